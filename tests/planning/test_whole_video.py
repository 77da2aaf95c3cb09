"""From a recipe to the loading of a whole video: every call in order, nothing over the budget, clear refusals."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from following import calls_of, follow
from hypothesis import given, settings
from hypothesis import strategies as st

import toolchain
from toolchain.build import entries
from toolchain.errors import BundleError, RecipeError
from toolchain.formats.calls import Round, StepCalls, rounds
from toolchain.formats.loading import Times
from toolchain.formats.recipe_file import find_recipe, load_recipe
from toolchain.formats.times import MeasuredStructure, MeasuredTimes, load_times
from toolchain.ir.target import distinct_functions
from toolchain.planning.loading.predict import everything_bytes, predict
from toolchain.planning.loading.run import Call, Run
from toolchain.planning.loading.unrolled import unroll
from toolchain.planning.loading.whole import Function, Part, whole_run
from toolchain.planning.plan import Plan

SOURCE = {"kind": "device", "name": "a", "sha256": "0" * 64}


def manifest_of(planned: Plan) -> dict[str, Any]:
    """The parts of a plan's manifest that say what is called and loaded; nothing is built."""
    build = planned.resolved
    components = {}
    for name, part in planned.components.items():
        order: dict[str, list[str]] = {}
        for b in part.blocks:
            order.setdefault(b.rate, []).append(b.name)
        blocks = [
            {
                "name": b.name,
                "functions": list(distinct_functions(b)),
                "weight_bytes": entries.bytes_by_storage([b]),
                "structure": b.structure(),
            }
            for b in part.blocks
        ]
        components[name] = {"blocks": blocks, "load_order": order, "default_function": "base"}
    stages = build.family.stages(build.recipe, build.configs) if "vae" in components else ()
    return {
        "components": components,
        "text": {"rate": "prompt"},
        "sampler": entries.sampler(build.recipe, planned.sampling).model_dump(mode="json"),
        "decoding": {"stages": [s.model_dump(mode="json") for s in stages]},
        "memory_budget_bytes": planned.loading.budget_bytes,
        "loading": planned.loading.entry().model_dump(mode="json"),
    }


def planned(name: str, *options: str, calibration: Path | None = None) -> Plan:
    path = find_recipe(name)
    return toolchain.plan(load_recipe(path, options), base=path.parent, calibration=calibration)


@pytest.fixture(scope="module")
def tiny() -> Plan:
    return planned("tiny", "sampler.merged_steps=10")


# --- recipes -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("leap", ["15", "null", "paper"])
@pytest.mark.slow
def test_a_whole_video_is_followed(leap: str) -> None:
    found = planned("tiny", f"sampler.leap={leap}", "sampler.merged_steps=10", "memory_budget=6MB")
    data = manifest_of(found)
    most = follow(data)
    assert found.loading.timeline.peak_bytes <= most <= 6_000_000
    calls = calls_of(data)
    steps = 16 if leap == "15" else 30  # a dynamic leap is planned for all steps
    assert [f for b, f in calls if b == "transformer/pair_0"] == ["merged"] * 10 + ["base"] * (steps - 10)
    assert {b.partition("/")[0] for b, _ in calls} == {"text_encoder", "transformer", "vae"}
    assert calls.count(("vae/spatial_00_15", "base")) == 17  # a frame a call


@pytest.mark.slow
def test_a_video_in_tiles_is_followed() -> None:
    """Every tile is a call; what blocks hold is a tile's, and whole frames wait beside them."""
    asked = ("target=onnx", "sampler.steps=2", "sampler.leap=null")
    whole, tiles = (planned("tiny", *asked, *more) for more in ((), ("vae.tiles={height: 32, width: 40, overlap: 8}",)))
    data = manifest_of(tiles)
    assert tiles.loading.timeline.peak_bytes <= follow(data)
    assert calls_of(data).count(("vae/spatial_00_15", "base")) == 17 * 3 * 2
    block = "vae/spatial_00_15"
    (least,), (most,) = ({c for c in calls(p) if c.block == block} for p in (tiles, whole))
    chunk = (5 + 17) * 4 * 8 * 8  # what goes into the temporal decoder, and comes out of it
    frames = 17 * (4 * 8 * 8 + 3 * 64 * 64)  # whole ones are there, whatever blocks take
    assert most.live_bytes == 4 * (chunk + frames + 4 * 8 * 8 + 3 * 64 * 64)
    assert least.live_bytes == 4 * (chunk + frames + 4 * 4 * 5 + 3 * 32 * 40)
    assert least.activation_bytes < most.activation_bytes / 2


def calls(planned: Plan) -> Iterator[Call]:
    made = planned.loading.entry().made_from
    assert made is not None
    return Run.from_data(made.run).calls()


def test_a_video_that_reuses_is_followed() -> None:
    """Steps take turns, so that no two rounds in a row are alike."""
    asked = [{"steps": [2, 4, 6]}, {"steps": [3, 5], "blocks": ["pair_1", "pair_2"]}]
    found = planned("tiny", "sampler.steps=8", "sampler.leap=null", f"sampler.reuse={asked}", "memory_budget=6MB")
    data = manifest_of(found)
    assert found.loading.timeline.peak_bytes <= follow(data) <= 6_000_000
    calls = [b for b, _ in calls_of(data)]
    assert [calls.count(f"transformer/pair_{i}") for i in range(4)] == [5, 3, 3, 5]
    assert calls.count("transformer/embed") == calls.count("transformer/final") == 8
    assert found.loading.planned.bound_s <= found.loading.timeline.total_s <= found.loading.planned.paper_s


@pytest.mark.slow
@pytest.mark.parametrize("name", ["open-sora-v1.2-iphone-15-pro", "open-sora-v1.2-android-int8"])
def test_shipped_recipes_obey_their_budgets(name: str) -> None:
    found = planned(name)
    most = follow(manifest_of(found))
    assert found.loading.timeline.peak_bytes <= most <= (found.recipe.memory_budget or 0)
    assert found.loading.times.name == found.recipe.device
    bound_s, total_s, paper_s = (
        found.loading.planned.bound_s,
        found.loading.timeline.total_s,
        found.loading.planned.paper_s,
    )
    assert bound_s <= total_s <= paper_s
    assert 1 - bound_s / total_s < 0.01


def test_without_a_budget_everything_stays(tiny: Plan) -> None:
    data = manifest_of(tiny)
    loads = [e for s in data["loading"]["plan"]["sections"] for e in s["events"] * s["times"] if "load" in e]
    assert len(loads) == len({e["load"] for e in loads}) == len(tiny.blocks)
    assert tiny.loading.times.name == "unspecified"
    assert data["loading"]["plan"]["budget_bytes"] == everything_bytes(tiny.loading.run)
    follow(data)


@pytest.mark.slow
def test_a_devices_memory_is_the_budget_where_none_is_given(tmp_path: Path) -> None:
    import recipes

    profile = Path(next(iter(recipes.__path__))) / "devices/iphone-15-pro.yaml"
    (tmp_path / "small.yaml").write_text(profile.read_text().replace("3.3e9", "6.0e6"))
    found = planned("tiny", f"device={tmp_path / 'small.yaml'}")
    assert found.loading.budget_bytes == 6_000_000
    assert planned("tiny", f"device={tmp_path / 'small.yaml'}", "memory_budget=7MB").loading.budget_bytes == 7_000_000


@pytest.mark.slow
def test_what_cannot_be_is_refused() -> None:
    with pytest.raises(RecipeError, match="unknown device 'iphone-15'; near ones are iphone-15-pro"):
        planned("tiny", "device=iphone-15")
    with pytest.raises(RecipeError, match="'android-emmc' has no throughput for float16; it has float32 on cpu"):
        planned("tiny", "target={name: coreml, precision: float16}", "device=android-emmc")
    with pytest.raises(RecipeError) as error:
        planned("tiny", "memory_budget=1MB")
    words = str(error.value).split()
    least = words[words.index("bytes") - 1]
    assert planned("tiny", f"memory_budget={least}").loading.timeline.peak_bytes == int(least)
    with pytest.raises(RecipeError, match=rf"'vae/spatial_00_15' \(base\) needs {least} bytes"):
        planned("tiny", f"memory_budget={int(least) - 1}")


def test_components_of_different_precisions() -> None:
    found = planned("tiny", "target={name: coreml, precision: float16}", "vae.precision=float32", "memory_budget=6MB")
    follow(manifest_of(found))
    size = {b.name: b.weight_bytes for b in found.loading.run.blocks}
    assert size["vae/spatial_00_15"] == 4 * next(b.parameters for b in found.blocks if b.name == "spatial_00_15")
    assert size["transformer/pair_0"] == 2 * next(b.parameters for b in found.blocks if b.name == "pair_0")


def test_work_is_counted_by_torch_and_merging_tokens_saves_some(tiny: Plan) -> None:
    part = tiny.components["text_encoder"]
    block = next(b for b in part.blocks if b.name.startswith("layer"))
    work = part.memory[block.name].works["base"]
    tokens = block.outputs[0].shape[0] * block.outputs[0].shape[1]
    matrices = sum(w.parameters for w in block.weights.values() if len(w.shape) == 2 and min(w.shape) > 8)
    assert 2 * tokens * matrices <= work.flops < 3 * tokens * matrices  # attention comes on top
    assert work.moved_bytes > block.weight_bytes
    pair = tiny.components["transformer"].memory["pair_0"].works
    assert pair["merged"].flops < pair["base"].flops


# --- calibrations ------------------------------------------------------------------------------------


def times_of(found: Plan, **changes: Any) -> MeasuredTimes:
    structures = {
        b.structure(): MeasuredStructure(load_s=2.0, run_s=dict.fromkeys(b.functions, 0.5)) for b in found.blocks
    }
    data = {"machine": "a phone", "bundle": "mine", "overlap_loss": 0.25, "structures": structures}
    return MeasuredTimes(**(data | changes))


def test_measured_times_replace_the_devices(tiny: Plan, tmp_path: Path) -> None:
    file = tmp_path / "c.yaml"
    times = times_of(tiny)
    file.write_text(times.to_yaml())
    assert load_times(file).times == times
    found = planned("tiny", "sampler.merged_steps=10", calibration=file).loading
    assert {b.load_s for b in found.run.blocks} == {2.0}
    assert {c.compute_s for c in found.run.calls()} == {0.5}
    assert found.overlap_loss == 0.25
    assert found.times.model_dump() == {"kind": "calibration", "name": "a phone", "sha256": times.sha256}
    without = [dataclasses.replace(c, compute_s=0) for c in found.run.calls()]
    assert without == [dataclasses.replace(c, compute_s=0) for c in tiny.loading.run.calls()]


@pytest.mark.slow
def test_a_calibration_of_another_bundle_is_refused(tiny: Plan, tmp_path: Path) -> None:
    file = tmp_path / "c.json"
    own = times_of(tiny).structures
    pair = next(b.structure() for b in tiny.blocks if b.name == "pair_0")
    for structures, missing in (
        ({d: s for d, s in own.items() if d != pair}, f"the structure {pair[:8]} of 'transformer/pair_0'"),
        (own | {pair: MeasuredStructure(load_s=1, run_s={"base": 1.0})}, "function 'merged' of 'transformer/pair_0'"),
    ):
        file.write_text(json.dumps(times_of(tiny, structures=structures).model_dump(mode="json")))
        with pytest.raises(BundleError) as error:
            planned("tiny", "sampler.merged_steps=10", calibration=file)
        said = f"--calibration {file}: is a calibration of another bundle ('mine'): it has no times of {missing}"
        assert str(error.value).startswith(said)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[", ":1: not YAML"),
        ("version: 2", "version"),
        ("machine: a\nmachine: b", ":2: not YAML: key 'machine' is given twice"),
        ("1", "valid dictionary"),
        ("{version: 1, machin: a}", "machin: unknown key; did you mean 'machine'"),
    ],
)
def test_what_is_no_calibration(text: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "c.yaml").write_text(text)
    with pytest.raises(RecipeError, match=message) as error:
        load_times(tmp_path / "c.yaml")
    assert str(error.value).startswith(f"--calibration {tmp_path / 'c.yaml'}:")
    with pytest.raises(RecipeError, match="cannot be read: No such file"):
        load_times(tmp_path / "none.yaml")


# --- runs --------------------------------------------------------------------------------------------


@st.composite
def videos(draw: st.DrawFn) -> tuple[dict[str, Any], Run]:
    """A manifest's parts with any blocks, functions and schedule, and the run that they make."""
    sizes = st.integers(0, 9)
    parts: dict[str, list[Part]] = {}
    rates = {"text_encoder": ["prompt"], "transformer": ["prompt", "step"], "vae": ["chunk", "frames"]}
    for name in draw(st.sampled_from([["transformer"], ["text_encoder", "transformer"], list(rates)])):
        own = []
        for rate in rates[name]:
            for i in range(draw(st.integers(1, 3))):
                functions = {
                    f: Function(draw(sizes) / 2, draw(sizes), draw(sizes))
                    for f in ["base", *(["other"] if draw(st.booleans()) else [])]
                }
                block = f"{name}/{rate}_{i}"
                own.append(Part(block, rate, draw(st.integers(1, 9)), draw(sizes) / 2, functions, "base"))
        parts[name] = own
    asked = st.lists(st.sampled_from(["base", "other"]), min_size=1, max_size=6)
    steps = draw(asked)
    places = st.lists(st.integers(0, 9), min_size=1, max_size=2)
    tiles = st.none() | st.fixed_dictionaries({"tops": places, "lefts": places})
    stages = [{"rate": r, "pieces": [{"function": f} for f in draw(asked)], "tiles": draw(tiles)} for r in rates["vae"]]
    beside = {("vae", "frames"): draw(sizes)}
    order = [Round(n, r, f) for n, r, f in _rounds(parts, steps, stages)]
    run = whole_run(parts, order, beside)
    components = {
        n: {
            "default_function": "base",
            "load_order": {r: [p.name.split("/")[1] for p in own if p.rate == r] for r in rates[n]},
            "blocks": [
                {
                    "name": p.name.split("/")[1],
                    "functions": list(p.functions),
                    "weight_bytes": {"float32": p.weight_bytes},
                }
                for p in own
            ],
        }
        for n, own in parts.items()
    }
    sampler = {"once": "prompt", "each": "step", "ranges": {}, "steps": [{"function": f} for f in steps]}
    data = {"components": components, "text": {"rate": "prompt"}, "sampler": sampler, "decoding": {"stages": stages}}
    return data, run


def _rounds(parts: Any, steps: Any, stages: Any) -> Any:
    from types import SimpleNamespace

    plain = [
        SimpleNamespace(
            rate=s["rate"],
            pieces=[SimpleNamespace(**p) for p in s["pieces"]],
            tiles=s["tiles"] and SimpleNamespace(count=len(s["tiles"]["tops"]) * len(s["tiles"]["lefts"])),
        )
        for s in stages
    ]
    return [(r.component, r.rate, r.function) for r in rounds(parts, [StepCalls(f) for f in steps], plain)]


@given(video=videos(), data=st.data())
@settings(max_examples=60, deadline=None)
@pytest.mark.slow
def test_any_video_is_followed_within_any_budget_that_works(video: tuple[dict[str, Any], Run], data: Any) -> None:
    manifest, run = video
    least = unroll(run).least_budget
    budget = data.draw(st.one_of(st.none(), st.integers(least, everything_bytes(run) + 3)))
    times = Times.model_validate(SOURCE)
    found = predict(run, budget, data.draw(st.sampled_from([0.0, 0.3])), times)
    entry = found.entry()
    manifest |= {"memory_budget_bytes": budget, "loading": json.loads(entry.model_dump_json())}
    assert follow(manifest) <= found.planned.plan.budget_bytes
    assert Run.from_data(entry.made_from.run) == run  # type: ignore[union-attr]
    assert entry.prediction is not None
    bound_s, paper_s = entry.prediction.bound_s * (1 - 1e-9), entry.prediction.paper_s * (1 + 1e-9)
    assert bound_s <= entry.prediction.total_s <= paper_s
    if least > 1:
        with pytest.raises(RecipeError, match=f"needs {least} bytes"):
            predict(run, least - 1, 0.0, times)
