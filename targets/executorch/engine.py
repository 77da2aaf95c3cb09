"""Running an ExecuTorch program on this machine."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from executorch.runtime import Runtime, Verification

from targets.streams import quiet
from toolchain.errors import LoweringError
from toolchain.ir.blocks import Block, Port
from toolchain.ir.target import distinct_functions


class ExecuTorchEngine:
    """A loaded program; functions are loaded at their first call."""

    def __init__(self, path: Path, inputs: Sequence[Port], outputs: Sequence[Port]) -> None:
        self._path = path
        self._inputs, self._outputs = inputs, outputs
        try:
            with quiet():  # the runtime describes the CPU when it first starts
                self._program = Runtime.get().load_program(path, verification=Verification.Minimal)
        except RuntimeError as e:
            raise LoweringError(f"'{path.name}' is not a program that ExecuTorch can load: {e}") from e

    @property
    def functions(self) -> set[str]:
        return set(self._program.method_names)

    def __call__(self, function: str, inputs: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        with quiet() as said:  # the runtime describes the CPU at first, and failures only here
            try:
                method = self._program.load_method(function)
                results = method.execute([inputs[p.name].contiguous() for p in self._inputs])
            except RuntimeError as e:
                operator = re.search(r"in operator (\S+):\s", said())
                where = f", operator '{operator[1]}'" if operator else ""
                raise LoweringError(f"'{self._path.name}', function '{function}'{where}: failed when run: {e}") from e
        # the runtime reuses its buffers at the next call
        return {p.name: r.clone() for p, r in zip(self._outputs, results, strict=True)}


def check(path: Path, block: Block) -> None:
    """Hold the program's methods, and the shapes they take and give, against the block."""
    engine = ExecuTorchEngine(path, block.inputs, block.outputs)
    expected = set(distinct_functions(block))
    if engine.functions != expected:
        raise LoweringError(
            f"block '{block.name}': program has {sorted(engine.functions)}, expected {sorted(expected)}"
        )
    for function in expected:
        meta = engine._program.metadata(function)
        shapes = [tuple(meta.input_tensor_meta(i).sizes()) for i in range(meta.num_inputs())]
        shapes += [tuple(meta.output_tensor_meta(i).sizes()) for i in range(meta.num_outputs())]
        signature = block.signatures[function]
        if shapes != [p.shape for p in (*signature.inputs, *signature.outputs)]:
            raise LoweringError(f"block '{block.name}', function '{function}': program's shapes are {shapes}")
