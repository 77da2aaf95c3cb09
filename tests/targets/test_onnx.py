"""ONNX models: made, stamped, read back and run."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from support import official_weights, own_weights, sample
from test_executorch import SingularValues, toy_block

import toolchain
from targets.onnx import OnnxTarget
from targets.onnx import weights as store
from toolchain.errors import LoweringError
from toolchain.ir.leaves import Leaf
from toolchain.ir.target import unique_weights

pytestmark = pytest.mark.slow

TARGET = OnnxTarget()
LIMIT = 5e-6
"""Float32 without any approximation of its own: a hundredth of what a wrong GELU would cost."""


def content(path: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in path.iterdir()}


def model(folder: Path, function: str = "base") -> onnx.ModelProto:
    return onnx.load(str(folder / f"{function}.onnx"), load_external_data=False)


def operators(folder: Path, function: str = "base") -> Counter[str]:
    return Counter(node.op_type for node in model(folder, function).graph.node)


# --- the transformer ---------------------------------------------------------------------------------

Lowered = tuple[Any, dict[str, Path]]


def lowered(cut: Any, folder: Path) -> Lowered:
    return cut, {b.name: TARGET.lower(b, cut.weights(b), folder / b.name).path for b in cut.blocks}


@pytest.fixture(scope="module")
def odd(cut_small: Any, tmp_path_factory: pytest.TempPathFactory) -> Lowered:
    """Five frames."""
    return lowered(cut_small(TARGET.forms, frames=5), tmp_path_factory.mktemp("odd"))


@pytest.fixture(scope="module")
def even(cut_small: Any, tmp_path_factory: pytest.TempPathFactory) -> Lowered:
    """Two frames, the first given as condition."""
    return lowered(cut_small(TARGET.forms, frames=2, conditions=True), tmp_path_factory.mktemp("even"))


@pytest.fixture(params=["odd", "even"])
def case(request: pytest.FixtureRequest) -> Lowered:
    found: Lowered = request.getfixturevalue(request.param)
    return found


def test_every_function_of_every_block(case: Lowered) -> None:
    cut, paths = case
    for block in cut.blocks:
        TARGET.check(paths[block.name], block)
        engine = TARGET.engine(paths[block.name], block.inputs, block.outputs)
        for function in ("base", "merged") if block.name.startswith("pair") else ("base",):
            results, expected = engine(function, cut.inputs(block.name)), cut.expected(block.name, function)
            assert results.keys() == expected.keys()
            for port, want in expected.items():
                assert results[port].shape == want.shape
                assert (results[port] - want).norm() <= LIMIT * want.norm(), f"{block.name}.{function}.{port}"


def test_files(case: Lowered) -> None:
    found = {name: sorted(p.name for p in path.iterdir()) for name, path in case[1].items()}
    assert found.pop("pair_0") == ["base.onnx", "merged.onnx", "weights.bin"]
    assert set(map(tuple, found.values())) == {("base.onnx", "weights.bin")}


def test_merged_is_not_base(odd: Lowered) -> None:
    cut, paths = odd
    engine = TARGET.engine(paths["pair_0"], cut.block("pair_0").inputs, cut.block("pair_0").outputs)
    base, merged = (engine(f, cut.inputs("pair_0"))["x_out"] for f in ("base", "merged"))
    assert (base - merged).norm() > 0.01 * base.norm()


def test_every_weight_lies_once_in_the_file_by_its_name(case: Lowered) -> None:
    cut, paths = case
    for block in cut.blocks:
        path = paths[block.name]
        stored = np.fromfile(path / store.FILE, np.uint8)
        named: set[str] = set()
        for file in path.glob("*.onnx"):
            outside = [t for t in model(path, file.stem).graph.initializer if t.external_data]
            named |= {t.name for t in outside}
            for tensor in outside:
                where = {e.key: e.value for e in tensor.external_data}
                assert where["location"] == "weights.bin"
                begin, size = int(where["offset"]), int(where["length"])
                assert begin % (4096 if size >= 4096 else 64) == 0
                values = stored[begin : begin + size].view(np.float32).reshape(tuple(tensor.dims))
                assert np.array_equal(values, cut.weights(block)[tensor.name].numpy())
        assert named == set(block.weights)
        assert len(stored) <= 4 * block.parameters + 4096 * len(named)


def test_models_hold_no_weights(case: Lowered) -> None:
    for name, path in case[1].items():
        for file in path.glob("*.onnx"):
            inside = [t for t in model(path, file.stem).graph.initializer if not t.external_data]
            assert sum(len(t.raw_data) for t in inside) <= 4096, name


def test_attention_norm_gelu_and_linear_are_one_operator_each(case: Lowered) -> None:
    for function in ("base", "merged"):
        found = operators(case[1]["pair_0"], function)
        assert found["Attention"] == found["RMSNormalization"] == found["LayerNormalization"] == 4
        assert found["Gelu"] == 2
        assert found["Gemm"] == 14
        assert not {"Softmax", "MatMul", "Tanh", "Shape", "Cast", "Identity"} & found.keys()


def test_no_weight_is_turned_over(case: Lowered) -> None:
    """A transposed weight would be copied whenever a block is loaded."""
    for path in case[1].values():
        graph = model(path).graph
        weights = {t.name for t in graph.initializer if t.external_data}
        assert not [n for n in graph.node if n.op_type == "Transpose" and weights & set(n.input)]


def test_nothing_tells_of_the_machine(case: Lowered) -> None:
    for path in case[1].values():
        for file in path.glob("*.onnx"):
            data = file.read_bytes()
            for trace in (b"/work", b".py", b"pkg.torch", os.fsencode(Path(torch.__file__).parent), b"2.13"):
                assert trace not in data


def test_values_are_named_after_the_steps_that_compute_them(odd: Lowered) -> None:
    steps = {name.partition("__")[0] for node in model(odd[1]["pair_0"]).graph.node for name in node.output}
    assert {"spatial_blocks_0_attn", "temporal_blocks_0_mlp", "spatial_blocks_0_cross_attn", "x_out"} <= steps


def test_simplifying_changes_the_form_alone(odd: Lowered) -> None:
    from targets.onnx import lower as stages

    exported = stages.symbolic(odd[0].block("pair_0"), "base")
    before = sum(n.op_type != "Constant" for n in exported.graph.node)
    after = sum(n.op_type != "Constant" for n in model(odd[1]["pair_0"]).graph.node)
    assert after < before / 2


# --- the text encoder and the video autoencoder ------------------------------------------------------


@pytest.fixture(scope="module")
def whole() -> Any:
    """The plan of the miniature, encoder included."""
    sets = ["target=onnx", "vae.encoder=true", "video.frames=22", "video.height=40", "video.width=48"]
    return toolchain.plan(toolchain.load_recipe("tiny", sets))


@pytest.mark.parametrize("component", ["text_encoder", "vae"])
def test_every_structure(whole: Any, tmp_path: Path, component: str) -> None:
    lowering = whole.components[component]
    expected = lowering.definition.expected
    kinds = {p.lowered.structure(): (p.lowered, p.plain) for p in lowering.pairs}
    for block, plain in kinds.values():
        weights = official_weights(block, expected)
        artifact = TARGET.lower(block, own_weights(block, weights), tmp_path / block.name)
        TARGET.check(artifact.path, block)
        engine = TARGET.engine(artifact.path, block.inputs, block.outputs)
        for function in artifact.functions:
            inputs = sample(block, function)
            with torch.no_grad():
                wanted = plain.module(function, own_weights(plain, weights))(*inputs.values())
            results = engine(function, inputs)
            for port, want in zip(plain.outputs, wanted, strict=True):
                error = (results[port.name] - want).norm() / want.norm()
                assert error <= LIMIT, f"{block.name}.{function}.{port.name}"


def test_the_autoencoder_has_a_shorter_tail(whole: Any) -> None:
    functions = {f for b in whole.components["vae"].blocks for f in b.functions}
    assert functions == {"base", "tail"}


def test_token_ids_are_int32(whole: Any, tmp_path: Path) -> None:
    block = whole.components["text_encoder"].blocks[0]
    TARGET.lower(block, unique_weights(block), tmp_path / "embed")
    (ids,) = (i for i in model(tmp_path / "embed").graph.input if i.name == "input_ids")
    assert ids.type.tensor_type.elem_type == onnx.TensorProto.INT32


# --- the same bytes ----------------------------------------------------------------------------------


LOWER = """
import sys
sys.path[:0] = {path!r}
from pathlib import Path
import toolchain
from targets.onnx import OnnxTarget
from toolchain.ir.target import unique_weights
plan = toolchain.plan(toolchain.load_recipe("tiny", ["target=onnx"]))
block = next(b for b in plan.components["vae"].blocks if b.name == "temporal_0_8")
OnnxTarget().lower(block, unique_weights(block), Path(sys.argv[1]) / block.name)
"""


def test_bytes_are_the_same_in_other_processes(tmp_path: Path) -> None:
    """Of convolutions; whole builds of the transformer are compared in tests/test_builds.py."""
    folders = {seed: tmp_path / f"with-seed-{seed}" for seed in ("1", "22")}
    running = []
    for seed, folder in folders.items():
        folder.mkdir()
        args = [sys.executable, "-c", LOWER.format(path=sys.path), str(folder)]
        running.append(subprocess.Popen(args, env={**os.environ, "PYTHONHASHSEED": seed}, stderr=subprocess.DEVNULL))
    assert [p.wait(timeout=300) for p in running] == [0, 0]
    first, second = ({p.name: content(p) for p in folder.iterdir()} for folder in folders.values())
    assert sorted(first) == ["temporal_0_8"]
    assert first == second


# --- every operator's value --------------------------------------------------------------------------


@pytest.mark.parametrize("most", [1 << 30, 200_000], ids=["at once", "in groups"])
def test_trace(odd: Lowered, monkeypatch: pytest.MonkeyPatch, most: int) -> None:
    monkeypatch.setattr("targets.onnx.engine.TRACED_BYTES", most)
    cut, paths = odd
    engine = TARGET.engine(paths["pair_0"], cut.block("pair_0").inputs, cut.block("pair_0").outputs)
    inputs = cut.inputs("pair_0")
    for function in ("base", "merged"):
        nodes = list(model(paths["pair_0"], function).graph.node)
        values = list(engine.trace(function, inputs))
        assert [(v.name, v.op) for v in values] == [(n.output[0], n.op_type) for n in nodes]
        assert [list(v.inputs) for v in values] == [list(n.input) for n in nodes]
        by_name = {v.name: v for v in values}
        assert torch.allclose(by_name["x_out"].value, engine(function, inputs)["x_out"], rtol=1e-5, atol=1e-5)
        gelu = next(v for v in values if v.op == "Gelu")
        assert gelu.dtype == "float32"
        before = by_name[gelu.inputs[0]].value
        assert torch.allclose(gelu.value, torch.nn.functional.gelu(before, approximate="tanh"), atol=1e-6)


# --- what is refused ---------------------------------------------------------------------------------


def test_an_operator_without_a_translation_names_block_function_and_operator(tmp_path: Path) -> None:
    with pytest.raises(LoweringError, match=r"block 'toy', function 'base': ONNX cannot express it: .*svd") as e:
        TARGET.lower(toy_block(SingularValues(), 3, 3), {}, tmp_path / "toy")
    assert "\n" not in str(e.value)
    assert list(tmp_path.iterdir()) == []


def test_check_finds_a_missing_function(odd: Lowered, cut_small: Any) -> None:
    plain = cut_small(TARGET.forms, merged=False).block("pair_0")
    with pytest.raises(
        LoweringError, match=r"block 'pair_0': folder has functions \['base', 'merged'\], expected \['b"
    ):
        TARGET.check(odd[1]["pair_0"], plain)


def test_check_finds_another_shape(odd: Lowered, cut_small: Any) -> None:
    taller = cut_small(TARGET.forms, height=6).block("final")
    with pytest.raises(LoweringError, match=r"'final', function 'base': inputs are .*\(2, 30, 64\).* expected .*45"):
        TARGET.check(odd[1]["final"], taller)


def test_check_finds_another_block(odd: Lowered) -> None:
    with pytest.raises(LoweringError, match=r"'final/weights\.bin' has .* bytes, expected"):
        TARGET.check(odd[1]["final"], odd[0].block("caption"))


@pytest.fixture
def copied(odd: Lowered, tmp_path: Path) -> tuple[Any, Path]:
    """A copy of the last block, to be damaged."""
    return odd[0].block("final"), Path(shutil.copytree(odd[1]["final"], tmp_path / "final"))


def damage(folder: Path, how: str) -> None:
    file = folder / ("weights.bin" if "weights" in how else "base.onnx")
    if how.startswith("no "):
        file.unlink()
    elif how.startswith("short "):
        file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    elif how.startswith("empty "):
        file.write_bytes(b"")
    else:
        file.write_bytes(b"not a model")


@pytest.mark.parametrize("how", ["short model", "empty model", "other model"])
def test_a_damaged_model_is_found(copied: tuple[Any, Path], how: str) -> None:
    block, folder = copied
    damage(folder, how)
    with pytest.raises(LoweringError, match=r"'final/base\.onnx' is not a model that can be read back|inputs are \[\]"):
        TARGET.check(folder, block)
    with pytest.raises(LoweringError, match=r"'final', function 'base'.*: cannot be loaded; "):
        TARGET.engine(folder, block.inputs, block.outputs)("base", sample(block, "base"))


@pytest.mark.parametrize("how", ["no weights", "short weights", "empty weights"])
def test_damaged_weights_are_found(copied: tuple[Any, Path], how: str) -> None:
    block, folder = copied
    damage(folder, how)
    with pytest.raises(LoweringError, match=r"'final/weights\.bin' (is missing|has \d+ bytes, expected \d+); lower"):
        TARGET.check(folder, block)
    with pytest.raises(
        LoweringError, match=r"'final', function 'base'.*: cannot be loaded; .*External (init|data)"
    ) as e:
        TARGET.engine(folder, block.inputs, block.outputs)("base", sample(block, "base"))
    assert "\n" not in str(e.value)


def test_an_input_of_another_shape_is_refused(odd: Lowered) -> None:
    block = odd[0].block("final")
    inputs = sample(block, "base")
    inputs["x"] = inputs["x"][:, :-1]
    with pytest.raises(LoweringError, match=r"'final', function 'base'.*: failed when run: .*x"):
        TARGET.engine(odd[1]["final"], block.inputs, block.outputs)("base", inputs)


def test_an_unknown_function_is_refused(odd: Lowered) -> None:
    block = odd[0].block("final")
    with pytest.raises(LoweringError, match=r"'final', function 'merged'.*: cannot be loaded"):
        TARGET.engine(odd[1]["final"], block.inputs, block.outputs)("merged", sample(block, "base"))


def test_an_operator_that_fails_when_run_is_named(whole: Any, tmp_path: Path) -> None:
    block = whole.components["text_encoder"].blocks[0]
    artifact = TARGET.lower(block, unique_weights(block), tmp_path / "embed")
    inputs = sample(block, "base")
    inputs["input_ids"] = inputs["input_ids"] + 1_000_000
    with pytest.raises(LoweringError, match=r"'embed', function 'base', operator 'Gather' \(.+\): failed when run: "):
        TARGET.engine(artifact.path, block.inputs, block.outputs)("base", inputs)


# --- size --------------------------------------------------------------------------------------------

WIDE = 23200
"""Its square of float32 is more than 2 GiB, beyond which no protobuf message can be."""


class Wide(Leaf):
    def __init__(self) -> None:
        super().__init__()
        self.linear = torch.nn.Linear(WIDE, WIDE, device="meta")

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.linear(x)
        return out


def test_more_than_two_gigabytes(tmp_path: Path) -> None:
    """Such a block is lowered, bound and stamped with other weights, and computes with these."""
    block = toy_block(Wide(), 2, WIDE)
    matrix, bias = torch.zeros(WIDE, WIDE), torch.ones(WIDE)
    matrix.diagonal()[:] = torch.arange(WIDE)
    weights = {"leaf.linear.weight": matrix, "leaf.linear.bias": bias}
    template = TARGET.bind(TARGET.lower(block, weights, tmp_path / "template"), weights)
    matrix.diagonal()[:] = torch.arange(WIDE).flip(0)
    stamped = TARGET.stamp(template, weights | {"leaf.linear.bias": bias + 1}, tmp_path / "wide")
    assert (stamped.path / store.FILE).stat().st_size > 2**31
    TARGET.check(stamped.path, block)
    x = torch.stack((torch.ones(WIDE), torch.arange(WIDE) % 7.0))
    (result,) = TARGET.engine(stamped.path, block.inputs, block.outputs)("base", {"x": x}).values()
    assert torch.equal(result, x * torch.arange(WIDE).flip(0) + 2)
