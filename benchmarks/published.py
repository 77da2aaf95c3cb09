"""The published way to convert a transformer, for comparison: see ``compile.py``, which runs it.

    python benchmarks/published.py FOLDER CHECKPOINT PAIRS

Loads the whole transformer's CHECKPOINT three times as float32, as the published scripts do; then
traces (``torch.jit.trace`` with its usual check) and converts each of the first PAIRS pairs once plain and once with
merged tokens, as float32 Core ML packages that share nothing. Prints the seconds of the load, of the conversions,
and the bytes of the packages.
"""

from __future__ import annotations

import sys
import time
import warnings
from pathlib import Path
from typing import Any

import coremltools as ct
import numpy as np
import torch
from coremltools.converters.mil import Builder
from coremltools.converters.mil.frontend.torch import ops

import toolchain
from targets.streams import quiet
from toolchain.ir.blocks import Block
from toolchain.weights.block_weights import BlockWeights, read_named
from toolchain.weights.checkpoint import open_checkpoint

MODELS = 3
_cast = ops._cast


def _cast_as_ever(context: Any, node: Any, dtype: Any, name: str) -> None:
    """As with NumPy 1, which took an array of one number for that number; the tracing frontend counts on it."""
    (x,) = ops._get_inputs(context, node, expected=1)
    if x.val is not None and np.ndim(x.val):
        context.add(Builder.const(val=dtype(np.asarray(x.val).item()), name=node.name), node.name)
    else:
        _cast(context, node, dtype, name)


def convert(block: Block, function: str, weights: dict[str, torch.Tensor], out: Path) -> None:
    ports = block.signatures[function]
    generator = torch.Generator().manual_seed(0)
    inputs = tuple(torch.randn(p.shape, generator=generator) for p in ports.inputs)
    with quiet(), warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        traced = torch.jit.trace(block.module(function, weights), inputs)
        model = ct.convert(
            traced,
            inputs=[ct.TensorType(name=p.name, shape=p.shape, dtype=np.float32) for p in ports.inputs],
            outputs=[ct.TensorType(name=p.name) for p in ports.outputs],
            minimum_deployment_target=ct.target.iOS18,
            compute_precision=ct.precision.FLOAT32,
            skip_model_load=True,
        )
    model.save(str(out))


def main() -> None:
    ops._cast = _cast_as_ever
    folder, location, pairs = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3])
    target = ["target={name: coreml, precision: float32}", f"transformer.checkpoint={location}"]
    recipe = toolchain.load_recipe(folder / "recipe.yaml", target)
    part = toolchain.plan(recipe, base=folder).components["transformer"]
    checkpoint = open_checkpoint(location, folder)
    started = time.perf_counter()
    expected = part.definition.expected
    whole = [{k: v.clone() for k, v in read_named(checkpoint, expected).items()} for _ in range(MODELS)]
    loaded = time.perf_counter()
    out = folder / "published"
    out.mkdir()
    for block in [b for b in part.blocks if "merged" in b.functions and b.name.startswith("pair")][:pairs]:
        weights = dict(BlockWeights(block, checkpoint, {}))
        for function in ("base", "merged"):
            convert(block, function, weights, out / f"{block.name}_{function}.mlpackage")
    converted = time.perf_counter()
    assert len(whole) == MODELS
    print(loaded - started, converted - loaded, sum(p.stat().st_size for p in out.rglob("*") if p.is_file()))


if __name__ == "__main__":
    main()
