"""The same pipeline in PyTorch, from the checkpoints: what bundles are compared with.

Whole components in memory; for small models, and for those who have the memory.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import fx

from toolchain.accuracy.ranges import Made, ReusingGraph
from toolchain.errors import RecipeError
from toolchain.formats.recipe import Recipe, SamplerRecipe
from toolchain.formats.schedule import Step
from toolchain.ir.activations import unrounded, without_scales
from toolchain.ir.blocks import extract_blocks, materialise
from toolchain.ir.graph import output_values
from toolchain.planning.plan import lower_graph, rewritten_graphs
from toolchain.planning.ranges import find_ranges
from toolchain.planning.resolve import ResolvedBuild, find_tokenizer, resolve
from toolchain.planning.sampling import sampling
from toolchain.player.feeding import Fed, feed_inputs
from toolchain.player.prompt import prepare_prompt
from toolchain.player.sampler import Denoiser, initial_noise, sample
from toolchain.player.tokenizer import T5Tokenizer
from toolchain.weights.block_weights import read_named


class EagerPipeline:
    """A recipe's models, loaded whole in float32.

    Args:
        recipe: must have all three components.
        base: folder that relative checkpoint paths are looked for in first.

    Raises:
        SoraCompileError: the recipe cannot be built, or lacks a component.
    """

    def __init__(self, recipe: Recipe, base: str | Path = ".") -> None:
        self._start(resolve(recipe, Path(base), checkpoints=True))

    @classmethod
    def of(cls, build: ResolvedBuild) -> EagerPipeline:
        """The pipeline of a build whose parts are found already."""
        pipeline = cls.__new__(cls)
        pipeline._start(build)
        return pipeline

    def _start(self, build: ResolvedBuild) -> None:
        tokenizer = find_tokenizer(build)
        if tokenizer is None or "vae" not in build.components:
            raise RecipeError(f"'{build.recipe.name}': a video needs a text_encoder and a vae; add them to the recipe")
        recipe, family, configs = build.recipe, build.family, build.configs
        definitions = family.define(recipe, configs)
        weights = {
            name: read_named(build.components[name].checkpoint, d.expected, d.aliases)
            for name, d in definitions.items()
        }
        self.tokenizer = T5Tokenizer(tokenizer)
        self.geometry = family.geometry(recipe, configs)
        self._prompt = family.prompt(recipe, configs)
        self._models = family.eager(recipe, configs, weights)
        part = build.components["transformer"]
        graph = rewritten_graphs(definitions["transformer"], part.passes, part.target)[0]
        self._family, self._part = family, part
        # what ranges there are, blocks say, which are cut when a sampler asks for one
        self._cut = functools.cache(lambda: lower_graph(graph, part.passes, part.target))
        self._made: dict[Made, fx.GraphModule] = {}
        self._take(recipe)
        read = weights["transformer"].__getitem__
        parameters = {name: w.source.value(read) for name, w in without_scales(graph.weights).items()}

        def with_weights(gm: fx.GraphModule) -> fx.GraphModule:
            return materialise(unrounded(gm), parameters)

        self._functions = {name: with_weights(gm) for name, gm in graph.functions.items()}
        self._materialise = with_weights
        self._inputs = {name: graph.inputs_of(name) for name in graph.functions}
        self._prediction = next(i for i, name in enumerate(graph.outputs) if graph.gives.get(name) == "prediction")
        # a table that is a tensor of the checkpoint as it is, such as the null prompt
        self._tables = {
            name: parameters[str(node.target)]
            for name, node in zip(graph.outputs, output_values(graph.functions["base"]), strict=True)
            if node.op == "get_attr"
        }

    def _take(self, recipe: Recipe) -> None:
        asked, part = recipe.sampler.reuse, self._part
        ranges = find_ranges(asked, extract_blocks(self._cut()[0]), part.target) if asked else []
        self.recipe = recipe
        self._sampling = sampling(recipe, self._family, part.passes.groups, ranges)

    def under(self, sampler: SamplerRecipe) -> EagerPipeline:
        """The same models, shared, with another sampler.

        Raises:
            RecipeError: the model does not have what the sampler asks for.
        """
        other = copy.copy(self)
        other._take(self.recipe.model_copy(update={"sampler": sampler}))
        return other

    @property
    def ranges(self) -> tuple[str, ...]:
        """Names of the ranges of blocks that the sampler reuses."""
        return tuple(self._sampling.ranges)

    @property
    def steps(self) -> tuple[Step, ...]:
        """The calls of the denoiser."""
        return self._sampling.steps

    @property
    def whole_steps(self) -> tuple[Step, ...]:
        """The calls of the denoiser, if none of them left anything out."""
        bare = self.recipe.sampler.model_copy(update={"reuse": [], "conditional": None})
        return sampling(self.recipe.model_copy(update={"sampler": bare}), self._family, self._part.passes.groups).steps

    @torch.no_grad()
    def encode(self, prompt: str) -> tuple[torch.Tensor, torch.Tensor]:
        """A prompt's embedding ``[1, L, d]`` and mask ``[1, L]``."""
        text = prepare_prompt(prompt, [(s.label, s.text) for s in self._prompt.suffixes], self._prompt.cleaning)
        tokens = self.tokenizer(text, self._prompt.max_tokens)
        ids, mask = torch.tensor([tokens.ids]), torch.tensor([tokens.mask], dtype=torch.float32)
        return self._models.encode(ids, mask), mask

    def noise(self, seed: int) -> torch.Tensor:
        """The latents that a video starts from ``[1, C, T, H, W]``."""
        g = self.geometry
        shape = (1, g.latent_channels, g.latent_frames, g.latent_height, g.latent_width)
        return torch.from_numpy(initial_noise(seed, shape))

    @torch.no_grad()
    def denoise(self, y: torch.Tensor, mask: torch.Tensor, seed: int) -> torch.Tensor:
        """Latents ``[1, C, T, H, W]``."""
        own, noise = self.recipe.sampler, self.noise(seed)
        latents: torch.Tensor = sample(
            self.denoiser(y, mask), noise, self.steps, guidance=own.guidance, difference=own.difference, leap=own.leap
        )
        return latents

    def denoiser(self, y: torch.Tensor, mask: torch.Tensor) -> Denoiser:
        """The denoiser for one video of a prompt; it keeps what ranges of blocks added."""
        given = {"text_embedding": y, "token_mask": mask, "frame_mask": torch.ones(1, self.geometry.latent_frames)}
        graph = None
        if self._sampling.ranges:
            graph = ReusingGraph(self._cut()[1], self._sampling, self._materialise, self._made)

        def call(batch: torch.Tensor, step: Step, _: torch.Tensor | None) -> torch.Tensor:
            now = given | {"latents": batch, "timestep": torch.tensor(step.t)}
            if graph is not None:
                return graph(step, self._fed(step.function, now))[self._prediction]
            return self.predict(step.function, now)

        return call

    @torch.no_grad()
    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        """Pixels ``[F, 3, H, W]``, -1 … 1, of latents ``[1, C, T, H, W]``."""
        return self._models.decode(latents)

    def video(self, prompt: str, seed: int = 0) -> torch.Tensor:
        """Pixels ``[F, 3, H, W]``, -1 … 1, of a video of ``prompt``."""
        y, mask = self.encode(prompt)
        return self.decode(self.denoise(y, mask, seed))

    @torch.no_grad()
    def predict(self, function: str, given: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """One call of the denoiser ``[B, C or 2C, T, H, W]``; ``given`` as for the player, by kind of feed."""
        result: torch.Tensor = self._functions[function](*self._fed(function, given))[self._prediction]
        return result

    def _fed(self, function: str, given: Mapping[str, torch.Tensor]) -> list[torch.Tensor]:
        """A function's inputs, in order."""
        inputs = [Fed(i.name, i.shape, i.feed) for i in self._inputs[function]]
        fed = feed_inputs(inputs, given, self._tables)
        return [fed[i.name] for i in inputs]
