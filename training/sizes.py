"""Sizes of the tiny models, and how their weights start."""

from __future__ import annotations

import math

import torch
from torch import nn

from toolchain.models.open_sora_v1_2.stdit3 import STDiT3, STDiT3Config
from toolchain.models.open_sora_v1_2.t5 import T5Config
from toolchain.models.open_sora_v1_2.vae_config import OpenSoraVAEConfig, SpatialVAEConfig, TemporalVAEConfig

TEXT_TOKENS = 24
FPS = 24.0

VAE = OpenSoraVAEConfig(
    spatial=SpatialVAEConfig(block_out_channels=(16, 16, 32, 64), layers_per_block=1, norm_num_groups=8),
    temporal=TemporalVAEConfig(filters=8, num_res_blocks=1, channel_multipliers=(1, 2, 2, 4), num_groups=4),
    shift=(0.0, 0.0, 0.0, 0.0),
    scale=(1.0, 1.0, 1.0, 1.0),
)
TRANSFORMER = STDiT3Config(
    hidden_size=128, depth=4, num_heads=4, caption_channels=64, model_max_length=TEXT_TOKENS, pred_sigma=True
)


def text_encoder(vocabulary: int) -> T5Config:
    """The text encoder for a tokenizer of so many pieces."""
    return T5Config(vocab_size=vocabulary, d_model=64, d_kv=16, d_ff=128, num_layers=2, num_heads=4)


def start_transformer(model: STDiT3) -> None:
    """Weights to begin training with.

    Linear layers are Xavier's. A temporal block, and the last layer, begin as doing nothing, as in adaLN-Zero. Only
    the temporal heads are special: see :func:`look_along_time`.
    """
    for module in model.modules():
        if isinstance(module, nn.Linear):
            nn.init.xavier_uniform_(module.weight)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
    nn.init.xavier_uniform_(model.x_embedder.proj.weight.view(model.config.hidden_size, -1))
    nn.init.zeros_(model.x_embedder.proj.bias)
    for embedder in (model.t_embedder, model.fps_embedder):
        for layer in (embedder.mlp[0], embedder.mlp[2]):
            nn.init.normal_(layer.weight, std=0.02)
    nn.init.normal_(model.t_block.get_submodule("1").weight, std=0.02)
    for i, block in enumerate(model.temporal_blocks):
        look_along_time(block.attn, model.rope.freqs)
        if i:
            nn.init.zeros_(block.attn.proj.weight)
        nn.init.zeros_(block.cross_attn.proj.weight)
        nn.init.zeros_(block.mlp.fc2.weight)
    for block in model.spatial_blocks:
        nn.init.zeros_(block.cross_attn.proj.bias)
    nn.init.zeros_(model.final_layer.linear.weight)
    nn.init.zeros_(model.final_layer.linear.bias)


def look_along_time(attention: nn.Module, freqs: torch.Tensor) -> None:
    """Let each temporal head begin by looking a certain number of frames back or ahead.

    Time has only relative positions, so a pure-noise token can tell its frame's number in one way: a frame before
    the first does not exist, and a head that wants it finds another. Query and key biases that differ by a rotation
    make such heads from the start; otherwise training takes long to find that, and motion has no sign.
    """
    heads = attention.heads
    channels = attention.proj.weight.shape[0]
    d = channels // heads
    offsets = (-1, 1, -2, 2, 0, -3, 3)
    q, k = torch.zeros(heads, d), torch.zeros(heads, d)
    for head in range(heads):
        turned = freqs.detach() * -offsets[head % len(offsets)]
        # rotation is of interleaved pairs; score(i, j) grows with cos(freq · (i - j) + …), largest at j = i + offset
        q[head, 0::2], q[head, 1::2] = turned.cos(), -turned.sin()
        k[head, 0::2] = 1.0
    with torch.no_grad():
        attention.qkv.bias[: 2 * channels] = 1.5 * torch.cat((q.flatten(), k.flatten()))


def frame_frequencies(model: STDiT3, frames: int = 16) -> None:
    """Rotary frequencies spread over the few frames there are, rather than over ten thousand positions."""
    with torch.no_grad():
        n = len(model.rope.freqs)
        model.rope.freqs.copy_(torch.logspace(math.log10(2.0), math.log10(1.0 / frames), n))
