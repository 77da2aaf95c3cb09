"""A bundle played within several budgets is the same video, whatever is loaded when; on every target."""

from __future__ import annotations

import gc
import threading
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import toolchain
from toolchain.errors import BundleError, RecipeError
from toolchain.formats.bundle import Bundle
from toolchain.formats.recipe import Recipe, TargetSpec
from toolchain.planning.loading.events import Load, LoadingPlan
from toolchain.planning.loading.run import Run
from toolchain.planning.loading.unrolled import unroll
from toolchain.player import Player, player
from toolchain.player.opening import load_engine
from toolchain.player.video import to_bytes

pytestmark = pytest.mark.slow

PROMPT, SEED = "a red fox", 5


@pytest.fixture(scope="module", params=["executorch", "onnx", "coreml"])
def built(request: pytest.FixtureRequest, build: Callable[[Recipe], Bundle], bundle: Bundle, recipe: Recipe) -> Bundle:
    if request.param == bundle.manifest.target.name:
        return bundle
    return build(recipe.model_copy(update={"target": TargetSpec(name=request.param)}))


@pytest.fixture(scope="module")
def whole(built: Bundle) -> torch.Tensor:
    """The video's frames, with everything in memory."""
    return to_bytes(Player(built).video(PROMPT, SEED))


def budgets(bundle: Bundle) -> dict[str, int]:
    """From the least that any plan works with to everything."""
    made = bundle.manifest.loading.made_from
    assert made is not None
    u = unroll(Run.from_data(made.run))
    after = [*u.block[1:], u.block[-1]]
    two = max(r + u.size[a] + (u.size[b] if a != b else 0) for r, a, b in zip(u.room, u.block, after, strict=True))
    return {"least": u.least_budget, "two blocks": two, "everything": sum(u.size) + max(u.room)}


def engines() -> int:
    """How many engines of any target are alive."""
    gc.collect()
    names = [(str(type(o).__module__), type(o).__name__) for o in gc.get_objects()]
    return sum(module.startswith("targets.") and name.endswith("Engine") for module, name in names)


@pytest.mark.parametrize("name", ["least", "two blocks", "everything"])
def test_every_budget_gives_the_same_video(built: Bundle, whole: torch.Tensor, name: str) -> None:
    """Byte for byte; not that of its file, since H.264 does not promise the same bytes for the same frames."""
    budget, threads, before = budgets(built)[name], threading.active_count(), engines()
    playing = Player(built, memory_budget=budget)
    assert torch.equal(to_bytes(playing.video(PROMPT, SEED)), whole)
    played, predicted = playing.played, playing.followed.predicted
    assert played is not None
    assert predicted is not None
    assert played.peak_bytes <= budget
    assert predicted.peak_bytes <= budget
    assert (played.loads, played.loads_bytes) == (predicted.loads, predicted.loads_bytes)
    assert played.calls == predicted.calls
    assert played.retries == 0
    assert threading.active_count() == threads
    assert engines() == before
    blocks = {block for block, _ in built.manifest.calls()}
    assert played.loads >= len(blocks)
    if name == "everything":
        assert played.loads == len(blocks)
    if name == "least" and built.manifest.target.name == "executorch":
        assert played.loads > len(blocks)  # on Core ML, activations of other calls leave room for all that stays


def test_no_more_engines_are_alive_than_the_plan_holds(built: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    playing = Player(built, memory_budget=budgets(built)["two blocks"])
    held, most = 0, 0
    for event in playing.followed.plan.events():
        held += isinstance(event, Load) or -1 if not hasattr(event, "function") else 0
        most = max(most, held)
    alive: weakref.WeakSet[Any] = weakref.WeakSet()
    counts: list[int] = []

    def load(*arguments: Any) -> Any:
        engine = load_engine(*arguments)
        alive.add(engine)
        counts.append(len(alive))
        return engine

    monkeypatch.setattr(player, "load_engine", load)
    playing.video(PROMPT, SEED)
    assert len(counts) == playing.played.loads if playing.played else pytest.fail("nothing was played")
    assert max(counts) <= most
    assert not alive


def test_too_small_a_budget_says_the_least(built: Bundle) -> None:
    least = budgets(built)["least"]
    with pytest.raises(RecipeError, match=r"too little"):
        Player(built, memory_budget=least - 1)
    Player(built, memory_budget=least)


@pytest.mark.parametrize("name", ["least", "two blocks", "everything"])
def test_a_leap_comes_sooner_than_planned(
    bundle: Bundle, player: Callable[..., Player], variant: Callable[..., Recipe], name: str
) -> None:
    dynamic = player(variant(steps=20, leap="paper"), memory_budget=budgets(bundle)[name])
    video = dynamic.video(PROMPT, SEED)
    played, predicted = dynamic.played, dynamic.followed.predicted
    assert played is not None
    assert predicted is not None
    assert played.calls < predicted.calls, "nothing was left out"
    assert played.loads <= predicted.loads
    assert played.peak_bytes <= budgets(bundle)[name]
    assert torch.equal(video, player(variant(steps=20, leap="paper")).video(PROMPT, SEED))


def test_stages_by_themselves_load_what_they_need(bundle: Bundle, player: Callable[..., Player]) -> None:
    playing = player()
    y, mask = playing.encode(PROMPT)
    assert {r.block.partition("/")[0] for r in playing.trace.records} == {"text_encoder"}
    latents = playing.denoise(y, mask, SEED)
    assert {r.block.partition("/")[0] for r in playing.trace.records} == {"text_encoder", "transformer"}
    assert torch.equal(playing.decode(latents), player().video(PROMPT, SEED))
    assert torch.equal(playing.decode(latents), playing.decode(latents))


# --- loads that fail ---------------------------------------------------------------------------------


def failing(monkeypatch: pytest.MonkeyPatch, times: int) -> None:
    left = [OSError(5, "Input/output error")] * times

    def load(bundle: Bundle, component: str, block: Any, *rest: Any) -> Any:
        if left and block.name == "pair_0":
            raise left.pop()
        return load_engine(bundle, component, block, *rest)

    monkeypatch.setattr(player, "load_engine", load)


def test_a_load_that_fails_once(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = Player(bundle).video(PROMPT, SEED)
    failing(monkeypatch, 1)
    playing = Player(bundle)
    assert torch.equal(playing.video(PROMPT, SEED), expected)
    assert playing.played is not None
    assert playing.played.retries == 1


def test_a_file_that_cannot_be_read(bundle: Bundle, tmp_path: Path) -> None:
    """It goes after the bundle's files were checked; the error is one line, with block and file."""
    playing = Player(bundle)
    (entry,) = (b for b in bundle.manifest.components["transformer"].blocks if b.name == "pair_0")
    path = bundle.path / entry.artifact
    path.rename(tmp_path / "gone")
    try:
        with pytest.raises(toolchain.SoraCompileError) as caught:
            playing.video(PROMPT, SEED)
    finally:
        (tmp_path / "gone").rename(path)
    assert str(caught.value) == (
        f"'transformer/pair_0' cannot be loaded, tried 2 times: '{path}': cannot be read: No such file or directory"
    )
    assert not [t for t in threading.enumerate() if t.name == "loader"]


# --- bundles of before -------------------------------------------------------------------------------


def test_a_bundle_without_a_prediction_is_not_planned_anew(bundle: Bundle) -> None:
    loading = bundle.manifest.loading.model_copy(update={"made_from": None, "prediction": None})
    older = Bundle(bundle.path, bundle.manifest.model_copy(update={"loading": loading}))
    with pytest.raises(BundleError, match="earlier version"):
        Player(older, memory_budget=10**9)
    playing = Player(older)
    assert torch.equal(playing.video(PROMPT, SEED), Player(bundle).video(PROMPT, SEED))
    assert playing.followed.predicted is None
    plan = LoadingPlan.from_data(loading.plan)
    assert playing.played is not None
    assert playing.played.loads == sum(isinstance(e, Load) for e in plan.events())
