"""Videos of a few prompts under any schedule, and what their steps lose: measured once, through the store.

A search that was stopped goes on with what is not there yet.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import torch
from safetensors.torch import load_file, save_file

from toolchain.accuracy.eager import EagerPipeline
from toolchain.accuracy.golden_video import psnr
from toolchain.accuracy.step_errors import MeasuredSteps, mean_steps, measure_steps
from toolchain.build.artifacts import code_modules
from toolchain.formats.recipe import SamplerRecipe
from toolchain.formats.reuse import Reuse
from toolchain.ir.target import package_versions
from toolchain.planning.resolve import ResolvedBuild, find_tokenizer
from toolchain.planning.step_search import StepErrors
from toolchain.player.video import to_bytes
from toolchain.system.code import code_digest
from toolchain.system.memory import release
from toolchain.system.store import NewEntry, Store, digest, key_of
from toolchain.weights.digests import checkpoint_digest, tensor_digests

STEP_VIDEOS: Final = 4
"""On so many videos steps are measured. How they compare differs less from video to video than what comes of them."""
KIND = "tunings"
FILE = "values.safetensors"


@dataclass(frozen=True)
class TuningVideo:
    """A prompt and the seed of its noise."""

    prompt: str
    seed: int


class TuningRuns:
    """What is known of the tuning videos, by sampler.

    Args:
        build: resolved with its checkpoints.
        full: the sampler that others are held against.
        blocks: first and last of the range that steps reuse; the longest range that there is if None.
    """

    def __init__(
        self,
        build: ResolvedBuild,
        full: SamplerRecipe,
        blocks: list[str] | None,
        videos: Sequence[TuningVideo],
        store: Store,
    ) -> None:
        self.videos, self.full = tuple(videos), full
        self.step_videos = range(min(len(videos), STEP_VIDEOS))
        self._build, self._blocks, self._store = build, blocks, store
        tokenizer = find_tokenizer(build)
        self._key_parts = {
            "video": build.recipe.video.model_dump(mode="json"),
            "components": {
                name: {
                    "recipe": part.recipe.model_dump(mode="json", exclude={"checkpoint", "precision"}),
                    "config": dict(part.config),
                    "weights": checkpoint_digest(tensor_digests(part.checkpoint, store)),
                    "target": part.target.name,
                    "code": code_digest("toolchain.build.tuning_runs", *code_modules(part)),
                }
                for name, part in build.components.items()
            },
            "tokenizer": None if tokenizer is None else digest(tokenizer),
            "tools": package_versions("torch"),
        }

    @functools.cached_property
    def _pipeline(self) -> EagerPipeline:
        return EagerPipeline.of(self._build)

    @functools.cache  # noqa: B019 - as long as the models
    def _encoded(self, number: int) -> tuple[torch.Tensor, torch.Tensor]:
        return self._pipeline.encode(self.videos[number].prompt)

    def _key(self, what: str, sampler: SamplerRecipe, number: int, **more: Any) -> str:
        video = self.videos[number]
        parts = {"sampler": sampler.model_dump(mode="json"), "prompt": video.prompt, "seed": video.seed}
        return key_of({**self._key_parts, "what": what, **parts, **more})

    def _measuring(self, base: SamplerRecipe) -> SamplerRecipe:
        """A sampler that names the range; which steps reuse it is of no account."""
        return base.model_copy(update={"reuse": [Reuse(steps=[1], blocks=self._blocks)]})

    # --- whole videos ------------------------------------------------------------------------------------

    def call_seconds(self) -> float:
        """How long a call of the denoiser took on the machine that made the first full video; nothing goes by it."""
        self._full(0)
        entry = self._store.get(KIND, self._key("full", self.full, 0))
        return float(entry.meta["call_s"]) if entry is not None else 0.0

    def _full(self, number: int) -> torch.Tensor:
        """The full video's pixels, ``uint8 [F, H, W, 3]``."""
        key = self._key("full", self.full, number)
        entry = self._store.get_or_make(KIND, key, functools.partial(self._make_full, number))
        pixels: torch.Tensor = load_file(entry.data / FILE)["pixels"]
        return pixels

    def _make_full(self, number: int, folder: Path) -> NewEntry:
        pipeline = self._pipeline.under(self.full)
        encoded = self._encoded(number)
        began = time.perf_counter()
        latents = pipeline.denoise(*encoded, self.videos[number].seed)
        call_s = (time.perf_counter() - began) / len(pipeline.steps)
        save_file({"pixels": to_bytes(pipeline.decode(latents)).contiguous()}, folder / FILE)
        return NewEntry({"call_s": call_s})

    def psnr_db(self, sampler: SamplerRecipe, number: int) -> float:
        """Peak signal-to-noise ratio of a tuning video against its full one, made now if need be."""
        key = self._key("psnr", sampler, number, full=self.full.model_dump(mode="json"))
        entry = self._store.get_or_make(KIND, key, lambda _: NewEntry({"psnr_db": self._measure(sampler, number)}))
        return float(entry.meta["psnr_db"])

    def _measure(self, sampler: SamplerRecipe, number: int) -> float:
        reference = self._full(number)
        pipeline = self._pipeline.under(sampler)
        pixels = pipeline.decode(pipeline.denoise(*self._encoded(number), self.videos[number].seed))
        release()
        return psnr(to_bytes(pixels), reference)

    # --- steps -------------------------------------------------------------------------------------------

    def knows_steps(self, base: SamplerRecipe, number: int) -> bool:
        """Whether a base's steps have been measured on a video."""
        return self._store.get(KIND, self._key("steps", self._measuring(base), number)) is not None

    def measure_steps(self, base: SamplerRecipe, number: int) -> MeasuredSteps:
        """The errors of a base's steps on a video, measured now if need be."""
        sampler = self._measuring(base)
        make = functools.partial(self._make_steps, sampler, number)
        entry = self._store.get_or_make(KIND, self._key("steps", sampler, number), make)
        own = {name: table.numpy() for name, table in load_file(entry.data / FILE).items()}
        return MeasuredSteps(StepErrors(own["reused"], own["alone"], own["kept"]), own["growth"])

    def _make_steps(self, sampler: SamplerRecipe, number: int, folder: Path) -> NewEntry:
        found = measure_steps(self._pipeline.under(sampler), *self._encoded(number), self.videos[number].seed)
        tables = {"reused": found.errors.reused, "alone": found.errors.alone, "kept": found.errors.kept}
        save_file({k: torch.from_numpy(v) for k, v in {**tables, "growth": found.growth}.items()}, folder / FILE)
        release()
        return NewEntry()

    def steps(self, base: SamplerRecipe) -> MeasuredSteps:
        """The errors of a base's steps, over the videos that steps are measured on."""
        return mean_steps([self.measure_steps(base, i) for i in self.step_videos])
