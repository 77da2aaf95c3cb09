"""Write a synthetic checkpoint: official names, shapes and layout, seeded random weights.

    python benchmarks/synthetic.py transformer OUT --set depth=2 --dtype float32

Nothing of full size is ever whole in memory: tensors are made and written shard by shard.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import yaml
from safetensors.torch import save_file
from torch import nn

COMPONENTS = ("text_encoder", "transformer", "vae")
FIXED = {"scale": (3.85, 2.32, 2.33, 3.06), "shift": (-0.10, 0.34, 0.27, 0.98)}
"""The VAE's latent normalisation, as published."""

SHARD_BYTES = 1_000_000_000
T5_HEAD = 64
"""Width of an attention head (``d_kv``) of every T5 v1.1."""


def shapes(component: str, config: Mapping[str, Any]) -> tuple[dict[str, tuple[int, ...]], dict[str, Any]]:
    """Official names and shapes of a component's tensors, and its whole configuration."""
    with torch.device("meta"):
        parsed, model = _build(component, config)
    names = {k: tuple(v.shape) for k, v in model.state_dict().items()}
    if component == "text_encoder":
        from toolchain.models.open_sora_v1_2.t5 import TIED

        names = {k: v for k, v in names.items() if k not in TIED.values()}
        return names, dataclasses.asdict(parsed) | {"model_type": "t5", "feed_forward_proj": "gated-gelu"}
    return names, dataclasses.asdict(parsed)


def _build(component: str, config: Mapping[str, Any]) -> tuple[Any, nn.Module]:
    if component == "transformer":
        from toolchain.models.open_sora_v1_2.stdit3 import STDiT3, STDiT3Config

        transformer = STDiT3Config.from_json(config)
        return transformer, STDiT3(transformer)
    if component == "text_encoder":
        from toolchain.models.open_sora_v1_2.t5 import T5Config, T5Encoder

        known = {f.name for f in dataclasses.fields(T5Config)}
        encoder = T5Config(**{k: v for k, v in config.items() if k in known})
        return encoder, T5Encoder(encoder)
    from toolchain.models.open_sora_v1_2.vae import OpenSoraVAE, OpenSoraVAEConfig

    vae = OpenSoraVAEConfig.from_json(config)
    return vae, OpenSoraVAE(vae)


def value(name: str, shape: tuple[int, ...], generator: torch.Generator) -> torch.Tensor:
    """A weight such as a trained model might have: activations stay of order one through any depth."""
    if name.endswith("rope.freqs"):
        return 10000 ** (-torch.arange(0, 2 * shape[0], 2).float() / (2 * shape[0]))
    if name in FIXED:
        return torch.tensor(FIXED[name]).reshape(shape)
    noise = torch.randn(shape, generator=generator)
    if len(shape) == 1 and name.endswith("weight"):
        return 1 + 0.1 * noise
    if name.endswith("bias"):
        return 0.02 * noise
    if name.startswith("shared."):
        return noise
    fan_in = torch.Size(shape[1:]).numel() if len(shape) > 1 else shape[0]
    if name.endswith(("SelfAttention.q.weight", "relative_attention_bias.weight")):
        # T5 does not divide the products of queries and keys by the root of a head's width: its initialisation has
        # that in q (transformers' T5PreTrainedModel._init_weights). Else they would have a deviation of 8 instead of 1,
        # where softmax picks one token and makes much of any error. The bias that is added to them starts as small.
        fan_in *= T5_HEAD
    return noise / fan_in**0.5


def write(component: str, out: Path, config: Mapping[str, Any], dtype: torch.dtype, seed: int) -> None:
    """Write ``config.json`` and one safetensors file, or shards with their index when it is large."""
    names, whole = shapes(component, config)
    out.mkdir(parents=True, exist_ok=True)
    (out / "config.json").write_text(json.dumps(whole, indent=1) + "\n")
    generator = torch.Generator().manual_seed(seed)
    shards: list[list[str]] = [[]]
    filled = 0
    for name, shape in names.items():
        size = torch.Size(shape).numel() * dtype.itemsize
        if shards[-1] and filled + size > SHARD_BYTES:
            shards.append([])
            filled = 0
        shards[-1].append(name)
        filled += size
    index: dict[str, str] = {}
    for i, shard in enumerate(shards):
        file = "model.safetensors" if len(shards) == 1 else f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors"
        save_file({n: value(n, names[n], generator).to(dtype) for n in shard}, out / file, metadata={"format": "pt"})
        (out / file).chmod(0o644)
        index |= dict.fromkeys(shard, file)
    if len(shards) > 1:
        (out / "model.safetensors.index.json").write_text(
            json.dumps({"metadata": {}, "weight_map": index}, indent=1) + "\n"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("component", choices=COMPONENTS)
    parser.add_argument("out", type=Path)
    parser.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", help="override the full-size configuration"
    )
    parser.add_argument("--dtype", default="float32", choices=["float32", "float16", "bfloat16"])
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    config = {k: yaml.safe_load(v) for k, v in (s.split("=", 1) for s in args.set)}
    write(args.component, args.out, config, getattr(torch, args.dtype), args.seed)


if __name__ == "__main__":
    main()
