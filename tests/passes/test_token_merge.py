"""Token merging against the golden vectors of the published code, and against a second way to write it."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError
from torch import fx

from passes.token_merge import TokenMerge, TokenMergeConfig, merge_frames, unmerge_frames
from toolchain.errors import LoweringError
from toolchain.ir.feeds import Given, Latents
from toolchain.ir.graph import Graph, Input, Leaf, LoweredForm, capture, leaf_of, wire
from toolchain.ir.graph_text import function_text, graph_text
from toolchain.ir.pipeline_text import parse_pipeline
from toolchain.models.open_sora_v1_2.stdit3 import LoweredSTDiT3, STDiT3, STDiT3Config

SIZES: dict[str, int] = {"batch": 2, "frames": 3, "height": 4, "width": 6, "height_px": 32, "width_px": 48}


def captured(config: STDiT3Config, **sizes: Any) -> Graph:
    with torch.device("meta"):
        model = STDiT3(config)
    return capture(LoweredSTDiT3(model, **(SIZES | sizes)))


# --- the two operations ------------------------------------------------------------------------------


def streams(frames: int, batch: int = 2, tokens: int = 3) -> torch.Tensor:
    generator = torch.Generator().manual_seed(frames)
    return torch.randn(batch, frames * tokens, 4, generator=generator)


def naive_merge(x: torch.Tensor, frames: int) -> torch.Tensor:
    parts = x.chunk(frames, dim=1)
    pairs = [parts[i : i + 2] for i in range(0, frames, 2)]
    return torch.cat([torch.stack(p).mean(0) for p in pairs], dim=1)


def naive_unmerge(x: torch.Tensor, frames: int) -> torch.Tensor:
    parts = x.chunk((frames + 1) // 2, dim=1)
    return torch.cat([parts[i // 2] for i in range(frames)], dim=1)


geometry = given(frames=st.integers(1, 9), batch=st.integers(1, 3), tokens=st.integers(1, 5))


@settings(max_examples=30, deadline=None)
@geometry
def test_merging_averages_neighbours(frames: int, batch: int, tokens: int) -> None:
    x = streams(frames, batch, tokens)
    merged = merge_frames(x, frames=frames)
    torch.testing.assert_close(merged, naive_merge(x, frames))
    if frames % 2:  # the last one has no neighbour and is left as it is
        assert torch.equal(merged[:, -tokens:], x[:, -tokens:])


@settings(max_examples=30, deadline=None)
@geometry
def test_unmerging_gives_each_frame_its_pairs_result(frames: int, batch: int, tokens: int) -> None:
    m = streams((frames + 1) // 2, batch, tokens)
    both = unmerge_frames(m, frames=frames)
    assert torch.equal(both, naive_unmerge(m, frames))
    torch.testing.assert_close(merge_frames(both, frames=frames), m)


def test_one_frame_is_left_as_it_is() -> None:
    x = streams(1)
    assert torch.equal(merge_frames(x, frames=1), x)
    assert torch.equal(unmerge_frames(x, frames=1), x)


# --- against the published code ----------------------------------------------------------------------


class Recorder(fx.Interpreter):
    """Runs a function with the weights of ``form``; keeps every node's value."""

    def __init__(self, graph: Graph, function: str, form: LoweredSTDiT3) -> None:
        super().__init__(fx.GraphModule(form, graph.functions[function].graph))
        self.values: dict[fx.Node, Any] = {}

    def run_node(self, n: fx.Node) -> Any:
        self.values[n] = super().run_node(n)
        return self.values[n]

    def wires(self, name: str) -> list[torch.Tensor]:
        return [v for n, v in self.values.items() if n.meta.get("wire") == name]

    def call(self, path: str) -> tuple[torch.Tensor, torch.Tensor]:
        """What the module at ``path`` takes first, and gives."""
        node = next(n for n in self.values if n.op == "call_module" and n.target == path)
        assert isinstance(node.args[0], fx.Node)
        return self.values[node.args[0]], self.values[node]


def recorded(model: Any, inputs: Mapping[str, torch.Tensor], function: str) -> Recorder:
    batch, _, frames, height, width = inputs["x"].shape
    sizes = {"batch": batch, "frames": frames, "height": height, "width": width}
    sizes |= {"height_px": int(inputs["height"]), "width_px": int(inputs["width"])}
    merged = TokenMerge()(captured(model.config, **sizes))
    run = Recorder(merged, function, LoweredSTDiT3(model, **sizes))
    mask = inputs["mask"].repeat(batch, 1).float()
    with torch.no_grad():
        run.run(inputs["x"], inputs["timestep"], inputs["y"][:, 0], mask, inputs["fps"].repeat(batch))
    return run


def in_published_shapes(run: Recorder, inputs: Mapping[str, torch.Tensor], merged: bool) -> dict[str, torch.Tensor]:
    """Values under the golden names; the published code keeps ``[B·T, S, C]`` and ``[B·S, T, C]``."""
    batch, frames = inputs["x"].shape[0], inputs["x"].shape[2]
    (text,) = run.wires("text")
    mask = inputs["mask"].repeat(batch, 1)
    streams = run.wires("x")
    found = {
        "part1_x": streams[0],
        "part1_y": text[mask != 0][None],
        "y_count_per_item": inputs["mask"].sum(1),
        "t": run.wires("t")[0][:, 0],
        "t_mlp": run.wires("t_mlp")[0][:, 0],
        "before_final_layer": streams[-1],
        "out": run.wires("out")[0],
    }
    layers = [f"{kind}_{i}" for i in range(2) for kind in ("spatial", "temporal")]
    found |= {f"{layer}_out": x for layer, x in zip(layers, streams[1:], strict=True)}
    half = frames // 2
    for layer in layers if merged else []:
        kind, i = layer.split("_")
        for site, module in (("attn", "attn"), ("cross", "cross_attn")):
            for end, x in zip(("in", "out"), run.call(f"{kind}_blocks.{i}.{module}"), strict=True):
                c = x.shape[-1]
                if site == "attn" and kind == "spatial":
                    x = x.reshape(batch * half, -1, c)
                elif site == "attn":
                    x = x.reshape(batch, half, -1, c).transpose(1, 2).reshape(-1, half, c)
                found[f"{layer}_{site}_{end}"] = x
    return found


@pytest.mark.parametrize("case", ["a", "b2"])
@pytest.mark.parametrize(("function", "prefix"), [("base", "plain."), ("merged", "tdtm.")])
def test_golden_vectors(small_model: Any, golden_case: Any, case: str, function: str, prefix: str) -> None:
    inputs, golden = golden_case(f"tdtm_case_{case}")
    run = recorded(small_model, inputs, function)
    ours = in_published_shapes(run, inputs, function == "merged")
    wanted = {k.removeprefix(prefix): v for k, v in golden.items() if k.startswith(prefix)}
    assert wanted.keys() <= ours.keys()
    for name, want in wanted.items():
        got = ours[name]
        assert got.shape == want.shape, name
        assert (got - want).float().norm() <= 1e-5 * want.float().norm(), name


# --- against the eager model with merging around its attentions --------------------------------------


def merge_in_place(model: Any, where: tuple[str, ...], frames: int) -> list[Any]:
    """Hooks that merge before and unmerge after every attention in ``where``; written without the pass."""

    def before(_: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        merged = {"frames": (frames + 1) // 2} if "frames" in kwargs else {}
        return (naive_merge(args[0], frames), *args[1:]), kwargs | merged

    def after(_: Any, args: tuple[Any, ...], out: torch.Tensor) -> torch.Tensor:
        return naive_unmerge(out, frames)

    hooks = []
    for module in model.modules():
        if getattr(module, "kind", "") in where:
            hooks.append(module.register_forward_pre_hook(before, with_kwargs=True))
            hooks.append(module.register_forward_hook(after))
    return hooks


def beside_hooked(graph: Graph, form: LoweredSTDiT3, args: list[torch.Tensor], hooks: list[Any]) -> list[torch.Tensor]:
    """What the eager model gives with ``hooks``, which are removed, and the graph's functions merged and base."""
    try:
        with torch.no_grad():
            wanted, _ = getattr(form, form.entry)(*args)
    finally:
        for hook in hooks:
            hook.remove()
    with torch.no_grad():
        return [wanted, *(Recorder(graph, function, form).run(*args)[0] for function in ("merged", "base"))]


@settings(max_examples=6, deadline=None)
@given(
    frames=st.integers(1, 6),
    where=st.sampled_from([("self_attention",), ("cross_attention",), ("self_attention", "cross_attention")]),
    conditions=st.booleans(),
)
def test_merged_is_the_model_with_merged_attention(small_model: Any, frames: int, where: Any, conditions: bool) -> None:
    sizes = SIZES | {"frames": frames}
    graph = captured(small_model.config, frames=frames, frame_conditions=conditions)
    graph = TokenMerge(TokenMergeConfig(where=where))(graph)
    form = LoweredSTDiT3(small_model, **sizes, frame_conditions=conditions)
    generator = torch.Generator().manual_seed(frames)
    args = [torch.rand(i.shape, generator=generator).round(decimals=2) for i in form.inputs()]
    args[1] *= 1000
    args[3] = (args[3] > 0.3).float()
    if conditions:
        args[5] = args[5].round()
    wanted, got, plain = beside_hooked(graph, form, args, merge_in_place(small_model, where, frames))
    assert (got - wanted).norm() <= 1e-5 * wanted.norm()
    assert frames == 1 or (got - plain).norm() > 1e-3 * plain.norm()


# --- the pass ----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def one_pair_graph(small_config: STDiT3Config) -> Graph:
    return captured(dataclasses.replace(small_config, depth=1))


def test_text_before_and_after(one_pair_graph: Graph, hold_text: Callable[[str, str], None]) -> None:
    hold_text("captured", graph_text(one_pair_graph))
    hold_text("token_merge", graph_text(TokenMerge()(one_pair_graph)))


def test_the_argument_is_left_alone(one_pair_graph: Graph) -> None:
    before, functions = graph_text(one_pair_graph), dict(one_pair_graph.functions)
    result = TokenMerge()(one_pair_graph)
    assert graph_text(result) != before
    assert graph_text(one_pair_graph) == before
    assert dict(one_pair_graph.functions) == functions
    assert list(result.functions) == ["base", "merged"]
    assert result.functions["base"] is functions["base"]
    assert result.weights == one_pair_graph.weights


def test_merged_attention_sees_half_of_the_frames(one_pair_graph: Graph) -> None:
    gm = TokenMerge()(one_pair_graph).functions["merged"]
    for node in gm.graph.nodes:
        leaf = leaf_of(gm, node)
        if leaf is not None and leaf.kind in ("self_attention", "cross_attention"):
            assert node.meta["val"].shape == (2, 2 * 6, 64)
            assert node.kwargs.get("frames", 2) == 2
        if "wire" in node.meta and node.meta["wire"] == "x":
            assert node.meta["val"].shape == (2, 3 * 6, 64)


def test_listed_twice(one_pair_graph: Graph) -> None:
    with pytest.raises(LoweringError, match=r"pass 'token-merge' on transformer: .*'merged' already; list the pass on"):
        TokenMerge()(TokenMerge()(one_pair_graph))


def test_a_component_without_frames(one_pair_graph: Graph) -> None:
    dims = {k: v for k, v in one_pair_graph.dims.items() if k != "T"}
    with pytest.raises(LoweringError, match="no frames to merge"):
        TokenMerge()(dataclasses.replace(one_pair_graph, dims=dims))


def test_a_component_without_attention(small_config: STDiT3Config) -> None:
    graph = captured(dataclasses.replace(small_config, depth=0))
    with pytest.raises(LoweringError, match="has no cross_attention"):
        TokenMerge(TokenMergeConfig(where=("cross_attention",)))(graph)


def test_what_it_promises_is_checked(one_pair_graph: Graph) -> None:
    base = one_pair_graph.functions["base"]
    with pytest.raises(LoweringError, match="0 merges for 4 attentions"):
        TokenMerge().ensures(dataclasses.replace(one_pair_graph, functions={"base": base, "merged": base}))


# --- options -----------------------------------------------------------------------------------------


def test_options_survive_json() -> None:
    config = TokenMergeConfig(where=("self_attention",))
    assert TokenMergeConfig.model_validate_json(config.model_dump_json()) == config
    assert TokenMergeConfig.model_validate({"where": ["self_attention"]}) == config
    assert str(TokenMerge()) == "token-merge"
    assert str(TokenMerge(config)) == "token-merge{where=self_attention}"
    assert parse_pipeline(str(TokenMerge(config))) == (("token-merge", {"where": "self_attention"}),)
    assert TokenMergeConfig.read({"where": "self_attention"}) == config


@pytest.mark.parametrize("wrong", [{"where": []}, {"where": ["mlp"]}, {"were": ["self_attention"]}])
def test_options_that_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        TokenMergeConfig.model_validate(wrong)


# --- the layout that it needs ------------------------------------------------------------------------


class Attend(Leaf):
    """As much of an attention as the pass sees of one."""

    kind = "self_attention"

    def forward(self, x: torch.Tensor, frames: int) -> torch.Tensor:
        return x


class Widen(Attend):
    def forward(self, x: torch.Tensor, frames: int) -> torch.Tensor:
        return x.repeat_interleave(2, dim=1)


class Layout(LoweredForm):
    """One attention on a stream of any shape."""

    component = "layout"

    def __init__(self, call: Callable[[Leaf, torch.Tensor], torch.Tensor], leaf: Leaf, *shape: int, **dims: int):
        super().__init__()
        self.attend, self.call, self.shape, self.sizes = leaf, call, shape, dims

    def inputs(self) -> tuple[Input, ...]:
        return (Input("x", self.shape, Latents()),)

    def gives(self) -> dict[str, Given]:
        return {}

    def dims(self) -> dict[str, int]:
        return self.sizes

    def unit(self, path: str) -> tuple[str, ...]:
        return (path,)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return (wire(self.call(self.attend, x), "x"),)


def by_keyword(leaf: Leaf, x: torch.Tensor) -> torch.Tensor:
    out: torch.Tensor = leaf(x, frames=3)
    return out


TSC = {"T": 3, "S": 4, "N": 12}


def test_a_layout_that_fits() -> None:
    merged = TokenMerge()(capture(Layout(by_keyword, Attend(), 2, 12, 8, **TSC))).functions["merged"]
    assert "frames=2" in function_text(merged, "merged")
    without_n = {"T": 3, "S": 4}
    assert "merged" in TokenMerge()(capture(Layout(by_keyword, Attend(), 2, 12, 8, **without_n))).functions


NEEDED = "needed is [B, T·S, C] with T·S = 3·4, frame after frame"


@pytest.mark.parametrize(
    ("form", "message"),
    [
        (Layout(by_keyword, Attend(), 2, 3, 4, 8, **TSC), f"'attend' takes [2, 3, 4, 8]; {NEEDED}"),
        (Layout(by_keyword, Attend(), 24, 8, **TSC), f"'attend' takes [24, 8]; {NEEDED}"),
        (
            Layout(by_keyword, Attend(), 2, 13, 8, **TSC),
            f"'attend' takes [2, 13, 8], which 3 frames do not divide; {NEEDED}",
        ),
        (Layout(by_keyword, Attend(), 8, 3, 8, **TSC), f"'attend' takes [8, 3, 8]; {NEEDED}"),
        (Layout(by_keyword, Widen(), 2, 12, 8, **TSC), f"'attend' gives [2, 24, 8]; {NEEDED}"),
        (
            Layout(by_keyword, Attend(), 2, 12, 8, **(TSC | {"N": 13})),
            "the component has N=13 tokens; needed are T·S = 3·4",
        ),
        (
            Layout(by_keyword, Attend(), 2, 12, 8, T=3, N=12),
            "the component gives T (frames), but not S (tokens of a frame)",
        ),
        (
            Layout(lambda leaf, x: leaf(x, 3), Attend(), 2, 12, 8, **TSC),
            "'attend' has nothing for the keyword 'frames'; needed is T = 3",
        ),
        (
            Layout(lambda leaf, x: leaf(x, frames=6), Attend(), 2, 12, 8, **TSC),
            "'attend' has 6 for the keyword 'frames'; needed is T = 3",
        ),
        (
            Layout(lambda leaf, x: leaf(x=x, frames=3), Attend(), 2, 12, 8, **TSC),
            "'attend' does not take the stream as its first argument",
        ),
    ],
    ids=[
        "B,T,S,C",
        "no batch",
        "not divisible",
        "other tokens",
        "output",
        "N",
        "no S",
        "position",
        "frames",
        "by name",
    ],
)
def test_layouts_that_are_refused(form: Layout, message: str) -> None:
    with pytest.raises(LoweringError) as raised:
        TokenMerge()(capture(form))
    assert str(raised.value) == f"pass 'token-merge' on layout: {message}"
