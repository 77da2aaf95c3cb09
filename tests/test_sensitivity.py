"""What is expected of storing a weight in few bits, held against what it does; and where it is remembered."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch

from toolchain.accuracy.sensitivity import random_direction, squared_errors
from toolchain.build.measured import measure_choice
from toolchain.build.sweep import KIND, Sweep
from toolchain.build.sweep_tasks import run_sweeps
from toolchain.build.tasks import builders
from toolchain.formats.recipe import Recipe
from toolchain.formats.recipe_file import load_recipe
from toolchain.listener import Listener
from toolchain.planning.candidates import read_candidates, rules, with_rules
from toolchain.planning.plan import Plan, plan_resolved
from toolchain.planning.resolve import resolve
from toolchain.system.store import Store

pytestmark = pytest.mark.slow

WAYS = read_candidates("float int8 int4{block=16 symmetric=false} palette{bits=3}", "candidates")


def plain_plan(project: Path, target: str) -> tuple[Recipe, Plan]:
    recipe = load_recipe(project / "recipe.yaml", [f"target={target}"])
    return recipe, plan_resolved(resolve(recipe, project, checkpoints=True))


def sweep(planned: Plan, store: Store) -> Sweep:
    return Sweep(builders(planned, store, direct=False)["transformer"], planned, WAYS)


def sweeps(store: Store) -> int:
    return sum(entry.kind == KIND for entry in store.entries())


def test_directions_measure_a_relative_error() -> None:
    result = torch.randn(40, 50)
    error = torch.randn(40, 50) * 0.1
    drawn = (random_direction({"out": result}, seed) for seed in range(400))
    found = [float((d["out"] * error).sum()) ** 2 for d in drawn]
    truth = float(error.square().sum() / result.square().sum())
    assert sum(found) / len(found) == pytest.approx(truth, rel=0.25)  # 400 samples: 7 % is one deviation


def test_directions_do_not_resemble_the_inputs() -> None:
    # a denoiser's output resembles the noise that it is given, which is drawn from seeds such as these
    noise = torch.randn(4096, generator=torch.Generator().manual_seed(1000))
    direction = random_direction({"out": torch.ones(4096)}, 1000)
    assert abs(float(torch.corrcoef(torch.stack([noise, direction["out"]]))[0, 1])) < 0.1


def test_rows_are_taken_for_independent() -> None:
    gradient, exact = torch.tensor([[1.0, 2.0], [0.0, 3.0]]), torch.zeros(2, 2)
    stored = torch.tensor([[1.0, -1.0], [5.0, 1.0]])
    assert squared_errors([gradient], exact, [lambda: stored, None]) == [1.0 + 9.0, None]


def test_what_is_expected_is_what_happens(project: Path, tmp_path: Path) -> None:
    recipe, planned = plain_plan(project, "coreml")
    found = sweep(planned, Store(tmp_path / "store"))
    errors = found.errors()
    assert all(own[0] == 0.0 for own in errors)
    ratios = []
    for i, item in enumerate(found.items):
        if "mlp.fc2" not in item.address and "qkv" not in item.address:
            continue
        chosen = [WAYS[3] if j == i else WAYS[0] for j in range(len(found.items))]
        options = rules(zip(found.items, chosen, strict=True))
        with_it = with_rules(recipe, {"transformer": options})
        again = plan_resolved(resolve(with_it, project, checkpoints=True))
        truth = measure_choice(builders(again, Store(tmp_path / "store"), direct=False)["transformer"], again).error
        expected = errors[i][3]
        assert expected is not None
        ratios.append(10 * math.log10(expected / truth))
    assert len(ratios) >= 4
    assert max(map(abs, ratios)) < 4.0
    assert abs(sum(ratios) / len(ratios)) < 1.5


def test_a_sweep_that_was_stopped_goes_on(project: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe, planned = plain_plan(project, "onnx")
    store = Store(tmp_path / "store")
    stopped = sweep(planned, store)
    ran: list[str] = []
    real = Sweep.measure

    def measure(self: Sweep, graph: int, block: str) -> None:
        if len(ran) == 1:
            raise KeyboardInterrupt
        ran.append(block)
        real(self, graph, block)

    arguments: tuple[Any, ...] = (recipe, project, WAYS, store, Listener(), 1, None)
    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(Sweep, "measure", measure)
        run_sweeps({"transformer": stopped}, *arguments)
    again = sweep(planned, store)
    assert [again.known(g, b) for g, b in again.blocks].count(True) == 1
    run_sweeps({"transformer": again}, *arguments)
    entries = sweeps(store)
    whole = sweep(planned, Store(tmp_path / "other")).errors()
    assert again.errors() == whole  # the same to the last bit
    assert sweeps(store) == entries
    assert all(own[3] is None for own in whole)  # ONNX has no palettes
