"""What feeds a component's input: the closed list of things that whoever runs a model knows how to make.

A model says it once for each of its inputs; the manifest records it, and players, the gate's random inputs and the
eager pipeline go by it. Names of inputs mean nothing to any of them.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field


class _Feed(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class TokenIds(_Feed):
    """Ids of the prompt's tokens ``[B, L]``, padded."""

    kind: Literal["token_ids"] = "token_ids"


class TokenMask(_Feed):
    """``[B, L]``, 1 for the prompt's tokens and 0 for padding; the same for both halves of guidance."""

    kind: Literal["token_mask"] = "token_mask"


class TextEmbedding(_Feed):
    """The text encoder's output: the prompt's for the conditional half, a table for the unconditional one."""

    kind: Literal["text_embedding"] = "text_embedding"
    unconditional: str = Field(description="Name of the component's table ``[L, C]`` that stands for no prompt.")


class Latents(_Feed):
    """The noisy latents ``[B, C, T, H, W]``, the same for both halves."""

    kind: Literal["latents"] = "latents"


class Timestep(_Feed):
    """The step's timestep, ``[B]``."""

    kind: Literal["timestep"] = "timestep"


class Constant(_Feed):
    """The same number everywhere, at every step."""

    kind: Literal["constant"] = "constant"
    value: float


class FrameMask(_Feed):
    """``[B, T]``: 0 for latent frames that are given as condition, 1 for those to make."""

    kind: Literal["frame_mask"] = "frame_mask"


class Frames(_Feed):
    """What the loop over frames hands on: to the first stage the latents, to others the results of the one before."""

    kind: Literal["frames"] = "frames"


class Pixels(_Feed):
    """Frames to encode, red green blue, -1 … 1."""

    kind: Literal["pixels"] = "pixels"


Feed = Annotated[
    TokenIds | TokenMask | TextEmbedding | Latents | Timestep | Constant | FrameMask | Frames | Pixels,
    Field(discriminator="kind"),
]

Given = Literal["text_embedding", "prediction", "frames", "pixels", "mean", "log_variance"]
"""What a component's output is. ``frames`` are what the next stage of decoding takes."""
