"""What each way of storing weights costs and saves on a full-width transformer pair, on every target that takes it.

    python benchmarks/quantization.py [--targets coreml,executorch,onnx] [--component text_encoder|miniature]

One STDiT3-XL/2 pair (hidden size 1152, base and merged function, x [2, 2880, 1152], 300 text tokens), or one T5-XXL
layer, with random weights of the checkpoint's names and shapes, or the last pair of the shipped miniature as it was
trained (hidden size 128). Every artifact is lowered once, stamped, executed,
and held against eager float32 on the weights that it stores (``lowering``, which on ExecuTorch has the rounding of
activations to int8 in it); ``quantization`` is what these weights
cost: eager on them against eager on the checkpoint's. ``of the change`` is the same on what a block adds to x.
``int8, activations`` rounds what comes into linear layers with fixed scales, which are learned on other inputs.
Seconds are the encoding and stamping of the block. Random weights are the hardest case for palettes and the easiest
for scales: they have no outliers. They have no strong directions either, which is what a rank lives on.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from synthetic import value

SCHEMES: dict[str, dict[str, Any] | None] = {
    "plain": None,
    "int8": {"scheme": "int8"},
    "int8, activations": {"scheme": "int8", "activations": {}, "calibration": {}},
    "int8, asymmetric": {"scheme": "int8", "symmetric": False},
    "int8, clipped": {"scheme": "int8", "clip": "error"},
    "int8, blocks of 32": {"scheme": "int8", "block": 32},
    "int8, blocks of 64": {"scheme": "int8", "block": 64},
    "int8, blocks of 128": {"scheme": "int8", "block": 128},
    "int4, blocks of 32": {"scheme": "int4"},
    "int4, clipped": {"scheme": "int4", "clip": "error"},
    "int4, half-quadratic": {"scheme": "int4", "clip": "half-quadratic"},
    "int4, asymmetric": {"scheme": "int4", "symmetric": False},
    "int4, asymmetric, clipped": {"scheme": "int4", "symmetric": False, "clip": "error"},
    "int4, rank 16": {"scheme": "int4", "rank": 16},
    "int4, rank 32": {"scheme": "int4", "rank": 32},
    "int4, rank 64": {"scheme": "int4", "rank": 64},
    "int4, asymmetric, clipped, rank 16": {"scheme": "int4", "symmetric": False, "clip": "error", "rank": 16},
    "int4, blocks of 64": {"scheme": "int4", "block": 64},
    "palette, 8 bits": {"scheme": "palette", "bits": 8},
    "palette, 6 bits": {"scheme": "palette", "bits": 6},
    "palette, 4 bits": {"scheme": "palette", "bits": 4},
    "palette, 4 bits, groups of 16": {"scheme": "palette", "bits": 4, "group": 16},
    "palette, 3 bits": {"scheme": "palette", "bits": 3},
    "palette, 2 bits": {"scheme": "palette", "bits": 2},
}
TARGETS: dict[str, dict[str, Any]] = {
    "coreml": {"name": "coreml", "precision": "float16"},
    "executorch": {"name": "executorch"},
    "onnx": {"name": "onnx"},
}
T5 = {"feed_forward_proj": "gated-gelu", "vocab_size": 32128, "d_model": 4096, "d_kv": 64, "d_ff": 10240}
T5 |= {"num_layers": 2, "num_heads": 64}


CALIBRATED = 4
"""Inputs that each function is run on to learn what comes into its layers."""
MINIATURE = Path(__file__).parents[1] / "recipes" / "tiny" / "transformer" / "model.safetensors"


def recipe(component: str, target: dict[str, Any], scheme: dict[str, Any] | None) -> dict[str, Any]:
    """A recipe of one pair, of two layers, or of the miniature's transformer."""
    # the table of tokens is not measured, and ExecuTorch takes it in float32 alone
    rules = {"rules": [{"match": "embed.*", "scheme": "float"}]} if component == "text_encoder" else {}
    quantize = [] if scheme is None else [{"quantize": scheme | rules}]
    first = [] if component == "text_encoder" else ["token-merge"]
    config = {"depth": 1} if component == "transformer" else T5
    passes = [*first, *quantize, "partition"]
    if component == "miniature":
        if scheme and "rank" in scheme:  # its captions are too narrow; no pair has them
            plain = {"match": "caption.*", "scheme": scheme["scheme"]}
            passes = ["token-merge", {"quantize": scheme | {"rules": [plain]}}, "partition"]
        return {
            "name": "miniature",
            "model": "open-sora-v1.2",
            "video": {"frames": 17, "height": 64, "width": 64},
            "target": target,
            "transformer": {"checkpoint": "shipped://tiny/transformer", "passes": passes},
        }
    transformer = {"checkpoint": "none", "config": {"depth": 1}, "passes": ["partition"]}
    parts = {"transformer": transformer} | {component: {"checkpoint": "none", "config": config, "passes": passes}}
    return {
        "name": "full-width",
        "model": "open-sora-v1.2",
        "video": {"frames": 68, "height": 192, "width": 192},
        "target": target,
    } | parts


def measured(component: str, target: dict[str, Any], scheme: dict[str, Any] | None, folder: Path) -> dict[str, float]:
    """Bytes of the artifact and its errors, the worst function's.

    Raises:
        RecipeError: the target does not take the scheme.
    """
    from toolchain.accuracy.metrics import compare, scaled
    from toolchain.accuracy.references import run_eager
    from toolchain.formats.recipe_file import parse_recipe
    from toolchain.ir.stored import StoredParts, decoding_reader
    from toolchain.ir.target import unique_weights
    from toolchain.planning.plan import plan

    planned = plan(parse_recipe(recipe(component, target, scheme)))
    part = planned.components["transformer" if component == "miniature" else component]
    pair = next(p for p in reversed(part.pairs) if p.name.startswith(("pair", "layer")))
    block, plain, own = pair.lowered, pair.plain, part.target
    generator = torch.Generator().manual_seed(0)
    if component == "miniature":
        tensors = {n: t.float() for n, t in load_file(MINIATURE).items()}
    else:
        tensors = {n: value(n, w.shape, generator) for n, w in tensor_shapes(plain).items()}
    whole = plain.unrounded()
    exact = {n: w.source.value(tensors.__getitem__) for n, w in whole.weights.items()}
    tensors |= scales(plain, exact, generator)
    weights = {n: w.source.value(tensors.__getitem__) for n, w in block.weights.items()}
    unique = unique_weights(block)
    template = own.bind(own.lower(block, unique, folder / f"template{own.suffix}"), StoredParts(block.weights, unique))
    del unique
    began = time.perf_counter()
    artifact = own.stamp(template, StoredParts(block.weights, weights), folder / f"artifact{own.suffix}")
    seconds = time.perf_counter() - began
    engine = own.engine(artifact.path, block.inputs, block.outputs)
    read = decoding_reader(block.weights, tensors.__getitem__)
    stored = {n: w.source.value(read) for n, w in plain.weights.items()}
    inputs = {p.name: torch.randn(p.shape, generator=generator) for p in plain.inputs}
    worst = {"lowering": 0.0, "quantization": 0.0, "of the change": 0.0}
    for function in artifact.functions:
        held, truth = (run_eager(b, function, w, inputs).outputs for b, w in ((plain, stored), (whole, exact)))
        results = engine(function, scaled(inputs, block.inputs))
        (name,) = truth
        x = next(v for v in inputs.values() if v.shape == truth[name].shape)
        found = (
            compare(results, scaled(held, block.outputs), 0.0),
            compare(held, truth, 0.0),
            compare({name: held[name] - x}, {name: truth[name] - x}, 0.0),
        )
        worst = {k: max(v, f.relative_error) for (k, v), f in zip(worst.items(), found, strict=True)}
    files = [artifact.path] if artifact.path.is_file() else [p for p in artifact.path.rglob("*") if p.is_file()]
    total = sum(p.stat().st_size for p in files)
    return {"bytes": total, "predicted": block.weight_bytes, "seconds": seconds, **worst}


def scales(plain: Any, exact: dict[str, torch.Tensor], generator: torch.Generator) -> dict[str, torch.Tensor]:
    """The scales of layers that round what comes in, by what they met in :data:`CALIBRATED` runs of each function."""
    from toolchain.accuracy.statistics import Watched
    from toolchain.ir.activations import scale_of, scale_sources

    sources = scale_sources(plain.weights)
    watched = Watched(plain.unrounded(), exact, ())
    largest: dict[Any, float] = {}
    for function in plain.functions if sources else ():
        for _ in range(CALIBRATED):
            inputs = {p.name: torch.randn(p.shape, generator=generator) for p in plain.inputs}
            for name, met in watched.run(function, inputs)[1].items():
                key = plain.weights[name].source, function
                largest[key] = max(largest.get(key, 0.0), -met.low, met.high)
    return {n: torch.tensor(scale_of(largest[s.layer, s.function or "base"])) for n, s in sources.items()}


def tensor_shapes(block: Any) -> dict[str, Any]:
    """The checkpoint's tensors that a block needs; each of its weights is one."""
    return {w.source.tensors[0]: w for w in block.unrounded().weights.values()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--targets", default=",".join(TARGETS))
    parser.add_argument("--component", default="transformer", choices=["transformer", "text_encoder", "miniature"])
    parser.add_argument("--schemes", default=";".join(SCHEMES), help="names of schemes, parted by ;")
    args = parser.parse_args()
    from toolchain.errors import RecipeError, SoraCompileError

    print("| target | scheme | MB | weights alone, MB | lowering | quantization | of the change | stamping, s |")
    print("|---|---|---|---|---|---|---|---|")
    for target in args.targets.split(","):
        for name in args.schemes.split(";"):
            with tempfile.TemporaryDirectory() as tmp:
                try:
                    row = measured(args.component, TARGETS[target], SCHEMES[name], Path(tmp))
                except RecipeError as e:
                    print(f"| {target} | {name} | refused: {str(e).split('; ')[-1]} | | | | | |", flush=True)
                    continue
                except SoraCompileError as e:
                    print(f"| {target} | {name} | FAILED: {e} | | | | | |", flush=True)
                    continue
            figures = [f"{row[k]:.1e}" for k in ("lowering", "quantization", "of the change")]
            sizes = [f"{row[k] / 1e6:.1f}" for k in ("bytes", "predicted")]
            print(f"| {target} | {name} | {' | '.join([*sizes, *figures])} | {row['seconds']:.1f} |", flush=True)


if __name__ == "__main__":
    main()
