"""What tests import by name: the golden model, checkpoints of it, models cut into blocks, their weights and inputs.

Fixtures are in conftest.py; there is more than one module of that name, so nothing is imported from them.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
import yaml
from safetensors.torch import save_file

from benchmarks import synthetic
from passes.guidance_split import GuidanceSplit
from passes.partition import Partition, PartitionConfig
from passes.token_merge import TokenMerge
from toolchain.formats.recipe import Recipe
from toolchain.ir.blocks import Block, Port, extract_blocks
from toolchain.ir.graph import capture
from toolchain.ir.leaves import LegalForm
from toolchain.ir.legalise import legalise
from toolchain.ir.passes import Pipeline
from toolchain.ir.storage import Plain
from toolchain.ir.stored import encoded
from toolchain.ir.weights import Weight
from toolchain.models.family import find_family
from toolchain.models.open_sora_v1_2.stdit3 import LoweredSTDiT3, STDiT3, STDiT3Config, position_scale
from toolchain.planning.pipelines import load_pipeline

GOLDEN = Path(__file__).parent / "golden"
FACTS: dict[str, Any] = json.loads((GOLDEN / "stdit3_rflow.json").read_text())


RECIPE: dict[str, Any] = {
    "version": 1,
    "name": "small",
    "model": "open-sora-v1.2",
    "video": {"frames": 17, "height": 32, "width": 48},
    "sampler": {"steps": 6, "leap": 3, "merged_steps": 2},
    "transformer": {"checkpoint": "checkpoint", "passes": ["token-merge", "partition"]},
    "target": "onnx",
}
"""One video of 5 latent frames, each of 2 × 3 patches."""
CHEAP = ("target=onnx", "gate.mode=none", "sampler.merged_steps=0", "transformer.passes=[partition]")
"""Changes with which it takes the least time: one function, which nothing executes."""


def write_checkpoint(folder: Path, config: Mapping[str, Any], weights: Mapping[str, torch.Tensor]) -> Path:
    """A checkpoint in the official layout."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config))
    save_file(dict(weights), folder / "model.safetensors")
    return folder


def write_project(folder: Path, one_pair: tuple[dict[str, Any], dict[str, torch.Tensor]]) -> Path:
    write_checkpoint(folder / "checkpoint", *one_pair)
    (folder / "recipe.yaml").write_text(yaml.safe_dump(RECIPE))
    return folder


def contents(folder: Path) -> dict[str, bytes | None]:
    """Everything under a folder: files with their bytes, folders and links with None."""
    found = sorted(folder.rglob("*"))
    return {p.relative_to(folder).as_posix(): p.read_bytes() if p.is_file() else None for p in found}


def edit_recipe(project: Path, **changes: Any) -> None:
    """Change keys of the project's recipe; ``__`` stands for the dot."""
    path = project / "recipe.yaml"
    data = yaml.safe_load(path.read_text())
    for key, value in changes.items():
        *parents, last = key.split("__")
        place = data
        for part in parents:
            place = place[part]
        place[last] = value
    path.write_text(yaml.safe_dump(data))


class Decoded(Mapping[str, torch.Tensor]):
    """The numbers that stored weights stand for, float32, by name; made when asked for.

    What is kept plainly is left as it is: rounding to float16 is not quantization.
    """

    def __init__(self, weights: Mapping[str, Weight], values: Mapping[str, torch.Tensor]) -> None:
        self._weights, self._values = weights, values

    def __getitem__(self, name: str) -> torch.Tensor:
        weight, value = self._weights[name], self._values[name]
        if isinstance(weight.storage, Plain):
            return value
        return weight.storage.decode(encoded(name, weight, self._values))

    def __iter__(self) -> Iterator[str]:
        return iter(self._weights)

    def __len__(self) -> int:
        return len(self._weights)


class Cut:
    """A model cut into blocks for one target, with activations and results of the eager model.

    ``functions`` are those to keep of what guidance-split gives, which is not asked without them.
    ``blocks`` have the target's legal forms, ``references`` are as captured; the two stand side by side.
    """

    def __init__(
        self,
        config: Mapping[str, Any],
        weights: Mapping[str, torch.Tensor],
        forms: tuple[LegalForm, ...],
        *,
        frames: int,
        conditions: bool = False,
        merged: bool = True,
        functions: tuple[str, ...] | None = None,
        height: int = 4,
        **partition: Any,
    ) -> None:
        model = STDiT3(STDiT3Config.from_json(config)).eval().requires_grad_(False)
        model.load_state_dict(weights)
        sizes = {"batch": 2, "frames": frames, "height": height, "width": 6, "height_px": 8 * height, "width_px": 48}
        with torch.device("meta"):
            graph = capture(LoweredSTDiT3(STDiT3(model.config), **sizes, frame_conditions=conditions))
        graph = TokenMerge()(graph) if merged else graph
        if functions is not None:
            graph = GuidanceSplit()(graph)
            graph = dataclasses.replace(graph, functions={name: graph.functions[name] for name in functions})
        cut = Partition(PartitionConfig.model_validate(partition))
        self._weights = weights
        self.references = extract_blocks(cut(graph))
        self.blocks = extract_blocks(cut(legalise(graph, forms)))
        scale = position_scale(model.config, 8 * height, 48)
        tables = {
            "pos_embed": model.pos_embed(hp=height // 2, wp=3, scale=scale),
            "rope": model.rope(frames=frames),
            "null_text": model.y_embedder.y_embedding,
        }
        generator = torch.Generator().manual_seed(0)
        inputs = {i.name: torch.randn(i.shape, generator=generator) for i in graph.inputs}
        inputs["timestep"] = torch.full((2,), 977.0)
        inputs["fps"] = torch.full((2,), 24.0)
        inputs["mask"] = (torch.arange(inputs["mask"].shape[1]) < 7).float().expand_as(inputs["mask"]).contiguous()
        if conditions:
            inputs["x_mask"] = (torch.arange(frames) > 0).float().expand(2, frames).contiguous()
        self._values = {f"inputs.{k}": v for k, v in inputs.items()} | {f"tables.{k}": v for k, v in tables.items()}
        for block in self.references:
            self._values |= {f"{block.name}.{k}": v for k, v in self.expected(block.name, "base").items()}

    def block(self, name: str) -> Block:
        return next(b for b in self.blocks if b.name == name)

    def weights(self, block: Block) -> dict[str, torch.Tensor]:
        return own_weights(block, self._weights)

    def inputs(self, name: str, function: str = "base") -> dict[str, torch.Tensor]:
        """A block's inputs, by port, as the blocks before it give them; the first of a function's smaller batch."""
        block = self.block(name)
        ports = block.signatures[function].inputs
        return {p.name: self._values[block.sources[p.name]][: p.shape[0]] for p in ports}

    def expected(self, name: str, function: str) -> dict[str, torch.Tensor]:
        """The eager results of a block's function, by port."""
        block = next(b for b in self.references if b.name == name)
        with torch.no_grad():
            results = block.module(function, self.weights(block))(*self.inputs(name, function).values())
        return {p.name: r for p, r in zip(block.outputs, results, strict=True)}


def official_weights(block: Block, expected: Mapping[str, tuple[int, ...]]) -> dict[str, torch.Tensor]:
    """Weights as a trained model's, by their official names, whose shapes are ``expected``."""
    generator = torch.Generator().manual_seed(0)
    names = sorted({n for w in block.weights.values() for n in w.source.tensors})
    return {n: synthetic.value(n, expected[n], generator) for n in names}


def own_weights(block: Block, weights: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Weights with official names, by the names of ``block``."""
    return {k: w.source.value(weights.__getitem__).contiguous() for k, w in block.weights.items()}


def sample(block: Block, function: str) -> dict[str, torch.Tensor]:
    """Random inputs of a block's function, by port; of a text, some tokens are masked."""
    generator = torch.Generator().manual_seed(1)
    return {p.name: _random(p, generator) for p in block.signatures[function].inputs}


def _random(port: Port, generator: torch.Generator) -> torch.Tensor:
    if port.name == "mask":
        return (torch.arange(port.shape[-1]) < 7).to(port.dtype).expand(port.shape).contiguous()
    if port.dtype.is_floating_point:
        return torch.randn(port.shape, generator=generator)
    return torch.randint(0, 30, port.shape, generator=generator, dtype=port.dtype)


def load_passes(recipe: Recipe, component: str) -> Pipeline:
    """A component's passes, as planning loads them."""
    return load_pipeline(recipe, component, find_family(recipe.model))


def degenerate(weights: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """A channel of zeros, one that is an outlier beside zeros, equal channels, and a bias of zeros."""
    changed = {name: value.clone() for name, value in weights.items()}
    for value in changed.values():
        if value.dim() == 1:
            value.zero_()
        else:
            value[0] = 0.0
            value[1] = 0.0
            value[1].view(-1)[3] = 1e4
            value[2] = value[3]
            value[4] = value[4].abs()
    return changed


def relative(found: Any, expected: torch.Tensor) -> float:
    """Norm of the difference over the norm of what is expected; ``found`` may be an array."""
    return float((torch.as_tensor(found) - expected).norm() / expected.norm())
