"""What each mode of the gate finds, and what it does not: faults put into a target, one after the other.

The target computes blocks in PyTorch, so nothing is lowered, and nothing is wrong but what a fault makes so.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from entry_points import registered
from fake_target import FakeTarget
from support import RECIPE, write_checkpoint

import toolchain
from toolchain.accuracy.verify import verify
from toolchain.errors import AccuracyError, LoweringError
from toolchain.formats.bundle import Bundle
from toolchain.formats.recipe import Recipe
from toolchain.ir.blocks import Port
from toolchain.ir.target import Artifact, Engine, Template, UnboundTemplateError
from toolchain.plugins import TARGETS
from toolchain.system.store import Store

MODES = ("release", "every", "structure")
BOTH = ("base", "merged")
FIRST = ("caption", "embed", "pair_0", "final")
"""Blocks of different structures; ``pair_1`` is one of ``pair_0``'s."""


@dataclass(frozen=True)
class Fault:
    """What a function gives is ``factor`` times as much: in one block or in all, from its first call or a later one."""

    function: str
    block: str = ""
    after_calls: int = 0
    factor: float = 1.1
    found: Sequence[str] = ()
    """By which modes."""


FAULTS = {
    "a program computes something else": Fault("base", found=("release", "every", "structure")),
    "so does its second function": Fault("merged", found=("release", "every", "structure")),
    "it depends on the input": Fault("base", after_calls=1, found=("release", "every")),
    "one artifact of many is wrong": Fault("base", "pair_1", found=("release", "every")),
    "numbers overflow in one of many": Fault("base", "pair_1", factor=math.inf, found=("release", "every")),
    "a second function is wrong in one of many": Fault("merged", "pair_1", found=("release",)),
    "one of many depends on the input": Fault("base", "pair_1", after_calls=1, found=("release",)),
}


class Faulty(FakeTarget):
    """Notes what is executed, and puts a fault into it. It knows blocks by a weight that each has of its own."""

    name = "faulty"
    names: ClassVar[Mapping[str, torch.Tensor]] = {}
    fault: ClassVar[Fault | None] = None
    executed: ClassVar[list[tuple[str, str]]] = []
    can_bind: ClassVar[bool] = True

    def bind(self, artifact: Artifact, weights: Mapping[str, torch.Tensor]) -> Template:
        if not self.can_bind:
            raise UnboundTemplateError("no reason")
        return super().bind(artifact, weights)

    def engine(self, path: Path, inputs: Sequence[Port], outputs: Sequence[Port]) -> Engine:
        engine = super().engine(path, inputs, outputs)
        held = [w for w in self.read(path)[1].values() if w.dim() == 2]
        name = next((n for n, own in self.names.items() if any(torch.equal(own, w) for w in held)), "")
        calls: list[str] = []

        def call(function: str, values: Mapping[str, torch.Tensor]) -> Mapping[str, torch.Tensor]:
            results, fault = engine(function, values), self.fault
            type(self).executed.append((name, function))
            calls.append(function)
            if fault is None or function != fault.function or fault.block not in ("", name):
                return results
            if calls.count(function) <= fault.after_calls:
                return results
            return {k: v * fault.factor for k, v in results.items()}

        return call


@pytest.fixture(scope="module")
def project(small_weights: Any, facts: Any, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A checkpoint of two pairs, and a store with its artifacts."""
    folder = tmp_path_factory.mktemp("modes")
    write_checkpoint(folder / "checkpoint", facts["config"], small_weights)
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(
            str(registered(folder / "site", "faulty", {TARGETS: {"faulty": "test_gate_modes:Faulty"}}))
        )
        names = {f"pair_{k}": small_weights[f"spatial_blocks.{k}.scale_shift_table"] for k in range(2)}
        patch.setattr(Faulty, "names", names)
        yield folder


@pytest.fixture
def build(project: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Builds with a mode of the gate and a fault; ``executed`` is emptied before."""

    def compile_(mode: str, fault: Fault | None = None, **options: Any) -> Bundle:
        monkeypatch.setattr(Faulty, "fault", fault)
        monkeypatch.setattr(Faulty, "executed", [])
        recipe = Recipe.model_validate(RECIPE | {"target": "faulty", "gate": {"mode": mode}})
        store = Store(tmp_path / f"store-{len(list(tmp_path.iterdir()))}")
        return toolchain.compile_recipe(recipe, tmp_path / mode, base=project, store=store, **options)

    return compile_


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", FAULTS)
def test_which_mode_finds_which_fault(build: Any, name: str, mode: str) -> None:
    fault = FAULTS[name]
    if mode not in fault.found:
        assert build(mode, fault).manifest.gate.mode == mode
        return
    where = f"block '{fault.block or '.*'}', function '{fault.function}': relative error"
    with pytest.raises(AccuracyError, match=where):
        build(mode, fault)


@pytest.mark.parametrize(
    ("mode", "calls"),
    [
        ("release", {("pair_0", f): 2 for f in BOTH} | {("pair_1", f): 2 for f in BOTH}),
        ("every", {("pair_0", f): 2 for f in BOTH} | {("pair_1", "base"): 1}),
        ("structure", {("pair_0", f): 1 for f in BOTH}),
        ("none", {}),
    ],
)
def test_what_each_mode_executes(build: Any, mode: str, calls: dict[tuple[str, str], int]) -> None:
    made = build(mode).manifest
    pairs = [e for e in Faulty.executed if e[0]]
    assert {e: pairs.count(e) for e in pairs} == calls
    blocks = {b.name: b for b in made.components["transformer"].blocks}
    shown = {(name, f) for name in ("pair_0", "pair_1") for f in blocks[name].accuracy or {}}
    assert shown == (set() if mode == "structure" else set(calls))
    assert all((blocks[name].goldens is None) == (mode in ("structure", "none")) for name in blocks)
    assert made.gate.inputs == {"release": 2, "every": 2, "structure": 1, "none": 0}[mode]


@pytest.mark.parametrize("mode", ["release", "every"])
def test_a_bundle_is_verified_on_what_it_has(build: Any, mode: str) -> None:
    bundle = build(mode)
    found = verify(bundle)
    assert not found.failed
    assert not found.unchecked
    have = {(b.name, f) for b in bundle.manifest.components["transformer"].blocks for f in b.accuracy}
    assert {(c.block, c.function) for c in found.checks} == have
    assert (("pair_1", "merged") in have) == (mode == "release")


def test_figures_are_those_of_release(build: Any) -> None:
    """What both execute, both measure alike: a block's activations do not depend on what others are left out of."""
    release, every = (
        {b.name: b for b in build(mode).manifest.components["transformer"].blocks} for mode in ("release", "every")
    )
    assert {n: every[n].accuracy for n in FIRST} == {n: release[n].accuracy for n in FIRST}
    assert every["pair_1"].activations["base"].high <= release["pair_1"].activations["base"].high


def test_blocks_that_are_lowered_one_by_one(build: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """None stands for another then: each is executed on everything, and gate ``structure`` refuses."""
    monkeypatch.setattr(Faulty, "can_bind", False)
    build("every")
    assert Faulty.executed.count(("pair_1", "merged")) == 2
    with pytest.raises(LoweringError, match=r"block 'pair_1' cannot be stamped \(no reason\).*use gate 'every'"):
        build("structure")
    build("every", direct=True)
    assert Faulty.executed.count(("pair_1", "merged")) == 2
