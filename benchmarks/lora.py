"""What changing a LoRA adapter costs at the transformer's full width, beside a new checkpoint and the floor.

    python benchmarks/lora.py [--target coreml] [--rank 16] [--rounds 3] [--depth 28] [--checkpoints FOLDER]

The checkpoint is built cold, with the gate ``structure``. Then, in turns, each with the templates of that build, the
checkpoint in the file cache and its digests known, as they are after any build with it:

- LoRA swap: the same checkpoint with an adapter (PEFT's files, of all linear layers) that was never built before.
- floor: reading the checkpoint and writing the bundle's bytes.

Last stands the adapter's size beside that of another checkpoint, which merging by hand would have written.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import sys
import tempfile
from pathlib import Path

import torch
import yaml
from compile import FLOOR, Table, kept, recipe, synthetic
from safetensors import safe_open
from safetensors.torch import save_file


def adapter(checkpoint: Path, out: Path, rank: int, seed: int) -> int:
    """Write an adapter of every linear layer of the blocks; returns its bytes."""
    drawn, parts = torch.Generator().manual_seed(seed), {}
    for file in sorted(checkpoint.glob("*.safetensors")):
        with safe_open(file, "pt") as weights:
            for name in weights.keys():  # noqa: SIM118  (it is no dictionary)
                shape = weights.get_slice(name).get_shape()
                if len(shape) == 2 and "blocks" in name and name.endswith(".weight"):
                    layer = f"base_model.model.{name.removesuffix('.weight')}"
                    parts[f"{layer}.lora_A.weight"] = torch.randn(rank, shape[1], generator=drawn) / shape[1] ** 0.5
                    parts[f"{layer}.lora_B.weight"] = torch.randn(shape[0], rank, generator=drawn) * 0.01
    out.mkdir()
    save_file(parts, out / "adapter_model.safetensors")
    (out / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": rank, "lora_alpha": rank}))
    return kept(out)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--target", default="coreml")
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--depth", type=int, default=28)
    parser.add_argument("--checkpoints", type=Path, help="folder that keeps the checkpoint; it is made if absent")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as tmp:
        folder = Path(tmp)
        os.environ["SORA_COMPILE_CACHE"] = str(folder / "cache")
        checkpoints = (args.checkpoints or folder / "checkpoint").absolute()
        if not (checkpoints / "transformer").exists():
            synthetic("transformer", checkpoints / "transformer", 0, "float32", [f"depth={args.depth}"])
        compare(folder, checkpoints, args)


def compare(folder: Path, checkpoints: Path, args: argparse.Namespace) -> None:
    whole, path, bundle = recipe(["transformer"], {"name": args.target}, checkpoints), folder / "r.yaml", folder / "out"
    path.write_text(yaml.safe_dump(whole))
    build = [sys.executable, "-m", "toolchain.cli", str(path), "-o", str(bundle), "--gate", "structure", "--json"]
    table, source = Table(folder), checkpoints / "transformer"
    cold = table.run("cold", build, checkpoints, lambda: kept(bundle))
    size = json.loads(cold.output)["bytes"]
    swaps, floors = [], []
    for number in range(args.rounds):
        added = adapter(source, folder / f"adapter{number}", args.rank, number)
        whole["transformer"]["loras"] = [{"checkpoint": str(folder / f"adapter{number}")}]
        path.write_text(yaml.safe_dump(whole))
        shutil.rmtree(bundle)
        before = kept(folder / "cache")
        swaps.append(table.run("LoRA swap", build, checkpoints, lambda b=before: kept(folder / "cache", bundle) - b))
        floors.append(
            table.run("floor", [sys.executable, "-c", FLOOR, str(size), str(source)], checkpoints, lambda: size)
        )
    ratio = statistics.median(s.seconds for s in swaps) / statistics.median(f.seconds for f in floors)
    print(f"LoRA swap / floor: {ratio:.1f} (medians of {args.rounds}); cold / LoRA swap: ", end="")
    print(f"{cold.seconds / statistics.median(s.seconds for s in swaps):.1f}")
    print(f"the adapter has {added / 1e6:.0f} MB, a merged checkpoint {kept(source) / 1e6:.0f} MB")


if __name__ == "__main__":
    main()
