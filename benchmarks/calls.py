"""What a call of a full-width transformer pair takes, on every target: both halves of guidance, one, and none.

    python benchmarks/calls.py [--targets coreml,coreml-float32,executorch,onnx] [--frames 17] [--rounds 3]

One STDiT3-XL/2 pair (hidden size 1152, 300 text tokens; 17 frames of 192 × 192 are 720 tokens) with random weights,
lowered with the functions of both halves and of the conditional one, plain and merged. Functions are called in turn,
round after round, on the same inputs; seconds are medians, of processor time on one thread, so that what else the
machine does counts little. A reused step is what a player does instead of calling the
pair: the stream plus what the pair added to it at an earlier step. Core ML's programs run in our own engine, on torch:
its ratios are not those of Apple's kernels, and in float16 it expands all weights at every call, whatever the batch.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from quantization import tensor_shapes
from synthetic import value

TARGETS: dict[str, dict[str, Any]] = {
    "coreml": {"name": "coreml", "precision": "float16"},
    "coreml-float32": {"name": "coreml", "precision": "float32"},
    "executorch": {"name": "executorch"},
    "onnx": {"name": "onnx"},
}
CALLS = 2
"""Timed calls of a function in a round, after one that is not."""
ADDITIONS = 50
"""Timed additions in a round: one is too short to be measured alone."""


def pair_of(target: dict[str, Any], frames: int, merged: bool) -> tuple[Any, Any]:
    """The pair as it is lowered, and its target."""
    from toolchain.formats.recipe_file import parse_recipe
    from toolchain.planning.plan import plan

    passes = [*(["token-merge"] if merged else []), "guidance-split", "partition"]
    part = {"checkpoint": "none", "config": {"depth": 1}, "passes": passes}
    recipe = {
        "name": "full-width",
        "model": "open-sora-v1.2",
        "video": {"frames": frames, "height": 192, "width": 192},
        "target": target,
        "transformer": part,
    }
    planned = plan(parse_recipe(recipe)).components["transformer"]
    return next(b for b in planned.blocks if b.name.startswith("pair")), planned.target


def seconds(call: Callable[[], Any], times: int) -> list[float]:
    """Processor time of each of so many calls."""
    found = []
    for _ in range(times):
        began = time.process_time()
        call()
        found.append(time.process_time() - began)
    return found


def measured(target: dict[str, Any], frames: int, rounds: int, merged: bool) -> dict[str, float]:
    """Seconds by function, and of a reused step of both halves (``reused``)."""
    block, own = pair_of(target, frames, merged)
    generator = torch.Generator().manual_seed(0)
    tensors = {n: value(n, w.shape, generator) for n, w in tensor_shapes(block).items()}
    weights = {n: w.source.value(tensors.__getitem__) for n, w in block.weights.items()}
    inputs = {p.name: torch.randn(p.shape, generator=generator) for p in block.inputs}
    given = {f: {p.name: inputs[p.name][: p.shape[0]] for p in block.signatures[f].inputs} for f in block.functions}
    taken: dict[str, list[float]] = {name: [] for name in (*block.functions, "reused")}
    with tempfile.TemporaryDirectory() as tmp:
        engine = own.engine(
            own.lower(block, weights, Path(tmp) / f"pair{own.suffix}").path, block.inputs, block.outputs
        )
        (stream,) = engine("base", inputs).values()
        kept = own.port_dtype(block.outputs[0]).torch
        stream, residual = stream.to(kept), torch.randn(stream.shape, generator=generator).to(kept)
        for _ in range(rounds):
            for function in block.functions:
                engine(function, given[function])  # loads it
                taken[function] += seconds(lambda f=function: engine(f, given[f]), CALLS)
            taken["reused"] += seconds(lambda: (stream.float() + residual.float()).to(kept), ADDITIONS)
    return {name: statistics.median(found) for name, found in taken.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--targets", default=",".join(TARGETS))
    parser.add_argument("--frames", type=int, default=17)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--base-only", action="store_true", help="without merged functions: half of the lowering")
    args = parser.parse_args()
    torch.set_num_threads(1)
    kinds = ("base",) if args.base_only else ("base", "merged")
    heads = [f"{kind}, s | its conditional, s | ratio" for kind in kinds]
    print(f"| target | {' | '.join(heads)} | reused, s | ratio |")
    print("|---" * (3 + 3 * len(kinds)) + "|")
    for target in args.targets.split(","):
        found = measured(TARGETS[target], args.frames, args.rounds, not args.base_only)
        cells = []
        for kind in kinds:
            both, half = found[kind], found[f"{kind}_conditional"]
            cells += [f"{both:.3f}", f"{half:.3f}", f"{half / both:.3f}"]
        cells += [f"{found['reused']:.5f}", f"{found['reused'] / found['base']:.4f}"]
        print(f"| {target} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
