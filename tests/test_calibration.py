"""What is measured of a component's activations, held against hooks; where it is remembered; what it decides."""

from __future__ import annotations

import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import toolchain
from toolchain.accuracy.explain import explain_block
from toolchain.accuracy.references import sample_inputs
from toolchain.accuracy.statistics import Watch, Watched
from toolchain.build.calibration import ComponentCalibration, calibrate, calibrate_recipe
from toolchain.build.calibration_chain import KIND
from toolchain.build.placing import labels_of, place_artifact
from toolchain.build.sweep import Sweep
from toolchain.build.tasks import builders
from toolchain.errors import BundleError, LoweringError, RecipeError, SoraCompileError
from toolchain.formats.recipe_file import load_recipe
from toolchain.ir.blocks import materialise
from toolchain.ir.calibration import coarse, derived, derived_moments
from toolchain.ir.weights import WeightSource
from toolchain.planning.candidates import read_candidates, rules, with_rules
from toolchain.planning.plan import Plan, plan, plan_resolved
from toolchain.planning.resolve import resolve
from toolchain.system.store import Store
from toolchain.weights.block_weights import read_named
from toolchain.weights.digests import tensor_digests

CLIPPED = (
    "transformer.passes=[token-merge, {quantize: {scheme: int4, clip: output, calibration: {inputs: 3}}}, partition]"
)

MIXED = """transformer.passes=[token-merge, {quantize: {scheme: int4, clip: output, calibration: {inputs: 2}, rules: [
    {match: "*.mlp.*", scheme: int4, compensate: true}]}}, partition]"""


def planned(project: Path, *overrides: str, target: str = "onnx") -> Plan:
    recipe = load_recipe(project / "recipe.yaml", [f"target={target}", *(overrides or [CLIPPED])])
    return plan_resolved(resolve(recipe, project, checkpoints=True))


def calibrated(found: Plan, store: Store, component: str = "transformer") -> ComponentCalibration:
    digests = tensor_digests(found.components[component].resolved.checkpoint)
    return calibrate(found, component, store, digests)


def whole(name: str, *shape: int) -> WeightSource:
    return WeightSource((name,), shape)


# --- numbers -----------------------------------------------------------------------------------------


def test_coarse_numbers() -> None:
    values = torch.tensor([0.0, 1.0, 1.05, 2.0**-40, 3.0, 1e30], dtype=torch.float64)
    found = coarse(values)
    assert found[:4].tolist() == [0.0, 1.0, 1.0, 2.0**-40]
    ratios = [abs(math.log2(f / v)) for f, v in zip(found[1:].tolist(), values[1:].tolist(), strict=True)]
    assert max(ratios) <= 0.125
    assert torch.equal(coarse(found), found)
    assert torch.equal(coarse(values * (1 + 1e-7)), found)


def test_parts_of_a_weight_have_their_own_columns() -> None:
    linear, importance = whole("a", 6, 8), torch.arange(8.0)
    assert torch.equal(derived(linear, linear, importance), importance.expand(6, 8))
    rows = WeightSource(("a",), (2, 8), narrow=((0, 4, 2),))
    assert torch.equal(derived(rows, linear, importance), importance.expand(2, 8))
    columns = WeightSource(("a",), (6, 3), narrow=((1, 2, 3),))
    assert torch.equal(derived(columns, linear, importance), importance[2:5].expand(6, 3))
    fused = WeightSource(("a", "b"), (12, 8))
    half = WeightSource(("a", "b"), (6, 8), narrow=((0, 3, 6),))
    assert torch.equal(derived(half, fused, importance), importance.expand(6, 8))
    conv, channels = whole("c", 4, 3, 5, 3, 3), torch.arange(3.0).reshape(3, 1, 1, 1)
    tap = WeightSource(("c",), (4, 3, 3, 3), select=((2, 1),))
    assert torch.equal(derived(tap, conv, channels), torch.arange(3.0).reshape(1, 3, 1, 1).expand(4, 3, 3, 3))
    patches, pixels = whole("p", 4, 3, 1, 2, 2), torch.arange(12.0).reshape(3, 1, 2, 2)
    assert torch.equal(derived(whole("p", 4, 12), patches, pixels), torch.arange(12.0).expand(4, 12))


def test_parts_of_a_weight_have_their_own_moments() -> None:
    linear, moments = whole("a", 6, 8), torch.arange(64.0).reshape(8, 8)
    columns = WeightSource(("a",), (6, 3), narrow=((0, 0, 6), (1, 2, 3)))
    assert torch.equal(derived_moments(columns, linear, moments), moments[2:5, 2:5])
    assert torch.equal(derived_moments(WeightSource(("a",), (2, 8), narrow=((0, 1, 2),)), linear, moments), moments)
    with pytest.raises(LoweringError, match="taken apart"):
        derived_moments(WeightSource(("a",), (6,), select=((1, 0),)), linear, moments)


# --- what is measured ----------------------------------------------------------------------------------


class Hooks:
    """An independent reference: a whole graph in one piece, with hooks on its linear layers."""

    def __init__(self, found: Plan) -> None:
        part = found.components["transformer"]
        (graph,) = part.graphs
        tensors = read_named(part.resolved.checkpoint, part.definition.expected, part.definition.aliases)
        weights = {n: w.source.value(tensors.__getitem__) for n, w in graph.weights.items()}
        inputs = sample_inputs(graph, found.resolved.family, 0)
        self.rows: dict[str, list[torch.Tensor]] = {}
        self.outputs: dict[str, list[torch.Tensor]] = {}
        self.count = 3 * len(graph.functions)
        for function, gm in graph.functions.items():
            module = materialise(gm, weights)
            for name, layer in module.named_modules():
                if isinstance(layer, nn.Linear):
                    layer.register_forward_hook(self.hook(f"{name}.weight"))
            for number in range(3):
                given = inputs(function, number)
                given["timestep"] = torch.full((2,), self.timestep(found, function, number))
                with torch.no_grad():
                    module(*(given[spec.name] for spec in graph.inputs))

    def hook(self, name: str) -> Any:
        def met(layer: nn.Module, args: tuple[torch.Tensor], result: torch.Tensor) -> None:
            self.rows.setdefault(name, []).append(args[0].reshape(-1, args[0].shape[-1]).double())
            self.outputs.setdefault(name, []).append(result)

        return met

    @staticmethod
    def timestep(found: Plan, function: str, number: int) -> float:
        # four calls (a leap after three steps), of which the first two are of merged tokens
        steps = found.resolved.family.timesteps(found.recipe)[:4]
        own = steps[:2] if function == "merged" else steps[2:]
        return own[[0, 1, 1][number]]


def test_statistics_are_those_of_hooks(project: Path, tmp_path: Path) -> None:
    found = planned(project)
    hooks, measured = Hooks(found), calibrated(found, Store(tmp_path / "store"))
    weights = found.components["transformer"].graphs[0].weights
    linear = [n for n in hooks.rows if weights[n].storage.needs == "importance"]
    assert len(linear) >= 12
    for name in linear:
        source, rows = weights[name].source, torch.cat(hooks.rows[name])
        importance = measured.statistic(source, "importance")
        assert importance.shape == weights[name].shape
        assert torch.equal(importance[0], importance[-1])
        ratio = (importance[0] / rows.square().mean(0)).log2().abs()
        assert float(ratio[rows.square().mean(0) > 0].max()) <= 0.1251
        ranges = measured.ranges(source)
        assert len(ranges) == hooks.count
        for (_, met), given, result in zip(ranges, hooks.rows[name], hooks.outputs[name], strict=True):
            expected = (float(given.min()), float(given.max()), float(result.min()), float(result.max()))
            assert (met.low, met.high, met.out_low, met.out_high) == pytest.approx(expected, rel=1e-4, abs=1e-4)
    timesteps = {(run.function, run.number): run.timestep for run, _ in ranges}
    assert timesteps["merged", 2] == Hooks.timestep(found, "merged", 2)
    assert timesteps["base", 0] == Hooks.timestep(found, "base", 0)


def test_convolutions_tables_and_fused_weights() -> None:
    weights = {"t": torch.randn(9, 4), "c": torch.randn(6, 2, 3, 3), "m": torch.randn(5, 4)}
    x, picture = torch.randn(7, 4), torch.randn(2, 4, 5, 5)
    watch = Watch(weights, {"m", "t"})
    with watch:
        nn.functional.embedding(torch.tensor([1, 3]), weights["t"])
        nn.functional.conv2d(picture, weights["c"], groups=2)
        nn.functional.linear(x, weights["m"], None)
        nn.functional.linear(2 * x, weights["m"])
    totals = watch.totals
    assert totals["t"].squares is not None
    assert torch.equal(totals["t"].squares, torch.ones(4, dtype=torch.float64))
    assert totals["c"].squares is not None
    squares = picture.double().square().sum((0, 2, 3)).reshape(2, 2).mean(0)  # groups share columns
    torch.testing.assert_close(totals["c"].squares, squares.reshape(2, 1, 1))
    assert totals["c"].count == 2 * 25
    assert totals["m"].products is not None
    torch.testing.assert_close(totals["m"].products, 5 * (x.T @ x).double(), rtol=1e-5, atol=1e-5)
    assert totals["m"].count == 14
    assert (watch.ranges["m"].low, watch.ranges["m"].high) == (float((2 * x).min()), float((2 * x).max()))
    assert watch.take_ranges()
    assert watch.ranges == {}


# --- where it is remembered ----------------------------------------------------------------------------


def counted(monkeypatch: pytest.MonkeyPatch, stop_after: int = 10**9) -> list[str]:
    """Every run of a block from now on; the one after ``stop_after`` is interrupted."""
    ran: list[str] = []
    real = Watched.run

    def run(self: Watched, function: str, inputs: Any) -> Any:
        if len(ran) == stop_after:
            raise KeyboardInterrupt
        ran.append(self._block.name)
        return real(self, function, inputs)

    monkeypatch.setattr(Watched, "run", run)
    return ran


def statistics(found: ComponentCalibration) -> list[tuple[WeightSource, str]]:
    return [(m.source, m.digests["importance"]) for m in found.measured]


@pytest.mark.slow
def test_a_calibration_that_was_stopped_goes_on(project: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found, store = planned(project), Store(tmp_path / "store")
    with monkeypatch.context() as patched:
        first = counted(patched, 14)  # six runs a block: in the third one
        with pytest.raises(KeyboardInterrupt):
            calibrated(found, store)
    with monkeypatch.context() as patched:
        second = counted(patched)
        resumed = calibrated(found, store)
    assert not set(first[:12]) & set(second)  # blocks that were done are not run again
    assert first[12] in second
    assert statistics(resumed) == statistics(calibrated(found, Store(tmp_path / "other")))
    assert [entry.kind for entry in store.entries()] == [KIND]  # activations and sums are gone
    with monkeypatch.context() as patched:
        third = counted(patched)
        calibrated(found, store)
        # schemes and targets share it
        calibrated(planned(project, CLIPPED.replace("int4", "int8"), target="coreml"), store)
        assert not third
        calibrated(planned(project, CLIPPED.replace("inputs: 3", "inputs: 3, seed: 1")), store)
        assert third


@pytest.mark.slow
def test_bytes_are_the_same_whatever_the_way(project: Path, tmp_path: Path) -> None:
    limit = "gate.max_quantization_error.transformer=0.5"
    overrides, store = ["target=onnx", MIXED, limit], Store(tmp_path / "store")
    recipe = load_recipe(project / "recipe.yaml", overrides)
    bundle = toolchain.compile_recipe(recipe, tmp_path / "stamped", base=project, store=store)
    blocks = {b.name: b for b in bundle.manifest.components["transformer"].blocks}
    kept = {name for block in blocks.values() for name in block.quantized.values()}
    assert kept == {"int4-block32-clip-output-f32", "int4-block32-compensated-f32"}
    direct_plan = planned(project, *overrides[1:])
    direct = builders(direct_plan, store, direct=True)["transformer"]
    (pair,) = (b for b in direct.plan.blocks if b.name == "pair_0")
    labels = labels_of(direct_plan, "transformer", pair)
    placed = place_artifact(direct.artifact(pair), tmp_path / "direct/pair_0", tmp_path, direct.plan.target, labels)
    assert {f.sha256 for f in placed} == {f.sha256 for f in blocks["pair_0"].files}
    unchecked = load_recipe(project / "recipe.yaml", [*overrides, "gate.mode=none"])
    other = Store(tmp_path / "other")  # with templates, whose lowering is not what this is about
    shutil.copytree(store.root / "templates", other.root / "templates")
    two = toolchain.compile_recipe(unchecked, tmp_path / "two", base=project, store=other, jobs=2)
    assert [b.files for b in two.manifest.components["transformer"].blocks] == [b.files for b in blocks.values()]
    # whoever looks for what broke measures again, or is told that he has to
    explained = explain_block(bundle, "transformer/pair_0", base=project, calibrate=calibrate_recipe)
    assert all(row.own is None or row.own < 1e-5 for each in explained for row in each.rows)
    with pytest.raises(BundleError, match="was encoded with a calibration"):
        explain_block(bundle, "transformer/pair_0", base=project)


@pytest.mark.slow
def test_what_decides_the_bytes_is_in_the_key(project: Path, tmp_path: Path) -> None:
    store = Store(tmp_path / "store")

    def keys(passes: str) -> tuple[str, str]:
        found = planned(project, passes)
        builder = builders(found, store, direct=False)["transformer"]
        (block,) = (b for b in builder.plan.blocks if b.name == "pair_0")
        return builder.template_key(block), builder.artifact_key(block)

    by_output = keys(CLIPPED)
    others = keys(CLIPPED.replace("inputs: 3", "inputs: 3, seed: 1"))
    by_error = keys(CLIPPED.replace("output, calibration: {inputs: 3}", "error"))
    assert by_output[0] == others[0] == by_error[0]  # a template is lowered for the parts, however they are found
    assert len({by_output[1], others[1], by_error[1]}) == 3


# --- what is refused -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("passes", "said"),
    [
        (
            "{quantize: {scheme: int4, clip: output}}",
            "transformer.passes.0.quantize: 'clip: output' goes by what comes into a layer; write "
            "'calibration: {inputs: 8}' beside the pass's scheme",
        ),
        (
            "{quantize: {scheme: int4, calibration: {inputs: 8}}}",
            "transformer.passes.0.quantize: calibration: nothing goes by it; remove it, or choose one of clip: output, "
            "weighted: true, compensate: true, activations",
        ),
        (
            "{quantize: {scheme: int4, clip: output, calibration: {input: 8}}}",
            "transformer.passes.0.quantize.calibration.input: unknown key; did you mean 'inputs'?",
        ),
        (
            "{quantize: {scheme: int4, clip: output, calibration: {inputs: 0}}}",
            "transformer.passes.0.quantize.calibration.inputs: input should be greater than or equal to 1, got int 0",
        ),
        (
            "{quantize: {scheme: int4, clip: output, calibration: {inputs: 8}, rules: [{match: '*', scheme: int8}]}}",
            "pass 'quantize' on transformer: calibration: no weight is kept by an option that goes by it; remove it",
        ),
        (
            "{quantize: {scheme: int4, weighted: true, calibration: {inputs: 8}}}",
            "transformer.passes.0.quantize: 'weighted' is for palettes and for a rank; int4 has 'clip: output' for its "
            "ranges",
        ),
        (
            "{quantize: {scheme: palette, compensate: true, calibration: {inputs: 8}}}",
            "transformer.passes.0.quantize: 'compensate' is no option of the scheme palette; it has bits, group, "
            "weighted",
        ),
    ],
    ids=["none", "for nothing", "misspelt", "no inputs", "overridden", "weighted integers", "a compensated palette"],
)
def test_refusals(project: Path, passes: str, said: str) -> None:
    with pytest.raises(SoraCompileError) as error:
        overrides = ["target=onnx", "sampler.merged_steps=0", f"transformer.passes=[{passes}]"]
        plan(load_recipe(project / "recipe.yaml", overrides), base=project)
    assert str(error.value) == said


def test_a_weight_that_nothing_was_measured_for(project: Path, tmp_path: Path) -> None:
    measured = calibrated(planned(project), Store(tmp_path / "store"))
    with pytest.raises(LoweringError, match="no linear layer, convolution or table of the model reads 'zzz'"):
        measured.statistic(whole("zzz", 4, 4), "importance")
    with pytest.raises(LoweringError, match="is no linear layer's"):
        measured.digest(measured.measured[0].source, "moments")


# --- as candidates of a budget -------------------------------------------------------------------------


@pytest.mark.slow
def test_candidates_that_go_by_a_calibration(project: Path, tmp_path: Path) -> None:
    text = "float int4{block=16} int4{block=16 compensate=true calibration={inputs: 2}}"
    ways = read_candidates(text, "candidates")
    assert " ".join(map(str, ways)) == text.replace("inputs: 2", "inputs: 2, seed: 0")
    assert read_candidates(" ".join(map(str, ways)), "candidates") == ways
    recipe = load_recipe(project / "recipe.yaml", ["target=onnx"])
    found = plan_resolved(resolve(recipe, project, checkpoints=True))
    swept = Sweep(builders(found, Store(tmp_path / "store"), direct=False)["transformer"], found, ways)
    errors = [own for own in swept.errors() if own[1] and own[2]]
    assert len(errors) >= 12
    assert sum(own[2] or 0 for own in errors) < 0.8 * sum(own[1] or 0 for own in errors)
    quantized = [item for item in swept.items if item.sizes[2] is not None]
    chosen = rules((item, ways[2 if i % 2 else 1]) for i, item in enumerate(quantized))
    assert chosen is not None
    assert chosen["calibration"] == {"inputs": 2, "seed": 0}
    again = plan(with_rules(recipe, {"transformer": chosen}), base=project).components["transformer"]
    assert again.passes.calibration == ways[2].calibration
    needs = [w.storage.needs for block in again.blocks for w in block.weights.values()]
    assert "moments" in needs
    plainly = rules((item, ways[1]) for item in quantized)
    assert plainly is not None
    assert "calibration" not in plainly


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("int4{clip=output}", "'clip: output' goes by what comes into a layer; write 'calibration: {inputs: 8}'"),
        (
            "int4{clip=output calibration={inputs: 1}} palette{weighted=true calibration={inputs: 2}}",
            "candidates: candidates have different calibrations; a component has one",
        ),
    ],
    ids=["without", "two"],
)
def test_candidates_that_are_refused(text: str, said: str) -> None:
    with pytest.raises(RecipeError) as error:
        read_candidates(text, "candidates")
    assert said in str(error.value)
