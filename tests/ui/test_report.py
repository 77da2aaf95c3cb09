"""What a report says, and that its page is valid, complete and safe, without a browser."""

from __future__ import annotations

import base64
import dataclasses
import io
import json
import math
import re
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import av
import html5lib
import pytest

from toolchain.errors import BundleError
from toolchain.formats.bundle import Bundle, describe_file
from toolchain.formats.loading import loads_of
from toolchain.formats.manifest import Manifest
from toolchain.formats.recipe_file import load_recipe
from toolchain.planning.plan import plan
from toolchain.ui.report import words
from toolchain.ui.report.charts import report_charts
from toolchain.ui.report.facts import Facts, bundle_facts, plan_facts
from toolchain.ui.report.page import picture, render
from toolchain.ui.report.timeline import Interval, Timeline, predicted_timeline, trace_timelines
from toolchain.ui.report.video import golden_clip

pytestmark = pytest.mark.slow
HTML = "{http://www.w3.org/1999/xhtml}"


@pytest.fixture(scope="module")
def facts(shown: Any) -> Facts:
    return bundle_facts(shown.bundle)


@pytest.fixture(scope="module")
def played(shown: Any) -> Timeline:
    return trace_timelines(shown.trace, shown.bundle)[1]


@pytest.fixture(scope="module")
def page(shown: Any, facts: Facts, played: Timeline) -> str:
    return render(facts, [played], golden_clip(shown.bundle))


def parsed(page: str) -> Any:
    """The page's tree; what the HTML standard calls a parse error is one here."""
    return html5lib.HTMLParser(strict=True).parse(page)


def embedded(page: str) -> str:
    """The video as it stands in the page: H.264 does not promise the same bytes for the same frames."""
    found = re.search('data:video/mp4;base64,[^"]+', page)
    return found[0] if found else pytest.fail("no video")


def texts(tree: Any) -> list[str]:
    """All text that is not within a script or style."""
    hidden = {t for tag in ("script", "style") for e in tree.iter(f"{HTML}{tag}") for t in e.itertext()}
    return [t for t in tree.itertext() if t not in hidden]


# --- facts -------------------------------------------------------------------------------------------


def test_facts_are_those_of_the_manifest(shown: Any, facts: Facts) -> None:
    m = shown.bundle.manifest
    (component,) = facts.components
    entries = {b.name: b for b in m.components["transformer"].blocks}
    order = [name for names in m.components["transformer"].load_order.values() for name in names]
    assert [b.name for b in component.blocks] == order
    for block in component.blocks:
        entry = entries[block.name]
        assert block.file_bytes == sum(f.bytes for f in entry.files)
        assert {e.function: e.accuracy for e in block.errors_of("lowering")} == entry.accuracy
        assert block.loads == sum(name == f"transformer/{block.name}" for name, _ in m.calls())
    assert component.weight_bytes == {"float32": sum(sum(b.weight_bytes.values()) for b in entries.values())}
    assert facts.built is not None
    assert (
        facts.built.bytes
        == sum(p.stat().st_size for p in shown.bundle.path.rglob("*") if p.is_file())
        - (shown.bundle.path / "manifest.json").stat().st_size
    )
    name, worst = facts.worst("lowering") or pytest.fail("nothing was measured")
    assert worst.accuracy.relative_error == max(
        a.relative_error for b in entries.values() for a in (b.accuracy or {}).values()
    )
    assert name.startswith("transformer/")
    (checkpoint,) = facts.checkpoints
    assert checkpoint.component == "transformer"
    assert re.fullmatch("[0-9a-f]{64}", checkpoint.sha256 or "")


def test_a_number_that_is_none_is_the_largest_error(edited: Callable[..., Bundle]) -> None:
    """Files have none: one that has is refused when it is opened."""
    bundle = edited(lambda data, folder: None)
    data = bundle.manifest.model_dump()
    data["components"]["transformer"]["blocks"][1]["accuracy"]["base"]["relative_error"] = math.nan
    found = bundle_facts(dataclasses.replace(bundle, manifest=Manifest.model_validate(data)))
    name, _ = found.worst("lowering") or pytest.fail("nothing was measured")
    assert name == f"transformer/{found.components[0].blocks[1].name}"
    page = render(found)
    assert "NaN or infinite" in page
    charts = re.search(r'<script type="application/json" id="charts">(.*?)</script>', page)
    assert charts is not None
    json.loads(charts[1], parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))


def test_a_plan_has_the_same_facts_as_its_bundle(onnx_bundle: Any, edited: Callable[..., Bundle]) -> None:
    recipe = load_recipe(onnx_bundle.project / "recipe.yaml", ["target=onnx"])
    planned = plan_facts(plan(recipe, base=onnx_bundle.project))
    built = bundle_facts(edited(lambda data, folder: None))
    assert planned.built is None
    for name in ("name", "model", "target", "target_options", "geometry", "sampler", "schemes", "weight_bytes"):
        assert getattr(planned, name) == getattr(built, name), name
    for a, b in zip(planned.blocks(), built.blocks(), strict=True):
        assert (a.name, a.functions, a.weight_bytes, a.structure, a.loads) == (
            b.name, b.functions, b.weight_bytes, b.structure, b.loads
        )  # fmt: skip
    page = render(planned)
    assert "Plan, not built" in page
    assert planned.loading == built.loading
    assert not [id_ for id_ in report_charts(planned, []) if "error" in id_ or "timeline" in id_]
    parsed(page)


# --- the timeline ------------------------------------------------------------------------------------


def test_what_was_played_is_drawn(shown: Any, played: Timeline) -> None:
    component = shown.bundle.manifest.components["transformer"]
    steps, once = component.load_order["step"], component.load_order["prompt"]
    loaded = [i.block for i in played.lanes["loader"]]  # nothing stays; the next step's first may be on its way
    assert loaded[: len(once) + 3 * len(steps)] == [*once, *steps * 3]
    ahead = len(loaded) - len(once) - 3 * len(steps)
    assert ahead <= 1
    assert [i.block for i in played.lanes["compute"]] == [*once, *steps * 3]
    assert {i.function for i in played.lanes["compute"]} == {"base", "merged"}
    size = {b.name: sum(b.weight_bytes.values()) for b in component.blocks}
    made = shown.bundle.manifest.loading.made_from
    calls = [c for phase in made.run["phases"] for c in phase["calls"]]
    one = max(size[c["block"].partition("/")[2]] + c["activation_bytes"] + c["live_bytes"] for c in calls)
    assert played.peak_bytes == one  # one after the other
    held = played.memory[-1][1] - ahead * size[steps[0]]
    assert held in {c["live_bytes"] for c in calls}  # the video would go on
    times = [t for t, _ in played.memory]
    assert times == sorted(set(times))
    assert played.budget_bytes == shown.bundle.manifest.memory_budget_bytes
    rows = {r.name.removeprefix("transformer/"): r for r in words.totals(played).rows}
    assert {name: (r.loads, r.runs) for name, r in rows.items()} == {
        name: (1, 1) if name in once else (3 + ahead * (name == steps[0]), 3) for name in size
    }
    assert sum(r.share for r in rows.values()) <= 1


def test_a_trace_has_what_was_predicted_of_its_plan(shown: Any, played: Timeline) -> None:
    both = trace_timelines(shown.trace, shown.bundle)
    assert [t.title for t in both] == ["predicted", "played"]
    assert both[1] == played
    expected = predicted_timeline(shown.bundle.manifest.loading, played.budget_bytes) or pytest.fail("none")
    assert both[0].peak_bytes == expected.peak_bytes
    assert both[0].end_s == pytest.approx(expected.end_s)
    for lane, intervals in expected.lanes.items():
        assert [(i.block, i.function) for i in both[0].lanes[lane]] == [(i.block, i.function) for i in intervals]


def test_the_prediction_is_drawn_as_the_manifest_says(edited: Callable[..., Bundle]) -> None:
    loading = edited(lambda data, folder: None).manifest.loading
    found = predicted_timeline(loading, 7) or pytest.fail("nothing is predicted")
    assert loading.prediction is not None
    assert found.end_s == loading.prediction.total_s
    assert found.peak_bytes == loading.prediction.peak_bytes
    assert found.memory[-1][1] == 0
    assert found.budget_bytes == 7
    loads = Counter(f"{i.component}/{i.block}" for i in found.lanes["loader"])
    assert loads == loads_of(loading.plan)
    made = loading.made_from or pytest.fail("made from nothing")
    calls = [(c["block"], c["function"]) for p in made.run["phases"] for _ in range(p["times"]) for c in p["calls"]]
    assert [(f"{i.component}/{i.block}", i.function) for i in found.lanes["compute"]] == calls


def test_a_bundle_of_before_there_was_a_prediction(edited: Callable[..., Bundle]) -> None:
    found = bundle_facts(edited(lambda data, _: data["loading"].update(prediction=None, made_from=None)))
    assert predicted_timeline(found.loading, None) is None
    assert "says nothing of when its loads are predicted" in render(found)


def predicted(played: Timeline) -> Timeline:
    """A timeline as a planner would give: everything twice as fast, and loads ahead of runs."""
    lanes = {
        lane: tuple(Interval(i.component, i.block, i.function, i.start_s / 2, i.end_s / 2) for i in intervals)
        for lane, intervals in played.lanes.items()
    }
    memory = tuple((t / 2, b * 2) for t, b in played.memory)
    return Timeline("predicted", lanes, memory, "weights and activations", played.budget_bytes)


def test_predicted_and_played_are_drawn_on_one_scale(facts: Facts, played: Timeline) -> None:
    both = [predicted(played), played]
    charts = report_charts(facts, both)
    rows = charts["chart-timeline"]["encoding"]["y"]["sort"]
    assert rows == ["predicted: loader", "predicted: compute", "played: loader", "played: compute"]
    for name in ("chart-timeline", "chart-memory"):
        window = {p["name"]: p["value"] for p in charts[name]["params"]}
        assert window == {"shown_from": 0, "shown_to": played.end_s}
    lines = charts["chart-memory"]["layer"]
    assert {v["title"] for v in lines[0]["data"]["values"]} == {"predicted", "played"}
    assert any("budget" in str(layer["encoding"].get("text")) for layer in lines[1:])
    parsed(render(facts, both))
    png = picture(facts, both)
    assert png.startswith(b"\x89PNG")


def test_a_budget_far_above_the_peak_is_said_and_not_drawn(facts: Facts, played: Timeline) -> None:
    far = Timeline("played", played.lanes, played.memory, played.memory_of, 1000 * played.peak_bytes)
    assert len(report_charts(facts, [far])["chart-memory"]["layer"]) == 1
    assert "0% of the budget of" in words.memory_note([far])


# --- the page ----------------------------------------------------------------------------------------


def test_the_page_is_valid_and_small(page: str) -> None:
    tree = parsed(page)
    ids = [e.get("id") for e in tree.iter() if e.get("id")]
    assert len(ids) == len(set(ids))
    targets = {e.get("href")[1:] for e in tree.iter(f"{HTML}a")}
    labels = {e.get("aria-labelledby") for e in tree.iter() if e.get("aria-labelledby")}
    assert (targets | labels) <= set(ids)
    assert len(page.encode()) < 2_000_000


def test_hostile_texts_stay_texts(page: str, shown: Any) -> None:
    tree = parsed(page)
    assert len(list(tree.iter(f"{HTML}script"))) == 3  # data, library, and what draws
    assert not list(tree.iter(f"{HTML}img"))
    hostile = shown.bundle.manifest.name
    said = texts(tree)
    block = f"{hostile}pair"
    assert said.count(hostile) >= 3  # heading, tool and version
    assert block in said  # the block's row
    assert any(f"“{hostile}”, seed 3" in t for t in said)
    assert any(f"# {hostile}" in t for t in said)  # the recipe
    charts = next(e for e in tree.iter(f"{HTML}script") if e.get("id") == "charts")
    data = json.loads("".join(charts.itertext()))
    assert block in {v["block"] for v in data["chart-bytes-0"]["data"]["values"]}


def test_nothing_is_fetched(page: str) -> None:
    tree = parsed(page)
    for e in tree.iter():
        for attribute in ("src", "href", "srcset", "action", "poster", "data"):
            value = e.get(attribute, "#")
            assert value.startswith(("#", "data:video/mp4;base64,")), (e.tag, attribute, value[:80])
    assert "@import" not in page
    assert "url(" not in "".join(t for e in tree.iter(f"{HTML}style") for t in e.itertext())
    policy = next(e.get("content") for e in tree.iter(f"{HTML}meta") if e.get("http-equiv"))
    assert policy.startswith("default-src 'none'; script-src 'sha256-")
    assert not re.search(r"unsafe-eval|script-src[^;]*unsafe-inline|https?:", policy)


def test_every_chart_has_its_figures_in_a_table(page: str, facts: Facts) -> None:
    tree = parsed(page)
    scrolled = [e for e in tree.iter(f"{HTML}div") if (e.get("class") or "").startswith("scroll")]
    assert scrolled
    for e in scrolled:
        assert e.get("tabindex") == "0"
        assert e.get("role") == "region"
        assert e.get("aria-label")
    cells = {"".join(c.itertext()).strip() for tag in ("td", "th") for c in tree.iter(f"{HTML}{tag}")}
    assert {f"{s.timestep:.3f}" for s in facts.sampler.steps} <= cells
    assert {words.figure(e.accuracy.relative_error) for b in facts.blocks() for e in b.errors} <= {
        word for cell in cells for word in cell.split()
    }


def test_the_video_is_h264_of_the_bundles_frames(page: str, shown: Any) -> None:
    (video,) = parsed(page).iter(f"{HTML}video")
    assert video.get("aria-label").endswith(shown.bundle.manifest.golden.prompt)
    kind, _, data = video.get("src").partition(",")
    assert kind == "data:video/mp4;base64"
    with av.open(io.BytesIO(base64.b64decode(data))) as container:
        (stream,) = container.streams
        assert (stream.codec_context.name, stream.codec_context.pix_fmt) == ("h264", "yuv420p")
        assert stream.average_rate == shown.bundle.manifest.geometry.fps
        frames = [f.to_ndarray(format="rgb24") for f in container.decode(video=0)]
    assert len(frames) == 12
    assert frames[0][16, 4, 0] > 150  # the square is where it was
    assert frames[0][16, 28, 0] < 100


def test_the_same_bundle_gives_the_same_page(shown: Any, facts: Facts, played: Timeline, page: str) -> None:
    clip = golden_clip(shown.bundle)
    assert clip is not None
    assert render(facts, [played], dataclasses.replace(clip, uri="")) == page.replace(embedded(page), "")


def test_a_golden_that_is_no_video_is_refused(edited: Callable[..., Bundle]) -> None:
    def spoil(data: dict[str, Any], folder: Path) -> None:
        file = describe_file(folder / data["recipe"]["path"], folder).model_dump(mode="json")
        data["golden"] = {"file": file, "prompt": "a", "seed": 0, "psnr_db": 50.0, "limit_db": 40.0}

    with pytest.raises(BundleError, match=r"'recipe\.yaml' holds no video"):
        golden_clip(edited(spoil))
