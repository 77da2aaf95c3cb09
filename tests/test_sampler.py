"""The sampling loop against recorded official runs; the noise against an independent Philox."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from toolchain.errors import RecipeError
from toolchain.formats.schedule import PRESETS, StaticLeap, Step, plan_steps
from toolchain.models.open_sora_v1_2.timesteps import timesteps
from toolchain.player.sampler import gaussian, initial_noise, sample, step_noise

GOLDEN = Path(__file__).parent / "golden"
RUNS = ["plain", "maskones", "maskcond"]
LPL: dict[str, dict[str, Any]] = json.loads((GOLDEN / "tdtm_modded_lpl.json").read_text())["lpl"]


def run(data: dict[str, Any], denoiser: Callable[..., Any], **options: Any) -> tuple[Any, list[Any], list[Any]]:
    """Sample as a recorded run did; returns final z, and z and x_mask as each call saw them."""
    z_seen: list[Any] = []
    masks: list[Any] = []

    def recorded(z_pair: Any, step: Step, x_mask: Any) -> Any:
        assert (step.function, step.index) == ("base", len(z_seen))
        assert (z_pair[:1] == z_pair[1:]).all()
        z_seen.append(z_pair[:1])
        masks.append(x_mask)
        return denoiser(len(z_seen) - 1, z_pair, step.t, x_mask)

    schedule = timesteps(6, height=192, width=192, frames=51)
    assert schedule == tuple(data["timesteps"].flatten().tolist())
    if "in.mask" in data:
        options |= {"mask": data["in.mask"], "noise": lambda i: data["noise"][i]}
    final = sample(recorded, data["in.z"], plan_steps(schedule), guidance=7.0, **options)
    return final, z_seen, masks


def check(data: dict[str, Any], final: Any, z_seen: list[Any], masks: list[Any], atol: float) -> None:
    assert len(z_seen) == 6
    for got, wanted in zip([*z_seen, final], data["z_trajectory"], strict=True):
        np.testing.assert_allclose(got, wanted, atol=atol, rtol=0)
    np.testing.assert_allclose(final, data["z_final"], atol=atol, rtol=0)
    if "x_mask" in data:
        np.testing.assert_array_equal(np.stack([np.asarray(m) for m in masks]), data["x_mask"])
    else:
        assert masks == [None] * 6


@pytest.mark.parametrize("name", RUNS)
@pytest.mark.parametrize("kind", ["numpy", "torch"])
def test_recorded_trajectories(name: str, kind: str) -> None:
    data: dict[str, Any] = load_file(GOLDEN / f"rflow_traj_{name}.safetensors")
    if kind == "numpy":
        data = {k: v.numpy() for k, v in data.items()}
    before = data["in.z"] + 0
    final, z_seen, masks = run(data, lambda i, *_: data["model_out"][i])
    assert isinstance(final, np.ndarray if kind == "numpy" else torch.Tensor)
    assert (data["in.z"] == before).all()
    check(data, final, z_seen, masks, atol=1e-6)


@pytest.mark.parametrize("name", RUNS)
def test_trajectories_of_the_model(name: str) -> None:
    from toolchain.models.open_sora_v1_2.stdit3 import STDiT3, STDiT3Config

    facts = json.loads((GOLDEN / "stdit3_rflow.json").read_text())
    model = STDiT3(STDiT3Config.from_json(facts["config"])).eval()
    model.load_state_dict(load_file(GOLDEN / "stdit3_weights.safetensors"))
    data = load_file(GOLDEN / f"rflow_traj_{name}.safetensors")
    args = facts["rflow"][name]["args"]
    null_text = model.y_embedder.y_embedding
    assert isinstance(null_text, torch.Tensor)
    text = torch.stack([data["in.t5_emb"], null_text[None]])
    size = {k: torch.tensor([float(args[a])]) for k, a in (("fps", "fps"), ("height", "hpx"), ("width", "wpx"))}

    @torch.no_grad()
    def denoise(_: int, z_pair: torch.Tensor, t: float, x_mask: torch.Tensor | None) -> torch.Tensor:
        out: torch.Tensor = model(z_pair, torch.full((2,), t), text, mask=data["in.text_mask"], x_mask=x_mask, **size)
        return out

    check(data, *run(data, denoise), atol=1e-4)


@pytest.mark.parametrize("name", LPL)
def test_leap_of_the_published_code(name: str) -> None:
    """Recorded predictions in, the published GPU sampler's number of calls and latents out."""
    facts, data = LPL[name], load_file(GOLDEN / f"lpl_{name}.safetensors")
    calls: list[np.ndarray[Any, Any]] = []
    made: list[Step] = []

    def denoiser(z_pair: Any, step: Step, x_mask: Any) -> Any:
        assert step.t == schedule[len(calls)]
        calls.append(z_pair[:1])
        return data["pred_cond_uncond"][len(calls) - 1]

    schedule = timesteps(facts["steps"], height=192, width=192, frames=facts["num_frames"], discrete=facts["discrete"])
    z = sample(
        denoiser,
        data["z0"].numpy(),
        plan_steps(schedule, PRESETS["code"]),
        guidance=facts["cfg"],
        leap=PRESETS["code"],
        on_step=lambda step, _: made.append(step),
    )
    assert len(calls) == len(made) == facts["n_calls"]
    assert [s.index for s in made if s.leap] == ([] if facts["leap_step"] is None else [facts["leap_step"]])
    np.testing.assert_allclose(np.stack(calls), data["z_before_each_call"], atol=1e-6, rtol=0)
    np.testing.assert_allclose(z, data["z_final"], atol=1e-6, rtol=0)


def test_static_leap_and_merged_steps() -> None:
    """A constant velocity of -z0 lands on 0 whatever the steps; the first two calls are merged."""
    z0 = np.ones((1, 4, 1, 2, 2), np.float32)
    asked: list[str] = []

    def denoiser(z_pair: Any, step: Step, x_mask: Any) -> Any:
        asked.append(step.function)
        return -np.ones_like(z_pair)

    schedule = timesteps(10, height=192, width=192, frames=68)
    steps = plan_steps(schedule, StaticLeap(after=4), merged_steps=2)
    z = sample(denoiser, z0, steps, guidance=7.0, leap=StaticLeap(after=4))
    assert asked == ["merged", "merged", "base", "base", "base"]
    np.testing.assert_allclose(z, 0, atol=1e-6)


@pytest.mark.parametrize("difference", ["none", "last"])
@pytest.mark.parametrize("kind", [np.array, torch.tensor])
def test_conditional_steps(kind: Any, difference: Any) -> None:
    """Step by step with plain numbers: c is 3 less 0.1 a step, u is 1 less 0.2 a step."""
    shown: list[int] = []

    def denoiser(batch: Any, step: Step, x_mask: Any) -> Any:
        shown.append(batch.shape[0])
        halves = [3.0 - 0.1 * step.index, 1.0 - 0.2 * step.index][: batch.shape[0]]
        return kind([[[[[v]]], [[[9.0]]]] for v in halves])

    steps = plan_steps((1000.0, 750.0, 500.0, 250.0), conditional_steps=[1, 3])
    z = sample(denoiser, kind([[[[[0.0]]]]]), steps, guidance=4.0, difference=difference)
    velocities = []
    d = 0.0
    for i, both in enumerate((True, False, True, False)):
        c, u = 3.0 - 0.1 * i, 1.0 - 0.2 * i
        d = c - u if both else d
        velocities.append(u + 4.0 * (c - u) if both else c + (3.0 * d if difference == "last" else 0.0))
    assert shown == [2, 1, 2, 1]
    assert z.item() == pytest.approx(sum(velocities) * 0.25, rel=1e-6)


def test_conditional_steps_with_given_frames() -> None:
    shapes: list[tuple[Any, Any]] = []

    def denoiser(batch: Any, step: Step, x_mask: Any) -> Any:
        shapes.append((batch.shape, x_mask.shape))
        return np.zeros_like(batch)

    z = np.zeros((3, 4, 2, 1, 1), np.float32)
    steps = plan_steps((1000.0, 500.0), conditional_steps=[1])
    sample(denoiser, z, steps, guidance=2.0, mask=np.ones((3, 2), np.float32), noise=lambda i: z)
    assert shapes == [((6, 4, 2, 1, 1), (6, 2)), ((3, 4, 2, 1, 1), (3, 2))]


def test_what_sample_refuses() -> None:
    z = np.zeros((2, 4, 3, 2, 2), np.float32)

    def attempt(z: Any = z, **options: Any) -> None:
        sample(lambda pair, *_: pair, z, plan_steps((1000.0, 500.0)), guidance=7.0, **options)

    for options, message in (
        ({"leap": PRESETS["code"]}, "one at a time"),
        ({"leap": StaticLeap(after=2)}, "leap.after is 2"),
        ({"mask": np.ones((2, 3), np.float32)}, "needs noise"),
        ({"mask": np.ones((1, 3), np.float32), "noise": lambda i: z}, "it must be \\(2, 3\\)"),
    ):
        with pytest.raises(RecipeError, match=message):
            attempt(**options)
    with pytest.raises(ValueError, match="step 0 is conditional, and no step before it computed both halves"):
        sample(lambda batch, *_: batch, z, plan_steps((9.0,), conditional_steps=[0]), guidance=7.0, difference="last")
    with pytest.raises(ValueError, match="the denoiser returned"):
        sample(lambda pair, *_: pair[:1], z, plan_steps((1000.0,)), guidance=7.0)
    for merged in (-1, 3):
        with pytest.raises(RecipeError, match=f"merged_steps is {merged}; choose 0 to 2"):
            plan_steps((1000.0, 500.0), merged_steps=merged)
    with pytest.raises(RecipeError, match="there are no timesteps"):
        plan_steps(())


def philox4x32(counter: list[int], key: list[int]) -> list[int]:
    """Philox 4x32-10, word by word from the paper's definition."""
    (a, b, c, d), (k, m) = counter, key
    for r in range(10):
        left, right = 0xD2511F53 * a, 0xCD9E8D57 * c
        k_r, m_r = (k + r * 0x9E3779B9) % 2**32, (m + r * 0xBB67AE85) % 2**32
        a, b, c, d = (right // 2**32) ^ b ^ k_r, right % 2**32, (left // 2**32) ^ d ^ m_r, left % 2**32
    return [a, b, c, d]


@pytest.mark.parametrize(
    ("counter", "key", "words"),
    [  # published known answers (Random123)
        ([0] * 4, [0] * 2, [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]),
        ([0xFFFFFFFF] * 4, [0xFFFFFFFF] * 2, [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]),
        (
            [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344],
            [0xA4093822, 0x299F31D0],
            [0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1],
        ),
    ],
)
def test_the_independent_philox_is_philox(counter: list[int], key: list[int], words: list[int]) -> None:
    assert philox4x32(counter, key) == words


def scalar_gaussian(seed: int, element: int, stream: int) -> float:
    block, lane = divmod(element, 4)
    words = philox4x32([block % 2**32, block >> 32, stream, 0], [seed % 2**32, seed >> 32])
    p, q = words[lane // 2 * 2 : lane // 2 * 2 + 2]
    radius, angle = math.sqrt(-2 * math.log((p + 1) / 2**32)), 2 * math.pi * (q / 2**32)
    return radius * (math.cos(angle) if lane % 2 == 0 else math.sin(angle))


@pytest.mark.parametrize("seed", [0, 42, 2**32 + 7, 2**64 - 1])
@pytest.mark.parametrize("stream", [0, 3, 2**32 - 1])
def test_noise_is_what_its_definition_says(seed: int, stream: int) -> None:
    got = gaussian(seed, (3, 5, 7), stream=stream)
    assert got.dtype == np.float32
    wanted = np.array([scalar_gaussian(seed, e, stream) for e in range(105)], np.float32).reshape(3, 5, 7)
    np.testing.assert_allclose(got, wanted, rtol=2**-23, atol=1e-12)


def test_noise_table() -> None:
    """For other languages to hold their own against: seed 42, elements 0 … 7."""
    table = [-0.9701898, 0.19401896, -1.2356207, 1.9239267, -0.07318151, 0.13913749, -1.106665, 0.32668296]
    np.testing.assert_allclose(initial_noise(42, (8,)), np.array(table, np.float32), rtol=2**-23)


def test_noise_is_standard_normal_and_streams_differ() -> None:
    noise = initial_noise(1, (1, 4, 20, 32, 32))
    assert abs(noise.mean()) < 0.01 and abs(noise.std() - 1) < 0.01
    first, second = (step_noise(1, noise.shape)(i) for i in range(2))
    for a, b in ((noise, first), (first, second)):
        assert abs((a * b).mean()) < 0.02
    np.testing.assert_array_equal(first, gaussian(1, noise.shape, stream=1))


@pytest.mark.parametrize("arguments", [{"seed": -1}, {"seed": 2**64}, {"seed": 1, "stream": 2**32}])
def test_noise_refuses(arguments: dict[str, int]) -> None:
    with pytest.raises(RecipeError, match="it must be 0 to 2"):
        gaussian(shape=(1,), **arguments)
