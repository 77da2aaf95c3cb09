"""Run a full-width transformer pair eagerly and with the Core ML engine, side by side; print seconds and errors.

    python benchmarks/engine.py [--rounds 5] [--threads N]

One STDiT3-XL/2 pair, hidden size 1152, x [2, 2880, 1152], 300 text tokens (a 68-frame video of 192 × 192 has
20 latent frames of 144 patches), with random weights. Each round calls eager float32 and both packages in
turn; the median of the rounds is printed, with the least in brackets.
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
from synthetic import value

PRECISIONS = ("float32", "float16")
RECIPE: dict[str, Any] = {
    "name": "full-width",
    "model": "open-sora-v1.2",
    "video": {"frames": 68, "height": 192, "width": 192},
    "sampler": {"steps": 30},
    "transformer": {"checkpoint": "none", "config": {"depth": 1}, "passes": ["partition"]},
}


def timed(call: Callable[[], Any]) -> tuple[float, Any]:
    began = time.perf_counter()
    result = call()
    return time.perf_counter() - began, result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    from toolchain.formats.recipe_file import parse_recipe
    from toolchain.planning.plan import plan

    with tempfile.TemporaryDirectory() as tmp:
        calls: dict[str, Callable[[], dict[str, torch.Tensor]]] = {}
        loads: dict[str, float] = {}
        for precision in PRECISIONS:
            recipe = parse_recipe(RECIPE | {"target": {"name": "coreml", "precision": precision}})
            part = plan(recipe).components["transformer"]
            pair = next(p for p in part.pairs if p.name.startswith("pair"))
            block, eager = pair.lowered, pair.plain
            generator = torch.Generator().manual_seed(0)
            weights = {k: value(w.source.tensors[0], w.shape, generator) for k, w in sorted(eager.weights.items())}
            inputs = {p.name: torch.randn(p.shape, generator=generator) for p in eager.inputs}
            if precision == PRECISIONS[0]:
                module = eager.module("base", weights)

                def run_eager(module: Any = module, inputs: Any = inputs, eager: Any = eager) -> Any:
                    with torch.no_grad():
                        return dict(zip((p.name for p in eager.outputs), module(*inputs.values()), strict=True))

                calls["eager"] = run_eager
            artifact = part.target.lower(block, weights, Path(tmp) / f"{precision}.mlpackage")
            loads[precision], engine = timed(
                lambda a=artifact, b=block, t=part.target: t.engine(a.path, b.inputs, b.outputs)
            )
            calls[precision] = lambda e=engine, i=inputs: e("base", i)
        shapes = ", ".join(f"{p.name} {list(p.shape)}" for p in block.inputs)
        print(f"{block.parameters / 1e6:.1f} M weights; {shapes}; {args.threads} threads, {args.rounds} rounds")
        expected = calls["eager"]()
        times: dict[str, list[float]] = {name: [] for name in calls}
        errors = dict.fromkeys(calls, 0.0)
        for _ in range(args.rounds):
            for name, call in calls.items():
                seconds, results = timed(call)
                times[name].append(seconds)
                errors[name] = max(
                    float((results[k] - v).double().norm() / v.double().norm()) for k, v in expected.items()
                )
        base = statistics.median(times["eager"])
        print("| | seconds a call | against eager | load, seconds | relative error |\n|---|---|---|---|---|")
        for name, seconds in times.items():
            median = statistics.median(seconds)
            load = f"{loads[name]:.3f}" if name in loads else ""
            print(f"| {name} | {median:.2f} ({min(seconds):.2f}) | {median / base:.2f} | {load} | {errors[name]:.1e} |")


if __name__ == "__main__":
    main()
