"""A recipe whose linear layers round what comes in: steps and their functions, the bundle, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

import toolchain
from toolchain.accuracy.explain import explain_block
from toolchain.accuracy.references import sample_inputs
from toolchain.accuracy.verify import verify
from toolchain.build.calibration import calibrate_recipe
from toolchain.build.gate import stretches
from toolchain.errors import SoraCompileError
from toolchain.formats.bundle import load_bundle
from toolchain.formats.recipe_file import load_recipe
from toolchain.formats.schedule import PRESETS, StaticLeap, groups_of, plan_steps
from toolchain.ir.target import Engine, distinct_functions
from toolchain.planning.plan import Plan, plan
from toolchain.player.following import followed
from toolchain.player.loader import Loader
from toolchain.player.opening import load_engine, target_of
from toolchain.player.runner import ComponentRunner
from toolchain.player.trace import Trace

W8A8 = "{quantize: {scheme: int8, activations: {groups: 2}, calibration: {inputs: 2}}}"
PASSES = f"transformer.passes=[{W8A8}, partition]"
MERGED = f"transformer.passes=[token-merge, {W8A8}, partition]"


# --- steps -------------------------------------------------------------------------------------------


def functions(*args: Any, **options: Any) -> list[str]:
    return [s.function for s in plan_steps([1000.0 - 100 * i for i in range(10)], *args, **options)]


def test_steps_call_the_functions_of_their_group() -> None:
    assert functions(groups=1, merged_steps=2) == functions(merged_steps=2)
    assert functions(groups=3) == ["base"] * 4 + ["base_2"] * 3 + ["base_3"] * 3
    assert functions(groups=2, merged_steps=7) == ["merged"] * 5 + ["merged_2"] * 2 + ["base_2"] * 3
    # a static leap ends the schedule early, and it is what is left that is divided; a dynamic one is not known before
    assert functions(StaticLeap(after=3), groups=2, merged_steps=1) == ["merged", "base", "base_2", "base_2"]
    assert functions(PRESETS["paper"], groups=2) == functions(groups=2)
    plain, divided = (plan_steps((900.0, 500.0, 100.0), groups=g) for g in (1, 3))
    assert [(s.index, s.t, s.dt, s.leap) for s in plain] == [(s.index, s.t, s.dt, s.leap) for s in divided]


@pytest.mark.parametrize("groups", [0, 5])
def test_more_groups_than_steps(groups: int) -> None:
    with pytest.raises(SoraCompileError, match=f"groups of steps: {groups} of 4 denoiser calls; choose 1 to 4"):
        plan_steps((1000.0, 750.0, 500.0, 250.0), groups=groups)


def test_groups_have_all_steps_in_order() -> None:
    steps = plan_steps([1000.0 - i for i in range(17)])
    for groups in range(1, 18):
        divided = groups_of(steps, groups)
        assert [s for group in divided for s in group] == list(steps)
        sizes = [len(group) for group in divided]
        assert max(sizes) - min(sizes) <= 1
        assert sizes == sorted(sizes, reverse=True)


# --- plans -------------------------------------------------------------------------------------------


def planned(project: Path, *overrides: str) -> Plan:
    return plan(load_recipe(project / "recipe.yaml", ["target=coreml", *overrides]), base=project)


@pytest.mark.slow
def test_what_a_plan_says(project: Path, run_cli: Any) -> None:
    found = planned(project, MERGED)
    blocks = {b.name: b for b in found.components["transformer"].blocks}
    assert distinct_functions(blocks["pair_0"]) == ("base", "merged", "base_2", "merged_2")
    assert len(blocks["pair_0"].int8_inputs) == 14
    # the gate and the calibration run a function at the timesteps of its group
    times = {f: found.timesteps_of(f) for f in ("base", "merged", "base_2", "merged_2")}
    assert len(times["merged"]) == len(times["base_2"]) == 2
    assert times["base"] == times["merged"]  # no step of the group calls it
    assert times["merged_2"] == times["base_2"]
    (graph,) = found.components["transformer"].graphs
    inputs = sample_inputs(graph, found.resolved.family, 0, stretches(graph, found))
    for function, own in times.items():
        for run in range(4):
            assert min(own) <= float(inputs(function, run)["timestep"][0]) <= max(own)
    ran = run_cli("plan", "recipe.yaml", "--set", "target=coreml", "--set", MERGED, "--json", cwd=project)
    assert ran.code == 0, ran.err
    data = json.loads(ran.out)
    assert (data["denoiser_calls"], data["merged_calls"]) == (4, 2)


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (
            ["target=executorch", MERGED],
            "which target 'executorch' does not do: it rounds what comes into quantized linear layers to int8 already",
        ),
        (["target=onnx", MERGED], "which target 'onnx' does not do: it has no products of int8 numbers with fixed"),
        (
            [PASSES.replace(", calibration: {inputs: 2}", "")],
            "'activations' goes by what comes into a layer; write 'calibration: {inputs: 8}'",
        ),
        (
            [f"transformer.passes=[{W8A8}, token-merge, partition]"],
            "'token-merge' adds a function that 'quantize' would know nothing of; list it before",
        ),
        ([MERGED.replace("groups: 2", "groups: 5")], "groups of steps: 5 of 4 denoiser calls; choose 1 to 4"),
    ],
    ids=["executorch", "onnx", "no calibration", "order", "groups"],
)
@pytest.mark.slow
def test_refusals(project: Path, overrides: list[str], said: str) -> None:
    with pytest.raises(SoraCompileError) as error:
        planned(project, *overrides)
    assert said in str(error.value)
    assert "\n" not in str(error.value)


# --- a bundle ----------------------------------------------------------------------------------------


@pytest.mark.slow
def test_from_recipe_to_steps_that_run(project: Path, tmp_path: Path, run_cli: Any) -> None:
    recipe = load_recipe(project / "recipe.yaml", ["target=coreml", PASSES, "sampler.merged_steps=0"])
    bundle = toolchain.compile_recipe(recipe, tmp_path / "bundle", base=project)
    part = bundle.manifest.components["transformer"]
    steps = bundle.manifest.sampler.steps
    assert [s.function for s in steps] == ["base", "base", "base_2", "base_2"]
    blocks = {b.name: b for b in part.blocks}
    pair = blocks["pair_0"]
    assert pair.functions == ["base", "base_2"]
    assert blocks["embed"].functions == blocks["caption"].functions == ["base"]
    assert len(pair.int8_inputs) == 14
    assert len(blocks["caption"].int8_inputs) == 1  # the other layer is small
    assert blocks["final"].int8_inputs == []
    assert pair.accuracy is not None
    assert pair.quantization is not None
    for function in pair.functions:
        assert pair.accuracy[function].limit == 0.1
        assert pair.accuracy[function].relative_error < 2e-2
        assert 1e-3 < pair.quantization[function].relative_error < 5e-2
    assert bundle.manifest.gate.limits == {"float16": 2e-2, "int8": 1e-1}
    # as a player runs it
    trace, found, target = Trace(), followed(bundle.manifest), target_of(bundle.manifest, "transformer")

    def open_block(block: str, function: str) -> Engine:
        return load_engine(bundle, "transformer", blocks[block.partition("/")[2]], function, target)

    loader = Loader(found.run, found.plan, open_block, trace)
    runner = ComponentRunner(bundle, "transformer", loader.call)
    generator = torch.Generator().manual_seed(0)
    shapes = {i.feed.kind: i.shape for i in part.inputs}
    y = torch.randn(1, *shapes["text_embedding"][1:], generator=generator)
    given = {"text_embedding": y, "token_mask": torch.ones(1, shapes["token_mask"][1])}
    latents = torch.randn(shapes["latents"], generator=generator)
    with loader:
        loader.enter("transformer")
        runner.run("prompt", given, part.default_function)
        for step in steps:
            now = given | {"latents": latents, "timestep": torch.tensor(step.timestep)}
            results = runner.run("step", now, step.function)
            assert all(bool(torch.isfinite(v).all()) for v in results.values())
    ran = [r.function for r in trace.records if r.category == "run" and r.block == "transformer/pair_0"]
    assert ran == ["base", "base", "base_2", "base_2"]
    # whoever looks at it later
    assert not verify(load_bundle(bundle.path)).failed
    explained = explain_block(bundle, "transformer/pair_0", base=project, calibrate=calibrate_recipe)
    assert [e.function for e in explained] == ["base", "base_2"]
    assert all(r.own is None or r.own < 2e-2 for e in explained for r in e.rows)
    shown = run_cli("inspect", bundle.path, cwd=project).out
    assert "transformer: 15 linear layers with static int8 activations" in shown
    assert "base 1-2, base_2 3-4" in shown
