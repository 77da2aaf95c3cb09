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

SHARD_BYTES = 1_000_000_000


def shapes(component: str, config: Mapping[str, Any]) -> tuple[dict[str, tuple[int, ...]], dict[str, Any]]:
    """Official names and shapes of a component's tensors, and its whole configuration."""
    if component != "transformer":
        raise SystemExit(f"no component is called '{component}'")
    from toolchain.models.stdit3 import STDiT3, STDiT3Config

    parsed = STDiT3Config.from_json(config)
    with torch.device("meta"):
        model: nn.Module = STDiT3(parsed)
    return {k: tuple(v.shape) for k, v in model.state_dict().items()}, dataclasses.asdict(parsed)


def value(name: str, shape: tuple[int, ...], generator: torch.Generator) -> torch.Tensor:
    """A weight such as a trained model might have: activations stay of order one through any depth."""
    if name.endswith("rope.freqs"):
        return 10000 ** (-torch.arange(0, 2 * shape[0], 2).float() / (2 * shape[0]))
    noise = torch.randn(shape, generator=generator)
    if name.endswith("norm.weight"):
        return 1 + 0.1 * noise
    if name.endswith("bias"):
        return 0.02 * noise
    fan_in = torch.Size(shape[1:]).numel() if len(shape) > 1 else shape[0]
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
    parser.add_argument("component", choices=["transformer"])
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
