"""The pipeline in PyTorch against the models it is made of, and the manifest's steps against the sampler's."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from toolchain.accuracy.eager import EagerPipeline
from toolchain.build import entries as describe
from toolchain.formats.recipe import Recipe
from toolchain.formats.recipe_file import load_recipe
from toolchain.formats.schedule import StaticLeap, Step, plan_steps
from toolchain.models.family import find_family
from toolchain.models.open_sora_v1_2.stdit3 import STDiT3, STDiT3Config
from toolchain.models.open_sora_v1_2.t5 import T5Config, T5Encoder
from toolchain.models.open_sora_v1_2.vae import OpenSoraVAE, OpenSoraVAEConfig
from toolchain.planning.sampling import sampling
from toolchain.player.prompt import prepare_prompt
from toolchain.player.sampler import initial_noise, sample
from toolchain.player.tokenizer import T5Tokenizer

TINY = Path(__file__).parents[1] / "recipes/tiny"
SMALL = ["video.frames=22", "video.height=40", "video.width=48", "video.fps=8"]
PROMPT = "a red fox"


def small_recipe(*overrides: str) -> Recipe:
    """The recipe ``tiny`` with two micro chunks and less of everything."""
    return load_recipe("tiny", [*SMALL, "sampler.steps=3", "sampler.leap=null", "sampler.merged_steps=1", *overrides])


@pytest.fixture(scope="module", autouse=True)
def one_thread_without_gradients() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with torch.no_grad():
        yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def pipeline() -> EagerPipeline:
    return EagerPipeline(small_recipe())


def stored(component: str) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """A tiny checkpoint's configuration and weights, read without the toolchain."""
    config: dict[str, Any] = json.loads((TINY / component / "config.json").read_text())
    return config, load_file(TINY / component / "model.safetensors")


@pytest.fixture(scope="module")
def transformer() -> STDiT3:
    config, weights = stored("transformer")
    model = STDiT3(STDiT3Config.from_json(config)).eval()
    model.load_state_dict(weights)
    return model


@pytest.fixture(scope="module")
def vae() -> OpenSoraVAE:
    config, weights = stored("vae")
    model = OpenSoraVAE(OpenSoraVAEConfig.from_json(config)).eval()
    model.load_state_dict(weights)
    return model


def relative(value: torch.Tensor, reference: torch.Tensor) -> float:
    """Norm of the difference over norm of the reference; shapes must agree."""
    assert value.shape == reference.shape
    return float((value - reference).norm() / reference.norm())


def official(model: STDiT3, z: torch.Tensor, t: torch.Tensor, y: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """The model's own forward at the small recipe's sizes; ``mask`` is of the conditional half."""
    size = {"height": torch.tensor([40.0]), "width": torch.tensor([48.0])}
    out: torch.Tensor = model(z, t, y[:, None], mask=mask, fps=torch.tensor([8.0]), **size)
    return out


# --- the components ----------------------------------------------------------------------------------


@pytest.mark.parametrize("timestep", [1000.0, 431.5, 3.25])
def test_transformer_is_the_model(timestep: float, pipeline: EagerPipeline, transformer: STDiT3) -> None:
    generator = torch.Generator().manual_seed(0)
    z, y = torch.randn(2, 4, 7, 5, 6, generator=generator), torch.randn(2, 24, 64, generator=generator)
    mask = (torch.arange(24) < 9).float()[None]
    t = torch.full((2,), timestep)
    given = {"latents": z, "timestep": torch.tensor(timestep), "text_embedding": y[:1], "token_mask": mask}
    both = torch.cat((y[:1], transformer.y_embedder.y_embedding[None]))
    found = pipeline.predict("base", given)
    assert relative(found, official(transformer, z, t, both, mask)) < 1e-5


def test_merged_is_another_function(pipeline: EagerPipeline) -> None:
    assert [s.function for s in pipeline.steps] == ["merged", "base", "base"]
    generator = torch.Generator().manual_seed(0)
    given = {"latents": torch.randn(2, 4, 7, 5, 6, generator=generator), "timestep": torch.tensor(900.0)}
    given |= {"text_embedding": torch.randn(1, 24, 64, generator=generator), "token_mask": torch.ones(1, 24)}
    base, merged = (pipeline.predict(f, given) for f in ("base", "merged"))
    with pytest.raises(KeyError):
        pipeline.predict("tail", given)
    assert relative(merged, base) > 1e-3


@pytest.mark.parametrize("prompt", [PROMPT, "", "a fox " * 40], ids=["short", "empty", "long"])
def test_text_encoder_is_the_model(prompt: str, pipeline: EagerPipeline) -> None:
    config, weights = stored("text_encoder")
    model = T5Encoder(T5Config.from_json(config)).eval()
    model.load_state_dict(weights)
    tokens = T5Tokenizer(TINY / "text_encoder/spiece.model")(
        prepare_prompt(prompt, [("aesthetic score:", " aesthetic score: 6.5.")]), 24
    )
    y, mask = pipeline.encode(prompt)
    assert mask.tolist() == [list(tokens.mask)]
    assert relative(y, model(torch.tensor([tokens.ids]), torch.tensor([tokens.mask]))) < 1e-5


def test_video_is_the_latents_decoded(pipeline: EagerPipeline, vae: OpenSoraVAE) -> None:
    video = pipeline.video(PROMPT, seed=3)
    latents = pipeline.denoise(*pipeline.encode(PROMPT), seed=3)
    assert video.shape == (22, 3, 40, 48)
    assert latents.shape == (1, 4, 7, 5, 6)
    assert relative(video, vae.decode(latents, 22)[0].transpose(0, 1)) < 1e-5


def test_denoising_follows_the_manifest(transformer: STDiT3) -> None:
    """The manifest's numbers and the model alone, written out as a device would."""
    pipeline = EagerPipeline(small_recipe("sampler.merged_steps=0", "sampler.leap=1"))
    entry = describe.sampler(pipeline.recipe, sampling(pipeline.recipe, find_family(pipeline.recipe.model)))
    y, mask = pipeline.encode(PROMPT)
    both = torch.cat((y, transformer.y_embedder.y_embedding[None]))
    z = torch.from_numpy(initial_noise(3, (1, 4, 7, 5, 6)))
    for step in entry.steps:
        out = official(transformer, torch.cat((z, z)), torch.full((2,), step.timestep), both, mask)
        conditional, unconditional = out[:1, :4], out[1:, :4]
        z = z + (unconditional + entry.guidance * (conditional - unconditional)) * step.dt
    assert len(entry.steps) == 2
    assert relative(pipeline.denoise(y, mask, seed=3), z) < 1e-5


def test_a_seed_is_a_video(pipeline: EagerPipeline) -> None:
    y, mask = pipeline.encode(PROMPT)
    first, again, other = (pipeline.denoise(y, mask, seed) for seed in (1, 1, 2))
    assert torch.equal(first, again)
    assert relative(other, first) > 0.1


def test_frame_conditions_without_any_change_nothing(pipeline: EagerPipeline) -> None:
    y, mask = pipeline.encode(PROMPT)
    conditioned = EagerPipeline(small_recipe("transformer.frame_conditions=true"))
    assert relative(conditioned.denoise(y, mask, 1), pipeline.denoise(y, mask, 1)) < 1e-5


# --- the manifest's steps ----------------------------------------------------------------------------

SAMPLERS = {
    "plain": {"steps": 5, "leap": "null", "merged_steps": 0},
    "one-step": {"steps": 1, "leap": "null", "merged_steps": 0},
    "leap": {"steps": 30, "leap": 15, "merged_steps": 0},
    "merged": {"steps": 5, "leap": "null", "merged_steps": 5},
    "merged-leap": {"steps": 30, "leap": 15, "merged_steps": 10},
    "leap-while-merged": {"steps": 30, "leap": 4, "merged_steps": 10},
    "discrete": {"steps": 7, "leap": 3, "merged_steps": 1, "discrete_timesteps": "true"},
    "paper": {"steps": 30, "leap": "paper", "merged_steps": 10},
    "code": {"steps": 30, "leap": "code", "merged_steps": 16},
}


@pytest.mark.parametrize("name", SAMPLERS)
def test_manifest_has_the_steps_that_are_made(name: str) -> None:
    recipe = load_recipe("tiny", [*SMALL, *(f"sampler.{k}={v}" for k, v in SAMPLERS[name].items())])
    family = find_family(recipe.model)
    entry = describe.sampler(recipe, sampling(recipe, family))
    made: list[Step] = []
    calls: list[tuple[float, str]] = []

    def steady(z_pair: torch.Tensor, step: Step, _: torch.Tensor | None) -> torch.Tensor:
        """The same velocity always, at which a dynamic rule leaps as soon as it may."""
        calls.append((step.t, step.function))
        return torch.ones_like(z_pair)

    own = recipe.sampler
    sample(
        steady,
        torch.zeros(1, 4, 7, 5, 6),
        plan_steps(family.timesteps(recipe), own.leap, merged_steps=own.merged_steps),
        guidance=entry.guidance,
        leap=own.leap,
        on_step=lambda step, _: made.append(step),
    )
    planned = [(s.timestep, s.dt, s.leap) for s in entry.steps]
    if name in ("paper", "code"):  # the plan is for the case that the rule never says so
        assert not any(leap for _, _, leap in planned)
        last = made[-1]
        assert last.index < len(planned) - 1
        planned = [*planned[: last.index], (last.t, torch.tensor(last.t / 1000).item(), True)]
    assert [(s.t, s.dt, s.leap) for s in made] == planned
    assert calls == [(s.timestep, s.function) for s in entry.steps[: len(calls)]]
    assert len(calls) == len(made)
    timesteps = family.timesteps(recipe)
    assert [s.timestep for s in entry.steps] == list(timesteps[: len(entry.steps)])
    assert len(entry.steps) == (own.leap.after + 1 if isinstance(own.leap, StaticLeap) else own.steps)
    assert [s.function for s in entry.steps] == [
        "merged" if i < own.merged_steps else "base" for i in range(own.steps)
    ][: len(entry.steps)]
    assert sum(dt for _, dt, _ in planned) == pytest.approx(timesteps[0] / 1000, abs=1e-6)


@pytest.mark.parametrize("name", SAMPLERS)
def test_playing_the_manifest_is_sampling_the_recipe(name: str) -> None:
    """A player has the manifest's steps and its resolved rule alone; velocities that turn, and then settle."""
    recipe = load_recipe("tiny", [*SMALL, *(f"sampler.{k}={v}" for k, v in SAMPLERS[name].items())])
    family, own = find_family(recipe.model), recipe.sampler
    entry = describe.sampler(recipe, sampling(recipe, family))
    generator = torch.Generator().manual_seed(0)
    first, second = (torch.randn(2, 4, 7, 5, 6, generator=generator) for _ in range(2))
    z = torch.zeros(1, 4, 7, 5, 6)

    def run(steps: tuple[Step, ...], leap: Any) -> tuple[torch.Tensor, list[Step]]:
        made: list[Step] = []

        def turning(z_pair: torch.Tensor, step: Step, _: torch.Tensor | None) -> torch.Tensor:
            return first + second / (1 + step.index) ** 3

        final = sample(turning, z, steps, guidance=3.0, leap=leap, on_step=lambda s, _: made.append(s))
        return final, made

    played = entry.plan()
    planned = plan_steps(family.timesteps(recipe), own.leap, merged_steps=own.merged_steps)
    from_manifest, from_recipe = run(played, entry.leap), run(planned, own.leap)
    assert torch.equal(from_manifest[0], from_recipe[0])
    assert from_manifest[1] == from_recipe[1]
