"""Token merging's options, which the published code does not have: lines, alternating pairs, ranges of layers.

Held against a second way to write them, frame by frame.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError
from test_token_merge import SIZES, TSC, Attend, Layout, beside_hooked, by_keyword, captured, streams

from passes.token_merge import (
    LayerRange,
    TokenMerge,
    TokenMergeConfig,
    merge_frames,
    merged_count,
    unmerge_frames,
)
from toolchain.errors import LoweringError
from toolchain.ir.graph import Graph, capture
from toolchain.ir.pipeline_text import parse_pipeline
from toolchain.models.open_sora_v1_2.stdit3 import LoweredSTDiT3, STDiT3Config

# --- the two operations ------------------------------------------------------------------------------


def naive_pairs(frames: int, alternating: bool) -> list[list[int]]:
    """The frames that are merged together, in order."""
    start: list[list[int]] = [[0]] if alternating else []
    first = len(start)
    return start + [list(range(i, min(i + 2, frames))) for i in range(first, frames, 2)]


def naive_linear(x: torch.Tensor, frames: int, alternating: bool) -> torch.Tensor:
    """Every frame by itself: on the line between the centres of its pair and of the next one on its side."""
    pairs = naive_pairs(frames, alternating)
    parts = x.chunk(len(pairs), dim=1)
    found = []
    for frame in range(frames):
        own = next(i for i, pair in enumerate(pairs) if frame in pair)
        side = 0 if len(pairs[own]) == 1 else -1 if frame == pairs[own][0] else 1
        other = min(max(own + side, 0), len(pairs) - 1)
        found.append(torch.lerp(parts[own], parts[other], 0.25))
    return torch.cat(found, dim=1)


@settings(max_examples=40, deadline=None)
@given(frames=st.integers(1, 9), batch=st.integers(1, 3), tokens=st.integers(1, 5), alternating=st.booleans())
def test_pairs_and_lines(frames: int, batch: int, tokens: int, alternating: bool) -> None:
    x, lead, pairs = streams(frames, batch, tokens), int(alternating), naive_pairs(frames, alternating)
    assert merged_count(frames, lead) == len(pairs)
    parts = x.chunk(frames, dim=1)
    means = torch.cat([torch.stack([parts[i] for i in pair]).mean(0) for pair in pairs], dim=1)
    torch.testing.assert_close(merge_frames(x, frames=frames, lead=lead), means)
    m = streams(len(pairs), batch, tokens)
    own = m.chunk(len(pairs), dim=1)
    repeated = torch.cat([own[i] for i, pair in enumerate(pairs) for _ in pair], dim=1)
    assert torch.equal(unmerge_frames(m, frames=frames, lead=lead), repeated)
    linear = unmerge_frames(m, frames=frames, lead=lead, linear=True)
    torch.testing.assert_close(linear, naive_linear(m, frames, alternating))


def test_what_does_not_move_is_left_as_it_is() -> None:
    still = streams(1).repeat(1, 5, 1)
    for lead in (0, 1):
        merged = merge_frames(still, frames=5, lead=lead)
        assert torch.equal(unmerge_frames(merged, frames=5, lead=lead, linear=True), still)


def test_linear_follows_what_moves_evenly() -> None:
    even = torch.arange(8.0).reshape(1, 8, 1)
    got = unmerge_frames(merge_frames(even, frames=8), frames=8, linear=True)
    assert torch.equal(got[:, 1:7], even[:, 1:7])
    assert got[0, [0, 7], 0].tolist() == [0.5, 6.5]  # the ends have no neighbour to go by


# --- against the eager model with merging around its attentions --------------------------------------


def naive_merge(x: torch.Tensor, frames: int, alternating: bool) -> torch.Tensor:
    parts = x.chunk(frames, dim=1)
    return torch.cat([sum(parts[i] for i in p) / len(p) for p in naive_pairs(frames, alternating)], dim=1)


@settings(max_examples=5, deadline=None)
@given(frames=st.integers(2, 6), first=st.integers(0, 1))
def test_merged_is_the_model_with_merged_attention(small_model: Any, frames: int, first: int) -> None:
    graph = captured(small_model.config, frames=frames)
    options = {"unmerge": "linear", "pairs": "alternating", "layers": {"first": first}}
    graph = TokenMerge(TokenMergeConfig.read(options))(graph)
    form = LoweredSTDiT3(small_model, **(SIZES | {"frames": frames}))
    generator = torch.Generator().manual_seed(frames)
    args = [torch.rand(i.shape, generator=generator) for i in form.inputs()]
    args[3] = (args[3] > 0.3).float()
    hooks = []
    for name, module in small_model.named_modules():
        kind, layer = getattr(module, "kind", ""), int(name.split(".")[1]) if "_blocks." in name else -1
        if kind not in ("self_attention", "cross_attention") or layer < first:
            continue

        def before(_: Any, args: Any, kwargs: Any, odd: bool = layer % 2 == 1) -> Any:
            merged = {"frames": len(naive_pairs(frames, odd))} if "frames" in kwargs else {}
            return (naive_merge(args[0], frames, odd), *args[1:]), kwargs | merged

        def after(_: Any, args: Any, out: torch.Tensor, odd: bool = layer % 2 == 1) -> torch.Tensor:
            return naive_linear(out, frames, odd)

        hooks += [module.register_forward_pre_hook(before, with_kwargs=True), module.register_forward_hook(after)]
    wanted, got, plain = beside_hooked(graph, form, args, hooks)
    assert (got - wanted).norm() <= 1e-5 * wanted.norm()
    assert frames == 2 or (got - plain).norm() > 1e-4 * plain.norm()


# --- layers and pairs --------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def three_pairs_graph(small_config: STDiT3Config) -> Graph:
    return captured(dataclasses.replace(small_config, depth=3), frames=4)


def merges(graph: Graph, **options: Any) -> dict[str, set[tuple[int, bool]]]:
    """By unit, the leads of its merges, and whether it is unmerged linearly."""
    gm = TokenMerge(TokenMergeConfig.read(options))(graph).functions["merged"]
    found: dict[str, set[tuple[int, bool]]] = {}
    for node in gm.graph.nodes:
        if node.target is unmerge_frames:
            key = node.kwargs.get("lead", 0), node.kwargs.get("linear", False)
            found.setdefault(".".join(node.meta["unit"]), set()).add(key)
    return found


def test_pairs_alternate_between_layers(three_pairs_graph: Graph) -> None:
    found = merges(three_pairs_graph, pairs="alternating", unmerge="linear")
    parts = [(i, part) for i in range(3) for part in ("spatial", "temporal")]
    assert found == {f"pair.{i}.{part}": {(i % 2, True)} for i, part in parts}
    gm = TokenMerge(TokenMergeConfig(pairs="alternating"))(three_pairs_graph).functions["merged"]
    frames = {str(n.target): n.kwargs["frames"] for n in gm.graph.nodes if str(n.target).endswith(".attn")}
    assert frames == {f"{kind}_blocks.{i}.attn": 2 + i % 2 for i in range(3) for kind in ("spatial", "temporal")}


def test_only_some_layers(three_pairs_graph: Graph) -> None:
    assert {u.rpartition(".")[0] for u in merges(three_pairs_graph, layers={"first": 1})} == {"pair.1", "pair.2"}
    assert {u.rpartition(".")[0] for u in merges(three_pairs_graph, layers={"last": 0})} == {"pair.0"}
    # layers are counted from the model's first, not from the first that is merged
    assert merges(three_pairs_graph, layers={"first": 1, "last": 1}, pairs="alternating") == {
        "pair.1.spatial": {(1, False)},
        "pair.1.temporal": {(1, False)},
    }


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"layers": {"first": 3}}, "layers: there is no layer 3; they are 0 to 2"),
        ({"layers": {"first": 1, "last": 7}}, "layers: there is no layer 7; they are 0 to 2"),
        (
            {"layers": {"last": 0}, "pairs": "alternating"},
            "pairs: alternating: no second layer is merged, so they are as with 'fixed'; leave it out",
        ),
    ],
    ids=["first", "last", "pairs"],
)
def test_layers_that_are_refused(three_pairs_graph: Graph, options: dict[str, Any], message: str) -> None:
    with pytest.raises(LoweringError) as raised:
        TokenMerge(TokenMergeConfig.read(options))(three_pairs_graph)
    assert str(raised.value) == f"pass 'token-merge' on transformer: {message}"


def test_a_component_without_layers() -> None:
    with pytest.raises(LoweringError, match="layers: there is no layer 0; the component has none"):
        TokenMerge(TokenMergeConfig(layers=LayerRange()))(capture(Layout(by_keyword, Attend(), 2, 12, 8, **TSC)))


# --- text --------------------------------------------------------------------------------------------


def test_options_survive_text() -> None:
    assert TokenMergeConfig().written(defaults=True) == {"where": ["self_attention", "cross_attention"]}
    more = TokenMergeConfig(unmerge="linear", pairs="alternating", layers=LayerRange(first=4, last=23))
    assert str(TokenMerge(more)) == "token-merge{unmerge=linear pairs=alternating layers={first: 4, last: 23}}"
    ((_, options),) = parse_pipeline(str(TokenMerge(more)))
    assert TokenMergeConfig.read(options) == more


@pytest.mark.parametrize(
    "wrong",
    [
        {"unmerge": "cubic"},
        {"pairs": "odd"},
        {"layers": {"first": 4, "last": 3}},
        {"layers": {"first": -1}},
        {"layers": [4, 23]},
    ],
    ids=str,
)
def test_options_that_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        TokenMergeConfig.model_validate(wrong)
