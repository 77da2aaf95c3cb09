"""STDiT3, the transformer of Open-Sora 1.2, written to be traced and lowered.

``STDiT3`` takes the official state_dict and the official forward arguments. ``LoweredSTDiT3`` is the
same computation for one geometry: fixed shapes, the prompt padded and masked instead of packed, and
tables (positions) as values of their own, so that no block carries a constant that is not a weight.

The token stream is ``[B, T·S, C]``: batch, latent frames × patches of a frame, hidden size.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import nn

from toolchain.ir.feeds import Constant, FrameMask, Given, Latents, TextEmbedding, Timestep, TokenMask
from toolchain.ir.graph import Input, LoweredForm, wire
from toolchain.models.open_sora_v1_2.attention import (
    CrossAttention,
    SpatialAttention,
    TemporalAttention,
)
from toolchain.models.open_sora_v1_2.modulation import gated, modulate, modulation, select_frames
from toolchain.models.open_sora_v1_2.stdit3_leaves import (
    FinalLayer,
    Mlp,
    ModulationProjection,
    PatchEmbed,
    PositionTable,
    RotaryTable,
    TextBias,
    TimestepEmbedder,
    Unpatchify,
    add_positions,
)


def _positive(name: str, value: Any, least: int = 1) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise ValueError(f"{name} {value!r} is not a whole number of {least} or more")


@dataclass(frozen=True)
class STDiT3Config:
    """The official configuration's fields, with the values of STDiT3-XL/2 as defaults.

    The last group changes how the official code trains or runs, not what is computed; it is accepted
    so that an official ``config.json`` loads as it is.
    """

    input_size: tuple[int | None, int | None, int | None] = (None, None, None)
    input_sq_size: int = 512
    in_channels: int = 4
    patch_size: tuple[int, int, int] = (1, 2, 2)
    hidden_size: int = 1152
    depth: int = 28
    num_heads: int = 16
    mlp_ratio: float = 4.0
    pred_sigma: bool = True
    caption_channels: int = 4096
    model_max_length: int = 300
    qk_norm: bool = True

    class_dropout_prob: float = 0.1
    drop_path: float = 0.0
    enable_flash_attn: bool = False
    enable_layernorm_kernel: bool = False
    enable_sequence_parallelism: bool = False
    only_train_temporal: bool = False
    freeze_y_embedder: bool = False
    skip_y_embedder: bool = False

    def __post_init__(self) -> None:
        object.__setattr__(self, "patch_size", tuple(self.patch_size))
        for name in ("input_sq_size", "in_channels", "hidden_size", "num_heads", "caption_channels"):
            _positive(name, getattr(self, name))
        _positive("model_max_length", self.model_max_length)
        _positive("depth", self.depth, least=0)
        for name in ("pred_sigma", "qk_norm", "skip_y_embedder"):
            if not isinstance(getattr(self, name), bool):
                raise ValueError(f"{name} {getattr(self, name)!r} is neither true nor false")
        if len(self.patch_size) != 3:
            raise ValueError(f"patch_size {list(self.patch_size)}: expected three sizes")
        pt, ph, pw = self.patch_size
        _positive("patch_size", ph)
        if pt != 1 or ph != pw:
            raise ValueError(f"patch_size {list(self.patch_size)}: only [1, p, p] is supported")
        if self.hidden_size % self.num_heads or (self.hidden_size // self.num_heads) % 2:
            raise ValueError(f"hidden_size {self.hidden_size} does not divide into {self.num_heads} heads of even size")
        if self.hidden_size % 4:
            raise ValueError(f"hidden_size {self.hidden_size} is not a multiple of 4, as position embeddings need")
        if self.skip_y_embedder:
            raise ValueError("skip_y_embedder: true is not supported; the model must embed its captions")

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> STDiT3Config:
        """From the contents of a ``config.json``; keys that say nothing of the model are passed over.

        Raises:
            ValueError: a value is out of range or of the wrong type.
        """
        known = {f.name for f in fields(cls)}
        return cls(**{k: v for k, v in data.items() if k in known})

    @property
    def out_channels(self) -> int:
        return 2 * self.in_channels if self.pred_sigma else self.in_channels


class STDiT3Block(nn.Module):
    """Modulated self-attention, cross-attention to the prompt, modulated MLP; each a residual."""

    def __init__(self, config: STDiT3Config, temporal: bool) -> None:
        super().__init__()
        c, heads = config.hidden_size, config.num_heads
        self.norm1 = nn.LayerNorm(c, eps=1e-6, elementwise_affine=False)
        self.attn = (TemporalAttention if temporal else SpatialAttention)(c, heads, config.qk_norm)
        self.cross_attn = CrossAttention(c, heads)
        self.norm2 = nn.LayerNorm(c, eps=1e-6, elementwise_affine=False)
        self.mlp = Mlp(c, int(c * config.mlp_ratio), c)
        self.scale_shift_table = nn.Parameter(torch.randn(6, c) / c**0.5)
        self.temporal = temporal

    def forward(
        self,
        x: torch.Tensor,
        t_mlp: torch.Tensor,
        text: torch.Tensor,
        text_bias: torch.Tensor,
        rope: torch.Tensor,
        frames: int,
    ) -> torch.Tensor:
        m = modulation(self.scale_shift_table, t_mlp)
        shift_msa, scale_msa, gate_msa, shift_mlp, scale_mlp, gate_mlp = (m[i] for i in range(6))
        h = modulate(self.norm1(x), shift_msa, scale_msa)
        h = self.attn(h, rope, frames=frames) if self.temporal else self.attn(h, frames=frames)
        x = gated(x, gate_msa, h)
        x = x + self.cross_attn(x, text, text_bias)
        h = self.mlp(modulate(self.norm2(x), shift_mlp, scale_mlp))
        return gated(x, gate_mlp, h)


class CaptionEmbedder(nn.Module):
    """Projects the text encoder's output; holds the embedding of "no prompt" for guidance."""

    def __init__(self, config: STDiT3Config) -> None:
        super().__init__()
        self.y_proj = Mlp(config.caption_channels, config.hidden_size, config.hidden_size)
        null = torch.randn(config.model_max_length, config.caption_channels) / config.caption_channels**0.5
        self.register_buffer("y_embedding", null)


class STDiT3(nn.Module):
    """The denoiser: velocity (and, unused, sigma) of a noisy latent video for a prompt and a timestep."""

    def __init__(self, config: STDiT3Config) -> None:
        super().__init__()
        self.config = config
        c = config.hidden_size
        self.rope = RotaryTable(c // config.num_heads)
        self.pos_embed = PositionTable(c)
        self.x_embedder = PatchEmbed(config.in_channels, c, config.patch_size)
        self.t_embedder = TimestepEmbedder(c)
        self.fps_embedder = TimestepEmbedder(c)
        self.t_block = ModulationProjection(c, 6 * c)
        self.y_embedder = CaptionEmbedder(config)
        self.text_bias = TextBias()
        self.spatial_blocks = nn.ModuleList(STDiT3Block(config, temporal=False) for _ in range(config.depth))
        self.temporal_blocks = nn.ModuleList(STDiT3Block(config, temporal=True) for _ in range(config.depth))
        self.final_layer = FinalLayer(c, config.patch_size, config.out_channels)
        self.unpatchify = Unpatchify(config.patch_size, config.out_channels)

    def forward(
        self,
        x: torch.Tensor,
        timestep: torch.Tensor,
        y: torch.Tensor,
        mask: torch.Tensor | None = None,
        x_mask: torch.Tensor | None = None,
        fps: torch.Tensor | None = None,
        height: torch.Tensor | None = None,
        width: torch.Tensor | None = None,
        **_: object,
    ) -> torch.Tensor:
        """The official forward.

        Args:
            x: noisy latents ``[B, C_in, T, H, W]``, H and W in latent pixels (an eighth of the video's).
            timestep: ``[B]``, 0 … 1000.
            y: text encoder output ``[B, 1, L, caption_channels]``.
            mask: 1 for real tokens ``[n, L]``, repeated to B; all tokens when None.
            x_mask: ``[B, T]`` bool, False for frames given as condition; none when None.
            fps: ``[1]`` or ``[B]``.
            height, width: the video's size in pixels ``[1]`` or ``[B]``; only the first counts.

        Returns:
            float32 ``[B, C_out, T, H, W]``; the first half of the channels is the velocity.

        Raises:
            ValueError: ``fps``, ``height`` or ``width`` is missing.
        """
        if fps is None or height is None or width is None:
            raise ValueError("STDiT3 needs fps, height and width")
        dtype = self.x_embedder.proj.weight.dtype
        batch = x.shape[0]
        if mask is None:
            mask = torch.ones(y.shape[0], y.shape[-2], device=x.device)
        dims = latent_dims(self.config, batch, x.shape[2], x.shape[3], x.shape[4], y.shape[-2])
        out, _null = denoise(
            self,
            dims,
            position_scale(self.config, float(height[0]), float(width[0])),
            x.to(dtype),
            timestep,
            y.to(dtype).reshape(batch, y.shape[-2], y.shape[-1]),
            (mask != 0).to(dtype).repeat(batch // mask.shape[0], 1),
            fps.repeat(batch // fps.shape[0]),
            None if x_mask is None else x_mask.to(dtype),
        )
        return out.float()


def latent_dims(config: STDiT3Config, batch: int, frames: int, height: int, width: int, text: int) -> dict[str, int]:
    """Sizes by letter: B, T, H, W (latent), Hp × Wp = S (patches of a frame), N = T·S tokens, L (text), C."""
    hp, wp = -(-height // config.patch_size[1]), -(-width // config.patch_size[2])
    sizes = {"B": batch, "T": frames, "H": height, "W": width, "Hp": hp, "Wp": wp}
    return sizes | {"S": hp * wp, "N": frames * hp * wp, "L": text, "C": config.hidden_size}


def position_scale(config: STDiT3Config, height_px: float, width_px: float) -> float:
    """Scale of the position embedding: the video's size against the size the model was trained for."""
    return math.sqrt(height_px * width_px) / config.input_sq_size


def denoise(
    model: Any,
    dims: Mapping[str, int],
    scale: float,
    x: torch.Tensor,
    timestep: torch.Tensor,
    y: torch.Tensor,
    mask: torch.Tensor,
    fps: torch.Tensor,
    x_mask: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The computation itself, for ``STDiT3`` and ``LoweredSTDiT3`` alike; returns output and null text."""
    frames = dims["T"]
    pos_embed = wire(model.pos_embed(hp=dims["Hp"], wp=dims["Wp"], scale=scale), "pos_embed")
    rope = wire(model.rope(frames=frames), "rope")
    null_text = wire(model.y_embedder.y_embedding, "null_text")

    text = wire(model.y_embedder.y_proj(y), "text")
    text_bias = wire(model.text_bias(mask), "text_bias")

    fps_embedded = model.fps_embedder(fps)
    t = wire(model.t_embedder(timestep) + fps_embedded, "t")
    t_mlp = wire(model.t_block(t), "t_mlp")
    final: tuple[torch.Tensor, ...] = (t,)
    if x_mask is not None:
        t0 = wire(model.t_embedder(timestep * 0) + fps_embedded, "t0")
        t_mlp = wire(select_frames(x_mask, t_mlp, model.t_block(t0)), "t_mlp")
        final = (t, t0, x_mask)
    x = wire(add_positions(model.x_embedder(x), pos_embed), "x")
    for spatial, temporal in zip(model.spatial_blocks, model.temporal_blocks, strict=True):
        x = wire(spatial(x, t_mlp, text, text_bias, rope, frames), "x")
        x = wire(temporal(x, t_mlp, text, text_bias, rope, frames), "x")
    sizes = (frames, dims["Hp"], dims["Wp"], dims["H"], dims["W"])
    out = model.unpatchify(model.final_layer(x, *final), dims=sizes)
    return wire(out, "out"), null_text


class LoweredSTDiT3(LoweredForm):
    """``STDiT3`` for one geometry. See :func:`denoise`; inputs and sizes in :meth:`inputs` and :meth:`dims`.

    Args:
        model: shares its modules; build it under ``torch.device("meta")`` to allocate nothing.
        batch: conditional and unconditional halves together, so 2 for one video with guidance.
        frames, height, width: latent sizes T, H, W.
        height_px, width_px: the video's size.
        fps: what the model is told as frames per second.
        frame_conditions: adds the input ``x_mask`` (frames given as condition).
    """

    component = "transformer"

    def __init__(
        self,
        model: STDiT3,
        *,
        batch: int,
        frames: int,
        height: int,
        width: int,
        height_px: int,
        width_px: int,
        fps: float = 24.0,
        frame_conditions: bool = False,
    ) -> None:
        super().__init__()
        for name, child in model.named_children():
            self.add_module(name, child)
        self.config = model.config
        self._dims = latent_dims(model.config, batch, frames, height, width, model.config.model_max_length)
        self._scale = position_scale(model.config, height_px, width_px)
        self._fps = fps
        self.frame_conditions = frame_conditions
        if frame_conditions:
            self.entry = "forward_conditioned"

    def dims(self) -> dict[str, int]:
        return dict(self._dims)

    def inputs(self) -> tuple[Input, ...]:
        d, c = self._dims, self.config
        shapes = (
            Input("x", (d["B"], c.in_channels, d["T"], d["H"], d["W"]), Latents()),
            Input("timestep", (d["B"],), Timestep(), exact=True),
            Input("y", (d["B"], d["L"], c.caption_channels), TextEmbedding(unconditional="null_text"), rate="prompt"),
            Input("mask", (d["B"], d["L"]), TokenMask(), rate="prompt"),
            Input("fps", (d["B"],), Constant(value=self._fps), exact=True),
        )
        return (*shapes, Input("x_mask", (d["B"], d["T"]), FrameMask())) if self.frame_conditions else shapes

    def gives(self) -> dict[str, Given]:
        return {"out": "prediction"}

    def unit(self, path: str) -> tuple[str, ...]:
        parts = path.split(".")
        if parts[0] in ("spatial_blocks", "temporal_blocks"):
            return (f"pair.{parts[1]}", parts[0].removesuffix("_blocks"))
        units = {"y_embedder": "caption", "text_bias": "caption", "final_layer": "final", "unpatchify": "final"}
        return (units.get(parts[0], "embed"),)

    def forward(self, x, timestep, y, mask, fps):  # type: ignore[no-untyped-def]
        return denoise(self, self._dims, self._scale, x, timestep, y, mask, fps, None)

    def forward_conditioned(self, x, timestep, y, mask, fps, x_mask):  # type: ignore[no-untyped-def]
        return denoise(self, self._dims, self._scale, x, timestep, y, mask, fps, x_mask)
