"""What simplification saves: every kind of block as the exporter translates it, and as onnxsim leaves it.

    python benchmarks/simplify.py [--recipe tiny] [--only transformer/pair_0 vae] [--runs 5]

One block of every structure, with random weights, run by ONNX Runtime with and without. Bytes are those of the
model without weights, source paths and other metadata; milliseconds are the fastest of the runs, after one more;
the relative error is against eager float32. The full-size blocks are those of a recipe of that size:

    python benchmarks/simplify.py --recipe open-sora-v1.2-android --only transformer text_encoder
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from synthetic import value

import toolchain
from targets.onnx import OnnxTarget
from targets.onnx import lower as stages
from targets.onnx import weights as store

FEW = ["text_encoder.config.num_layers=1", "transformer.config.depth=1"]
"""One layer stands for all."""


@dataclass(frozen=True)
class Case:
    """A block, the same before legalisation, and what both are fed."""

    name: str
    block: Any
    eager: Any
    shapes: Mapping[str, tuple[int, ...]]
    inputs: Mapping[str, torch.Tensor]

    def weights(self, block: Any) -> dict[str, torch.Tensor]:
        generator = torch.Generator().manual_seed(0)
        needed = {n for w in self.eager.weights.values() for n in w.source.tensors}
        tensors = {n: value(n, s, generator) for n, s in sorted(self.shapes.items()) if n in needed}
        return {k: w.source.value(tensors.__getitem__).contiguous() for k, w in block.weights.items()}


def cases(recipe_name: str, only: list[str]) -> Iterator[Case]:
    """One block of every structure, in the order in which they run."""
    full = [] if recipe_name == "tiny" else FEW
    recipe = toolchain.load_recipe(recipe_name, ["target=onnx", *full])
    planned = toolchain.plan(recipe)
    family = planned.resolved.family
    for component, part in planned.components.items():
        specs = {i.name: i for graph in part.graphs for i in graph.inputs}
        seen = set()
        for pair in part.pairs:
            block, eager = pair.lowered, pair.plain
            name = f"{component}/{block.name}"
            if block.structure() in seen or not any(name.startswith(o) for o in only):
                continue
            seen.add(block.structure())
            generator = torch.Generator().manual_seed(1)
            inputs = {
                p.name: family.sample_input(specs[p.name], generator)
                if block.sources[p.name].startswith("inputs.")
                else torch.randn(p.shape, generator=generator)
                for p in block.inputs
            }
            yield Case(name, block, eager, part.definition.expected, inputs)


def measure(case: Case, model: Any, folder: Path, runs: int, expected: Mapping[str, torch.Tensor]) -> dict[str, float]:
    """Nodes, bytes, seconds to load with one run and to run, and relative error of a model."""
    (folder / "base.onnx").write_bytes(model.SerializeToString())
    engine = OnnxTarget().engine(folder, case.block.inputs, case.block.outputs)
    began = time.perf_counter()
    results = engine("base", case.inputs)
    first = time.perf_counter() - began
    seconds = []
    for _ in range(runs):
        began = time.perf_counter()
        engine("base", case.inputs)
        seconds.append(time.perf_counter() - began)
    nodes = sum(node.op_type != "Constant" for node in model.graph.node)
    error = max(float((results[k] - want).norm() / want.norm()) for k, want in expected.items())
    return {"nodes": nodes, "bytes": model.ByteSize(), "first": first, "run": min(seconds), "error": error}


def both(case: Case, runs: int) -> tuple[dict[str, float], dict[str, float], float]:
    """Figures of a block's ``base`` without and with simplification, and the seconds that it took."""
    slots = store.layout({name: source.shape for name, source in case.block.weights.items()})
    exported = stages.symbolic(case.block, "base")
    began = time.perf_counter()
    simple = stages.simplify(exported, case.name)
    seconds = time.perf_counter() - began
    with torch.no_grad():
        outputs = case.eager.module("base", case.weights(case.eager))(*case.inputs.values())
    expected = {p.name: v for p, v in zip(case.block.outputs, outputs, strict=True)}
    with tempfile.TemporaryDirectory() as tmp:
        folder = Path(tmp)
        store.write(folder / store.FILE, slots, case.weights(case.block))
        models = (stages.refer(stages.strip(exported), slots), stages.refer(simple, slots))
        without, simplified = (measure(case, model, folder, runs, expected) for model in models)
    return without, simplified, seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipe", default="tiny")
    parser.add_argument("--only", nargs="+", default=[""], metavar="COMPONENT[/BLOCK]")
    parser.add_argument("--runs", type=int, default=5)
    args = parser.parse_args()
    print("| block | nodes | bytes | load and first run, ms | run, ms | relative error | onnxsim, ms |")
    print("|---|---|---|---|---|---|---|")
    for case in cases(args.recipe, args.only):
        pair = both(case, args.runs)
        counts = " | ".join(f"{pair[0][k]:.0f} → {pair[1][k]:.0f}" for k in ("nodes", "bytes"))
        times = " | ".join(f"{pair[0][k] * 1e3:.1f} → {pair[1][k] * 1e3:.1f}" for k in ("first", "run"))
        errors = f"{pair[0]['error']:.1e} → {pair[1]['error']:.1e}"
        print(f"| {case.name} | {counts} | {times} | {errors} | {pair[2] * 1e3:.0f} |", flush=True)


if __name__ == "__main__":
    main()
