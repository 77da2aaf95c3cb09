"""The player: tokenise, encode, denoise, decode, write, all from the bundle alone."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from toolchain.errors import BundleError
from toolchain.formats.bundle import Bundle, load_bundle
from toolchain.formats.manifest import Stage
from toolchain.formats.schedule import Step
from toolchain.ir.feeds import Given
from toolchain.player.opening import target_of
from toolchain.player.prompt import prepare_prompt
from toolchain.player.runner import ComponentRunner
from toolchain.player.sampler import initial_noise, sample
from toolchain.player.tokenizer import T5Tokenizer
from toolchain.player.trace import Trace
from toolchain.player.video import check_outputs, to_bytes, write_frames, write_video

Progress = Callable[[str, int, int], None]
"""Told of a stage (``encode``, ``denoise``, ``decode``), how much of it is done, and how much there is."""


def _silent(stage: str, done: int, total: int) -> None:
    pass


class Player:
    """A bundle, ready to play. Its files are checked against their digests first.

    Args:
        bundle: the bundle or its path.
        progress: told of progress.
        warn: told of what a user should know, such as a prompt that is too long.

    Raises:
        BundleError: a file is missing or altered, or a component that a video needs is not in the bundle.
    """

    def __init__(
        self, bundle: Bundle | str | Path, *, progress: Progress = _silent, warn: Callable[[str], None] = print
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
        self.bundle.check_files()
        self._targets = {name: target_of(self.manifest, name) for name in self.manifest.components}

    @contextmanager
    def _component(self, name: str) -> Iterator[ComponentRunner]:
        runner = ComponentRunner(self.bundle, name, self._targets[name], self.trace)
        try:
            yield runner
        finally:
            runner.free()

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
        steps = [Step(i, e.timestep, e.dt, e.function, e.leap) for i, e in enumerate(s.steps)]
        given = {"text_embedding": y, "token_mask": mask, "frame_mask": torch.ones(1, g.latent_frames)}
        with self._component("transformer") as transformer:
            transformer.run(s.once, given, transformer.entry.default_function)

            def denoiser(z_pair: torch.Tensor, step: Step, _: torch.Tensor | None) -> torch.Tensor:
                self.progress("denoise", step.index, len(steps))
                now = {"latents": z_pair, "timestep": torch.tensor(step.t)}
                return transformer.result(transformer.run(s.each, given | now, step.function), "prediction")

            latents: torch.Tensor = sample(
                denoiser,
                z,
                steps,
                guidance=s.guidance,
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
            given = filled.transpose(0, 1)[None] if stage.layout == "clip" else filled
            result = vae.result(vae.run(stage.rate, {"frames": given}, piece.function), gives)
            clip = result[0].transpose(0, 1) if stage.layout == "clip" else result
            results.append(clip[: piece.gives])
        return torch.cat(results)

    def video(self, prompt: str, seed: int = 0) -> torch.Tensor:
        """Pixels ``[F, 3, H, W]``, -1 … 1, of a video of ``prompt``."""
        y, mask = self.encode(prompt)
        return self.decode(self.denoise(y, mask, seed))


def play(
    bundle: Bundle | str | Path,
    prompt: str,
    out: str | Path,
    *,
    seed: int = 0,
    frames: str | Path | None = None,
    trace: str | Path | None = None,
    progress: Progress = _silent,
    warn: Callable[[str], None] = print,
) -> Path:
    """Play a bundle: make a video of ``prompt`` and write it as the .mp4 file ``out``.

    Args:
        seed: decides the initial noise, on every device alike.
        frames: also write every frame as a PNG into this folder.
        trace: also write when each block was loaded and run, as Chrome-trace JSON.

    Returns:
        The video's path.

    Raises:
        SoraCompileError: the bundle is damaged, has no engine on this machine, or a file cannot be written.
    """
    out = Path(out)
    folder, record = (None if p is None else Path(p) for p in (frames, trace))
    check_outputs(out, folder, record)
    player = Player(bundle, progress=progress, warn=warn)
    pictures = to_bytes(player.video(prompt, seed))
    write_video(pictures, player.manifest.geometry.fps, out)
    if folder is not None:
        write_frames(pictures, folder)
    if record is not None:
        # the pinned recipe decides all that a bundle is
        played = {"bundle": player.manifest.name, "recipe_sha256": player.manifest.recipe.sha256}
        player.trace.write(record, played)
    return out
