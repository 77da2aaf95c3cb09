"""The encoder of T5 v1.1, Open-Sora's text encoder, written to be traced and lowered.

``T5Encoder`` takes a Hugging Face state_dict. ``LoweredT5`` is the same computation for a fixed number of
prompts and tokens. Relative positions are a value of their own that every block takes, as in Hugging
Face's code, but computed outside block 0, so that all blocks are of one structure.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import nn

from toolchain.ir.feeds import Given, TokenIds, TokenMask
from toolchain.ir.graph import Input, LoweredForm, wire
from toolchain.models.open_sora_v1_2.t5_leaves import (
    AttentionBias,
    BiasedAttention,
    GatedMlp,
    Norm,
    PositionBias,
    TokenEmbedding,
)

TIED = {"shared.weight": "encoder.embed_tokens.weight"}
"""One tensor under two names; a checkpoint may hold either or both. The graph's weights have the key's name."""

GATED_GELU = ("gated-gelu", "gated-gelu_new")
"""Names of the one feed-forward that v1.1 has; both mean the tanh approximation of GELU."""


@dataclass(frozen=True)
class T5Config:
    """The fields of a Hugging Face ``config.json`` that shape the encoder; defaults are T5 v1.1 XXL's."""

    vocab_size: int = 32128
    d_model: int = 4096
    d_kv: int = 64
    d_ff: int = 10240
    num_layers: int = 24
    num_heads: int = 64
    relative_attention_num_buckets: int = 32
    relative_attention_max_distance: int = 128
    layer_norm_epsilon: float = 1e-6

    def __post_init__(self) -> None:
        for f in fields(self):
            value = getattr(self, f.name)
            allowed = (int, float) if f.name == "layer_norm_epsilon" else (int,)
            if isinstance(value, bool) or not isinstance(value, allowed) or value <= 0:
                raise ValueError(f"T5 {f.name}: {value!r} is not a positive {allowed[-1].__name__}")
        near = self.relative_attention_num_buckets // 4
        if self.relative_attention_num_buckets % 2 or near < 1 or self.relative_attention_max_distance <= near:
            raise ValueError(
                f"T5 relative_attention_num_buckets {self.relative_attention_num_buckets} and max_distance "
                f"{self.relative_attention_max_distance}: buckets must be even, at least 4, and reach past {near}"
            )

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> T5Config:
        """From the contents of a ``config.json``; keys that say nothing of the encoder are passed over.

        Raises:
            ValueError: not a T5 v1.1 encoder (``feed_forward_proj`` or ``model_type`` is another's), a size is
                missing (it would mean T5-small's, not XXL's), or a value is out of range or of the wrong type.
        """
        model_type = data.get("model_type", "t5")
        if model_type != "t5":
            raise ValueError(f"model_type {model_type!r}: only 't5' is supported (umt5 has positions in every block)")
        feed_forward = data.get("feed_forward_proj", "relu")  # absent in the first T5's configs
        if feed_forward not in GATED_GELU:
            raise ValueError(
                f"feed_forward_proj {feed_forward!r}: only T5 v1.1's 'gated-gelu' is supported, not the first T5's"
            )
        sizes = ("vocab_size", "d_model", "d_kv", "d_ff", "num_layers", "num_heads")
        if missing := [k for k in sizes if k not in data]:
            raise ValueError(f"T5 config lacks {', '.join(missing)}")
        known = {f.name for f in fields(cls)}
        return cls(**{k: v for k, v in data.items() if k in known})


class SelfAttention(nn.Module):
    """Projections around :class:`BiasedAttention`; block 0's keeps the position table, for its official name."""

    def __init__(self, config: T5Config, first: bool) -> None:
        super().__init__()
        inner = config.num_heads * config.d_kv
        self.q = nn.Linear(config.d_model, inner, bias=False)
        self.k = nn.Linear(config.d_model, inner, bias=False)
        self.v = nn.Linear(config.d_model, inner, bias=False)
        self.o = nn.Linear(inner, config.d_model, bias=False)
        self.attend = BiasedAttention(config.num_heads)
        if first:
            buckets, reach = config.relative_attention_num_buckets, config.relative_attention_max_distance
            self.relative_attention_bias = PositionBias(buckets, reach, config.num_heads)

    def forward(self, x: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.o(self.attend(self.q(x), self.k(x), self.v(x), bias))
        return out


class SelfAttentionLayer(nn.Module):
    """``x + attention(norm(x))``."""

    def __init__(self, config: T5Config, first: bool) -> None:
        super().__init__()
        self.SelfAttention = SelfAttention(config, first)
        self.layer_norm = Norm(config.d_model, config.layer_norm_epsilon)

    def forward(self, x: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = x + self.SelfAttention(self.layer_norm(x), bias)
        return out


class FeedForwardLayer(nn.Module):
    """``x + mlp(norm(x))``."""

    def __init__(self, config: T5Config) -> None:
        super().__init__()
        self.DenseReluDense = GatedMlp(config.d_model, config.d_ff)
        self.layer_norm = Norm(config.d_model, config.layer_norm_epsilon)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = x + self.DenseReluDense(self.layer_norm(x))
        return out


class T5Block(nn.Module):
    """Attention, then the MLP: ``x`` ``[B, L, C]``, ``bias`` ``[B, h, L, L]``, to ``[B, L, C]``."""

    def __init__(self, config: T5Config, first: bool) -> None:
        super().__init__()
        self.layer = nn.ModuleList((SelfAttentionLayer(config, first), FeedForwardLayer(config)))

    def forward(self, x: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.layer[1](self.layer[0](x, bias))
        return out


class T5Stack(nn.Module):
    """What the official state_dict calls ``encoder``."""

    def __init__(self, config: T5Config, tokens: TokenEmbedding) -> None:
        super().__init__()
        self.embed_tokens = tokens
        self.block = nn.ModuleList(T5Block(config, first=i == 0) for i in range(config.num_layers))
        self.final_layer_norm = Norm(config.d_model, config.layer_norm_epsilon)


class T5Encoder(nn.Module):
    """Token ids to one vector a token."""

    def __init__(self, config: T5Config) -> None:
        super().__init__()
        self.config = config
        self.shared = TokenEmbedding(config.vocab_size, config.d_model)
        self.encoder = T5Stack(config, self.shared)
        self.attention_bias = AttentionBias()
        self.register_load_state_dict_pre_hook(_complete_tied)  # type: ignore[no-untyped-call]

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        """The official forward.

        Args:
            input_ids: token ids ``[B, L]``, int32 or int64.
            attention_mask: nonzero for real tokens ``[B, L]``.

        Returns:
            ``[B, L, C]``, the model's dtype. Padded places hold what they attend to among the real tokens;
            whoever uses the output masks them.
        """
        mask = (attention_mask != 0).to(self.shared.weight.dtype)
        return encode(self, input_ids, mask, input_ids.shape[1])


def _complete_tied(
    module: nn.Module,
    state_dict: dict[str, Any],
    prefix: str,
    metadata: Mapping[str, Any],
    strict: bool,
    missing: list[str],
    unexpected: list[str],
    errors: list[str],
) -> None:
    """Fill in the name that a state_dict leaves out of a tied pair, and refuse two that differ."""
    for names in TIED.items():
        held = [prefix + name for name in names if prefix + name in state_dict]
        if len(held) == 1:
            state_dict.update({prefix + name: state_dict[held[0]] for name in names})
        elif len(held) == 2 and not _same(*(state_dict[name] for name in held)):
            errors.append(f"'{held[0]}' and '{held[1]}' are one tensor in a T5 encoder, but differ here")


def _same(a: torch.Tensor, b: torch.Tensor) -> bool:
    return a is b or (a.shape == b.shape and (a.is_meta or b.is_meta or torch.equal(a, b)))


def encode(model: Any, ids: torch.Tensor, mask: torch.Tensor, length: int) -> torch.Tensor:
    """The computation itself, for ``T5Encoder`` and ``LoweredT5`` alike; L = ``length``."""
    stack = model.encoder
    positions = stack.block[0].layer[0].SelfAttention.relative_attention_bias
    position_bias = wire(positions(length=length), "position_bias")
    bias = wire(model.attention_bias(position_bias, mask), "attention_bias")
    x = wire(model.shared(ids), "x")
    for block in stack.block:
        x = wire(block(x, bias), "x")
    return wire(stack.final_layer_norm(x), "y")


class LoweredT5(LoweredForm):
    """``T5Encoder`` for fixed sizes. See :func:`encode`.

    Args:
        model: shares its modules; build it under ``torch.device("meta")`` to allocate nothing.
        prompts: number of prompts encoded together.
        length: tokens of a prompt, padding included.
    """

    component = "text_encoder"

    def __init__(self, model: T5Encoder, *, prompts: int, length: int) -> None:
        super().__init__()
        for name, child in model.named_children():
            self.add_module(name, child)
        self.config = model.config
        self.prompts = prompts
        self.length = length

    def dims(self) -> dict[str, int]:
        return {"B": self.prompts, "L": self.length, "C": self.config.d_model, "h": self.config.num_heads}

    def inputs(self) -> tuple[Input, ...]:
        shape = (self.prompts, self.length)
        ids = Input("input_ids", shape, TokenIds(), rate="prompt", dtype=torch.int32)
        return ids, Input("mask", shape, TokenMask(), rate="prompt")

    def gives(self) -> dict[str, Given]:
        return {"y": "text_embedding"}

    def unit(self, path: str) -> tuple[str, ...]:
        parts = path.split(".")
        if parts[-1] in ("shared", "attention_bias", "relative_attention_bias"):
            return ("embed",)
        return (f"layer.{parts[2]}",) if parts[:2] == ["encoder", "block"] else ("final",)

    def forward(self, input_ids, mask):  # type: ignore[no-untyped-def]
        return encode(self, input_ids, mask, self.length)
