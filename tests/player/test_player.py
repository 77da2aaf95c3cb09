"""Videos played from a bundle against the same pipeline in PyTorch, and what the player writes."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
import torch
from PIL import Image

from toolchain.accuracy.eager import EagerPipeline
from toolchain.build import entries as describe
from toolchain.formats.bundle import Bundle
from toolchain.formats.loading import loads_of
from toolchain.formats.recipe import Recipe
from toolchain.formats.recipe_file import parse_recipe
from toolchain.models.family import find_family
from toolchain.models.open_sora_v1_2.vae import OpenSoraVAE
from toolchain.planning.sampling import sampling
from toolchain.player import Player
from toolchain.player.video import to_bytes
from toolchain.ui.report.timeline import predicted_timeline, trace_timelines

pytestmark = pytest.mark.slow

PROMPT = "a blue square"
LONG = "a red fox runs over the snow in the last light of a cold day, and then it sleeps under a tree. "
ALIKE = 80.0
"""Decibels from which two videos count as equal. 50 are promised and float32 gives over 100, but these random
models make videos that differ by no more than 55 dB when one of them leaps."""
SAMPLERS: dict[str, dict[str, Any]] = {
    "plain": {},
    "leap": {"leap": 2},
    "dynamic-leap": {"steps": 20, "leap": "paper"},
    "dynamic-leap-code": {"steps": 30, "leap": "code"},
    "merged": {"merged_steps": 2},
    "merged-leap": {"leap": 2, "merged_steps": 2},
    "merged-dynamic-leap": {"steps": 20, "leap": "paper", "merged_steps": 9},
}

Psnr = Callable[[torch.Tensor, torch.Tensor], float]
Players = Callable[..., Player]
Variant = Callable[..., Recipe]
Eager = Callable[[Recipe], EagerPipeline]
Events = Callable[[Player], list[dict[str, Any]]]


def denoiser_calls(events: list[dict[str, Any]]) -> list[str]:
    """The function of the transformer's pair at every call."""
    runs = [e["name"] for e in events if e["component"] == "transformer" and e["cat"] == "run"]
    return [name.partition(".")[2] for name in runs if name.startswith("pair_0.")]


# --- the video ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", SAMPLERS)
def test_equals_the_eager_pipeline(
    name: str, variant: Variant, player: Players, eager: Eager, psnr: Psnr, events: Events
) -> None:
    own = variant(**SAMPLERS[name])
    playing = player(own)
    video = playing.video(PROMPT, seed=1)
    assert video.shape == (22, 3, 40, 48)
    assert video.dtype == torch.float32
    assert psnr(video, eager(own).video(PROMPT, seed=1)) >= ALIKE
    calls = denoiser_calls(events(playing))
    merged = own.sampler.merged_steps
    assert calls == ["merged"] * merged + ["base"] * (len(calls) - merged)
    if own.sampler.leap is None:
        assert len(calls) == own.sampler.steps
    else:
        assert len(calls) < own.sampler.steps


def test_samplers_make_different_videos(variant: Variant, player: Players, psnr: Psnr) -> None:
    """Else the comparison with the eager pipeline would hold them apart from nothing."""
    videos = [player(variant(**SAMPLERS[n])).video(PROMPT, seed=1) for n in ("plain", "leap", "merged", "merged-leap")]
    for i, video in enumerate(videos):
        assert all(psnr(video, other) < ALIKE for other in videos[:i])


def test_built_manifest_has_the_recipes_sampler(bundle: Bundle, recipe: Recipe) -> None:
    assert bundle.manifest.sampler == describe.sampler(recipe, sampling(recipe, find_family(recipe.model)))


def test_stages_equal_the_eager_ones(recipe: Recipe, player: Players, eager: Eager, decoder: OpenSoraVAE) -> None:
    """Each stage on the same input, so that an error of one is not blamed on another."""
    playing, model = player(), eager(recipe)
    y, mask = playing.encode(PROMPT)
    expected_y, expected_mask = model.encode(PROMPT)
    assert y.shape == (1, 32, 32)
    torch.testing.assert_close(y, expected_y, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(mask, expected_mask, rtol=0, atol=0)
    latents = playing.denoise(expected_y, mask, seed=2)
    assert latents.shape == (1, 4, 7, 5, 6)
    torch.testing.assert_close(latents, model.denoise(expected_y, mask, seed=2), rtol=1e-4, atol=1e-4)
    pixels = playing.decode(latents)
    expected = decoder.decode(latents, 22)[0].transpose(0, 1)
    torch.testing.assert_close(pixels, expected, rtol=1e-4, atol=1e-3)


def test_last_chunk_and_last_group_are_short(bundle: Bundle, player: Players, events: Events) -> None:
    decoding = bundle.manifest.decoding
    assert decoding is not None
    assert [(s.rate, s.layout) for s in decoding.stages] == [("chunk", "clip"), ("frames", "frames")]
    chunks, groups = ([(p.takes, p.gives, p.function) for p in s.pieces] for s in decoding.stages)
    assert chunks == [(5, 17, "base"), (2, 5, "tail")]
    assert groups == [(4, 4, "base")] * 5 + [(4, 2, "base")]
    playing = player()
    video = playing.decode(torch.randn(1, 4, 7, 5, 6, generator=torch.Generator().manual_seed(0)))
    assert len(video) == 22
    vae = bundle.manifest.components["vae"]
    assert {rate: len(names) > 1 for rate, names in vae.load_order.items()} == {"chunk": True, "frames": True}
    runs = [e["name"] for e in events(playing) if e["cat"] == "run"]
    first = [f"{name}.{function}" for function in ("base", "tail") for name in vae.load_order["chunk"]]
    assert runs == first + [f"{name}.base" for name in vae.load_order["frames"]] * 6


def test_chunks_do_not_see_one_another(player: Players) -> None:
    """The second chunk's latents decide the last five frames and no others."""
    playing = player()
    latents = torch.randn(1, 4, 7, 5, 6, generator=torch.Generator().manual_seed(0))
    other = latents.clone()
    other[:, :, 5:] = 0
    first, second = playing.decode(latents), playing.decode(other)
    assert torch.equal(first[:17], second[:17])
    assert not torch.equal(first[17:], second[17:])


# --- prompts and seeds -------------------------------------------------------------------------------


@pytest.mark.parametrize("prompt", [LONG, "", "   "], ids=["long", "empty", "blank"])
def test_long_and_empty_prompts(prompt: str, recipe: Recipe, player: Players, eager: Eager, psnr: Psnr) -> None:
    said: list[str] = []
    playing = player(warn=said.append)
    video = playing.video(prompt, seed=1)
    assert psnr(video, eager(recipe).video(prompt, seed=1)) >= ALIKE
    assert psnr(video, playing.video(PROMPT, seed=1)) < ALIKE
    if prompt == LONG:
        assert len(said) == 1
        assert "longer than 32 tokens" in said[0]
    else:
        assert said == []


def test_what_is_cut_off_a_prompt_changes_nothing(player: Players) -> None:
    playing = player(warn=lambda text: None)
    one, two = (playing.encode(LONG + end) for end in ("a fox", "two foxes and a bear"))
    assert torch.equal(one[0], two[0])
    assert bool(one[1].all())


def test_the_same_seed_gives_the_same_video(player: Players, psnr: Psnr) -> None:
    playing = player()
    first = playing.video(PROMPT, seed=1)
    assert torch.equal(first, playing.video(PROMPT, seed=1))
    assert torch.equal(first, player().video(PROMPT, seed=1))
    assert psnr(first, playing.video(PROMPT, seed=2)) < ALIKE


# --- progress ----------------------------------------------------------------------------------------


def test_progress_is_told_in_order(player: Players, variant: Variant) -> None:
    told: list[tuple[str, int, int]] = []
    player(variant(**SAMPLERS["dynamic-leap"]), progress=lambda *event: told.append(event)).video(PROMPT)
    stages = list(dict.fromkeys(stage for stage, _, _ in told))
    assert stages == ["encode", "denoise", "decode"]
    assert [s for s, _, _ in told] == sorted((s for s, _, _ in told), key=stages.index)
    for stage in stages:
        (total,) = {t for s, _, t in told if s == stage}
        done = [d for s, d, _ in told if s == stage]
        assert (done[0], done[-1]) == (0, total)
        assert all(a < b for a, b in pairwise(done))


# --- frames given as condition -----------------------------------------------------------------------


@pytest.fixture(scope="session")
def conditioned(
    build: Callable[[Recipe], Bundle],
    bundle: Bundle,
    recipe: Recipe,
    edit: Callable[..., Bundle],
    tmp_path_factory: Any,
) -> Bundle:
    """The bundle with a transformer that takes frames as condition."""
    data = recipe.model_dump(mode="json") | {"text_encoder": None, "vae": None, "sampler": {"steps": 4}}
    data["transformer"] |= {"frame_conditions": True, "passes": []}
    built = build(parse_recipe(data))
    folder = tmp_path_factory.mktemp("conditioned") / "bundle"
    shutil.copytree(bundle.path, folder)
    for part in ("transformer", "goldens/transformer"):
        shutil.rmtree(folder / part)
        shutil.copytree(built.path / part, folder / part)
    components = bundle.manifest.components | {"transformer": built.manifest.components["transformer"]}
    return edit(Bundle(folder, bundle.manifest), components=components, sampler=built.manifest.sampler)


def test_frame_conditions_without_any_change_nothing(
    conditioned: Bundle, variant: Variant, player: Players, eager: Eager, psnr: Psnr
) -> None:
    assert "x_mask" in [i.name for i in conditioned.manifest.components["transformer"].inputs]
    video = player(bundle=conditioned).video(PROMPT, seed=1)
    assert psnr(video, eager(variant()).video(PROMPT, seed=1)) >= ALIKE


# --- the command -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def played(bundle: Bundle, run_cli_process: Any, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    """The folder in which the command played the bundle with everything it can write, and what it said."""
    folder = tmp_path_factory.mktemp("played")
    options = ("--seed", "7", "-o", "fox.mp4", "--frames", "frames", "--trace", "trace.json")
    return folder, run_cli_process("play", bundle.path, "--prompt", LONG, *options, cwd=folder)


def test_command_says_where_the_video_is(played: tuple[Path, Any]) -> None:
    folder, ran = played
    assert ran.code == 0, ran.err
    assert ran.out.strip() == "fox.mp4"
    warning, took, *table = ran.err.splitlines()
    assert warning == "sora-compile: warning: the prompt is longer than 32 tokens; its end is left out"
    assert took.startswith("played in ")
    assert [line.split()[0] for line in table if line.strip()][:2] == ["predicted", "time"]
    assert sorted(p.name for p in folder.iterdir()) == ["fox.mp4", "frames", "trace.json"]


def test_command_writes_the_video(played: tuple[Path, Any], bundle: Bundle) -> None:
    with av.open(str(played[0] / "fox.mp4")) as container:
        (stream,) = container.streams
        assert (stream.type, stream.codec_context.name) == ("video", "h264")
        assert (stream.width, stream.height) == (48, 40)
        assert stream.average_rate == bundle.manifest.geometry.fps == 8
        assert sum(1 for _ in container.decode(video=0)) == 22


def test_command_writes_frames(played: tuple[Path, Any], player: Players) -> None:
    pictures = sorted((played[0] / "frames").iterdir())
    assert [p.name for p in pictures] == [f"{i:03d}.png" for i in range(22)]
    found = np.stack([np.asarray(Image.open(p)) for p in pictures])
    video = player(warn=lambda text: None).video(LONG, seed=7)
    np.testing.assert_array_equal(found, to_bytes(video).numpy())


def test_command_writes_a_trace(played: tuple[Path, Any], bundle: Bundle) -> None:
    trace = json.loads((played[0] / "trace.json").read_text())
    names = [e["args"]["name"] for e in trace["traceEvents"] if e["ph"] == "M"]
    assert names == ["played", "loader", "compute", "predicted", "loader", "compute"]
    about = trace["otherData"]
    assert (about["bundle"], about["recipe_sha256"]) == ("small", bundle.manifest.recipe.sha256)
    for process, of in ((1, about["played"]), (2, about["predicted"])):
        own = [e for e in trace["traceEvents"] if e["pid"] == process]
        for category, lane, count in (("load", 1, of["loads"]), ("run", 2, of["calls"])):
            spans = [e for e in own if e["ph"] == "X" and e["tid"] == lane]
            assert {e["cat"] for e in spans} == {category}
            assert len(spans) == count
            assert all(e["ts"] >= 0 and e["dur"] >= 0 for e in spans)
            assert all(a["ts"] + a["dur"] <= b["ts"] + 1e-3 for a, b in pairwise(spans))  # one after the other
            assert {e["args"]["block"] for e in spans} == {block for block, _ in bundle.manifest.calls()}
        assert max(e["args"]["bytes"] for e in own if e["ph"] == "C") == of["peak_bytes"] <= of["budget_bytes"]
    runs = [(e["args"]["block"], e["args"]["function"]) for e in trace["traceEvents"] if e.get("cat") == "run"]
    assert runs == list(bundle.manifest.calls()) * 2


def test_a_report_takes_the_trace(played: tuple[Path, Any], bundle: Bundle) -> None:
    predicted, found = trace_timelines(played[0] / "trace.json", bundle)
    assert (predicted.title, found.title) == ("predicted", "played")
    expected = predicted_timeline(bundle.manifest.loading, found.budget_bytes) or pytest.fail("nothing is predicted")
    assert predicted.lanes.keys() == expected.lanes.keys()
    assert predicted.end_s == pytest.approx(expected.end_s)
    assert predicted.peak_bytes == expected.peak_bytes
    assert {i.component for i in found.lanes["compute"]} == set(bundle.manifest.components)
    assert found.peak_bytes <= bundle.manifest.loading.plan["budget_bytes"]
    assert found.budget_bytes is None  # everything stays
    assert found.memory[-1][1] == 0


def test_command_as_json(bundle: Bundle, run_cli: Any, tmp_path: Path) -> None:
    ran = run_cli("play", bundle.path, "--prompt", PROMPT, "-o", "a.mp4", "--json", cwd=tmp_path)
    assert (ran.code, ran.err) == (0, "")
    answer = json.loads(ran.out)
    assert answer.keys() == {"video", "played", "predicted"}
    assert answer["video"] == "a.mp4"
    for figures in (answer["played"], answer["predicted"]):
        assert figures["calls"] == len(list(bundle.manifest.calls()))
        assert figures["loads"] == sum(loads_of(bundle.manifest.loading.plan).values())
