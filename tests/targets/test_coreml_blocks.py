"""The Core ML engine on whole blocks: every structure of every component against eager PyTorch, and compressed ones."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import coremltools as ct
import coremltools.optimize.coreml as shrink
import pytest
import torch

from benchmarks import synthetic
from targets.coreml import CoreMLConfig, CoreMLTarget
from targets.coreml.engine import CoreMLEngine
from targets.coreml.lower import _convert
from targets.coreml.quantized import Quantized
from toolchain.formats.recipe import Recipe
from toolchain.formats.recipe_file import parse_recipe
from toolchain.ir.blocks import Block, Port
from toolchain.models.samples import sample_input
from toolchain.planning.plan import plan

pytestmark = pytest.mark.slow

LIMITS = {"float32": 1e-5, "float16": 3e-3}
"""Of whole blocks; some hold a part of the autoencoder, twelve layers one after the other."""
CONFIGS: Mapping[str, Mapping[str, Any]] = {
    "text_encoder": {
        "vocab_size": 256,
        "d_model": 32,
        "d_kv": 8,
        "d_ff": 64,
        "num_layers": 1,
        "num_heads": 4,
        "feed_forward_proj": "gated-gelu",
    },
    "transformer": {"hidden_size": 32, "depth": 1, "num_heads": 2, "caption_channels": 32, "model_max_length": 32},
    "vae": {
        "spatial": {"block_out_channels": [8, 8, 16, 16], "layers_per_block": 1, "norm_num_groups": 4},
        "temporal": {
            "filters": 8,
            "num_res_blocks": 1,
            "channel_multipliers": [1, 1, 2],
            "temporal_downsample": [True, True],
            "num_groups": 4,
        },
    },
}
PASSES: Mapping[str, list[Any]] = {
    "transformer": ["token-merge", "partition"],
    "vae": [{"partition": {"max_bytes": "300kB"}}],  # few blocks, each of many operators
}


def relative_error(results: Mapping[str, torch.Tensor], expected: Mapping[str, torch.Tensor]) -> float:
    """Norm of the difference over the norm of what is expected; the worst port's."""
    assert results.keys() == expected.keys()
    return max(float((results[k] - v).double().norm() / v.double().norm()) for k, v in expected.items())


# --- blocks of the golden model, on what the blocks before them give ----------------------------------


@pytest.mark.parametrize("precision", ["float32", "float16"])
def test_blocks_of_the_golden_transformer(cut_small: Any, tmp_path: Path, precision: Any) -> None:
    target = CoreMLTarget(CoreMLConfig(precision=precision))
    cut = cut_small(target.forms, frames=5, conditions=precision == "float32")
    held = []
    for block in cut.blocks:
        artifact = target.lower(block, cut.weights(block), tmp_path / f"{block.name}.mlpackage")
        engines = {a: CoreMLEngine(artifact.path, block.inputs, block.outputs, a) for a in ("rounded", "native")}
        for function in artifact.functions:
            expected = cut.expected(block.name, function)
            for engine in engines.values():
                found = engine(function, cut.inputs(block.name))
                assert {k: v.dtype for k, v in found.items()} == dict.fromkeys(expected, torch.float32)
                assert relative_error(found, expected) < LIMITS[precision], (block.name, function)
            held.append((block.name, function))
    assert held == [("caption", "base"), ("embed", "base"), ("pair_0", "base"), ("pair_0", "merged"), ("final", "base")]


# --- every component ---------------------------------------------------------------------------------


def recipe_of(precision: str) -> Recipe:
    """All components in small, the autoencoder's encoder too; two micro chunks, 17 frames and 5."""
    parts = {
        n: {"checkpoint": n, "config": dict(c), "passes": PASSES.get(n, ["partition"])} for n, c in CONFIGS.items()
    }
    parts["vae"] |= {"encoder": True, "frames_per_call": 2}
    return parse_recipe(
        {
            "name": "small",
            "model": "open-sora-v1.2",
            "video": {"frames": 22, "height": 40, "width": 48, "fps": 8},
            "sampler": {"steps": 4, "merged_steps": 2},
            "target": {"name": "coreml", "precision": precision},
            **parts,
        }
    )


def structures(recipe: Recipe, component: str) -> Iterator[tuple[Any, Block, Block]]:
    """One block of every structure, as it is lowered and as it was captured."""
    lowering = plan(recipe).components[component]
    seen = set()
    for pair in lowering.pairs:
        block, eager = pair.lowered, pair.plain
        if block.structure() not in seen:
            seen.add(block.structure())
            yield lowering, block, eager


@pytest.mark.parametrize(
    ("component", "precision"), [("text_encoder", "float32"), ("text_encoder", "float16"), ("vae", "float32")]
)
def test_blocks_of_every_structure(component: str, precision: Any, tmp_path: Path) -> None:
    """The stricter limit is for the autoencoder; its kinds of layers are run in float16 in test_stamping.py."""
    recipe = recipe_of(precision)
    functions = set()
    for lowering, block, eager in structures(recipe, component):
        generator = torch.Generator().manual_seed(0)
        names = {n for w in eager.weights.values() for n in w.source.tensors}
        shapes = {n: lowering.definition.expected[n] for n in names}
        tensors = {n: synthetic.value(n, s, generator) for n, s in sorted(shapes.items())}
        weights, plain = (
            {k: w.source.value(tensors.__getitem__).contiguous() for k, w in b.weights.items()} for b in (block, eager)
        )
        artifact = lowering.target.lower(block, weights, tmp_path / f"{block.name}.mlpackage")
        engine = lowering.target.engine(artifact.path, block.inputs, block.outputs, device=False)
        specs = {(i.name, i.shape): i for graph in lowering.graphs for f in graph.functions for i in graph.inputs_of(f)}
        for function in artifact.functions:
            signature = block.signatures[function]
            inputs = {}
            for port in eager.signatures[function].inputs:
                spec = specs.get((port.name, port.shape))
                inputs[port.name] = (
                    sample_input(spec, generator)
                    if spec and eager.sources[port.name].startswith("inputs.")
                    else torch.randn(port.shape, generator=generator)
                )
            with torch.no_grad():
                results = eager.module(function, plain)(*inputs.values())
            expected = {p.name: v * p.scale for p, v in zip(signature.outputs, results, strict=True)}
            given = {p.name: inputs[p.name] * p.scale if p.scale != 1 else inputs[p.name] for p in signature.inputs}
            assert relative_error(engine(function, given), expected) < LIMITS[precision], (block.name, function)
            functions.add((block.name.split("_0")[0].rstrip("0123456789_"), function))
    if component == "vae":
        parts = {"temporal", "spatial", "spatial_encoder", "temporal_encoder"}
        tails = {(p, "tail") for p in parts if "temporal" in p}
        assert functions == {(p, "base") for p in parts} | tails


# --- compressed weights ------------------------------------------------------------------------------


def int8_per_channel(model: Any) -> Any:
    return shrink.linear_quantize_weights(model, config(shrink.OpLinearQuantizerConfig(granularity="per_channel")))


def int8_with_offsets(model: Any) -> Any:
    return shrink.linear_quantize_weights(model, config(shrink.OpLinearQuantizerConfig(mode="linear", dtype="uint8")))


def int4_per_block(model: Any) -> Any:
    options = {"dtype": "int4", "granularity": "per_block", "block_size": 32}
    return shrink.linear_quantize_weights(model, config(shrink.OpLinearQuantizerConfig(**options)))


def palette(model: Any, **options: Any) -> Any:
    return shrink.palettize_weights(model, config(shrink.OpPalettizerConfig(mode="uniform", **options)))


def pruned(model: Any) -> Any:
    return shrink.prune_weights(model, config(shrink.OpMagnitudePrunerConfig(target_sparsity=0.5)))


def pruned_palette(model: Any) -> Any:
    options = shrink.OpPalettizerConfig(mode="uniform", nbits=4)
    return shrink.palettize_weights(pruned(model), config(options), joint_compression=True)


def pruned_int8(model: Any) -> Any:
    return shrink.linear_quantize_weights(
        pruned(model), config(shrink.OpLinearQuantizerConfig()), joint_compression=True
    )


def config(options: Any) -> Any:
    """For all weights of some size."""
    options.weight_threshold = 1024
    return shrink.OptimizationConfig(global_config=options)


COMPRESSIONS = {
    "int8 per channel": (int8_per_channel, "constexpr_blockwise_shift_scale", 1e-2),
    "uint8 with offsets": (int8_with_offsets, "constexpr_blockwise_shift_scale", 1e-2),
    "int4 per block": (int4_per_block, "constexpr_blockwise_shift_scale", 0.2),
    "4-bit palette": (lambda m: palette(m, nbits=4), "constexpr_lut_to_dense", 0.3),
    "6-bit palette": (lambda m: palette(m, nbits=6), "constexpr_lut_to_dense", 0.1),
    "4-bit palettes of channel groups": (
        lambda m: palette(m, nbits=4, granularity="per_grouped_channel", group_size=16),
        "constexpr_lut_to_dense",
        0.3,
    ),
    "half of them zero": (pruned, "constexpr_sparse_to_dense", 1.0),
    "zeros and a palette": (pruned_palette, "constexpr_lut_to_sparse", 1.0),
    "zeros and int8": (pruned_int8, "constexpr_sparse_blockwise_shift_scale", 1.0),
}


@pytest.fixture(scope="module")
def dense(cut_small: Any, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Block, dict[str, torch.Tensor]]:
    """The golden model's pair in float16 as a plain package, whose function is ``main``; and inputs of it."""
    cut = cut_small(CoreMLTarget().forms, frames=2, merged=False)
    block = cut.block("pair_0")
    folder = tmp_path_factory.mktemp("dense")
    weights = cut.weights(block)
    quantized = Quantized(block.weights, weights)
    path = _convert(block, "base", weights, "float16", folder / "pair.mlpackage", quantized)
    return path, block, cut.inputs("pair_0")


@pytest.mark.parametrize("kind", COMPRESSIONS)
def test_compressed_weights(dense: Any, kind: str, tmp_path: Path) -> None:
    """Running compressed weights is running the weights that coremltools decompresses them to."""
    path, block, inputs = dense
    compress, operator, limit = COMPRESSIONS[kind]
    model = compress(ct.models.MLModel(str(path), skip_model_load=True))
    model.save(str(tmp_path / "small.mlpackage"))
    shrink.decompress_weights(model).save(str(tmp_path / "large.mlpackage"))
    ports: tuple[tuple[Port, ...], tuple[Port, ...]] = (block.inputs, block.outputs)
    small, large, original = (
        CoreMLEngine(p, *ports) for p in (tmp_path / "small.mlpackage", tmp_path / "large.mlpackage", path)
    )
    assert operator in {v.op for v in small.trace("base", inputs)}
    results = small("base", inputs)
    assert relative_error(results, large("base", inputs)) < 1e-6
    assert relative_error(results, original("base", inputs)) < limit
    assert size(tmp_path / "small.mlpackage") < 0.8 * size(path)


def size(package: Path) -> int:
    return sum(f.stat().st_size for f in package.rglob("weight.bin"))
