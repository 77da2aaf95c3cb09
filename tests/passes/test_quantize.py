"""How weights of a graph are chosen for quantization, and what is refused."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import pytest
import torch

from passes.partition import Partition
from passes.quantize import Quantize
from toolchain.errors import LoweringError, RecipeError
from toolchain.ir.affine import Affine
from toolchain.ir.graph import Graph, capture
from toolchain.ir.graph_text import graph_text
from toolchain.ir.palette import Palette
from toolchain.ir.passes import Pass, find_pass
from toolchain.ir.pipeline_text import parse_pipeline
from toolchain.ir.storage import FLOAT16, FLOAT32, Narrow
from toolchain.ir.uses import weight_uses
from toolchain.models.open_sora_v1_2.stdit3 import LoweredSTDiT3, STDiT3, STDiT3Config

SIZES: dict[str, int] = {"batch": 2, "frames": 3, "height": 4, "width": 6, "height_px": 32, "width_px": 48}


@pytest.fixture(scope="module")
def graph() -> Graph:
    with torch.device("meta"):
        model = STDiT3(STDiT3Config(hidden_size=64, num_heads=2, depth=2, caption_channels=96, model_max_length=3))
    return capture(LoweredSTDiT3(model, **SIZES)).stored_as(FLOAT16)


def quantize(**options: Any) -> Pass:
    return find_pass("quantize", options, "transformer.passes[0]")


def storages(graph: Graph) -> dict[str, str]:
    return {name: w.storage.name for name, w in graph.weights.items() if w.storage != FLOAT16}


def refusal(graph: Graph, **options: Any) -> str:
    with pytest.raises(LoweringError) as error:
        quantize(**options)(graph)
    return str(error.value).removeprefix("pass 'quantize' on transformer: ")


def test_what_is_left_alone(graph: Graph) -> None:
    found = storages(quantize(scheme="int8")(graph))
    assert set(found.values()) == {"int8-f32"}
    assert "spatial_blocks.0.attn.qkv.weight" in found
    assert "temporal_blocks.1.mlp.fc2.weight" in found
    assert "y_embedder.y_proj.fc1.weight" in found
    for name in graph.weights:
        if any(
            part in name for part in ("bias", "norm", "table", "t_embedder", "fps_embedder", "t_block", "final_layer")
        ):
            assert name not in found
    assert "x_embedder.proj.weight" not in found


def test_the_graph_itself_stays_and_nothing_but_storage_changes(graph: Graph) -> None:
    before = graph_text(graph)
    result = quantize(scheme="int4")(graph)
    assert graph_text(result) == before == graph_text(graph)
    assert {n: w.source for n, w in result.weights.items()} == {n: w.source for n, w in graph.weights.items()}
    assert not storages(graph)


@pytest.mark.parametrize(
    ("options", "storage"),
    [
        ({"scheme": "int8"}, Affine(8)),
        ({"scheme": "int8", "symmetric": False}, Affine(8, symmetric=False)),
        ({"scheme": "int4"}, Affine(4, 32)),
        ({"scheme": "int4", "block": 64, "clip": "error"}, Affine(4, 64, clip="error")),
        ({"scheme": "palette"}, Palette(4)),
        ({"scheme": "palette", "bits": 6, "group": 16}, Palette(6, 16)),
    ],
    ids=str,
)
def test_schemes(graph: Graph, options: Mapping[str, Any], storage: Any) -> None:
    weight = quantize(**options)(graph).weights["spatial_blocks.0.mlp.fc1.weight"]
    assert weight.storage == storage


def test_types_by_name(graph: Graph) -> None:
    name = "spatial_blocks.0.mlp.fc1.weight"
    wide = graph.stored_as(FLOAT32)
    kept = {
        (of, scheme): quantize(scheme=scheme)(g).weights[name].storage
        for of, g in (("float16", graph), ("float32", wide))
        for scheme in ("float16", "float32")
    }
    assert kept == {
        ("float16", "float16"): FLOAT16,
        ("float16", "float32"): FLOAT32,  # which a target of float16 refuses
        ("float32", "float16"): Narrow(FLOAT16.dtype),
        ("float32", "float32"): FLOAT32,
    }


def test_the_last_rule_that_matches_wins(graph: Graph) -> None:
    rules = [
        {"match": "pair.*.mlp.*", "scheme": "palette"},
        {"match": "pair.1.*fc2.weight", "scheme": "int8"},
        {"match": "final_layer.linear.weight", "scheme": "int8", "symmetric": False},
        {"match": "*cross_attn*", "scheme": "float"},
        {"match": "*.cross_attention.kv_linear.weight", "scheme": "float"},
    ][:3]
    found = storages(quantize(scheme="int4", rules=rules)(graph))
    assert found["spatial_blocks.0.mlp.fc1.weight"] == "palette4-f32"
    assert found["spatial_blocks.1.mlp.fc2.weight"] == "int8-f32"
    assert found["spatial_blocks.1.attn.proj.weight"] == "int4-block32-f32"
    assert found["final_layer.linear.weight"] == "int8-asymmetric-f32"  # delicate, but named


def test_a_rule_can_leave_weights_alone(graph: Graph) -> None:
    found = storages(quantize(scheme="int8", rules=[{"match": "*.cross_attention.*", "scheme": "float"}])(graph))
    assert not [name for name in found if "cross_attn" in name]
    assert "spatial_blocks.0.attn.qkv.weight" in found


def test_a_pattern_means_matrices(graph: Graph) -> None:
    found = storages(quantize(scheme="float", rules=[{"match": "pair.0.spatial.*", "scheme": "int8"}])(graph))
    assert found
    assert all(len(graph.weights[name].shape) == 2 and name.endswith(".weight") for name in found)


def test_addresses_are_unit_kind_and_name(graph: Graph) -> None:
    uses = weight_uses(graph)
    assert uses["spatial_blocks.1.mlp.fc1.weight"].address == "pair.1.spatial.mlp.fc1.weight"
    assert uses["spatial_blocks.1.mlp.fc1.weight"].use == "linear"
    assert uses["x_embedder.proj.weight"].use == "convolution"


# --- refusals ----------------------------------------------------------------------------------------


def test_a_pattern_that_matches_nothing(graph: Graph) -> None:
    right, wrong = "pair.1.spatial.mlp.fc1.weight", "pair.1.spatial.mlp.fc1.wieght"
    said = refusal(graph, scheme="int8", rules=[{"match": wrong, "scheme": "int4"}])
    assert said == f"rules[0].match '{wrong}' matches no weight; one is called '{right}'"


def test_a_rule_may_be_for_another_graph_of_the_component(graph: Graph) -> None:
    """As the VAE's two: one has what the rule names."""
    pairs = quantize(scheme="int8", rules=[{"match": "pair.*.mlp.*", "scheme": "int4"}])
    without = dataclasses.replace(graph, functions={"base": _first_nodes(graph)})
    with pytest.raises(LoweringError, match="matches no weight"):
        pairs(without)
    found = storages(pairs(without, beside=[graph]))
    assert set(found.values()) == {"int8-f32"}
    nowhere = quantize(scheme="int8", rules=[{"match": "zzz", "scheme": "int4"}])
    with pytest.raises(LoweringError, match="matches no weight"):
        nowhere(without, beside=[graph])


def _first_nodes(graph: Graph) -> torch.fx.GraphModule:
    """What of a graph's base comes before its layers."""
    base = graph.functions["base"]
    nodes, copied = torch.fx.Graph(), {}
    for node in base.graph.nodes:
        if node.op == "output" or (node.op == "call_module" and node.meta["unit"][0].startswith("pair")):
            break
        copied[node] = nodes.node_copy(node, copied.__getitem__)
        copied[node].meta = dict(node.meta)
    nodes.output(list(copied.values())[-1])
    return torch.fx.GraphModule(base, nodes)


def test_a_rule_that_never_decides(graph: Graph) -> None:
    rules = [{"match": "*.fc1.weight", "scheme": "int4"}, {"match": "*.fc?.weight", "scheme": "palette"}]
    assert refusal(graph, scheme="int8", rules=rules) == (
        "rules[0]: later rules decide about all that '*.fc1.weight' matches; "
        "the last rule that matches wins, so put it after them or remove it"
    )


def test_twice_and_after_partition(graph: Graph) -> None:
    once = quantize(scheme="int8")
    with pytest.raises(LoweringError, match="its weights are quantized already; list the pass once, with rules"):
        once(once(graph))
    with pytest.raises(LoweringError, match="put 'quantize' before 'partition'"):
        once(Partition()(graph))


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({}, "scheme"),
        ({"scheme": "int5"}, "scheme: input should be 'float', 'float32', 'float16', 'int8', 'int4' or 'palette'"),
        ({"scheme": "int8", "bits": 4}, "'bits' is no option of the scheme int8; it has block, symmetric, clip"),
        ({"scheme": "palette", "bits": 5}, "bits: a palette has 1, 2, 3, 4, 6, 8 bits, not 5"),
        ({"scheme": "int4", "block": 48}, "block: expected a power of two from 16 on, got 48"),
        ({"scheme": "float", "block": 32}, "'block' is no option of the scheme float; it has none"),
        ({"scheme": "int8", "rules": [{"scheme": "int4"}]}, "match"),
        ({"scheme": "int8", "rulse": []}, "rulse: unknown key; did you mean 'rules'?"),
    ],
    ids=str,
)
def test_options_that_are_wrong(options: Mapping[str, Any], said: str) -> None:
    with pytest.raises(RecipeError) as error:
        quantize(**options)
    assert str(error.value).startswith("transformer.passes[0].quantize")
    assert said in str(error.value)


# --- text --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options",
    [
        {"scheme": "int8"},
        {"scheme": "int4", "block": 64, "symmetric": False, "clip": "half-quadratic"},
        {"scheme": "int8", "rules": [{"match": "pair.*.mlp.*", "scheme": "palette", "bits": 6, "group": 8}]},
        {"scheme": "float", "rules": [{"match": "a b'c\"*", "scheme": "int4"}, {"match": "*.fc?", "scheme": "int8"}]},
    ],
    ids=str,
)
def test_options_round_trip_as_text(options: dict[str, Any]) -> None:
    first = quantize(**options)
    ((name, read),) = parse_pipeline(str(first))
    assert name == "quantize"
    again = find_pass(name, read, "passes[0]")
    assert isinstance(again, Quantize)
    assert again.config == first.config
    assert str(again) == str(first)
