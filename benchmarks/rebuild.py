"""What building costs at full size: cold, after fine-tuning, with nothing changed; the published way; the floor.

    python benchmarks/rebuild.py [--component transformer] [--target coreml] [--depth 28] [--published-pairs 1]

Rows, side by side in one run, each in a process of its own and with memory as the peak of the process tree:

- cold: an empty cache, gate ``structure``; with ``--every`` also gate ``every``.
- fine-tuned: another checkpoint, templates in the cache.
- nothing changed: the same command again.
- published: the whole model in memory, every block exported and converted once for each variant, in float32, as the
  published scripts do; measured on a few pairs and scaled to the depth, the load counted once.
- floor: reading the checkpoint and writing the bundle's bytes.

"written" counts distinct files of cache and bundle. The checkpoint is synthetic: official names and shapes.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import yaml
from measure import run

HERE = Path(__file__).parent
VIDEO = {"frames": 68, "height": 192, "width": 192}
SMALL_TRANSFORMER = ["depth=1", "hidden_size=32", "num_heads=2"]
SMALL_TEXT = ["num_layers=1", "d_model=32", "d_kv=8", "d_ff=64", "num_heads=4", "vocab_size=256"]
FLOOR = """
import sys
from pathlib import Path
left = int(sys.argv[2])
with open("floor.bin", "wb") as out:
    for path in sorted(Path(sys.argv[1]).glob("*.safetensors")):
        with path.open("rb") as f:
            while part := f.read(1 << 24):
                out.write(part[: max(0, left)])
                left -= len(part)
    while left > 0:
        out.write(b"\\1" * min(left, 1 << 24))
        left -= 1 << 24
"""


def synthetic(component: str, out: Path, changes: list[str], dtype: str, seed: int) -> None:
    command = [sys.executable, str(HERE / "synthetic.py"), component, str(out), "--dtype", dtype, "--seed", str(seed)]
    subprocess.run([*command, *(x for c in changes for x in ("--set", c))], check=True)


def recipe(component: str, target: dict[str, Any]) -> dict[str, Any]:
    """A recipe whose one large component is ``component``."""
    parts: dict[str, Any] = {"transformer": {"checkpoint": "other", "passes": ["token-merge", "partition"]}}
    if component != "transformer":
        parts["text_encoder"] = {"checkpoint": "checkpoint"}
    else:
        parts["transformer"]["checkpoint"] = "checkpoint"
    sampler = {"steps": 30, "merged_steps": 15, "leap": 15}
    return {"name": "full", "model": "open-sora-v1.2", "video": VIDEO, "sampler": sampler, "target": target} | parts


def written(*folders: Path) -> int:
    """Bytes of the distinct files below the folders."""
    stats = [p.stat() for f in folders if f.exists() for p in f.rglob("*") if p.is_file()]
    return sum({s.st_ino: s.st_size for s in stats}.values())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--component", choices=["transformer", "text_encoder"], default="transformer")
    parser.add_argument("--target", default="coreml")
    parser.add_argument("--precision", help="the target's own if absent")
    parser.add_argument("--depth", type=int, help="pairs or layers; 28 and 24 if absent")
    parser.add_argument("--dtype", default="float32", help="of the checkpoint")
    parser.add_argument("--published-pairs", type=int, default=1, help="0 leaves the published way out")
    parser.add_argument("--every", action="store_true", help="also with gate every")
    parser.add_argument("--folder", type=Path, help="where to work; a temporary folder if absent")
    args = parser.parse_args()
    depth = args.depth or (28 if args.component == "transformer" else 24)
    with tempfile.TemporaryDirectory(dir=args.folder) as tmp:
        folder = Path(tmp)
        os.environ["SORA_COMPILE_CACHE"] = str(folder / "cache")
        key = "depth" if args.component == "transformer" else "num_layers"
        for name, seed in (("checkpoint", 0), ("tuned", 1)):
            synthetic(args.component, folder / name, [f"{key}={depth}"], args.dtype, seed)
        if args.component == "text_encoder":
            synthetic("transformer", folder / "other", [*SMALL_TRANSFORMER, "caption_channels=4096"], "float32", 0)
            shutil.copy(HERE.parent / "recipes/tiny/text_encoder/spiece.model", folder / "checkpoint")
            shutil.copy(HERE.parent / "recipes/tiny/text_encoder/spiece.model", folder / "tuned")
        target = {"name": args.target} | ({"precision": args.precision} if args.precision else {})
        path = folder / "recipe.yaml"
        path.write_text(yaml.safe_dump(recipe(args.component, target)))
        compile_(folder, path, depth, args)


def compile_(folder: Path, path: Path, depth: int, args: argparse.Namespace) -> None:
    command = [sys.executable, "-m", "toolchain.cli", str(path), "-o", str(folder / "bundle"), "--json"]
    structure = [*command, "--gate", "structure"]
    imports, imports_peak, _ = run([sys.executable, "-c", "import torch, pydantic, rich"], folder)
    size = written(folder / "checkpoint")
    print(f"{args.component}, depth {depth}, {args.target}; checkpoint {size / 1e9:.2f} GB of {args.dtype}")
    print(f"{'':28} {'seconds':>8} {'peak MB':>8} {'written MB':>11}")

    def row(name: str, seconds: float, peak: float, bytes_: float | None) -> None:
        shown = f"{bytes_ / 1e6:11.0f}" if bytes_ is not None else f"{'':>11}"
        print(f"{name:28} {seconds:8.1f} {peak / 1e6:8.0f} {shown}", flush=True)

    row("imports alone", imports, imports_peak, None)
    seconds, peak, out = run(structure, folder)
    bundle = json.loads(out)["bytes"]
    row("cold, gate structure", seconds, peak, written(folder / "cache", folder / "bundle"))
    seconds, peak, _ = run(structure, folder)
    row("nothing changed", seconds, peak, None)
    before = written(folder / "cache", folder / "bundle")
    other = yaml.safe_load(path.read_text())
    other[args.component]["checkpoint"] = "tuned"
    path.write_text(yaml.safe_dump(other))
    seconds, peak, _ = run(structure, folder)
    row("fine-tuned, templates warm", seconds, peak, written(folder / "cache", folder / "bundle") - before)
    if args.every:
        shutil.rmtree(folder / "cache")
        seconds, peak, _ = run(command, folder)
        row("cold, gate every", seconds, peak, written(folder / "cache", folder / "bundle"))
    seconds, peak, _ = run([sys.executable, "-c", FLOOR, str(folder / "tuned"), str(bundle)], folder)
    row("floor: read and write", seconds, peak, bundle)
    if args.published_pairs and args.component == "transformer":
        published = [sys.executable, str(HERE / "published.py"), str(folder), str(args.published_pairs)]
        seconds, peak, out = run(published, folder)
        loading, converting, bytes_ = map(float, out.split())
        scale = depth / args.published_pairs
        row(f"published, {args.published_pairs} of {depth} pairs", seconds, peak, bytes_)
        row(f"published, scaled to {depth}", loading + converting * scale, peak, bytes_ * scale)


if __name__ == "__main__":
    main()
