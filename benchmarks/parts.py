"""Lower the full-size model's distinct parts, and run them.

    python benchmarks/parts.py [--only text_encoder vae] [--targets executorch coreml]

One block of every structure of the text encoder (one layer of T5-XXL, its embedding and norm) and of the VAE's
decoder (68 frames of 192 × 192), with random weights, each in a process of its own. Memory is the peak of that
process, with the reference run where there is one.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from measure import run

TARGETS = ("executorch", "coreml")


def plan(component: str, target: str) -> tuple[Any, Any]:
    """The model family, and a component's plan: of the shipped full-size recipe, with one text encoder layer."""
    import toolchain

    name = {"executorch": "open-sora-v1.2-android", "coreml": "open-sora-v1.2-iphone-15-pro"}[target]
    recipe = toolchain.load_recipe(name, ["text_encoder.config.num_layers=1", "transformer.config.depth=1"])
    planned = toolchain.plan(recipe)
    return planned.resolved.family, planned.components[component]


def distinct(component: str, target: str) -> list[str]:
    """One block of every structure."""
    seen: dict[str, str] = {}
    for block in plan(component, target)[1].blocks:
        seen.setdefault(block.structure(), block.name)
    return list(seen.values())


def weights_of(part: Any, pair: Any, block: Any) -> dict[str, torch.Tensor]:
    """Random weights of one block of a pair; the same for both."""
    from synthetic import value

    generator = torch.Generator().manual_seed(0)
    names = sorted({n for w in pair.plain.weights.values() for n in w.source.tensors})
    tensors = {n: value(n, part.definition.expected[n], generator) for n in names}
    return {k: w.source.value(tensors.__getitem__).contiguous() for k, w in block.weights.items()}


def inputs_of(family: Any, part: Any, block: Any) -> dict[str, torch.Tensor]:
    """What a block is run on: the component's own inputs as the gate's are, all else normal noise."""
    generator = torch.Generator().manual_seed(1)
    specs = {i.name: i for graph in part.graphs for i in graph.inputs}
    return {
        p.name: family.sample_input(specs[p.name], generator)
        if block.sources[p.name].startswith("inputs.")
        else torch.randn(p.shape, generator=generator)
        for p in block.inputs
    }


def one(component: str, name: str, target: str) -> dict[str, Any]:
    """Lower one block with random weights, and hold it against eager where it can be run."""
    from toolchain.accuracy.metrics import measure
    from toolchain.accuracy.references import run_eager
    from toolchain.ir.target import EngineUnavailableError
    from toolchain.system.memory import release, return_large_allocations

    return_large_allocations()  # as a build does
    family, part = plan(component, target)
    pair = next(p for p in part.pairs if p.name == name)
    block, eager = pair.lowered, pair.plain

    with tempfile.TemporaryDirectory() as tmp:
        began = time.perf_counter()
        artifact = part.target.lower(block, weights_of(part, pair, block), Path(tmp) / f"block{part.target.suffix}")
        release()
        part.target.check(artifact.path, block)
        seconds = time.perf_counter() - began
        path = artifact.path
        files = [p for p in path.rglob("*") if p.is_file()] if path.is_dir() else [path]
        result: dict[str, Any] = {"seconds": seconds, "bytes": sum(f.stat().st_size for f in files), "error": None}
        try:
            engine = part.target.engine(path, block.inputs, block.outputs)
        except EngineUnavailableError:
            return result
        case = run_eager(eager, "base", weights_of(part, pair, eager), inputs_of(family, part, block))
        result["error"] = measure(block, ["base"], engine, [case], 1.0)["base"].relative_error
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", default=["text_encoder", "vae"], choices=["text_encoder", "vae"])
    parser.add_argument("--targets", nargs="+", default=list(TARGETS), choices=list(TARGETS))
    parser.add_argument("--one", nargs=3, metavar=("COMPONENT", "BLOCK", "TARGET"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        print(json.dumps(one(*args.one)))
        return
    print("| part | target | seconds | peak memory, MB | artifact, MB | relative error |\n|---|---|---|---|---|---|")
    for component in args.only:
        for target in args.targets:
            for name in distinct(component, target):
                cost = run([sys.executable, __file__, "--one", component, name, target], Path())
                r = json.loads(cost.output.splitlines()[-1])
                error = "not executed" if r["error"] is None else f"{r['error']:.1e}"
                row = f"| {component}/{name} | {target} | {r['seconds']:.0f} | {cost.peak / 1e6:.0f} "
                print(f"{row}| {r['bytes'] / 1e6:.1f} | {error} |", flush=True)


if __name__ == "__main__":
    main()
