"""Faults put into a Core ML package: the gate catches each, and the explanation names the step.

A fault is an edit of the saved package, as a converter's mistake or a damaged weight would leave it.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from targets.coreml import CoreMLConfig, CoreMLTarget
from targets.coreml.schema import MODEL
from targets.coreml.stamp import WEIGHTS, Slot
from targets.executorch import ExecuTorchTarget
from targets.onnx import OnnxTarget
from targets.stamping import raw
from toolchain.accuracy.metrics import measure, require
from toolchain.accuracy.references import run_eager
from toolchain.accuracy.walk import explain
from toolchain.errors import AccuracyError
from toolchain.ir.dtypes import DTYPES
from toolchain.ir.target import Target, unique_weights

pytestmark = pytest.mark.slow

SPATIAL, TEMPORAL = "spatial_blocks.0", "temporal_blocks.0"


class Package:
    """A lowered pair that can be damaged: its weights by name, its operations by what they are called."""

    def __init__(self, path: Path, slots: list[Slot]) -> None:
        self.path, self.slots = path, {s.weight: s for s in slots}

    def read(self, name: str) -> torch.Tensor:
        slot = self.slots[name]
        data = bytearray((self.path / WEIGHTS).read_bytes())
        return torch.frombuffer(data, dtype=DTYPES[slot.dtype].torch, offset=slot.offset, count=slot.count).clone()

    def write(self, name: str, values: torch.Tensor) -> None:
        slot = self.slots[name]
        with (self.path / WEIGHTS).open("r+b") as f:
            f.seek(slot.offset)
            f.write(raw(values.to(DTYPES[slot.dtype].torch)))

    def scale(self, name: str, factor: float) -> None:
        self.write(name, self.read(name).float() * factor)

    def edit(self, change: Callable[[dict[str, Any], dict[str, Any]], None], function: str = "base") -> None:
        """Call ``change`` with a function's operations and constants, by the name of what they give."""
        import coremltools as ct

        spec = ct.utils.load_spec(str(self.path))
        own = spec.mlProgram.functions[function]
        operations = list(own.block_specializations[own.opset].operations)
        by_name = {o.outputs[0].name: o for o in operations if o.outputs}
        change(by_name, {n: o for n, o in by_name.items() if o.type == "const"})
        (self.path / MODEL).write_bytes(spec.SerializeToString(deterministic=True))


def find(operations: dict[str, Any], start: str, kind: str, number: int = 0) -> Any:
    """The operation of a step and a type, in order."""
    return [o for n, o in operations.items() if n.startswith(start) and o.type == kind][number]


def constant(operations: dict[str, Any], operation: Any, parameter: str) -> Any:
    """The tensor of the constant that an operation takes."""
    return operations[operation.inputs[parameter].arguments[0].name].attributes["val"].immediateValue.tensor


def set_half(tensor: Any, value: float) -> None:
    if tensor.WhichOneof("value") == "floats":
        tensor.floats.values[0] = value
    else:
        tensor.bytes.values = bytes(raw(torch.tensor([value], dtype=torch.float16)))


def swap(p: Package) -> None:
    first, second = f"{SPATIAL}.attn.proj.weight", f"{TEMPORAL}.attn.proj.weight"
    a, b = p.read(first), p.read(second)
    p.write(first, b)
    p.write(second, a)


def one_wrong_row(p: Package) -> None:
    weight = p.read(f"{SPATIAL}.mlp.fc1.weight")
    weight[64:128] = weight[:64] * 20
    p.write(f"{SPATIAL}.mlp.fc1.weight", weight)


def not_a_number(p: Package) -> None:
    weight = p.read(f"{TEMPORAL}.attn.qkv.weight")
    weight[7] = float("nan")
    p.write(f"{TEMPORAL}.attn.qkv.weight", weight)


def epsilon(p: Package) -> None:
    p.edit(lambda ops, _: set_half(constant(ops, find(ops, "spatial_blocks_0_norm2", "layer_norm"), "epsilon"), 0.5))


def mask_left_out(p: Package) -> None:
    def change(ops: dict[str, Any], _: Any) -> None:
        del find(ops, "temporal_blocks_0_cross_attn", "scaled_dot_product_attention").inputs["attn_mask"]

    p.edit(change)


def queries_for_keys(p: Package) -> None:
    def change(ops: dict[str, Any], _: Any) -> None:
        slices = [o for n, o in ops.items() if n.startswith("spatial_blocks_0_attn") and o.type == "slice_by_index"]
        query, key = slices[0], slices[1]
        for parameter in ("begin", "end", "begin_mask", "end_mask"):
            if parameter in query.inputs and parameter in key.inputs:
                query.inputs[parameter].arguments[0].name = key.inputs[parameter].arguments[0].name
            elif parameter in query.inputs:
                del query.inputs[parameter]

    p.edit(change)


def turned_backwards(p: Package) -> None:
    p.edit(lambda ops, _: setattr(find(ops, "temporal_blocks_0_attn", "sub"), "type", "add"))


def another_activation(p: Package) -> None:
    def change(ops: dict[str, Any], _: Any) -> None:
        gelu = find(ops, "spatial_blocks_0_mlp", "gelu")
        gelu.type = "relu"
        del gelu.inputs["mode"]

    p.edit(change)


def shift_without_scale(p: Package) -> None:
    def change(ops: dict[str, Any], _: Any) -> None:
        multiply = find(ops, "modulate_1", "mul")
        multiply.inputs["y"].arguments[0].name = multiply.inputs["x"].arguments[0].name

    p.edit(change)


def half_of_the_average(p: Package) -> None:
    def change(ops: dict[str, Any], _: Any) -> None:
        set_half(constant(ops, find(ops, "merge_frames_0", "mul"), "y"), 0.9)

    p.edit(change, "merged")


@dataclass(frozen=True)
class Fault:
    """What is done to a package, the step that is to blame, and why, in which of its functions."""

    damage: Callable[[Package], None]
    step: str
    cause: str = "wrong"
    function: str = "base"


FAULTS = {
    "a weight scaled": Fault(lambda p: p.scale(f"{SPATIAL}.attn.qkv.weight", 1.5), "spatial_blocks_0_attn_0"),
    "a bias scaled": Fault(lambda p: p.scale(f"{TEMPORAL}.cross_attn.proj.bias", 30), "temporal_blocks_0_cross_attn_0"),
    "a weight of zeros": Fault(lambda p: p.scale(f"{SPATIAL}.mlp.fc2.weight", 0), "spatial_blocks_0_mlp_0"),
    "two tensors swapped": Fault(swap, "spatial_blocks_0_attn_0"),
    "one row wrong": Fault(one_wrong_row, "spatial_blocks_0_mlp_0"),
    "a weight that is no number": Fault(not_a_number, "temporal_blocks_0_attn_0", "overflow"),
    "a modulation table negated": Fault(lambda p: p.scale(f"{TEMPORAL}.scale_shift_table", -1), "modulation_1[0]"),
    "a wrong epsilon": Fault(epsilon, "spatial_blocks_0_norm2_0"),
    "a missing mask": Fault(mask_left_out, "temporal_blocks_0_cross_attn_0"),
    "queries taken for keys": Fault(queries_for_keys, "spatial_blocks_0_attn_0"),
    "rotation the other way": Fault(turned_backwards, "temporal_blocks_0_attn_0"),
    "another activation": Fault(another_activation, "spatial_blocks_0_mlp_0"),
    "another operand": Fault(shift_without_scale, "modulate_1"),
    "overflow in float16": Fault(
        lambda p: p.scale(f"{SPATIAL}.mlp.fc1.bias", 1e7), "spatial_blocks_0_mlp_0", "overflow"
    ),
    "frames merged wrongly": Fault(half_of_the_average, "merge_frames_0", function="merged"),
}


@pytest.fixture(scope="module")
def healthy(cut_small: Any, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The target, the model cut into blocks, its lowered pair and where the pair's weights lie."""
    target = CoreMLTarget(CoreMLConfig(precision="float16"))
    cut = cut_small(target.forms, frames=5)
    block = cut.block("pair_0")
    folder = tmp_path_factory.mktemp("healthy")
    unique = unique_weights(block)
    template = target.bind(target.lower(block, unique, folder / "template.mlpackage"), unique)
    path = target.stamp(template, cut.weights(block), folder / "pair_0.mlpackage").path
    return target, cut, path, [Slot(**s) for s in template.slots if s["file"] == WEIGHTS.as_posix()]


HALF = "pair_0_temporal"
"""Half a pair lowers in half the time."""


def judge(target: Target, cut: Any, path: Path, function: str, name: str = "pair_0") -> tuple[str | None, Any]:
    """The gate's objection to an artifact's function, or None; and the explanation."""
    block = cut.block(name)
    plain = next(b for b in cut.references if b.name == name)
    case = run_eager(plain, function, cut.weights(plain), cut.inputs(name))
    engine = target.engine(path, block.inputs, block.outputs)
    limit = 2e-2 if target.precision == "float16" else 1e-3
    objection = None
    try:
        require(f"block '{name}', function '{function}'", measure(block, [function], engine, [case], limit)[function])
    except AccuracyError as e:
        objection = str(e)
    return objection, explain(block, cut.weights(block), case, engine, target, limit)


@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_is_caught_and_named(healthy: Any, name: str, tmp_path: Path) -> None:
    target, cut, path, slots = healthy
    fault = FAULTS[name]
    damaged = tmp_path / "pair_0.mlpackage"
    shutil.copytree(path, damaged)
    fault.damage(Package(damaged, slots))
    objection, found = judge(target, cut, damaged, fault.function)
    assert objection is not None and objection.startswith(
        f"block 'pair_0', function '{fault.function}': relative error"
    )
    assert (found.culprit, found.cause) == (fault.step, fault.cause), found.text()
    assert f"'{fault.step}' ({fault.cause})" in found.verdict
    assert found.operators[fault.step]
    if name == "frames merged wrongly":
        assert judge(target, cut, damaged, "base")[0] is None


@pytest.mark.parametrize("function", ["base", "merged"])
def test_a_healthy_package_has_no_culprit(healthy: Any, function: str) -> None:
    target, cut, path, _ = healthy
    objection, found = judge(target, cut, path, function)
    assert objection is None
    assert all(r.own is None or r.own < 2e-3 for r in found.rows), found.text()
    assert sum(r.own is not None for r in found.rows) > len(found.rows) * 0.8  # the trace is understood


@pytest.mark.parametrize("target", [ExecuTorchTarget(), OnnxTarget()], ids=lambda t: t.name)
def test_other_targets_show_every_step(target: Target, cut_small: Any, tmp_path: Path) -> None:
    cut = cut_small(target.forms, frames=5, max_bytes="300kB")
    block = cut.block(HALF)
    path = target.lower(block, cut.weights(block), tmp_path / f"{HALF}{target.suffix}").path
    # what cannot be traced is lowered again for every function
    for function in ("base", "merged") if target.name == "onnx" else ("merged",):
        objection, found = judge(target, cut, path, function, HALF)
        assert objection is None
        measured = [r for r in found.rows if r.own is not None]
        assert len(measured) > len(found.rows) * 0.8, found.text()
        assert all(r.own is not None and r.own < 1e-5 for r in measured), found.text()
