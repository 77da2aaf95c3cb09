"""From a budget to a recipe with rules: the command, a budget in a recipe, and what cannot be met."""

from __future__ import annotations

import json
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import yaml
from PIL import Image

import toolchain
from toolchain.build.quantizing import settle_budgets
from toolchain.build.sweep_tasks import SweepTask
from toolchain.errors import RecipeError, SoraCompileError
from toolchain.formats.recipe_file import load_recipe
from toolchain.listener import Listener
from toolchain.planning.plan import plan
from toolchain.system.store import Store

pytestmark = pytest.mark.slow

WAYS = "float int8 int4{block=16 symmetric=false}"
BUDGET = "transformer.passes=[token-merge, {quantize: {budget: {sqnr_db: 30}, candidates: 'float int8'}}, partition]"


def quantized(project: Path, **options: Any) -> Any:
    recipe = load_recipe(project / "recipe.yaml", ["target=onnx"])
    return toolchain.quantize(recipe, base=project, **({"candidates": WAYS} | options))


def test_the_command(project: Path, tmp_path: Path, run_cli: Any) -> None:
    budget = ("--bytes", "400kB", "--candidates", WAYS, "--set", "target=onnx")
    out, picture = tmp_path / "chosen.yaml", tmp_path / "curve.png"
    ran = run_cli("quantize", "recipe.yaml", *budget, "-o", out, "--plot", picture, "--json", cwd=project)
    assert ran.code == 0, ran.err
    (found,) = json.loads(ran.out)
    assert found["bytes"] <= 400_000 < found["plain_bytes"]
    assert {w["stored"] for w in found["weights"]} > {"int8"}
    assert found["gap"] < 1e-6
    # the file alone gives what was chosen, from another folder
    chosen = plan(load_recipe(out), base=tmp_path).components["transformer"]
    assert chosen.weight_bytes == found["bytes"]
    stored = {name: w["stored"] for w in found["weights"] for name in w["names"]}
    (graph,) = chosen.graphs
    for name, kept in stored.items():
        assert graph.weights[name].storage.name.split("-")[0] == {"float": "float32"}.get(kept, kept.split("{")[0])
    assert yaml.safe_load(out.read_text())["transformer"]["passes"][1]["quantize"]["scheme"] == "float"
    with Image.open(picture) as drawn:
        assert drawn.format == "PNG"


@pytest.mark.parametrize("option", ["-o", "--plot"])
def test_what_cannot_be_written_is_refused_first(option: str, project: Path, tmp_path: Path, run_cli: Any) -> None:
    """Before any work is done: nothing is said of a budget of one byte, which cannot be met."""
    places = {"-o": tmp_path / "chosen.yaml", "--plot": tmp_path / "curve.png"}
    for place, code, said in (
        (tmp_path / "missing" / "file", 6, "its folder does not exist or cannot be written"),
        (tmp_path, 2, "is a folder; expected the name of a file"),
    ):
        given = [str(x) for pair in (places | {option: place}).items() for x in pair]
        ran = run_cli("quantize", "recipe.yaml", "--bytes", "1", "--set", "target=onnx", *given, cwd=project)
        assert (ran.code, ran.err.strip().splitlines()[-1]) == (code, f"sora-compile: {option} {place}: {said}")
        assert not any(place.is_file() for place in places.values())


def test_decibels_are_held_as_measured(project: Path) -> None:
    found = quantized(project, budget={"sqnr_db": 30.0})
    (settled,) = found.settled
    assert 30.0 <= settled.measured["transformer"].sqnr_db < 36.0
    assert settled.bytes < settled.plain_bytes / 2
    assert quantized(project, budget={"sqnr_db": 30.0}).recipe == found.recipe


def test_it_is_better_than_all_alike(project: Path) -> None:
    (alike,) = quantized(project, budget={"sqnr_db": 10.0}).settled[0].alike[1:2]
    (settled,) = quantized(project, budget={"bytes": alike.bytes}).settled
    assert settled.bytes <= alike.bytes
    assert settled.expected <= alike.error


def test_a_budget_in_a_recipe(project: Path) -> None:
    recipe = load_recipe(project / "recipe.yaml", ["target=onnx", BUDGET])
    settled = settle_budgets(recipe, project, Store(), Listener(), jobs=1, executor=None)
    (spec,) = (s for s in settled.transformer.passes if s.name == "quantize")
    assert "budget" not in spec.options
    assert {rule["scheme"] for rule in spec.options["rules"]} == {"int8"}
    assert settle_budgets(settled, project, Store(), Listener(), jobs=1, executor=None) is settled
    with pytest.raises(RecipeError, match="quantize: a budget becomes rules when weights are read"):
        plan(recipe, base=project)


class _Recording(ThreadPoolExecutor):
    """One thread, which remembers its tasks."""

    def __init__(self) -> None:
        super().__init__(1)
        self.tasks: list[SweepTask] = []

    def submit(self, fn: Any, /, *args: Any, **kwargs: Any) -> Future[Any]:
        self.tasks += args
        return super().submit(fn, *args, **kwargs)


def test_blocks_are_measured_by_an_executor(project: Path, tmp_path: Path) -> None:
    with _Recording() as executor:
        spread = quantized(project, budget={"bytes": 400_000}, executor=executor, store=Store(tmp_path / "store"))
    assert {task.block for task in executor.tasks} >= {"caption", "pair_0"}
    assert quantized(project, budget={"bytes": 400_000}).recipe == spread.recipe


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"budget": {"bytes": 1000}}, "transformer: a budget of 1000 bytes cannot be met: "),
        ({"budget": {"sqnr_db": 100.0}, "candidates": "int8"}, "is the best that these candidates can do"),
        ({"budget": {"sqnr_db": 30.0, "bytes": 1000}}, "give one of bytes and sqnr_db"),
        ({"budget": {"size": 1000}}, "budget.size: unknown key"),
        ({"budget": {"sqnr_db": 30.0}, "component": "transfomer"}, "did you mean 'transformer'?"),
        ({"budget": {"sqnr_db": 30.0}, "candidates": "int5"}, "candidates 'int5'"),
        ({"budget": {"sqnr_db": 30.0}, "candidates": "palette"}, "can be kept in none of the candidates; add float"),
        ({}, "no budget is given; use --bytes or --sqnr-db"),
    ],
    ids=lambda v: str(v)[:40],
)
def test_refusals(project: Path, options: dict[str, Any], said: str) -> None:
    with pytest.raises(SoraCompileError) as error:
        quantized(project, **options)
    assert said in str(error.value)
    assert "\n" not in str(error.value)
