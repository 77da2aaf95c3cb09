"""The player: tokenise, encode, denoise, decode, write, all from the bundle alone."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch

from toolchain.errors import BundleError
from toolchain.formats.bundle import Bundle, load_bundle
from toolchain.formats.manifest import Piece, Stage
from toolchain.formats.sampling import RangeEntry
from toolchain.formats.schedule import Step
from toolchain.formats.tiles import in_tiles
from toolchain.ir.feeds import Given
from toolchain.ir.target import Engine
from toolchain.player.following import Figures, followed
from toolchain.player.loader import Loader
from toolchain.player.opening import load_engine, target_of
from toolchain.player.prompt import prepare_prompt
from toolchain.player.residuals import step_ranges
from toolchain.player.runner import ComponentRunner
from toolchain.player.sampler import initial_noise, sample
from toolchain.player.tokenizer import T5Tokenizer
from toolchain.player.trace import Trace
from toolchain.player.video import check_outputs, to_bytes, write_frames, write_video
from toolchain.system.memory import return_large_allocations

Progress = Callable[[str, int, int], None]
"""Told of a stage (``encode``, ``denoise``, ``decode``), how much of it is done, and how much there is."""


def _silent(stage: str, done: int, total: int) -> None:
    pass


class Player:
    """A bundle, ready to play. Its files are checked against their digests first.

    Args:
        bundle: the bundle or its path.
        memory_budget: bytes for weights and activations to plan loading for; the bundle's own plan if None.
        progress: told of progress.
        warn: told of what a user should know, such as a prompt that is too long.

    ``trace`` has all loads and runs so far. ``played`` is what the last video took, or the last stage that was asked
    for by itself.

    Raises:
        BundleError: a file is missing or altered, or a component that a video needs is not in the bundle.
        RecipeError: the budget is too small; says the smallest that works.
    """

    def __init__(
        self,
        bundle: Bundle | str | Path,
        *,
        memory_budget: int | None = None,
        progress: Progress = _silent,
        warn: Callable[[str], None] = print,
    ) -> None:
        self.bundle = bundle if isinstance(bundle, Bundle) else load_bundle(bundle)
        self.manifest = self.bundle.manifest
        self.progress, self.warn = progress, warn
        self.trace = Trace()
        missing = {"text_encoder", "transformer", "vae"} - self.manifest.components.keys()
        if missing or self.manifest.text is None or self.manifest.decoding is None:
            names = ", ".join(sorted(missing)) or "text or decoding"
            raise BundleError(
                f"'{self.bundle.path}' has no {names}; a video needs all components, add them to the recipe"
            )
        self.followed = followed(self.manifest, memory_budget)
        self.played: Figures | None = None
        self.bundle.check_files()
        self._targets = {name: target_of(self.manifest, name) for name in self.manifest.components}
        self._blocks = {f"{name}/{b.name}": b for name, c in self.manifest.components.items() for b in c.blocks}
        self._loader: Loader | None = None

    def open_block(self, block: str, function: str) -> Engine:
        """Load a block (``COMPONENT/BLOCK``), ready to run a function.

        Raises:
            SoraCompileError: it cannot be loaded; names the artifact.
        """
        component = block.partition("/")[0]
        return load_engine(self.bundle, component, self._blocks[block], function, self._targets[component])

    @contextmanager
    def _following(self) -> Iterator[Loader]:
        """The loader that follows the plan: one for a whole video, or for a stage that is asked for by itself."""
        if self._loader is not None:
            yield self._loader
            return
        with Loader(self.followed.run, self.followed.plan, self.open_block, self.trace) as loader:
            self._loader = loader
            try:
                yield loader
            finally:
                self._loader, self.played = None, loader.played()

    @contextmanager
    def _component(self, name: str) -> Iterator[ComponentRunner]:
        alone = self._loader is None
        with self._following() as loader:
            loader.enter(name, alone=alone)
            yield ComponentRunner(self.bundle, name, loader.call)

    def encode(self, prompt: str) -> tuple[torch.Tensor, torch.Tensor]:
        """A prompt's embedding ``[1, L, d]`` and mask ``[1, L]``."""
        text = self.manifest.text
        assert text is not None  # the constructor refuses a bundle without
        tokenizer = T5Tokenizer(self.bundle.path / text.tokenizer.path)
        prepared = prepare_prompt(prompt, [(s.label, s.text) for s in text.suffixes], text.cleaning)
        tokens = tokenizer(prepared, text.max_tokens)
        if tokens.truncated:
            self.warn(f"the prompt is longer than {text.max_tokens} tokens; its end is left out")
        ids, mask = torch.tensor([tokens.ids], dtype=torch.int32), torch.tensor([tokens.mask], dtype=torch.float32)
        self.progress("encode", 0, 1)
        with self._component("text_encoder") as encoder:
            results = encoder.run(text.rate, {"token_ids": ids, "token_mask": mask}, encoder.entry.default_function)
            y = encoder.result(results, "text_embedding")
        self.progress("encode", 1, 1)
        return y, mask

    def denoise(
        self,
        y: torch.Tensor,
        mask: torch.Tensor,
        seed: int,
        on_step: Callable[[Step, torch.Tensor], None] | None = None,
    ) -> torch.Tensor:
        """Latents ``[1, C, T, H, W]`` for an embedded prompt.

        Args:
            y, mask: as :meth:`encode` gives them.
            seed: decides the initial noise.
            on_step: called after every step with the step that was made and the new latents.
        """
        g, s = self.manifest.geometry, self.manifest.sampler
        z = torch.from_numpy(
            initial_noise(seed, (1, g.latent_channels, g.latent_frames, g.latent_height, g.latent_width))
        )
        steps = s.plan()
        given = {"text_embedding": y, "token_mask": mask, "frame_mask": torch.ones(1, g.latent_frames)}

        def leave_out(own: RangeEntry) -> None:
            assert self._loader is not None  # while a component runs
            self._loader.leave_out([f"transformer/{name}" for name in own.blocks])

        ranges = step_ranges(s, leave_out)
        with self._component("transformer") as transformer:
            transformer.run(s.once, given, transformer.entry.default_function)

            def denoiser(batch: torch.Tensor, step: Step, _: torch.Tensor | None) -> torch.Tensor:
                self.progress("denoise", step.index, len(steps))
                now = {"latents": batch, "timestep": torch.tensor(step.t)}
                results = transformer.run(s.each, given | now, step.function, ranges[step.index])
                return transformer.result(results, "prediction")

            latents: torch.Tensor = sample(
                denoiser,
                z,
                steps,
                guidance=s.guidance,
                difference=s.difference,
                leap=s.leap,
                on_step=on_step,
                num_train_timesteps=s.time_scale,
            )
        self.progress("denoise", len(steps), len(steps))
        return latents

    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        """Pixels ``[F, 3, H, W]``, -1 … 1, of latents ``[1, C, T, H, W]``."""
        plan = self.manifest.decoding
        assert plan is not None  # the constructor refuses a bundle without
        frames = latents[0].transpose(0, 1)  # [T, C, H, W] between stages
        with self._component("vae") as vae:
            for stage in plan.stages:
                frames = self._stage(vae, stage, frames, "pixels" if stage is plan.stages[-1] else "frames")
        total = self.manifest.geometry.frames
        self.progress("decode", total, total)
        return frames

    def _stage(self, vae: ComponentRunner, stage: Stage, frames: torch.Tensor, gives: Given) -> torch.Tensor:
        """One stage of decoding: ``frames`` ``[T, C, H, W]`` to what it ``gives``, likewise."""
        results: list[torch.Tensor] = []
        start, total = 0, self.manifest.geometry.frames
        for piece in stage.pieces:
            if gives == "pixels":
                self.progress("decode", start, total)
            own = frames[start : start + piece.takes]
            if not len(own):
                raise BundleError(f"'{self.bundle.path}': decoding takes more than the {len(frames)} frames there are")
            start += piece.takes
            filled = torch.cat((own, own[-1:].expand(piece.takes - len(own), *own.shape[1:])))

            def run(part: torch.Tensor, piece: Piece = piece) -> torch.Tensor:
                given = part.transpose(0, 1)[None] if stage.layout == "clip" else part
                result = vae.result(vae.run(stage.rate, {"frames": given}, piece.function), gives)
                clip = result[0].transpose(0, 1) if stage.layout == "clip" else result
                return clip[: piece.gives]

            results.append(in_tiles(stage.tiles, filled, run))
        return torch.cat(results)

    def video(self, prompt: str, seed: int = 0) -> torch.Tensor:
        """Pixels ``[F, 3, H, W]``, -1 … 1, of a video of ``prompt``."""
        with self._following():
            y, mask = self.encode(prompt)
            return self.decode(self.denoise(y, mask, seed))


@dataclass(frozen=True)
class PlayedVideo:
    """A video's file, what playing it took, and what was predicted, if the bundle says."""

    path: Path
    played: Figures
    predicted: Figures | None


def play(
    bundle: Bundle | str | Path,
    prompt: str,
    out: str | Path,
    *,
    seed: int = 0,
    memory_budget: int | None = None,
    frames: str | Path | None = None,
    trace: str | Path | None = None,
    progress: Progress = _silent,
    warn: Callable[[str], None] = print,
) -> PlayedVideo:
    """Play a bundle: make a video of ``prompt`` and write it as the .mp4 file ``out``.

    Args:
        seed: decides the initial noise, on every device alike.
        memory_budget: bytes for weights and activations; as for :class:`Player`.
        frames: also write every frame as a PNG into this folder.
        trace: also write when each block was loaded and run, and was predicted to be, as Chrome-trace JSON.

    Raises:
        SoraCompileError: the bundle is damaged, has no engine on this machine, or a file cannot be written.
    """
    out = Path(out)
    folder, record = (None if p is None else Path(p) for p in (frames, trace))
    check_outputs(out, folder, record)
    return_large_allocations()  # what is freed is to be free
    player = Player(bundle, memory_budget=memory_budget, progress=progress, warn=warn)
    pictures = to_bytes(player.video(prompt, seed))
    played, predicted = player.played, player.followed.predicted
    assert played is not None
    write_video(pictures, player.manifest.geometry.fps, out)
    if folder is not None:
        write_frames(pictures, folder)
    if record is not None:
        about = {
            "bundle": player.manifest.name,
            "recipe_sha256": player.manifest.recipe.sha256,  # the pinned recipe decides all that a bundle is
            "memory_budget_bytes": memory_budget or player.manifest.memory_budget_bytes,
            "played": played.to_data(),
            "predicted": None if predicted is None else predicted.to_data(),
        }
        timeline = player.followed.timeline
        player.trace.write(record, about, None if timeline is None else Trace.of(timeline))
    return PlayedVideo(out, played, predicted)
