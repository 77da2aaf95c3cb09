"""What is stamped is what lowering gives, and degenerate weights change neither structure nor numbers."""

from __future__ import annotations

import functools
import hashlib
import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from support import official_weights, own_weights, sample

import toolchain
from toolchain.accuracy.metrics import compare, measure, require, scaled
from toolchain.accuracy.references import run_eager
from toolchain.ir.blocks import Block
from toolchain.ir.graph import compute_nodes, leaf_of
from toolchain.ir.target import Artifact, Target, Template, unique_weights
from toolchain.planning.plan import Plan
from toolchain.system.store import digest

pytestmark = pytest.mark.slow

SETTINGS = (
    "video.frames=17",
    "video.height=16",
    "video.width=16",
    "vae.encoder=true",
    "vae.passes=[{partition: {layers_per_block: 4}}]",
)
PRECISIONS = {
    "executorch": "float32",
    "onnx": "float32",
    "coreml-float16": "float16",
    "coreml-float32": "float32",
}
BLOCKS = (
    "text_encoder/embed",
    "text_encoder/layer_0",
    "text_encoder/final",
    "transformer/caption",
    "transformer/embed",
    "transformer/pair_0",
    "transformer/final",
    "vae/temporal_0_3",
    "vae/temporal_8",
    "vae/temporal_encoder_8",
    "vae/spatial_00_03",
    "vae/spatial_12_15",
)
"""Of the text encoder and the transformer one block of each structure; of the autoencoder every kind of layer."""
IN_FLOAT32 = ("text_encoder/layer_0", "transformer/pair_0", "vae/spatial_12_15")
"""Blocks that Core ML is also given in float32: between its precisions nothing but the type of weights differs."""
LOWERED_AGAIN = ("text_encoder/layer_0", "transformer/caption", "vae/spatial_12_15")
"""Blocks that are also lowered with degenerate weights, to be compared with what is stamped."""
SIMPLIFIED_WITHOUT_WEIGHTS = ("onnx",)
"""Targets whose lowering does not look at weights: degenerate ones change no byte beside them."""
LIMITS = {"float32": 1e-4, "float16": 5e-3}
WEIGHTS_FILE = {"executorch": ".", "onnx": "weights.bin"}
"""Where weights lie when the slots do not say it."""
KEY_BYTES = 64


@functools.cache
def plan(name: str) -> Plan:
    """The miniature for a target."""
    sets = [f"target={name.partition('-')[0]}", *SETTINGS]
    if "-" in name:
        sets.insert(1, f"target.precision={PRECISIONS[name]}")
    return toolchain.plan(toolchain.load_recipe("tiny", sets))


@dataclass(frozen=True)
class Case:
    """A template, the block it was made of, as lowered and as captured, and weights by their official names."""

    target: Target
    block: Block
    plain: Block
    template: Template
    trained: Mapping[str, torch.Tensor]
    folder: Path

    @property
    def degenerate(self) -> dict[str, torch.Tensor]:
        """Zeros, ones and equal tensors, which tools like to simplify."""
        result = {}
        first: dict[torch.Size, torch.Tensor] = {}
        for name, tensor in self.trained.items():
            if name.endswith("bias"):
                result[name] = torch.zeros_like(tensor)
            elif "norm" in name:
                result[name] = torch.ones_like(tensor)
            else:
                result[name] = first.setdefault(tensor.shape, tensor).clone()
        return result

    def out(self, name: str) -> Path:
        return self.folder / f"{name}{self.target.suffix}"

    def lower(self, weights: Mapping[str, torch.Tensor], name: str) -> Artifact:
        return self.target.lower(self.block, own_weights(self.block, weights), self.out(name))

    def stamp(self, weights: Mapping[str, torch.Tensor], name: str) -> Artifact:
        return self.target.stamp(self.template, own_weights(self.block, weights), self.out(name))


@pytest.fixture(scope="module")
def cases(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, str], Case]:
    """The case of a target and a block; each template is lowered once."""

    @functools.cache
    def make(name: str, block_name: str) -> Case:
        component, _, own = block_name.partition("/")
        part = plan(name).components[component]
        pair = next(p for p in part.pairs if p.name == own)
        block, plain = pair.lowered, pair.plain
        target, folder = part.target, tmp_path_factory.mktemp("case")
        unique = unique_weights(block, seed=3)
        template = target.bind(target.lower(block, unique, folder / f"template{target.suffix}"), unique)
        return Case(target, block, plain, template, official_weights(block, part.definition.expected), folder)

    return make


@pytest.fixture(params=[f"{t}/{b}" for t in PRECISIONS for b in (IN_FLOAT32 if t == "coreml-float32" else BLOCKS)])
def case(request: pytest.FixtureRequest, cases: Callable[[str, str], Case]) -> Case:
    return cases(*request.param.split("/", 1))


def files(path: Path) -> dict[str, bytes]:
    found = [p for p in path.rglob("*") if p.is_file()] if path.is_dir() else [path]
    return {str(p.relative_to(path)): p.read_bytes() for p in found}


def digests(contents: Mapping[str, bytes | bytearray]) -> dict[str, str]:
    return {name: hashlib.sha256(content).hexdigest() for name, content in contents.items()}


def written(case: Case) -> Iterator[tuple[str, int, int]]:
    """File, offset and size of everything that stamping writes, keys of weights included."""
    for slot in case.template.slots:
        file = slot["file"] if "file" in slot else WEIGHTS_FILE[case.target.name]
        yield file, slot["offset"], slot["size"] if "size" in slot else slot["count"] * _itemsize(slot["dtype"])
        for key in slot.get("keys", ()):
            yield file, key, KEY_BYTES


def _itemsize(dtype: str) -> int:
    return torch.empty(0, dtype=getattr(torch, dtype)).itemsize


def structure(case: Case, path: Path) -> dict[str, str]:
    """Digests of an artifact's files with all weights blanked out."""
    contents = {name: bytearray(content) for name, content in files(path).items()}
    for file, offset, size in written(case):
        assert offset + size <= len(contents[file])
        contents[file][offset : offset + size] = bytes(size)
    return digests(contents)


def steps(block: Block) -> set[str]:
    """The kinds of leaves and operators in a block."""
    return {
        type(leaf).__name__ if (leaf := leaf_of(gm, node)) else str(node.target)
        for gm in block.functions.values()
        for node in compute_nodes(gm)
    }


@pytest.mark.parametrize("name", PRECISIONS)
def test_every_kind_of_block_is_stamped_here(name: str) -> None:
    for component, part in plan(name).components.items():
        here = [b for b in part.blocks if f"{component}/{b.name}" in BLOCKS]
        if component == "vae":
            decoder = [b for b in part.blocks if "encoder" not in b.name]
            assert set().union(*map(steps, decoder)) <= set().union(*map(steps, here))
        else:
            assert sorted({b.structure() for b in part.blocks}) == sorted(b.structure() for b in here)


def test_stamped_is_direct_byte_for_byte(case: Case) -> None:
    direct, stamped = case.lower(case.trained, "direct"), case.stamp(case.trained, "stamped")
    functions = ("base", "merged") if case.block.name == "pair_0" else ("base",)
    assert stamped.functions == direct.functions == case.template.artifact.functions == functions
    assert digests(files(stamped.path)) == digests(files(direct.path))
    assert all(digest(path) == sha256 for path, sha256 in stamped.digests.items())


def test_templates_hold_no_weights(case: Case) -> None:
    """What is left is smaller by every weight, and its slots are plain data."""
    sizes = [
        sum(map(len, files(p).values())) for p in (case.stamp(case.trained, "whole").path, case.template.artifact.path)
    ]
    assert sizes[0] - sizes[1] >= case.block.parameters * (2 if case.target.precision == "float16" else 4)
    assert json.loads(json.dumps(case.template.slots)) == case.template.slots


def test_degenerate_weights_keep_structure_and_numbers(case: Case) -> None:
    target, block, functions = case.target, case.block, case.template.artifact.functions
    path = case.stamp(case.degenerate, "degenerate").path
    assert structure(case, path) == structure(case, case.stamp(case.trained, "first").path)
    target.check(path, block)
    limit, weights = LIMITS[target.precision], own_weights(case.plain, case.degenerate)
    eager = [run_eager(case.plain, f, weights, sample(case.plain, f)) for f in functions]
    engine = target.engine(path, block.inputs, block.outputs)
    for function, accuracy in measure(block, functions, engine, eager, limit).items():
        require(f"{function}, against PyTorch", accuracy)
    if f"{block.component}/{block.name}" in LOWERED_AGAIN:
        direct = case.lower(case.degenerate, "degenerate-direct")
        lowered = target.engine(direct.path, block.inputs, block.outputs)
        for run in eager:
            inputs = scaled(run.inputs, block.inputs)
            accuracy = compare(engine(run.function, inputs), lowered(run.function, inputs), limit)
            require(f"{run.function}, against what is lowered", accuracy)
        if target.name in SIMPLIFIED_WITHOUT_WEIGHTS:
            assert digests(files(path)) == digests(files(direct.path))
