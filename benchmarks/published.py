"""The published way to convert a transformer, for comparison: see ``rebuild.py``, which runs it.

    python benchmarks/published.py FOLDER PAIRS

Loads the whole checkpoint of FOLDER/checkpoint as float32, then exports and converts each of the first PAIRS pairs
once plain and once with merged tokens, as float32 Core ML packages that share nothing. Prints the seconds of the
load, of the conversions, and the bytes written.
"""

from __future__ import annotations

import dataclasses
import sys
import time
from pathlib import Path

import toolchain
from targets.coreml import CoreMLConfig, CoreMLTarget
from toolchain.blocks import Block
from toolchain.checkpoint import open_checkpoint
from toolchain.weights import BlockWeights, read_named


def only(block: Block, function: str) -> Block:
    """A block of one function, called ``base``."""
    functions, signatures = {"base": block.functions[function]}, {"base": block.signatures[function]}
    return dataclasses.replace(block, functions=functions, signatures=signatures)


def main() -> None:
    folder, pairs = Path(sys.argv[1]), int(sys.argv[2])
    recipe = toolchain.load_recipe(folder / "recipe.yaml", ["target={name: coreml, precision: float32}"])
    lowering = toolchain.plan(recipe, base=folder).components["transformer"]
    started = time.perf_counter()
    checkpoint = open_checkpoint("checkpoint", folder)
    whole = read_named(checkpoint, lowering.definition)
    loaded = time.perf_counter()
    target = CoreMLTarget(CoreMLConfig(precision="float32"))
    out = folder / "published"
    out.mkdir()
    for block in [b for b in lowering.blocks if "merged" in b.functions and b.name.startswith("pair")][:pairs]:
        weights = dict(BlockWeights(block, checkpoint, {}))
        for function in ("base", "merged"):
            target.lower(only(block, function), weights, out / f"{block.name}_{function}.mlpackage")
    converted = time.perf_counter()
    written = sum(p.stat().st_size for p in out.rglob("*") if p.is_file())
    assert whole
    print(loaded - started, converted - loaded, written)


if __name__ == "__main__":
    main()
