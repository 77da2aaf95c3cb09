"""The same pipeline in PyTorch, from the checkpoints: what bundles are compared with.

Whole components in memory; for small models, and for those who have the memory.
"""

from __future__ import annotations

from pathlib import Path

import torch

from toolchain.build.compile import find_tokenizer
from toolchain.formats.recipe import Recipe
from toolchain.ir.blocks import materialise
from toolchain.ir.graph import capture
from toolchain.models.family import define
from toolchain.models.open_sora_v1_2.t5 import T5Config, T5Encoder
from toolchain.models.open_sora_v1_2.vae import OpenSoraVAE, OpenSoraVAEConfig
from toolchain.planning.plan import load_passes, plan
from toolchain.player.prompt import prepare_prompt
from toolchain.player.sampler import initial_noise, sample
from toolchain.player.tokenizer import T5Tokenizer
from toolchain.weights.block_weights import read_named
from toolchain.weights.checkpoint import open_checkpoint


class EagerPipeline:
    """A recipe's models, loaded whole in float32.

    Args:
        recipe: must have all three components.
        base: folder that relative checkpoint paths are looked for in first.

    Raises:
        SoraCompileError: the recipe cannot be built.
    """

    def __init__(self, recipe: Recipe, base: str | Path = ".") -> None:
        assert recipe.text_encoder is not None and recipe.vae is not None
        self.recipe = recipe
        components = plan(recipe, base=base).components
        checkpoints = {n: open_checkpoint(part.checkpoint, Path(base)) for n, part in recipe.components().items()}
        weights = {n: read_named(checkpoints[n], components[n].definition) for n in components}
        self.tokenizer = T5Tokenizer(find_tokenizer(recipe.text_encoder, checkpoints["text_encoder"], Path(base)))
        self.text_encoder = T5Encoder(T5Config.from_json(components["text_encoder"].definition.config))
        self.text_encoder.load_state_dict(weights["text_encoder"])
        self.vae = OpenSoraVAE(OpenSoraVAEConfig.from_json(components["vae"].definition.config))
        self.vae.load_state_dict(weights["vae"])
        definition = define("transformer", recipe, components["transformer"].definition.config)
        graph = capture(definition.forms[0].base)
        for rewrite in load_passes(recipe, "transformer").rewrites:
            graph = rewrite(graph)
        self.tokens = graph.dims["L"]
        self.channels = int(definition.config["in_channels"])
        self.null_text = weights["transformer"]["y_embedder.y_embedding"][None]
        self.functions = {f: materialise(gm, weights["transformer"]) for f, gm in graph.functions.items()}

    @torch.no_grad()
    def encode(self, prompt: str) -> tuple[torch.Tensor, torch.Tensor]:
        """A prompt's embedding ``[1, L, d]`` and mask ``[1, L]``."""
        assert self.recipe.text_encoder is not None
        text = prepare_prompt(prompt, score=self.recipe.text_encoder.aesthetic_score)
        tokens = self.tokenizer(text, self.tokens)
        ids, mask = torch.tensor([tokens.ids]), torch.tensor([tokens.mask], dtype=torch.float32)
        y: torch.Tensor = self.text_encoder(ids, mask)
        return y, mask

    @torch.no_grad()
    def denoise(self, y: torch.Tensor, mask: torch.Tensor, seed: int) -> torch.Tensor:
        """Latents ``[1, C, T, H, W]``."""
        video, own = self.recipe.video, self.recipe.sampler
        shape = (1, self.channels, video.latent_frames, *video.latent_size)
        given = (torch.ones(2, video.latent_frames),) if self.recipe.transformer.frame_conditions else ()
        both, masks = torch.cat((y, self.null_text)), torch.cat((mask, mask))

        def denoiser(z_pair: torch.Tensor, t: float, _: torch.Tensor | None, merged: bool) -> torch.Tensor:
            fps = torch.full((2,), self.recipe.model_fps)
            function = self.functions["merged" if merged else "base"]
            out: torch.Tensor = function(z_pair, torch.full((2,), t), both, masks, fps, *given)[0]
            return out

        latents: torch.Tensor = sample(
            denoiser,
            torch.from_numpy(initial_noise(seed, shape)),
            self.recipe.timesteps(),
            guidance=own.guidance,
            leap=own.leap,
            merged_steps=own.merged_steps,
        )
        return latents

    @torch.no_grad()
    def video(self, prompt: str, seed: int = 0) -> torch.Tensor:
        """Pixels ``[F, 3, H, W]``, -1 … 1, of a video of ``prompt``."""
        y, mask = self.encode(prompt)
        latents = self.denoise(y, mask, seed)
        return self.vae.decode(latents, self.recipe.video.frames)[0].transpose(0, 1)
