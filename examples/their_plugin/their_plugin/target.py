"""The target ``torch-export``: a ``.ptx`` folder a block.

It has a program a function (``FUNCTION.pt2``), the weights (``weights.safetensors``) and the ports (``ports.json``).
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors.torch import load_file, save_file

from their_plugin.attention_in_steps import ATTENTION_IN_STEPS
from toolchain.errors import LoweringError
from toolchain.ir.blocks import Block, Port
from toolchain.ir.leaves import LegalForm
from toolchain.ir.target import (
    Artifact,
    Engine,
    Target,
    TargetConfig,
    Template,
    UnboundTemplateError,
    distinct_functions,
    package_versions,
)

WEIGHTS, PORTS = "weights.safetensors", "ports.json"


class TorchExportConfig(TargetConfig):
    precision: Literal["float32"] = "float32"


class TorchExportTarget(Target):
    name = "torch-export"
    suffix = ".ptx"
    Config = TorchExportConfig

    @property
    def forms(self) -> tuple[LegalForm, ...]:
        return (ATTENTION_IN_STEPS,)

    def lower(self, block: Block, weights: Mapping[str, torch.Tensor], out: Path) -> Artifact:
        from their_plugin.programs import write_program

        out.mkdir()
        functions = distinct_functions(block)
        for function in functions:
            write_program(block, function, out / f"{function}.pt2")
        (out / PORTS).write_text(json.dumps(_ports(block), indent=1))
        _write_weights(weights, {n: w.shape for n, w in block.weights.items()}, out)
        return Artifact(out, functions)

    def bind(self, artifact: Artifact, weights: Mapping[str, torch.Tensor]) -> Template:
        """Programs have no weights, and the file of weights has them by name: it is simply left out."""
        stored = _read_weights(artifact.path)
        for name, weight in weights.items():
            if name not in stored or not torch.equal(stored[name], weight):
                raise UnboundTemplateError(f"weight '{name}' is not in '{WEIGHTS}'")
        (artifact.path / WEIGHTS).unlink()
        return Template(artifact, {name: list(weight.shape) for name, weight in weights.items()})

    def stamp(self, template: Template, weights: Mapping[str, torch.Tensor], out: Path) -> Artifact:
        shutil.copytree(template.artifact.path, out)
        _write_weights(weights, template.slots, out)
        return Artifact(out, template.artifact.functions)

    def check(self, path: Path, block: Block) -> None:
        where = f"block '{block.name}'"
        found, needed = {p.stem for p in path.glob("*.pt2")}, set(distinct_functions(block))
        if found != needed:
            raise LoweringError(f"{where}: artifact has functions {sorted(found)}, expected {sorted(needed)}")
        try:
            ports = json.loads((path / PORTS).read_text())
        except (OSError, ValueError) as e:
            raise LoweringError(f"{where}: '{PORTS}' cannot be read ({e}); lower the block again") from e
        if ports != _ports(block):
            raise LoweringError(f"{where}: the artifact has other ports than the block")
        shapes = {name: tuple(t.shape) for name, t in _read_weights(path).items()}
        if shapes != {name: w.shape for name, w in block.weights.items()}:
            raise LoweringError(f"{where}: the artifact has other weights than the block")
        from their_plugin.programs import read_program

        for function in needed:
            read_program(path / f"{function}.pt2")

    def engine(self, path: Path, inputs: Sequence[Port], outputs: Sequence[Port]) -> Engine:
        return TorchExportEngine(path, inputs, outputs)

    def versions(self) -> dict[str, str]:
        return package_versions("torch", "safetensors")


class TorchExportEngine:
    """An artifact, loaded; its programs are read at their first call."""

    def __init__(self, path: Path, inputs: Sequence[Port], outputs: Sequence[Port]) -> None:
        self._path, self._inputs, self._outputs = path, inputs, outputs
        self._weights = _read_weights(path)
        self._programs: dict[str, torch.nn.Module] = {}

    def __call__(self, function: str, inputs: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        from their_plugin.programs import read_program

        if function not in self._programs:
            self._programs[function] = read_program(self._path / f"{function}.pt2")
        try:
            with torch.no_grad():
                results = self._programs[function](self._weights, *(inputs[p.name] for p in self._inputs))
        except (RuntimeError, ValueError, KeyError, TypeError) as e:
            said = " ".join(str(e).split())[:200]
            raise LoweringError(f"'{self._path.name}', function '{function}': failed when run: {said}") from e
        return {p.name: r.clone() for p, r in zip(self._outputs, results, strict=True)}


def _ports(block: Block) -> dict[str, Any]:
    """The ports of each function, as JSON has them."""
    return {
        function: {
            side: [[p.name, list(p.shape), str(p.dtype)] for p in ports]
            for side, ports in (("inputs", signature.inputs), ("outputs", signature.outputs))
        }
        for function, signature in block.signatures.items()
    }


def _read_weights(path: Path) -> dict[str, torch.Tensor]:
    try:
        return load_file(path / WEIGHTS)
    except Exception as e:  # of several kinds, and of a package that is not ours
        raise LoweringError(f"'{path.name}/{WEIGHTS}' cannot be read: {e}; lower the block again") from e


def _write_weights(weights: Mapping[str, torch.Tensor], shapes: Mapping[str, Sequence[int]], out: Path) -> None:
    """Write the weights as float32, after looking at each.

    All of a block are in memory for that; ``targets.stamping`` has what writes them piece by piece.
    """
    stored = {}
    for name, shape in shapes.items():
        stored[name] = weights[name].float().reshape(tuple(shape)).contiguous().clone()
        if not torch.isfinite(stored[name]).all():
            raise LoweringError(f"weight '{name}' has numbers that are NaN or infinite; mend the checkpoint")
    save_file(stored, out / WEIGHTS)
