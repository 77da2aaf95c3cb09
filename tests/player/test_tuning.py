"""Schedules that are searched for: what is measured of steps, the whole search, its goals, and what it refuses."""

from __future__ import annotations

import dataclasses
import json
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from rich.console import Console

import toolchain
from toolchain.accuracy.confidence import lower_bound
from toolchain.accuracy.eager import EagerPipeline
from toolchain.accuracy.golden_video import SAME_DB, psnr
from toolchain.accuracy.step_errors import calls_to_measure, measure_steps
from toolchain.build.tuning import CONFIDENCE, Tried, Tuned, choose, front_of
from toolchain.errors import RecipeError
from toolchain.formats.recipe import Recipe, SamplerRecipe
from toolchain.formats.recipe_file import load_recipe, parse_recipe
from toolchain.player.video import to_bytes
from toolchain.system.store import ENTRY_FILE, Store
from toolchain.ui.tuning import steps_text, tuned_table

PROMPTS = ["a blue square", "two cats"]
STEPS = 4


@pytest.fixture(scope="module")
def split(recipe_data: dict[str, Any]) -> Recipe:
    """The small recipe, whose steps may do all that steps can."""
    passes = ["token-merge", "guidance-split", "partition"]
    changes = {"sampler": {"steps": STEPS}, "transformer": recipe_data["transformer"] | {"passes": passes}}
    return parse_recipe(recipe_data | changes)


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Store:
    return Store(tmp_path_factory.mktemp("store"))


Tune = Callable[..., Tuned]


@pytest.fixture(scope="module")
def tune(split: Recipe, source: Path, store: Store) -> Tune:
    """A search that knows what those before it measured."""

    def run(**options: Any) -> Tuned:
        return toolchain.tune(
            split, **({"base": source, "prompts": PROMPTS, "points": 3, "store": store, "seed": 5} | options)
        )

    return run


@pytest.fixture(scope="module")
def tuned(tune: Tune) -> Tuned:
    return tune()


# --- the errors of steps -----------------------------------------------------------------------------


def test_errors_are_those_of_steps_that_leave_things_out(split: Recipe, source: Path) -> None:
    """At the last step, where what it loses is what the video loses."""
    pipeline = EagerPipeline(split, source)
    y, mask = pipeline.encode(PROMPTS[0])
    last = STEPS - 1

    def latents(**changes: Any) -> torch.Tensor:
        own = split.sampler.model_dump() | changes
        return pipeline.under(SamplerRecipe.model_validate(own)).denoise(y, mask, 3)

    full = latents()

    def lost(**changes: Any) -> float:
        return float((latents(**changes) - full).square().mean().sqrt())

    sampler = SamplerRecipe.model_validate({"steps": STEPS, "reuse": {"steps": [1]}})
    found = measure_steps(pipeline.under(sampler), y, mask, 3)
    errors = found.errors
    reuse = {"reuse": [{"steps": [last]}]}
    alone = {"conditional": {"steps": [last], "difference": "none"}}
    kept = {"conditional": {"steps": [last], "difference": "last"}}
    assert errors.reused[last - 1, last] == pytest.approx(lost(**reuse), rel=1e-3)
    assert errors.alone[last, last] == pytest.approx(lost(**alone), rel=1e-3)
    assert errors.alone[last - 1, last] == pytest.approx(lost(**reuse, **alone), rel=1e-3)
    assert errors.kept[last, last - 1, last] == pytest.approx(lost(**kept), rel=1e-3)
    assert errors.kept[last - 1, last - 1, last] == pytest.approx(lost(**reuse, **kept), rel=1e-3)
    assert found.growth.shape == (STEPS,)
    # the error of the second step, as it is at the end
    end = found.at_the_end.reused[0, 1]
    assert end == pytest.approx(lost(reuse=[{"steps": [1]}]), rel=1e-2)


def test_calls_that_are_said_beforehand_are_made(split: Recipe, source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sampler = SamplerRecipe.model_validate({"steps": STEPS, "reuse": {"steps": [1]}})
    pipeline = EagerPipeline(split, source).under(sampler)
    encoded = pipeline.encode(PROMPTS[0])
    own = pipeline.denoiser(*encoded)
    made: list[bool] = []

    def counted(batch: Any, step: Any, x_mask: Any) -> Any:
        made.append(step.reuse is None)
        return own(batch, step, x_mask)

    monkeypatch.setattr(pipeline, "denoiser", lambda *_: counted)
    measure_steps(pipeline, *encoded, 0)
    assert len(made) - STEPS * (STEPS - 1) // 2 == calls_to_measure(STEPS)


# --- the search --------------------------------------------------------------------------------------


def test_the_front(tuned: Tuned, split: Recipe) -> None:
    front = tuned.front
    assert front[0].sampler == tuned.full.sampler == tuned.own.sampler == split.sampler
    assert (front[0].psnr_db, front[0].worst_db) == (SAME_DB, SAME_DB)
    assert [t.seconds for t in front] == sorted((t.seconds for t in front), reverse=True)
    assert [t.psnr_db for t in front] == sorted((t.psnr_db for t in front), reverse=True)
    assert len(front) > 2 and all(t.worst_db <= t.psnr_db for t in front)
    assert any(t.sampler.reuse for t in front)
    assert tuned.chosen is None and tuned.recipe == split


def test_quality_is_what_the_pipeline_makes(tuned: Tuned, split: Recipe, source: Path) -> None:
    one, whole = tuned.front[-1], EagerPipeline(split, source)
    left_out = whole.under(one.sampler)
    each = [psnr(*(to_bytes(p.video(v.prompt, v.seed)) for p in (left_out, whole))) for v in tuned.videos]
    assert one.psnr_db == pytest.approx(sum(each) / len(each))
    assert one.promised_db == lower_bound(each, CONFIDENCE) < one.psnr_db


def test_a_stopped_search_goes_on_to_the_same_end(
    recipe_data: dict[str, Any], source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bare = parse_recipe(
        recipe_data | {"sampler": {"steps": STEPS}, "transformer": {"checkpoint": "transformer", "passes": []}}
    )

    def tune(store: Store) -> Tuned:
        return toolchain.tune(bare, base=source, prompts=PROMPTS[:1], points=2, store=store)

    tuned = tune(Store(tmp_path / "other"))
    made = 0
    plain = EagerPipeline.denoise

    def stopping(limit: int) -> Callable[..., torch.Tensor]:
        def denoise(self: EagerPipeline, *arguments: Any) -> torch.Tensor:
            nonlocal made
            if made == limit:
                raise KeyboardInterrupt
            made += 1
            return plain(self, *arguments)

        return denoise

    own = Store(tmp_path / "store")
    monkeypatch.setattr(EagerPipeline, "denoise", stopping(3))
    with pytest.raises(KeyboardInterrupt):
        tune(own)
    monkeypatch.setattr(EagerPipeline, "denoise", stopping(1000))
    made = 0
    assert tune(own) == tuned
    rest, made = made, 0
    assert tune(own) == tuned
    assert made == 0
    assert 0 < rest < len([e for e in own.entries() if "psnr_db" in e.meta or "call_s" in e.meta])


@pytest.mark.slow
def test_a_killed_search_goes_on_to_the_same_end(
    recipe_data: dict[str, Any], source: Path, tmp_path: Path, start_cli: Any, run_cli: Any
) -> None:
    bare = {"sampler": {"steps": STEPS}, "transformer": {"checkpoint": "transformer", "passes": []}}
    recipe, prompts = source / "bare.yaml", tmp_path / "prompts.txt"
    recipe.write_text(parse_recipe(recipe_data | bare).to_yaml())
    prompts.write_text(PROMPTS[0])
    command = ("tune", recipe, "--prompts", prompts, "--points", "2", "--json")
    cache = tmp_path / "cache"
    results = cache / "tunings"

    def kept() -> dict[str, int]:
        """Results, and when they were made."""
        return {str(p.relative_to(results)): p.parent.stat().st_mtime_ns for p in results.rglob(ENTRY_FILE)}

    process = start_cli(*command, cwd=tmp_path, cache=cache)
    while process.poll() is None and len(kept()) < 3:
        time.sleep(0.01)
    process.kill()
    process.communicate()
    assert process.returncode == -signal.SIGKILL
    before = kept()

    ran, undisturbed = (
        run_cli(*command, cwd=tmp_path, env={"SORA_COMPILE_CACHE": str(c)}) for c in (cache, tmp_path / "other")
    )
    assert (ran.code, ran.out) == (0, undisturbed.out), ran.err
    after = kept()
    assert len(before) >= 3 and before.items() < after.items()
    assert list((cache / "scratch").iterdir()) == []


# --- goals -------------------------------------------------------------------------------------------


def test_goals(tuned: Tuned) -> None:
    first, *_, last = tuned.front
    for t in tuned.front:
        assert choose(tuned.front, t.seconds, None) == t
        found = choose(tuned.front, None, t.promised_db)
        assert found is not None and found.seconds <= t.seconds and found.promised_db >= t.promised_db
    assert choose(tuned.front, first.seconds + 1, None) == first
    assert choose(tuned.front, None, last.promised_db - 1) == last
    assert choose(tuned.front, None, None) is None


def test_goals_that_nothing_meets(tuned: Tuned) -> None:
    with pytest.raises(RecipeError, match=r"--latency 0.001: cannot be met: .* s is the fastest schedule found, at "):
        choose(tuned.front, 1e-3, None)
    with pytest.raises(RecipeError, match="--quality 300: cannot be met: 200 dB"):
        choose(tuned.front, None, 300.0)


def test_what_is_better_in_nothing_is_left_out(split: Recipe) -> None:
    def tried(seconds: float, db: float) -> Tried:
        return Tried(split.sampler, seconds, 0, db, db, db)

    own = tried(3.0, 40.0), tried(2.0, 41.0), tried(2.0 + 1e-12, 30.0), tried(1.0, 20.0), tried(5.0, 50.0)
    assert front_of(own) == (own[4], own[1], own[3])


def test_the_command(tuned: Tuned, split: Recipe, source: Path, store: Store, tmp_path: Path, run_cli: Any) -> None:
    recipe, prompts = source / "split.yaml", tmp_path / "prompts.txt"
    recipe.write_text(split.to_yaml())
    prompts.write_text("\n".join(PROMPTS) + "\n\n")
    out, picture = tmp_path / "tuned.yaml", tmp_path / "front.png"
    given = ("--prompts", prompts, "--seed", "5", "--points", "3", "--quality", "20")
    env = {"SORA_COMPILE_CACHE": str(store.root)}
    ran = run_cli("tune", recipe, *given, "-o", out, "--front", picture, "--json", cwd=tmp_path, env=env)
    assert ran.code == 0, ran.err
    found = json.loads(ran.out)
    best = choose(tuned.front, None, 20.0)
    assert best is not None and found["chosen"]["seconds"] <= best.seconds
    assert found["chosen"]["psnr_db"] >= found["chosen"]["promised_psnr_db"] >= 20.0
    # the file alone gives what was chosen, from another folder
    written = load_recipe(out)
    assert written.sampler == SamplerRecipe.model_validate(found["chosen"]["sampler"])
    timeline = toolchain.plan(written, base=tmp_path).loading.timeline
    assert (timeline.total_s, timeline.peak_bytes) == (found["chosen"]["seconds"], found["chosen"]["peak_bytes"])
    with Image.open(picture) as drawn:
        assert drawn.format == "PNG"


def test_the_table(tuned: Tuned, split: Recipe) -> None:
    leaping = SamplerRecipe.model_validate(
        {"steps": 9, "leap": 5, "reuse": {"steps": [1, 3]}, "conditional": {"steps": [3, 4]}}
    )
    assert steps_text(leaping) == "BrBcCB"
    shown = Console(width=200)
    with shown.capture() as caught:
        shown.print(tuned_table(dataclasses.replace(tuned, chosen=tuned.front[-1])))
    (line,) = [line for line in caught.get().splitlines() if "chosen" in line]
    assert steps_text(tuned.front[-1].sampler) in line
    assert f"{tuned.front[-1].psnr_db:.2f}" in line


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"quality_db": 30.0, "latency_s": 1.0}, "choose one"),
        ({"memory_bytes": 1000}, "memory"),
        ({"prompts": None}, "give --prompts, or gate.golden"),
        ({"prompts": []}, "there are no prompts"),
        ({"prompts": PROMPTS[:1], "quality_db": 30.0}, "give two prompts or more"),
        ({"points": 0}, "--points 0"),
    ],
)
def test_refused(options: dict[str, Any], said: str, tune: Tune) -> None:
    with pytest.raises(RecipeError, match=said):
        tune(**options)


def test_the_command_refuses(tmp_path: Path, run_cli: Any) -> None:
    for options, said in (
        (("-o", "tuned.yaml"), "-o tuned.yaml: nothing is chosen without a goal; give --latency or --quality"),
        (("--prompts", "none.txt"), "--prompts none.txt: cannot be read: No such file or directory"),
    ):
        ran = run_cli("tune", "tiny", *options, cwd=tmp_path)
        assert (ran.code, ran.err.strip().splitlines()[-1]) == (2, f"sora-compile: {said}")
