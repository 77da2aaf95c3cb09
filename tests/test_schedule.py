"""Timesteps against the official lists; LPL against runs of the published code."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import TypeAdapter, ValidationError
from safetensors.numpy import load_file

from toolchain.errors import RecipeError
from toolchain.formats.recipe_file import load_recipe
from toolchain.formats.schedule import PRESETS, DynamicLeap, Leap, StaticLeap, plan_steps
from toolchain.models.open_sora_v1_2.family import OpenSoraV12
from toolchain.models.open_sora_v1_2.timesteps import timesteps, transform_ratio
from toolchain.player.leap import LeapState

GOLDEN = Path(__file__).parent / "golden"
OFFICIAL: dict[str, list[float]] = json.loads((GOLDEN / "rflow_timesteps.json").read_text())
SWIFT: dict[str, list[float]] = json.loads((GOLDEN / "swift_timesteps.json").read_text())
LPL: dict[str, dict[str, Any]] = json.loads((GOLDEN / "tdtm_modded_lpl.json").read_text())["lpl"]
CODE = PRESETS["code"]


def size(text: str) -> tuple[int, int]:
    """``240p_9:16_240x426`` → (240, 426): height, width."""
    h, w = text.split("_")[-1].split("x")
    return int(h), int(w)


@pytest.mark.parametrize("key", OFFICIAL)
def test_timesteps_are_the_official_ones(key: str) -> None:
    resolution, frames, dtype, discrete = (part.split("=")[-1] for part in key.split("|"))
    height, width = size(resolution)

    def ours() -> tuple[float, ...]:
        return timesteps(30, height=height, width=width, frames=int(frames), dtype=dtype, discrete=discrete == "True")

    if any(math.isnan(t) for t in OFFICIAL[key]):
        reason = "2 to 16 frames; use 1 or at least 17" if frames == "16" else "not a number in float16"
        with pytest.raises(RecipeError, match=reason):
            ours()
    else:
        assert ours() == tuple(OFFICIAL[key])


@pytest.mark.parametrize("resolution", SWIFT)
def test_timesteps_of_the_phone_app(resolution: str) -> None:
    height, width = size(resolution)
    assert timesteps(30, height=height, width=width, frames=51, discrete=True) == tuple(SWIFT[resolution])


def torch_timesteps(
    steps: int, h: int, w: int, frames: int, dtype: torch.dtype, discrete: bool, scale: float = 1.0
) -> list[float]:
    """The same formula in torch's own arithmetic, but for the square root.

    torch's float32 ``sqrt`` (MKL) is not always correctly rounded: of 95 x 181 / 512^2 it is an ulp off.
    """

    def sqrt(x: torch.Tensor) -> torch.Tensor:
        return x.double().sqrt().to(x.dtype)

    height, width, count = (torch.tensor([v], dtype=dtype) for v in (h, w, frames))
    latent = torch.ones_like(count) if frames == 1 else count // 17 * 5
    ratio = sqrt(height * width / 512**2) * sqrt(latent) * scale
    out = []
    for i in range(steps):
        t = (1.0 - i / steps) * 1000
        u = torch.tensor([round(t) if discrete else t]) / 1000
        out.append((ratio * u / (1 + (ratio - 1) * u) * 1000).item())
    return out


@settings(max_examples=60, deadline=None)
@given(
    steps=st.integers(1, 60),
    h=st.integers(16, 1200),
    w=st.integers(16, 1200),
    frames=st.one_of(st.just(1), st.integers(17, 500)),
    dtype=st.sampled_from(["float32", "bfloat16", "float16"]),
    discrete=st.booleans(),
    scale=st.one_of(st.just(1.0), st.floats(0.01, 100)),
)
def test_rounding_is_torch_rounding(
    steps: int, h: int, w: int, frames: int, dtype: str, discrete: bool, scale: float
) -> None:
    wanted = torch_timesteps(steps, h, w, frames, getattr(torch, dtype), discrete, scale)
    try:
        ours = timesteps(steps, height=h, width=w, frames=frames, dtype=dtype, discrete=discrete, scale=scale)
    except RecipeError:
        assert dtype == "float16" and math.isnan(wanted[0])
    else:
        assert list(ours) == wanted


def test_scale_gives_the_ratio_of_another_geometry() -> None:
    """64 x 64 pixels and 17 frames, scaled to the ratio of 192 x 192 and 68 frames."""
    small, large = transform_ratio(64, 64, 17), transform_ratio(192, 192, 68)
    assert (small, large) == pytest.approx((0.125 * 5**0.5, 0.375 * 20**0.5))
    scaled = timesteps(30, height=64, width=64, frames=17, scale=large / small)
    assert scaled == pytest.approx(timesteps(30, height=192, width=192, frames=68), rel=1e-6)
    recipes = load_recipe("tiny", ["sampler.transform_scale=6"]), load_recipe("open-sora-v1.2-iphone-15-pro")
    ratios = [OpenSoraV12().transform_ratio(r) for r in recipes]
    assert ratios == pytest.approx([large, large], rel=1e-6)


def test_timesteps_without_transform() -> None:
    assert timesteps(4, height=1, width=1, frames=5, transform=False) == (1000.0, 750.0, 500.0, 250.0)
    assert timesteps(3, height=1, width=1, frames=1, transform=False, discrete=True) == (1000.0, 667.0, 333.0)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [({"steps": 0}, "steps is 0"), ({"frames": 0}, "frames is 0"), ({"dtype": "int8"}, "choose one of float32")],
)
def test_timesteps_refuse(wrong: dict[str, Any], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        timesteps(**{"steps": 30, "height": 192, "width": 192, "frames": 68, **wrong})


@settings(deadline=None)
@given(
    steps=st.integers(1, 100),
    frames=st.one_of(st.just(1), st.integers(17, 300)),
    after=st.one_of(st.none(), st.integers(1, 99)),
)
def test_steps_add_up_to_the_whole_way(steps: int, frames: int, after: int | None) -> None:
    schedule = timesteps(steps, height=192, width=256, frames=frames)
    leap = None if after is None else StaticLeap(after=after)
    if after is not None and after >= steps:
        with pytest.raises(RecipeError, match=r"leap\.after"):
            plan_steps(schedule, leap)
        return
    plan = plan_steps(schedule, leap)
    assert math.fsum(s.dt for s in plan) == pytest.approx(schedule[0] / 1000, abs=steps * 2**-24)
    assert len(plan) == (steps if after is None else after + 1)
    assert [s.leap for s in plan] == [False] * (len(plan) - 1) + [after is not None]
    assert [(s.index, s.t) for s in plan] == list(enumerate(schedule))[: len(plan)]


def test_static_leap_of_the_app() -> None:
    schedule = SWIFT["192x192"]
    plan = plan_steps(schedule, StaticLeap(after=15))
    assert len(plan) == 16
    assert plan[-1].dt == float(np.float32(schedule[15]) / np.float32(1000))
    state = LeapState(StaticLeap(after=15), 30)
    assert [state.observe(i, None) for i in range(16)] == [False] * 15 + [True]


@pytest.mark.parametrize("name", LPL)
@pytest.mark.parametrize("kind", ["numpy", "torch"])
def test_dynamic_leap_of_the_code(name: str, kind: str) -> None:
    run, data = LPL[name], load_file(GOLDEN / f"lpl_{name}.safetensors")
    state = LeapState(CODE, run["steps"])
    history, leaps = [], []
    for i, velocity in enumerate(data["v_cfg"][:, 0]):
        leaps.append(state.observe(i, velocity if kind == "numpy" else torch.from_numpy(velocity)))
        history.append((state.failures_left, state.best))
    assert leaps == [i == run["leap_step"] for i in range(run["n_calls"])]
    assert math.isnan(state.cosines[0])
    np.testing.assert_allclose(state.cosines, data["cosines"], atol=1e-6)
    wanted = [(s["tolerance_n"], s["best_cos"]) for s in run["state_after"]]
    if leaps[-1]:  # there the published code starts over, for the next sample; ours is for one
        assert history.pop()[0] == 0
        wanted.pop()
    assert [failures for failures, _ in history] == [failures for failures, _ in wanted]
    np.testing.assert_allclose([best for _, best in history], [best for _, best in wanted], atol=1e-6)


@pytest.mark.parametrize("name", LPL)
def test_dynamic_leap_trajectory(name: str) -> None:
    """z along the run, from the recorded velocities, timesteps and the leap that we decide."""
    run, data = LPL[name], load_file(GOLDEN / f"lpl_{name}.safetensors")
    schedule = timesteps(run["steps"], height=192, width=192, frames=run["num_frames"], discrete=run["discrete"])
    np.testing.assert_array_equal(np.array(schedule[: run["n_calls"]], np.float32), data["timesteps"])
    state, z = LeapState(CODE, run["steps"]), data["z0"]
    for step, velocity, before in zip(
        plan_steps(schedule, CODE), data["v_cfg"], data["z_before_each_call"], strict=False
    ):
        np.testing.assert_allclose(z, before, atol=1e-6)
        if state.observe(step.index, velocity[0]):
            step = step.leaping()
        z = z + velocity * step.dt
    np.testing.assert_allclose(z, data["z_final"], atol=1e-6)


def velocities(cosines: list[float]) -> list[np.ndarray[Any, Any]]:
    """Velocities ``[2, 1, 1, 1]`` (plane vectors), each with the given cosine to the one before."""
    angles = np.cumsum([0.0, *np.arccos(cosines)])
    return [np.array([np.cos(a), np.sin(a)], np.float32).reshape(2, 1, 1, 1) for a in angles]


def leap_index(rule: DynamicLeap, steps: int, cosines: list[float]) -> int | None:
    state = LeapState(rule, steps)
    return next((i for i, v in enumerate(velocities(cosines)) if state.observe(i, v)), None)


def test_paper_rule_counts_failures_from_half_of_the_steps_on() -> None:
    rule = PRESETS["paper"]
    # Ten steps: step 5 is the first judged (cosine with step 4) and sets the best.
    assert leap_index(rule, 10, [0.9] * 9) == 8
    # A gain at step 7 does not clear the failure of step 6.
    assert leap_index(rule, 20, [0.5] * 9 + [0.6, 0.6, 0.7, 0.7, 0.7, 0.9]) == 14
    # 5e-5 more is no gain, 2e-4 more is.
    assert leap_index(rule, 8, [0.5] * 3 + [0.5, 0.50005, 0.50005, 0.50005]) == 7
    assert leap_index(rule, 8, [0.5] * 3 + [0.5, 0.5002, 0.5004, 0.5006]) is None


def test_paper_rule_looks_at_the_whole_velocity() -> None:
    first = np.zeros((4, 2, 3, 5), np.float32)
    first[3, 1] = 1
    state = LeapState(PRESETS["paper"], 2)
    state.observe(0, first)
    state.observe(1, 2 * first)
    assert state.cosines[1] == pytest.approx(1.0, abs=1e-6)


def test_rules_survive_json() -> None:
    adapter: TypeAdapter[StaticLeap | DynamicLeap] = TypeAdapter(Leap)
    for leap in (*PRESETS.values(), StaticLeap(after=3)):
        assert adapter.validate_json(leap.model_dump_json()) == leap
    resolved = PRESETS["paper"].resolve(31)
    assert (resolved.start, resolved.start_fraction) == (16, 0.0)
    assert resolved.resolve(31) == resolved
    for wrong in ({"kind": "static", "after": 0}, {"kind": "static", "after": 2, "more": 1}, {"kind": "dynamic"}):
        with pytest.raises(ValidationError):
            adapter.validate_python(wrong)


def test_leaps_that_cannot_come_are_refused() -> None:
    StaticLeap(after=29).check(30)
    for after, steps in ((30, 30), (1, 1)):
        with pytest.raises(RecipeError, match=r"leap\.after"):
            StaticLeap(after=after).check(steps)
    CODE.check(18)
    with pytest.raises(RecipeError, match="step index 16 at the earliest, but the last of 17 steps is 16"):
        CODE.check(17)


def test_a_state_serves_one_sample() -> None:
    v = np.ones((4, 1, 2, 2), np.float32)
    state = LeapState(CODE, 30)
    state.observe(0, v)
    with pytest.raises(ValueError, match="one sample"):
        state.observe(0, v)


@pytest.mark.parametrize("steps", [1, 7, 30])
def test_merged_steps_are_the_first(steps: int) -> None:
    schedule = timesteps(steps, height=192, width=192, frames=68)
    for merged in (0, 1, steps):
        plan = plan_steps(schedule, merged_steps=merged)
        assert [s.function for s in plan] == ["merged"] * merged + ["base"] * (steps - merged)
        assert [(s.index, s.t, s.dt) for s in plan] == [(s.index, s.t, s.dt) for s in plan_steps(schedule)]


def test_merged_steps_past_a_leap_are_cut_with_it() -> None:
    plan = plan_steps(SWIFT["192x192"], StaticLeap(after=4), merged_steps=10)
    assert [(s.function, s.leap) for s in plan] == [("merged", False)] * 4 + [("merged", True)]


@pytest.mark.parametrize(
    "module", ["formats.schedule", "models.open_sora_v1_2.timesteps", "models.open_sora_v1_2.family", "player.leap"]
)
def test_import_is_light(module: str) -> None:
    code = f"import sys, toolchain.{module}; print([m for m in ('torch', 'numpy') if m in sys.modules])"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "[]"
