"""What a model family defines: everything that is one model's, and nothing that is not.

A family is found by the name that a recipe's ``model`` gives, through the entry-point group ``sora_compile.models``.
Importing it must be light: torch is imported in the methods that need it.
"""

from __future__ import annotations

import abc
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Protocol

from toolchain import plugins
from toolchain.errors import RecipeError

if TYPE_CHECKING:
    import torch

    from toolchain.formats.manifest import Geometry, Stage, Suffix
    from toolchain.formats.recipe import Recipe
    from toolchain.ir.graph import Input, LoweredForm

Configs = Mapping[str, Mapping[str, Any]]
"""Components' configurations as their ``config.json`` has them, by component."""


@dataclass(frozen=True)
class Forms:
    """What is captured as one graph: ``base``, and the same modules at other sizes as other functions."""

    base: LoweredForm
    others: Mapping[str, LoweredForm] = field(default_factory=dict)


@dataclass(frozen=True)
class Definition:
    """A component, ready to be captured: nothing of it is allocated."""

    name: str
    config: Mapping[str, Any]
    """The whole configuration, defaults written out: what a bundle's recipe pins."""
    expected: Mapping[str, tuple[int, ...]]
    """Official names and shapes of the checkpoint's tensors."""
    forms: tuple[Forms, ...]
    aliases: Mapping[str, str] = field(default_factory=dict)
    """Tensors that a checkpoint may hold under another name, or under both."""


@dataclass(frozen=True)
class PromptPreparation:
    """From a prompt to the text encoder's tokens: what is appended, how it is cleaned, how many tokens there are."""

    max_tokens: int
    suffixes: tuple[Suffix, ...] = ()
    cleaning: Literal["web-captions", "none"] = "none"


class EagerModels(Protocol):
    """The text encoder and the decoder in PyTorch as published, with real weights: what bundles are held against.

    They share no lowered form with what is compiled. (The denoiser's reference is its captured graph.)
    """

    def encode(self, token_ids: torch.Tensor, token_mask: torch.Tensor) -> torch.Tensor:
        """Embedding ``[1, L, d]`` of ids and mask ``[1, L]``."""
        ...

    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        """Pixels ``[F, 3, H, W]``, -1 … 1, of latents ``[1, C, T, H, W]``."""
        ...


class ModelFamily(abc.ABC):
    """One family of text-to-video models: text encoder, transformer (the denoiser) and VAE."""

    name: ClassVar[str]

    @abc.abstractmethod
    def check(self, recipe: Recipe) -> None:
        """Refuse what no checkpoint of the family can do; called when a recipe is loaded, so nothing heavy here.

        Raises:
            RecipeError: names the key.
        """

    @abc.abstractmethod
    def define(self, recipe: Recipe, configs: Configs) -> dict[str, Definition]:
        """The recipe's components for the recipe's video, in the order in which they run.

        Raises:
            RecipeError: a configuration or the video's size is not one the model can have, or components do not fit.
        """

    @abc.abstractmethod
    def geometry(self, recipe: Recipe, configs: Configs) -> Geometry:
        """The video and its latents.

        Raises:
            RecipeError: as :meth:`define`.
        """

    @abc.abstractmethod
    def timesteps(self, recipe: Recipe) -> tuple[float, ...]:
        """The denoising timesteps, from noise to video, before any leap.

        Raises:
            RecipeError: the recipe's video has none.
        """

    @abc.abstractmethod
    def prompt(self, recipe: Recipe, configs: Configs) -> PromptPreparation:
        """How prompts are prepared."""

    @abc.abstractmethod
    def stages(self, recipe: Recipe, configs: Configs) -> Sequence[Stage]:
        """How latents become pixels: loops over time, run one after the other by the VAE's blocks."""

    @abc.abstractmethod
    def eager(self, recipe: Recipe, configs: Configs, weights: Mapping[str, Mapping[str, torch.Tensor]]) -> EagerModels:
        """The text encoder and the decoder, whole, with ``weights`` by component and official name."""

    def default_partition(self, component: str) -> str:
        """The partition of a component whose recipe lists none, as text: ``partition{max_bytes=200MB}``."""
        return "partition"

    def sample_input(self, spec: Input, generator: torch.Generator) -> torch.Tensor:
        """An input as a real run has it, for the accuracy gate: by what feeds it."""
        from toolchain.models.samples import sample_input

        return sample_input(spec, generator)


def find_family(name: str) -> ModelFamily:
    """The family called ``name``.

    Raises:
        RecipeError: there is none; names the nearest.
    """
    family = plugins.find(plugins.MODELS, name, "model", "model")()
    if not isinstance(family, ModelFamily):
        raise RecipeError(f"model: '{name}' is registered, but is no ModelFamily; update the package that provides it")
    return family
