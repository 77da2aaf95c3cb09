"""Predicted peaks of activations against measured ones, on every target.

    python benchmarks/memory.py [--targets coreml executorch onnx] [--blocks transformer/pair_0 text_encoder/layer_0]

One block of the full-size recipes with random weights, its base function (68 frames of 192 × 192), each in a process
of its own. Measured are, for Core ML, the bytes that the engine holds, in the types that the program declares; for
ExecuTorch, the buffers that the program plans and what its first run adds to the process (XNNPACK's workspace); for
ONNX Runtime, how much the peak of the process grows in its second run, and the inputs. ``--small`` takes a
transformer of width 288. Other blocks, such as ``vae/temporal_00_03``, can be named; they take long.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

RECIPES = {
    "coreml": ("open-sora-v1.2-iphone-15-pro", []),
    "executorch": ("open-sora-v1.2-android", []),
    "onnx": ("open-sora-v1.2-android", ["target=onnx"]),
}
ONE = ["text_encoder.config.num_layers=1", "transformer.config.depth=1"]
SMALL = ["transformer.config.hidden_size=288", "transformer.config.num_heads=4"]


def resident(key: str) -> int:
    """A figure of this process's memory, in bytes, as Linux calls it."""
    for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines():
        if line.startswith(f"{key}:"):
            return int(line.split()[1]) * 1024
    raise SystemExit(f"this system does not say '{key}'; run it on Linux")


def coreml(engine: Any, path: Path, inputs: dict[str, torch.Tensor]) -> int:
    return max(size for _, size in engine.held("base", inputs))


def executorch(engine: Any, path: Path, inputs: dict[str, torch.Tensor]) -> int:
    from executorch.exir._serialize._program import deserialize_pte_binary

    program = deserialize_pte_binary(path.read_bytes()).program
    planned = sum(next(p for p in program.execution_plan if p.name == "base").non_const_buffer_sizes)
    del program
    gc.collect()
    method = engine._program.load_method("base")
    given = [t.contiguous() for t in inputs.values()]
    before = resident("RssAnon")
    results = method.execute(given)
    grown = resident("RssAnon") - before
    del results
    return planned + grown


def onnx(engine: Any, path: Path, inputs: dict[str, torch.Tensor]) -> int:
    engine("base", inputs)
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # the peak counts from here
    before = resident("VmRSS")
    engine("base", inputs)
    return resident("VmHWM") - before + sum(t.nbytes for t in inputs.values())


MEASURES = {"coreml": coreml, "executorch": executorch, "onnx": onnx}


def one(target: str, component: str, name: str, small: bool) -> dict[str, int]:
    """Predicted and measured bytes of a block."""
    import toolchain
    from toolchain.ir.target import unique_weights
    from toolchain.system.memory import return_large_allocations

    return_large_allocations()
    recipe, options = RECIPES[target]
    part = toolchain.plan(toolchain.load_recipe(recipe, [*options, *ONE, *(SMALL if small else [])])).components[
        component
    ]
    block = next(b for b in part.blocks if b.name == name)
    with tempfile.TemporaryDirectory() as tmp:
        path = Path(tmp) / f"block{part.target.suffix}"
        part.target.lower(block, unique_weights(block), path)
        inputs = {
            p.name: torch.rand(p.shape) if p.dtype.is_floating_point else torch.ones(p.shape, dtype=p.dtype)
            for p in block.inputs
        }
        engine = part.target.engine(path, block.inputs, block.outputs)
        return {"predicted": part.memory[name].peaks["base"].bytes, "measured": MEASURES[target](engine, path, inputs)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--targets", nargs="+", default=list(MEASURES), choices=list(MEASURES))
    parser.add_argument("--blocks", nargs="+", default=["transformer/pair_0", "text_encoder/layer_0"])
    parser.add_argument("--small", action="store_true")
    parser.add_argument("--one", nargs=2, metavar=("TARGET", "BLOCK"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        print(json.dumps(one(args.one[0], *args.one[1].split("/"), args.small)))
        return
    print("| block | target | predicted, MB | measured, MB | ratio |\n|---|---|---|---|---|")
    for block in args.blocks:
        for target in args.targets:
            command = [sys.executable, __file__, "--one", target, block, *(["--small"] if args.small else [])]
            done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
            r = json.loads(done.stdout.splitlines()[-1])
            figures = f"{r['predicted'] / 1e6:.1f} | {r['measured'] / 1e6:.1f} | {r['predicted'] / r['measured']:.2f}"
            print(f"| {block} | {target} | {figures} |", flush=True)


if __name__ == "__main__":
    main()
