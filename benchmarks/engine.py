"""How fast a target's engine is on this machine, against eager PyTorch and against the machine's own speed.

    python benchmarks/engine.py [--target coreml] [--parts transformer vae text_encoder] [--rounds 5] [--threads N]

One block of every structure of the full-size model (68 frames of 192 × 192: a pair of STDiT3-XL/2, a layer of
T5-XXL, every part of the VAE's decoder), by the shipped recipe of the target, with random weights. Each round runs
eager float32, as the gate does it, and the artifact, in turns; the median of the rounds is printed. "of peak" is how
many floating-point operations a second eager does of its matrix products, convolutions and attention, against one
large product of matrices in the same run: what is missing is spent on everything else.
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
from parts import distinct, inputs_of, plan, weights_of
from torch.utils.flop_counter import FlopCounterMode

PARTS = ("transformer", "vae", "text_encoder")
LEAST_FLOPS = 1e9
"""Blocks that do less take no time."""
SIZE = 2048


def timed(call: Callable[[], Any]) -> tuple[float, Any]:
    began = time.perf_counter()
    result = call()
    return time.perf_counter() - began, result


def peak() -> float:
    """Floating-point operations a second of a product of two large float32 matrices."""
    a, b = torch.randn(SIZE, SIZE), torch.randn(SIZE, SIZE)
    return 2 * SIZE**3 / min(timed(lambda: a @ b)[0] for _ in range(5))


def compare(component: str, name: str, target: str, rounds: int) -> None:
    """Print the row of a block, unless it does next to nothing."""
    from toolchain.accuracy.metrics import measure
    from toolchain.accuracy.references import run_eager

    family, part = plan(component, target)
    pair = next(p for p in part.pairs if p.name == name)
    block, plain = pair.lowered, pair.plain
    weights, inputs = weights_of(part, pair, plain), inputs_of(family, part, plain)
    with FlopCounterMode(display=False) as counter:
        case = run_eager(plain, "base", weights, inputs)
    flops = counter.get_total_flops()
    if flops < LEAST_FLOPS:
        return
    with tempfile.TemporaryDirectory() as tmp:
        artifact = part.target.lower(block, weights_of(part, pair, block), Path(tmp) / f"block{part.target.suffix}")
        load, engine = timed(lambda: part.target.engine(artifact.path, block.inputs, block.outputs))
        eager_seconds, engine_seconds, speeds = [], [], []
        for _ in range(rounds):
            speeds.append(peak())
            eager_seconds.append(timed(lambda: run_eager(plain, "base", weights, inputs))[0])
            seconds, figures = timed(lambda: measure(block, ["base"], engine, [case], 1.0))
            engine_seconds.append(seconds)
    eager, own = statistics.median(eager_seconds), statistics.median(engine_seconds)
    share = flops / eager / statistics.median(speeds)
    error = figures["base"].relative_error
    print(
        f"| {component}/{name} | {part.target.precision} | {flops / 1e12:.2f} | {eager:.2f} | {100 * share:.0f} % "
        f"| {own:.2f} | {own / eager:.2f} | {load:.2f} | {error:.1e} |",
        flush=True,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--target", default="coreml", choices=["coreml", "executorch"])
    parser.add_argument("--parts", nargs="+", default=PARTS, choices=PARTS)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    speed = peak() / 1e9
    print(f"{args.target}, {args.threads} threads, {args.rounds} rounds; {speed:.0f} GFLOP/s is this machine's peak")
    print("| block | precision | TFLOP | eager, s | of peak | engine, s | engine / eager | load, s | relative error |")
    print("|---|---|---|---|---|---|---|---|---|")
    for component in args.parts:
        for name in distinct(component, args.target):
            compare(component, name, args.target, args.rounds)


if __name__ == "__main__":
    main()
