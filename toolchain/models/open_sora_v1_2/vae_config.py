"""Sizes of Open-Sora's video autoencoder, and the arithmetic of its micro chunks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any, TypeVar

C = TypeVar("C")


def from_known(cls: type[C], data: Mapping[str, Any]) -> C:
    """The dataclass ``cls`` from those keys of ``data`` that it knows."""
    known = {f.name for f in fields(cls)}  # type: ignore[arg-type]
    return cls(**{k: v for k, v in data.items() if k in known})


@dataclass(frozen=True)
class SpatialVAEConfig:
    """The image autoencoder's sizes under the names of diffusers' AutoencoderKL; defaults are SDXL's.

    ``scaling_factor`` of such a configuration is passed over: Open-Sora does not use it (see
    ``OpenSoraVAEConfig.spatial_scaling``).

    Raises:
        ValueError: it describes a variant that is not supported, or channels do not divide into groups.
    """

    in_channels: int = 3
    out_channels: int = 3
    latent_channels: int = 4
    block_out_channels: tuple[int, ...] = (128, 256, 512, 512)
    layers_per_block: int = 2
    norm_num_groups: int = 32
    act_fn: str = "silu"
    down_block_types: tuple[str, ...] | None = None
    up_block_types: tuple[str, ...] | None = None
    mid_block_add_attention: bool = True
    use_quant_conv: bool = True
    use_post_quant_conv: bool = True

    def __post_init__(self) -> None:
        object.__setattr__(self, "block_out_channels", tuple(self.block_out_channels))
        levels = len(self.block_out_channels)
        for name, supported in (("down_block_types", "DownEncoderBlock2D"), ("up_block_types", "UpDecoderBlock2D")):
            given = getattr(self, name)
            types = (supported,) * levels if given is None else tuple(given)
            object.__setattr__(self, name, types)
            if types != (supported,) * levels:
                raise ValueError(f"{name} {list(types)}: only {levels} times {supported} is supported")
        if self.act_fn != "silu":
            raise ValueError(f"act_fn '{self.act_fn}': only silu is supported")
        for name in ("mid_block_add_attention", "use_quant_conv", "use_post_quant_conv"):
            if not getattr(self, name):
                raise ValueError(f"{name}: false is not supported")
        _check_groups(self.block_out_channels, self.norm_num_groups, "norm_num_groups")

    @property
    def factor(self) -> int:
        """Pixels a latent pixel, in height and in width."""
        return int(2 ** (len(self.block_out_channels) - 1))


@dataclass(frozen=True)
class TemporalVAEConfig:
    """The temporal autoencoder's sizes under their official names; defaults are the official ones.

    Raises:
        ValueError: levels and down-sampling steps do not match, or channels do not divide into groups.
    """

    in_out_channels: int = 4
    latent_embed_dim: int = 4
    embed_dim: int = 4
    filters: int = 128
    num_res_blocks: int = 4
    channel_multipliers: tuple[int, ...] = (1, 2, 2, 4)
    temporal_downsample: tuple[bool, ...] = (False, True, True)
    num_groups: int = 32

    def __post_init__(self) -> None:
        object.__setattr__(self, "channel_multipliers", tuple(self.channel_multipliers))
        object.__setattr__(self, "temporal_downsample", tuple(self.temporal_downsample))
        if len(self.temporal_downsample) != len(self.channel_multipliers) - 1:
            raise ValueError(
                f"temporal_downsample has {len(self.temporal_downsample)} entries; "
                f"{len(self.channel_multipliers)} channel_multipliers need one less"
            )
        _check_groups(self.channels, self.num_groups, "num_groups")

    @property
    def channels(self) -> tuple[int, ...]:
        """Channels of each level, shallow to deep."""
        return tuple(self.filters * m for m in self.channel_multipliers)

    @property
    def factor(self) -> int:
        """Frames a latent frame."""
        return int(2 ** sum(self.temporal_downsample))


def _check_groups(channels: tuple[int, ...], groups: int, name: str) -> None:
    for c in channels:
        if c % groups:
            raise ValueError(f"{c} channels do not divide into {name} {groups}")


@dataclass(frozen=True)
class OpenSoraVAEConfig:
    """Open-Sora's autoencoder; the defaults are OpenSora-VAE-v1.2.

    Args:
        micro_frame_size: frames that are encoded together; chunks do not see one another.
        micro_batch_size: frames that the spatial autoencoder takes at once; changes memory, not numbers.
        shift, scale: per latent channel, ``z = (latent - shift) / scale``.
        spatial_scaling: factor between the spatial latent and the temporal autoencoder's input. Open-Sora
            uses this one whatever the spatial autoencoder's own configuration says.

    Raises:
        ValueError: parts do not fit together.
    """

    spatial: SpatialVAEConfig = field(default_factory=SpatialVAEConfig)
    temporal: TemporalVAEConfig = field(default_factory=TemporalVAEConfig)
    micro_frame_size: int = 17
    micro_batch_size: int = 4
    shift: tuple[float, ...] = (-0.10, 0.34, 0.27, 0.98)
    scale: tuple[float, ...] = (3.85, 2.32, 2.33, 3.06)
    spatial_scaling: float = 0.18215

    def __post_init__(self) -> None:
        object.__setattr__(self, "shift", tuple(self.shift))
        object.__setattr__(self, "scale", tuple(self.scale))
        if self.spatial.latent_channels != self.temporal.in_out_channels:
            raise ValueError(
                f"spatial latent_channels {self.spatial.latent_channels} is not "
                f"temporal in_out_channels {self.temporal.in_out_channels}"
            )
        for name in ("shift", "scale"):
            if len(getattr(self, name)) != self.temporal.embed_dim:
                raise ValueError(f"{name} needs {self.temporal.embed_dim} values, one a latent channel")
        for name in ("micro_frame_size", "micro_batch_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} {getattr(self, name)} is not positive")

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> OpenSoraVAEConfig:
        """From the contents of a ``config.json``; keys that say nothing of the model are passed over.

        ``spatial`` and ``temporal`` hold the parts' own configurations; without them, as in the official
        file, the parts are the official ones.

        Raises:
            ValueError: a value is out of range or of the wrong type.
        """
        parts = {
            "spatial": from_known(SpatialVAEConfig, data.get("spatial", {})),
            "temporal": from_known(TemporalVAEConfig, data.get("temporal", {})),
        }
        if "spatial_scaling_used" in data:
            parts["spatial_scaling"] = data["spatial_scaling_used"]
        return from_known(cls, {**data, **parts})

    def latent_frames(self, frames: int) -> int:
        """Latent frames of a video of ``frames`` frames."""
        return sum(latents for latents, _ in self.chunks(frames))

    def chunks(self, frames: int) -> tuple[tuple[int, int], ...]:
        """The micro chunks of a video as (latent frames, frames), in order; the last may be shorter.

        Raises:
            ValueError: ``frames`` is not positive.
        """
        if frames < 1:
            raise ValueError(f"a video of {frames} frames has no chunks")
        full, rest = divmod(frames, self.micro_frame_size)
        sizes = [self.micro_frame_size] * full + [rest] * (rest > 0)
        return tuple((-(-n // self.temporal.factor), n) for n in sizes)


def chunk_functions(chunks: Sequence[tuple[int, int]]) -> dict[str, tuple[int, int]]:
    """The temporal VAE's functions: ``base`` for all chunks, and ``tail`` if the last one is shorter.

    ``chunks`` and the values are latents and frames of a chunk.
    """
    return {"base": chunks[0]} | ({"tail": chunks[-1]} if chunks[-1] != chunks[0] else {})
