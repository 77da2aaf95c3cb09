"""Compile a transformer of full width and few pairs for every target; print seconds, peak memory, bytes, error.

    python benchmarks/compile.py [--pairs 2] [--targets executorch coreml]

Each build runs in a process of its own; memory is the peak of the whole process tree. The checkpoint is
synthetic: official names, shapes and dtypes, seeded weights.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

import yaml
from measure import run

RECIPE = {
    "version": 1,
    "name": "full-width",
    "model": "open-sora-v1.2",
    "video": {"frames": 68, "height": 192, "width": 192},
    "sampler": {"steps": 30, "merged_steps": 15, "leap": 15},
    "transformer": {"checkpoint": "checkpoint", "passes": ["token-merge", "partition"]},
}
TARGETS = {
    "executorch": {"name": "executorch", "precision": "float32"},
    "coreml": {"name": "coreml", "precision": "float16"},
    "coreml-float32": {"name": "coreml", "precision": "float32"},
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=2)
    parser.add_argument("--targets", nargs="+", default=list(TARGETS), choices=list(TARGETS))
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as tmp:
        folder = Path(tmp)
        here = Path(__file__).parent
        make = [sys.executable, str(here / "synthetic.py"), "transformer", str(folder / "checkpoint")]
        subprocess.run([*make, "--set", f"depth={args.pairs}"], check=True)
        weights = sum(f.stat().st_size for f in (folder / "checkpoint").glob("*.safetensors"))
        floor, floor_peak, _ = run([sys.executable, "-c", "import torch, pydantic, rich"], folder)
        print(f"{args.pairs} pairs of full width, base + merged; checkpoint {weights / 1e6:.0f} MB float32")
        print(f"{'target':16} {'seconds':>8} {'peak MB':>8} {'bundle MB':>10} {'largest relative error':>24}")
        print(f"{'(imports only)':16} {floor:8.1f} {floor_peak / 1e6:8.0f}")
        for name in args.targets:
            recipe = folder / f"{name}.yaml"
            recipe.write_text(yaml.safe_dump(RECIPE | {"target": TARGETS[name]}))
            command = [sys.executable, "-m", "toolchain.cli", str(recipe), "-o", str(folder / "bundle"), "--json"]
            seconds, peak, out = run(command, folder)
            built = json.loads(out)
            blocks = built["manifest"]["components"]["transformer"]["blocks"]
            errors = [a["relative_error"] for b in blocks for a in (b["accuracy"] or {}).values()]
            error = f"{max(errors):.1e}" if errors else "not executed"
            print(f"{name:16} {seconds:8.1f} {peak / 1e6:8.0f} {built['bytes'] / 1e6:10.1f} {error:>24}")


if __name__ == "__main__":
    main()
