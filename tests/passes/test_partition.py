"""Partition: every node gets one block, in an order that runs, of the size that was asked for."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError
from torch import nn

from passes.partition import Partition, PartitionConfig
from passes.token_merge import TokenMerge
from toolchain.errors import LoweringError
from toolchain.ir.blocks import Block, extract_blocks
from toolchain.ir.feeds import Given, Latents
from toolchain.ir.graph import Graph, Input, LoweredForm, capture, compute_nodes, wire
from toolchain.ir.graph_text import graph_text
from toolchain.ir.leaves import Leaf
from toolchain.ir.storage import FLOAT16
from toolchain.models.open_sora_v1_2.stdit3 import LoweredSTDiT3, STDiT3, STDiT3Config

TINY = {"hidden_size": 8, "num_heads": 2, "caption_channels": 4, "model_max_length": 3}
PAIR_BYTES = 9472  # of such a pair, in float32


def captured(depth: int, frame_conditions: bool = False) -> Graph:
    with torch.device("meta"):
        model = STDiT3(STDiT3Config.from_json(TINY | {"depth": depth}))
    sizes = {"batch": 2, "frames": 3, "height": 2, "width": 4, "height_px": 16, "width_px": 32}
    return capture(LoweredSTDiT3(model, **sizes, frame_conditions=frame_conditions))


def cut(graph: Graph, **options: Any) -> tuple[Block, ...]:
    return extract_blocks(Partition(PartitionConfig.model_validate(options))(graph))


def names(graph: Graph, **options: Any) -> list[str]:
    """Names of the blocks that hold layers."""
    return [b.name for b in cut(graph, **options) if b.name not in ("embed", "caption", "final")]


def stored(block: Block, bytes_per_weight: float = 4.0) -> float:
    return block.parameters * bytes_per_weight


# --- rules -------------------------------------------------------------------------------------------


def test_one_pair_a_block_by_default() -> None:
    blocks = cut(captured(2))
    assert sorted(b.name for b in blocks) == ["caption", "embed", "final", "pair_0", "pair_1"]
    assert [b.name for b in blocks][-3:] == ["pair_0", "pair_1", "final"]
    assert {b.name: b.rate for b in blocks if b.rate != "step"} == {"caption": "prompt"}
    pairs = [b for b in blocks if "pair" in b.name]
    assert {stored(b) for b in pairs} == {PAIR_BYTES}
    assert [p.name for p in pairs[0].inputs] == [p.name for p in pairs[1].inputs]
    assert [p.name for p in pairs[0].outputs] == ["x_out"]
    assert pairs[1].sources["x"] == "pair_0.x_out"


@pytest.mark.parametrize(
    ("options", "wanted"),
    [
        ({"layers_per_block": 1}, ["pair_0", "pair_1", "pair_2", "pair_3", "pair_4"]),
        ({"layers_per_block": 2}, ["pair_0_1", "pair_2_3", "pair_4"]),
        ({"layers_per_block": 9}, ["pair_0_4"]),
        ({"blocks": 1}, ["pair_0_4"]),
        ({"blocks": 2}, ["pair_0_2", "pair_3_4"]),
        ({"blocks": 3}, ["pair_0_1", "pair_2_3", "pair_4"]),
        ({"blocks": 5}, ["pair_0", "pair_1", "pair_2", "pair_3", "pair_4"]),
        ({"max_bytes": PAIR_BYTES}, ["pair_0", "pair_1", "pair_2", "pair_3", "pair_4"]),
        ({"max_bytes": 3 * PAIR_BYTES - 1}, ["pair_0_1", "pair_2_3", "pair_4"]),
        ({"max_bytes": "1GB"}, ["pair_0_4"]),
    ],
    ids=str,
)
@pytest.mark.slow
def test_layers_are_packed(options: dict[str, Any], wanted: list[str]) -> None:
    assert names(captured(5), **options) == wanted


def test_a_pair_that_is_too_large_is_split() -> None:
    split = names(captured(2), max_bytes=PAIR_BYTES - 1)
    assert split == ["pair_0_spatial", "pair_0_temporal", "pair_1_spatial", "pair_1_temporal"]


def test_numbers_are_padded_so_that_names_sort() -> None:
    assert names(captured(12), layers_per_block=5) == ["pair_00_04", "pair_05_09", "pair_10_11"]
    single = names(captured(11))
    assert single == sorted(single) and single[0] == "pair_00"


def test_bytes_are_those_of_the_artifacts_precision() -> None:
    graph = captured(4).stored_as(FLOAT16)
    assert names(graph, max_bytes=PAIR_BYTES) == ["pair_0_1", "pair_2_3"]


def test_bytes_are_counted_weight_by_weight() -> None:
    graph = captured(4)
    halved = {n: dataclasses.replace(w, storage=FLOAT16) for n, w in graph.weights.items() if "_blocks.0." in n}
    mixed = dataclasses.replace(graph, weights={**graph.weights, **halved})
    assert names(mixed, max_bytes=PAIR_BYTES * 3 // 2) == ["pair_0_1", "pair_2", "pair_3"]


def test_more_blocks_than_layers() -> None:
    with pytest.raises(LoweringError, match="blocks: 6 is more than the 5 layers of 'pair'"):
        cut(captured(5), blocks=6)


def test_a_layer_that_fits_nowhere() -> None:
    with pytest.raises(LoweringError, match=r"max_bytes: 'pair\.0\.spatial' alone has 4736 bytes .*more than 1000"):
        cut(captured(2), max_bytes=1000)


def test_listed_twice() -> None:
    graph = Partition()(captured(1))
    with pytest.raises(LoweringError, match=r"pass 'partition' on transformer: .*partitioned already"):
        Partition()(graph)


def test_an_order_that_cannot_run_is_found() -> None:
    graph = Partition()(captured(2))
    for node in compute_nodes(graph.functions["base"]):
        if node.meta["block"] in ("pair_0", "pair_1"):
            node.meta["block"] = {"pair_0": "pair_1", "pair_1": "pair_0"}[node.meta["block"]]
    first = next(n for n in compute_nodes(graph.functions["base"]) if n.meta["block"] == "pair_1")
    first.meta["block"] = "pair_0"  # so that pair_0 is met first again, and needs what pair_1 gives
    with pytest.raises(LoweringError, match="from a later block"):
        Partition().ensures(graph)


def test_the_argument_is_left_alone() -> None:
    graph = TokenMerge()(captured(2))
    before = graph_text(graph)
    assert graph_text(Partition()(graph)) != before
    assert graph_text(graph) == before
    assert graph.blocks() == ()


def test_text_before_and_after(small_config: STDiT3Config, hold_text: Callable[[str, str], None]) -> None:
    graph = captured(2)
    hold_text("partition_before", graph_text(graph))
    hold_text("partition", graph_text(Partition(PartitionConfig(blocks=2))(graph)))


# --- properties --------------------------------------------------------------------------------------


@st.composite
def partitions(draw: st.DrawFn) -> tuple[int, dict[str, int]]:
    """A depth, and options that are possible for it."""
    depth = draw(st.integers(1, 6))
    rule = draw(st.sampled_from(["none", "layers_per_block", "blocks", "max_bytes"]))
    most = {"none": 1, "layers_per_block": 8, "blocks": depth, "max_bytes": PAIR_BYTES * (depth + 1)}[rule]
    value = draw(st.integers(PAIR_BYTES // 2 if rule == "max_bytes" else 1, most))
    return depth, {} if rule == "none" else {rule: value}


@settings(max_examples=15, deadline=None)
@given(drawn=partitions(), merged=st.booleans(), conditions=st.booleans())
@pytest.mark.slow
def test_every_cut_is_whole_and_in_order(drawn: tuple[int, dict[str, int]], merged: bool, conditions: bool) -> None:
    depth, options = drawn
    graph = captured(depth, frame_conditions=conditions)
    graph = TokenMerge()(graph) if merged else graph
    graph = Partition(PartitionConfig.model_validate(options))(graph)
    blocks = extract_blocks(graph)
    order = [b.name for b in blocks]
    assert len(set(order)) == len(order) and order == list(graph.blocks())

    for function, gm in graph.functions.items():
        of = {n: n.meta["block"] for n in compute_nodes(gm)}
        assert set(of.values()) == {*order, "tables"}
        assert all((of[n] == "tables") == (n.meta["rate"] == "build") for n in of)
        for node, block in of.items():
            earlier = [of[i] for i in node.all_input_nodes if i in of and of[i] != "tables"]
            assert all(order.index(e) <= order.index(block) for e in earlier)
        assert all(function in b.functions for b in blocks)

    ready = {f"inputs.{i.name}" for i in graph.inputs} | {f"tables.{t}" for t in ("pos_embed", "rope", "null_text")}
    for block in blocks:
        assert set(block.sources.values()) <= ready
        ready |= {f"{block.name}.{p.name}" for p in block.outputs}

    used = [name for b in blocks for w in b.weights.values() for name in w.source.tensors]
    assert len(used) == len(set(used))  # no weight is stored in two blocks
    assert {*used, "rope.freqs", "y_embedder.y_embedding"} == graph.weights.keys()
    if "max_bytes" in options:
        assert all(stored(b) <= options["max_bytes"] for b in blocks if "pair" in b.name)
    if "blocks" in options:
        assert sum("pair" in name for name in order) == options["blocks"]


# --- layers of unequal size --------------------------------------------------------------------------


class Layer(Leaf):
    kind = "layer"

    def __init__(self, rows: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(rows, device="meta"))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * self.weight.sum()


class Uneven(LoweredForm):
    """Layers of two parts, each with as many weights as asked for."""

    component = "uneven"

    def __init__(self, sizes: list[tuple[int, int]]) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.ModuleList(Layer(rows) for rows in parts) for parts in sizes)

    def inputs(self) -> tuple[Input, ...]:
        return (Input("x", (1,), Latents()),)

    def gives(self) -> dict[str, Given]:
        return {}

    def dims(self) -> dict[str, int]:
        return {}

    def unit(self, path: str) -> tuple[str, ...]:
        _, layer, part = path.split(".")
        return f"layer.{layer}", f"part{part}"

    def forward(self, x: Any) -> Any:
        for parts in self.layers:
            for part in parts:  # type: ignore[attr-defined]
                x = wire(part(x), "x")
        return (wire(x, "out"),)


def test_layers_of_unequal_size_are_packed_in_order() -> None:
    assert names(capture(Uneven([(10, 10), (30, 30), (5, 5), (5, 5)])), max_bytes=4 * 60) == [
        "layer_0",
        "layer_1",
        "layer_2_3",
    ]


def test_a_split_layer_shares_its_blocks_with_no_other() -> None:
    assert names(capture(Uneven([(20, 20), (20, 80), (5, 5)])), max_bytes=4 * 80) == [
        "layer_0",
        "layer_1_part0",
        "layer_1_part1",
        "layer_2",
    ]


# --- options -----------------------------------------------------------------------------------------


@given(
    options=st.one_of(
        st.just({}),
        st.builds(dict, layers_per_block=st.integers(1, 10**6)),
        st.builds(dict, blocks=st.integers(1, 10**6)),
        st.builds(dict, max_bytes=st.one_of(st.integers(1, 10**15), st.sampled_from(["200MB", "1.5GiB", "64 kB"]))),
    )
)
def test_options_survive_json(options: Mapping[str, Any]) -> None:
    config = PartitionConfig.model_validate(options)
    assert PartitionConfig.model_validate_json(config.model_dump_json()) == config
    assert PartitionConfig.model_validate(config.model_dump(mode="json", exclude_none=True)) == config


def test_sizes_are_decimal_unless_said_otherwise() -> None:
    assert PartitionConfig.model_validate({"max_bytes": "200MB"}).max_bytes == 200_000_000
    assert PartitionConfig.model_validate({"max_bytes": "200MiB"}).max_bytes == 200 * 2**20
    assert str(Partition(PartitionConfig.model_validate({"max_bytes": "1kB"}))) == "partition{max_bytes=1KB}"


@pytest.mark.parametrize(
    "wrong",
    [
        {"blocks": 0},
        {"layers_per_block": -1},
        {"max_bytes": "0MB"},
        {"max_bytes": "much"},
        {"block": 2},
        {"blocks": "two"},
        {"blocks": 2, "layers_per_block": 3},
    ],
    ids=str,
)
def test_options_that_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        PartitionConfig.model_validate(wrong)
