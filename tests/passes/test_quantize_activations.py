"""Linear layers that round what comes in: which, with whose scales, in which functions; and what is refused."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from passes.partition import Partition
from passes.quantize import Quantize
from passes.token_merge import TokenMerge
from targets.forms.gelu import GELU_FORMULA, gelu_formula
from toolchain.errors import LoweringError, RecipeError
from toolchain.ir.activations import (
    RoundedLinear,
    ScaleSource,
    round_to_int8,
    rounded_layers,
    scale_of,
    scale_sources,
    unrounded,
)
from toolchain.ir.blocks import extract_blocks, materialise
from toolchain.ir.functions import grouped, ungrouped
from toolchain.ir.graph import Graph, capture, leaf_of
from toolchain.ir.graph_text import leaves_text
from toolchain.ir.legalise import legalise
from toolchain.ir.passes import Pass, find_pass
from toolchain.ir.pipeline_text import parse_pipeline
from toolchain.ir.storage import FLOAT16
from toolchain.ir.target import distinct_functions, unique_weights
from toolchain.models.open_sora_v1_2.stdit3 import LoweredSTDiT3, STDiT3, STDiT3Config
from toolchain.testing.passes import check_pass

SIZES: dict[str, int] = {"batch": 2, "frames": 3, "height": 4, "width": 6, "height_px": 32, "width_px": 48}


@pytest.fixture(scope="module")
def graph() -> Graph:
    """With base and merged function."""
    with torch.device("meta"):
        model = STDiT3(STDiT3Config(hidden_size=64, num_heads=2, depth=2, caption_channels=96, model_max_length=3))
    return TokenMerge()(capture(LoweredSTDiT3(model, **SIZES)).stored_as(FLOAT16))


def quantize(groups: int | None = 2, **options: Any) -> Pass:
    own: dict[str, Any] = (
        {"scheme": "int8"} if groups is None else {"scheme": "int8", "activations": {"groups": groups}}
    )
    if groups is not None or any("activations" in rule for rule in options.get("rules", [])):
        own |= {"calibration": {"inputs": 2}}
    return find_pass("quantize", own | options, "transformer.passes[0]")


def refusal(graph: Graph, **options: Any) -> str:
    with pytest.raises(LoweringError) as error:
        quantize(**options)(graph)
    return str(error.value).removeprefix("pass 'quantize' on transformer: ")


# --- what there is afterwards ------------------------------------------------------------------------


def test_every_function_is_there_for_every_group(graph: Graph) -> None:
    result = quantize(groups=3)(graph)
    assert list(result.functions) == ["base", "merged", "base_2", "merged_2", "base_3", "merged_3"]
    for name, gm in result.functions.items():
        assert rounded_layers(gm)["temporal_blocks.1.mlp.fc2.weight"] == (
            f"temporal_blocks.1.mlp.fc2.input_scale_{name}"
        )
        (before,) = (g for n, g in graph.functions.items() if n == ungrouped(name))
        assert str(gm.graph) == str(before.graph)
    # weights are shared, scales are not
    own = dict(graph.functions["base"].named_parameters())
    for gm in result.functions.values():
        assert all(p is own[n] for n, p in gm.named_parameters() if "input_scale" not in n)
    assert list(graph.functions) == ["base", "merged"]
    assert not scale_sources(graph.weights)


def test_where_scales_come_from(graph: Graph) -> None:
    result = quantize(groups=2)(graph)
    weight = result.weights["spatial_blocks.1.attn.qkv.input_scale_merged_2"]
    assert weight.storage == FLOAT16
    assert weight.source == ScaleSource(
        ("spatial_blocks.1.attn.qkv.weight/merged_2",),
        (),
        layer=graph.weights["spatial_blocks.1.attn.qkv.weight"].source,
        function="merged_2",
    )
    # what is computed once for a prompt has one scale, whatever the function
    captions = {n: w for n, w in result.weights.items() if n.startswith("y_embedder") and "input_scale" in n}
    assert set(captions) == {f"y_embedder.y_proj.fc{i}.input_scale_base" for i in (1, 2)}
    assert {w.source.function for w in captions.values()} == {None}  # type: ignore[attr-defined]
    layers = 2 * 2 * 7 * 4  # layers, spatial and temporal, linear layers of each, functions
    assert len(scale_sources(result.weights)) == layers + 2


def test_blocks_have_the_functions_that_differ(graph: Graph) -> None:
    blocks = {b.name: b for b in extract_blocks(Partition()(quantize(groups=2)(graph)))}
    assert distinct_functions(blocks["pair_1"]) == ("base", "merged", "base_2", "merged_2")
    assert distinct_functions(blocks["caption"]) == distinct_functions(blocks["final"]) == ("base",)
    assert blocks["pair_0"].structure() == blocks["pair_1"].structure()
    plain = blocks["pair_0"].unrounded()
    assert not plain.int8_inputs
    assert len(blocks["pair_0"].int8_inputs) == 14
    assert plain.weights.keys() == blocks["pair_0"].weights.keys() - {
        s for gm in blocks["pair_0"].functions.values() for s in rounded_layers(gm).values()
    }
    # a block of which no layer rounds runs merged when 'merged_2' is asked for, not base
    rules = [{"match": "pair.0.*", "scheme": "int8"}]
    excepted = extract_blocks(Partition()(quantize(groups=2, rules=rules)(graph)))
    (first,) = (b for b in excepted if b.name == "pair_0")
    assert distinct_functions(first) == ("base", "merged", "merged_2")


def test_rules_except_layers(graph: Graph) -> None:
    rules = [
        {"match": "*.cross_attention.*", "scheme": "int8"},
        {"match": "*.mlp.fc1.weight", "scheme": "int8", "activations": "none"},
        {"match": "*.mlp.fc2.weight", "scheme": "int4"},
        {"match": "final_layer.linear.weight", "scheme": "int8", "activations": {"groups": 2}},  # delicate, but named
    ]
    found = rounded_layers(quantize(groups=2, rules=rules)(graph).functions["base_2"])
    assert set(found) == {
        *(
            f"{kind}_blocks.{i}.attn.{m}.weight"
            for kind in ("spatial", "temporal")
            for i in (0, 1)
            for m in ("qkv", "proj")
        ),
        "final_layer.linear.weight",
    }
    alone = [{"match": "pair.1.spatial.mlp.*", "scheme": "int8", "activations": {}}]
    only = quantize(groups=None, scheme="float", rules=alone)(graph)
    assert list(only.functions) == ["base", "merged"]
    assert set(rounded_layers(only.functions["merged"])) == {f"spatial_blocks.1.mlp.fc{i}.weight" for i in (1, 2)}


def test_without_activations_nothing_but_storage_changes(graph: Graph) -> None:
    result = quantize(groups=None)(graph)
    assert result.functions is graph.functions


def test_the_kit_for_passes(graph: Graph) -> None:
    report = check_pass(quantize(groups=2), [graph], refuses=[Partition()(graph)])
    assert set(report.skipped) == {"base computes the same"}  # it rounds


def test_text_of_a_leaf(graph: Graph) -> None:
    result = quantize(groups=2)(graph)
    shown = [
        line
        for line in leaves_text(result.functions["merged_2"]).splitlines()
        if line.startswith("spatial_blocks.0.mlp")
    ]
    layer = "RoundedLinear {{'in_features': {}, 'out_features': {}, 'scale_name': 'input_scale_merged_2'}} {{{}}}"
    tensors = "'weight': [{1}, {0}], 'bias': [{1}], 'input_scale_merged_2': []"
    assert shown[1:] == [
        f"spatial_blocks.0.mlp.fc1: {layer.format(64, 256, tensors.format(64, 256))}",
        f"spatial_blocks.0.mlp.fc2: {layer.format(256, 64, tensors.format(256, 64))}",
    ]


def test_legal_forms_keep_each_functions_scales(graph: Graph) -> None:
    legal = legalise(quantize(groups=2)(graph), [GELU_FORMULA])
    for name, gm in legal.functions.items():
        (node,) = (n for n in gm.graph.nodes if n.target == "temporal_blocks.0.mlp")
        leaf = leaf_of(gm, node)
        assert leaf is not None
        assert leaf.gelu is gelu_formula
        assert {m.scale_name for m in leaf.modules() if isinstance(m, RoundedLinear)} == {f"input_scale_{name}"}


# --- what it computes --------------------------------------------------------------------------------


def test_what_a_layer_computes() -> None:
    plain = nn.Linear(16, 4).requires_grad_(False)
    layer = RoundedLinear(plain, "base")
    x = torch.tensor([-9.0, -1.28, -1.275, -0.025, -0.015, -0.005, 0.0, 0.004, 0.005, 0.015, 0.02, 0.025, 1.26, 1.275])
    x = torch.cat((x, torch.tensor([1.3, 9.0])))
    layer.input_scale_base = nn.Parameter(torch.tensor(0.25) * 0 + 2.0**-7, requires_grad=False)
    steps = (x * 128).double()
    whole = torch.tensor([round(float(s)) for s in steps])  # Python rounds ties to even
    expected = whole.clamp(-128, 127).float() / 128
    assert torch.equal(round_to_int8(x, layer.input_scale_base), expected)
    assert torch.equal(layer(x), plain(expected))
    assert torch.equal(layer.plain(x), plain(x))


@settings(max_examples=200, deadline=None)
@given(st.floats(min_value=0, max_value=8e6, width=32))
def test_scales_are_float16_and_cut_nothing_off(magnitude: float) -> None:
    scale = scale_of(magnitude)
    assert scale == float(torch.tensor(scale, dtype=torch.float16))
    assert scale > 0
    assert magnitude / scale <= 127
    if magnitude >= 0.01:
        assert magnitude / scale > 127 / (1 + 2.0**-9)


def test_functions_without_rounding_compute_what_the_model_does(graph: Graph) -> None:
    result = quantize(groups=2)(graph)
    (pair,) = (b for b in extract_blocks(Partition()(result)) if b.name == "pair_0")
    (before,) = (b for b in extract_blocks(Partition()(graph)) if b.name == "pair_0")
    weights = {n: 0.1 * w for n, w in unique_weights(before).items()}
    inputs = [torch.randn(p.shape, generator=torch.Generator().manual_seed(1)) for p in pair.inputs]
    scales = {n: torch.tensor(0.03) for n in pair.weights.keys() - weights.keys()}
    with torch.no_grad():
        (exact,) = materialise(before.functions["merged"], weights)(*inputs)
        (same,) = materialise(unrounded(pair.functions["merged_2"]), weights)(*inputs)
        (rounded,) = pair.module("merged_2", weights | scales)(*inputs)
        (coarse,) = pair.module("merged_2", weights | {n: 30 * s for n, s in scales.items()})(*inputs)
    assert torch.equal(same, exact)
    errors = [float((r - exact).norm() / exact.norm()) for r in (rounded, coarse)]
    assert 1e-4 < errors[0] < errors[1]


# --- refusals ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"scheme": "int4"}, "'activations' is no option of the scheme int4"),
        ({"block": 32}, "activations: they are multiplied with one scale a channel; leave out 'block'"),
        ({"symmetric": False}, "leave out 'symmetric'"),
        ({"rank": 16}, "leave out 'rank'"),
        (
            {"calibration": None},
            "'activations' goes by what comes into a layer; write 'calibration: {inputs: 8}' beside the pass's scheme",
        ),
        ({"activations": {"groups": 0}}, "greater than or equal to 1"),
        ({"activations": {"group": 2}}, "groups"),
        ({"activations": "all"}, "activations: expected options, as {groups: 3}, or none"),
        (
            {"rules": [{"match": "*", "scheme": "int8", "activations": {"groups": 5}}]},
            "activations.groups: 2 and 5; steps are divided in one way for all",
        ),
    ],
    ids=str,
)
def test_options_that_are_wrong(options: Mapping[str, Any], said: str) -> None:
    with pytest.raises(RecipeError) as error:
        quantize(**options)
    assert str(error.value).startswith("transformer.passes[0].quantize")
    assert said in str(error.value)
    assert "\n" not in str(error.value)


def test_activations_that_are_no_ones(graph: Graph) -> None:
    rules = [{"match": "*", "scheme": "int8"}]
    assert refusal(graph, rules=rules) == "activations: there is no linear layer among what they are for"
    only_captions = [{"match": "caption.*", "scheme": "int8", "activations": {"groups": 2}}]
    assert refusal(graph, groups=None, rules=only_captions) == (
        "activations.groups: nothing here changes from step to step; leave 'groups' out"
    )


def test_a_function_that_bears_a_groups_name(graph: Graph) -> None:
    there = dataclasses.replace(graph, functions={**graph.functions, "base_2": graph.functions["base"]})
    assert "'base_2'" in refusal(there, groups=2)


def test_options_round_trip_as_text() -> None:
    first = quantize(groups=3, rules=[{"match": "*.mlp.*", "scheme": "int8", "activations": "none"}])
    ((name, read),) = parse_pipeline(str(first))
    again = find_pass(name, read, "passes[0]")
    assert isinstance(again, Quantize)
    assert again.config == first.config  # type: ignore[attr-defined]
    assert again.groups == 3


def test_names_of_functions() -> None:
    assert [grouped("merged", k) for k in range(3)] == ["merged", "merged_2", "merged_3"]
    assert {ungrouped(grouped("tail", k)) for k in range(12)} == {"tail"}
