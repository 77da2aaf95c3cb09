"""The autoencoder's four parts as they are lowered, each for one geometry.

The temporal parts take one micro chunk, the spatial ones a group of frames: whoever runs them loops over
chunks and groups. A last, shorter chunk is another instance of the same class.
"""

from __future__ import annotations

import re
from typing import ClassVar

import torch

from toolchain.ir.feeds import Frames, Given, Pixels
from toolchain.ir.graph import Input, LoweredForm, wire
from toolchain.models.open_sora_v1_2.vae import OpenSoraVAE

UNIT = re.compile(
    r"(?:encoder\.)?"
    r"(?:(?:(?:up_blocks|down_blocks)\.\d+|mid_block)\.(?:resnets|attentions|upsamplers|downsamplers)\.\d+"
    r"|block_res_blocks\.\d+\.\d+|res_blocks\.\d+|conv_blocks\.\d+)(?![^.])"
)
"""A layer that is a unit of its own, by its path in the spatial or the temporal autoencoder."""

FIRST = ("denormalize", "unscale", "pad_frames", "post_quant_conv", "conv1", "encoder.conv_in", "conv_in")
"""What belongs to the first convolution; all that is left belongs to the last."""


class LoweredPart(LoweredForm):
    """What the parts share: sizes by letter, and units named by the official paths.

    A unit is one residual block, attention, up- or down-sampler, or what comes before or after them all:
    ``("spatial.up_blocks.2.resnets.1",)``, ``("temporal.conv_in",)``, and in encoders
    ``("spatial_encoder.mid_block.resnets.0",)``.
    """

    component = "vae"
    part: ClassVar[str]

    def __init__(self, sizes: dict[str, int]) -> None:
        super().__init__()
        for letter, size in sizes.items():
            if size < 1:
                raise ValueError(f"{type(self).__name__}: size {letter} is {size}, must be positive")
        self._dims = sizes

    def dims(self) -> dict[str, int]:
        return dict(self._dims)

    def unit(self, path: str) -> tuple[str, ...]:
        stem = path.removeprefix(f"{self.part.split('_')[0]}_vae.").removeprefix("module.").removeprefix("decoder.")
        layer = UNIT.match(stem)
        if layer:
            return (f"{self.part}.{layer.group().removeprefix('encoder.')}",)
        return (f"{self.part}.{'conv_in' if stem in FIRST else 'conv_out'}",)


class LoweredTemporalDecoder(LoweredPart):
    """One micro chunk of latents ``z`` to ``x_z``.

    Args:
        model: shares its modules; build it under ``torch.device("meta")`` to allocate nothing.
        latents, frames: of the chunk, as ``OpenSoraVAEConfig.chunks`` gives them.
        height, width: latent sizes.
        batch: videos at once.

    Raises:
        ValueError: a size is not positive, or a chunk of ``frames`` has another number of latents.
    """

    part = "temporal"

    def __init__(
        self, model: OpenSoraVAE, *, latents: int, frames: int, height: int, width: int, batch: int = 1
    ) -> None:
        super().__init__({"B": batch, "T": latents, "F": frames, "H": height, "W": width})
        if latents != -(-frames // model.config.temporal.factor):
            raise ValueError(f"a chunk of {frames} frames does not have {latents} latent frames")
        self.denormalize, self.temporal_vae = model.denormalize, model.temporal_vae
        self.register_buffer("scale", model.scale)
        self.register_buffer("shift", model.shift)

    def inputs(self) -> tuple[Input, ...]:
        d = self._dims
        shape = (d["B"], self.temporal_vae.config.embed_dim, d["T"], d["H"], d["W"])
        return (Input("z", shape, Frames(), rate="chunk"),)

    def gives(self) -> dict[str, Given]:
        return {"x_z": "frames"}

    def forward(self, z: torch.Tensor) -> torch.Tensor:
        """``z`` ``[B, C, t, h, w]`` to ``x_z`` ``[B, C, frames, h, w]``."""
        latent = self.denormalize(z, self.scale, self.shift)
        return wire(self.temporal_vae.decode(latent, self._dims["F"]), "x_z")


class LoweredSpatialDecoder(LoweredPart):
    """Some frames of ``x_z`` to pixels.

    Args:
        model: shares its modules.
        frames: at once.
        height, width: latent sizes.

    Raises:
        ValueError: a size is not positive.
    """

    part = "spatial"

    def __init__(self, model: OpenSoraVAE, *, frames: int, height: int, width: int) -> None:
        super().__init__({"F": frames, "H": height, "W": width})
        self.spatial_vae = model.spatial_vae

    def inputs(self) -> tuple[Input, ...]:
        d = self._dims
        shape = (d["F"], self.spatial_vae.module.config.latent_channels, d["H"], d["W"])
        return (Input("x_z", shape, Frames(), rate="frames"),)

    def gives(self) -> dict[str, Given]:
        return {"pixels": "pixels"}

    def forward(self, x_z: torch.Tensor) -> torch.Tensor:
        """``x_z`` ``[n, C, h, w]`` to pixels ``[n, 3, H, W]``."""
        return wire(self.spatial_vae.decode(x_z), "pixels")


class LoweredSpatialEncoder(LoweredPart):
    """Some frames to the mean and log variance of their spatial latents, not yet scaled to ``x_z``.

    Args:
        model: shares its modules.
        frames: at once.
        height_px, width_px: the video's size.

    Raises:
        ValueError: a size is not positive.
    """

    part = "spatial_encoder"

    def __init__(self, model: OpenSoraVAE, *, frames: int, height_px: int, width_px: int) -> None:
        factor = model.config.spatial.factor
        super().__init__({"F": frames, "H": height_px // factor, "W": width_px // factor})
        self.spatial_vae = model.spatial_vae
        self._pixels = (frames, model.config.spatial.in_channels, height_px, width_px)

    def inputs(self) -> tuple[Input, ...]:
        return (Input("pixels", self._pixels, Pixels(), rate="encode_frames"),)

    def gives(self) -> dict[str, Given]:
        return {"mean": "mean", "logvar": "log_variance"}

    def forward(self, pixels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """``pixels`` ``[n, 3, H, W]`` to mean and log variance, each ``[n, C, h, w]``."""
        mean, logvar = self.spatial_vae.module.moments(pixels)
        return wire(mean, "mean"), wire(logvar, "logvar")


class LoweredTemporalEncoder(LoweredPart):
    """One micro chunk of ``x_z`` to the mean and log variance of its latents, not yet normalised to ``z``.

    Args:
        model: shares its modules.
        frames: of the chunk.
        height, width: latent sizes.
        batch: videos at once.

    Raises:
        ValueError: a size is not positive.
    """

    part = "temporal_encoder"

    def __init__(self, model: OpenSoraVAE, *, frames: int, height: int, width: int, batch: int = 1) -> None:
        latents = -(-frames // model.config.temporal.factor)
        super().__init__({"B": batch, "T": latents, "F": frames, "H": height, "W": width})
        self.temporal_vae = model.temporal_vae

    def inputs(self) -> tuple[Input, ...]:
        d = self._dims
        shape = (d["B"], self.temporal_vae.config.in_out_channels, d["F"], d["H"], d["W"])
        return (Input("x_z", shape, Frames(), rate="encode_chunk"),)

    def gives(self) -> dict[str, Given]:
        return {"mean": "mean", "logvar": "log_variance"}

    def forward(self, x_z: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """``x_z`` ``[B, C, frames, h, w]`` to mean and log variance, each ``[B, C, t, h, w]``."""
        mean, logvar = self.temporal_vae.moments(x_z, self._dims["F"])
        return wire(mean, "mean"), wire(logvar, "logvar")
