"""Functions for the conditional half of guidance: the numbers of both halves' first, and nothing of the other."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch
from fake_target import FakeTarget
from hypothesis import given, settings
from hypothesis import strategies as st
from support import load_passes
from test_token_merge import SIZES, Recorder, captured

from passes.guidance_split import GuidanceSplit
from passes.partition import Partition
from passes.quantize import Quantize, QuantizeConfig
from passes.token_merge import TokenMerge
from toolchain.errors import LoweringError, SoraCompileError
from toolchain.formats.recipe_file import parse_recipe
from toolchain.ir.blocks import Block, extract_blocks
from toolchain.ir.feeds import Given, Latents, TextEmbedding
from toolchain.ir.graph import Graph, Input, LoweredForm, capture, leaf_function, wire
from toolchain.ir.leaves import Leaf
from toolchain.ir.target import distinct_functions
from toolchain.models.open_sora_v1_2.stdit3 import LoweredSTDiT3, STDiT3Config
from toolchain.planning.memory import block_memory
from toolchain.planning.plan import plan


@pytest.fixture(scope="module")
def one_pair_graph(small_config: STDiT3Config) -> Graph:
    return captured(dataclasses.replace(small_config, depth=1))


@pytest.fixture(scope="module")
def split(one_pair_graph: Graph) -> Graph:
    return GuidanceSplit()(TokenMerge()(one_pair_graph))


# --- numbers -----------------------------------------------------------------------------------------


@settings(max_examples=4, deadline=None)
@given(frames=st.integers(1, 4), function=st.sampled_from(["base", "merged"]), conditions=st.booleans())
def test_it_is_the_first_half_of_both(small_model: Any, frames: int, function: str, conditions: bool) -> None:
    graph = GuidanceSplit()(TokenMerge()(captured(small_model.config, frames=frames, frame_conditions=conditions)))
    form = LoweredSTDiT3(small_model, **(SIZES | {"frames": frames}), frame_conditions=conditions)
    generator = torch.Generator().manual_seed(frames)
    both = {i.name: torch.rand(i.shape, generator=generator) for i in graph.inputs}
    both["timestep"] = torch.tensor([700.0, 700.0])
    both["mask"] = (both["mask"] > 0.3).float()
    half = {i.name: both[i.name][: i.shape[0]] for i in graph.inputs_of(f"{function}_conditional")}
    sizes = {name: len(value) for name, value in half.items()}
    assert sizes == {name: 2 if name in ("y", "mask") else 1 for name in both}
    other = half | {"y": torch.cat((half["y"][:1], torch.randn(half["y"][1:].shape, generator=generator)))}
    with torch.no_grad():
        wanted, null = Recorder(graph, function, form).run(*both.values())
        found = [Recorder(graph, f"{function}_conditional", form).run(*own.values()) for own in (half, other)]
    for out, table in found:
        torch.testing.assert_close(out, wanted[:1], rtol=1e-5, atol=1e-5)
        assert torch.equal(table, null)
    torch.testing.assert_close(found[0][0], found[1][0], rtol=0, atol=0)


# --- graphs and blocks -------------------------------------------------------------------------------


def test_functions_share_everything(one_pair_graph: Graph, split: Graph) -> None:
    assert list(split.functions) == ["base", "merged", "base_conditional", "merged_conditional"]
    assert split.functions["base"] is one_pair_graph.functions["base"]
    assert (split.weights, split.inputs, split.dims) == (
        one_pair_graph.weights,
        one_pair_graph.inputs,
        one_pair_graph.dims,
    )
    shapes = {i.name: i.shape for i in split.inputs_of("merged_conditional")}
    assert shapes["x"] == (1, 4, 3, 4, 6)
    assert shapes["y"] == (2, 12, 32)


@pytest.fixture(scope="module")
def blocks(split: Graph) -> dict[str, Block]:
    return {b.name: b for b in extract_blocks(Partition()(split))}


def test_what_runs_once_a_prompt_has_no_function_of_its_own(blocks: dict[str, Block]) -> None:
    assert distinct_functions(blocks["caption"]) == ("base",)
    assert distinct_functions(blocks["pair_0"]) == ("base", "merged", "base_conditional", "merged_conditional")
    found = blocks["pair_0"].signatures
    batches = {p.name: p.shape[0] for p in found["base_conditional"].inputs if p.name != "rope"}
    # a prompt's values come as they are, and the block takes half of them itself
    assert batches == {"text": 2, "text_bias": 2, "t_mlp": 1, "x": 1}
    assert [p.shape[0] for p in found["base_conditional"].outputs] == [1]


def test_each_block_halves_a_value_once(small_config: STDiT3Config) -> None:
    graph = Partition()(GuidanceSplit()(captured(small_config)))
    for block in extract_blocks(graph):
        named = [n.name for n in block.functions["base_conditional"].graph.nodes if "conditional_half" in n.name]
        assert len(named) == (4 if block.name.startswith("pair") else 0)  # text and its mask, for each half of a pair


def test_half_of_the_work_and_less_memory(blocks: dict[str, Block]) -> None:
    found = block_memory(list(blocks.values()), FakeTarget())["pair_0"]
    for function in ("base", "merged"):
        half = f"{function}_conditional"
        assert found.works[half].flops * 2 == found.works[function].flops
        assert found.peaks[half].bytes < 0.6 * found.peaks[function].bytes
    assert found.works["base_conditional"].moved_bytes < found.works["base"].moved_bytes


# --- what is refused ---------------------------------------------------------------------------------


def with_dims(graph: Graph, **dims: int) -> Graph:
    return dataclasses.replace(graph, dims={k: v for k, v in graph.dims.items() if k != "B"} | dims)


def prompt_only(graph: Graph) -> Graph:
    return dataclasses.replace(graph, inputs=tuple(dataclasses.replace(i, rate="prompt") for i in graph.inputs))


def rounding(graph: Graph) -> Graph:
    own = {"scheme": "int8", "activations": {}, "calibration": {}}
    return Quantize(QuantizeConfig.read(own))(graph)


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (GuidanceSplit(), "the graph has a function 'base_conditional' already; list the pass once"),
        (Partition(), "the graph is partitioned already; put 'guidance-split' before 'partition'"),
        (rounding, "layers round what comes in, with scales by function; put 'guidance-split' before that"),
        (with_dims, "the component gives no B (the batch of both halves of guidance)"),
        (lambda g: with_dims(g, B=1), "the component has a batch of B=1, which has no two halves"),
        (lambda g: with_dims(g, B=4), "no input that changes from step to step has the batch B=4 first"),
        (prompt_only, "no input that changes from step to step has the batch B=2 first"),
    ],
    ids=["twice", "partitioned", "rounding", "no B", "odd", "other B", "prompt"],
)
def test_refusals(one_pair_graph: Graph, edit: Callable[[Graph], Graph], message: str) -> None:
    with pytest.raises(LoweringError) as raised:
        GuidanceSplit()(edit(one_pair_graph))
    assert str(raised.value) == f"pass 'guidance-split' on transformer: {message}"


def test_token_merge_comes_first(split: Graph, one_pair_graph: Graph) -> None:
    with pytest.raises(
        LoweringError, match="it has 'base_conditional' already, and would have no 'merged_conditional'"
    ):
        TokenMerge()(GuidanceSplit()(one_pair_graph))


class Add(Leaf):
    kind = "add"

    def forward(self, x: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
        return x + other


@leaf_function
def turned(x: torch.Tensor) -> torch.Tensor:
    return x.transpose(0, 1)


@leaf_function
def summed(x: torch.Tensor) -> torch.Tensor:
    return x.sum(0)


class Odd(LoweredForm):
    """Something at every step, and something of the prompt."""

    component = "odd"

    def __init__(self, call: Callable[[Leaf, torch.Tensor, torch.Tensor], torch.Tensor], rate: Any = "prompt") -> None:
        super().__init__()
        self.add, self.call, self.rate = Add(), call, rate

    def inputs(self) -> tuple[Input, ...]:
        return Input("x", (2, 2, 3), Latents()), Input("y", (2, 2, 3), TextEmbedding(unconditional="no"), self.rate)

    def gives(self) -> dict[str, Given]:
        return {}

    def dims(self) -> dict[str, int]:
        return {"B": 2}

    def unit(self, path: str) -> tuple[str, ...]:
        return (path,)

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return (wire(self.call(self.add, x, y), "x"),)


@pytest.mark.parametrize(
    ("form", "message"),
    [
        (
            Odd(lambda leaf, x, y: leaf(x, y), rate="step"),
            "the text embedding 'y' has the rate 'step'; needed is 'prompt'",
        ),
        (
            Odd(lambda leaf, x, y: leaf(x, turned(y))),
            "'turned' is known once a prompt, and does not have the batch B=2 first",
        ),
        (
            Odd(lambda leaf, x, y: summed(leaf(x, y))),
            "'base_conditional' gives [2, 3] for 'x', and 'base' gives [2, 3]; needed is half of the batch B=2, which "
            "is first",
        ),
    ],
    ids=["step", "turned", "output"],
)
def test_layouts_that_are_refused(form: Odd, message: str) -> None:
    with pytest.raises(LoweringError) as raised:
        GuidanceSplit()(capture(form))
    assert str(raised.value) == f"pass 'guidance-split' on odd: {message}"


# --- in a recipe -------------------------------------------------------------------------------------

W8A8 = {"quantize": {"scheme": "int8", "activations": {"groups": 2}, "calibration": {"inputs": 2}}}


def test_what_pipelines_provide(recipe_data: dict[str, Any]) -> None:
    for passes, provided in (
        (["guidance-split"], {"base_conditional"}),
        (["token-merge", "guidance-split"], {"merged", "base_conditional", "merged_conditional"}),
    ):
        recipe_data["transformer"]["passes"] = passes
        recipe_data["sampler"]["merged_steps"] = 0
        assert load_passes(parse_recipe(recipe_data), "transformer").provides == provided


def test_with_int8_activations(project: Any, recipe_data: dict[str, Any]) -> None:
    """Functions for the conditional half have scales of their own, and are there for each group of steps."""
    recipe_data |= {"target": "coreml"}
    recipe_data["transformer"]["passes"] = ["token-merge", "guidance-split", W8A8, "partition"]
    found = plan(parse_recipe(recipe_data), base=project)
    pair = next(b for b in found.components["transformer"].blocks if b.name == "pair_0")
    kinds = ("base", "merged", "base_conditional", "merged_conditional")
    assert distinct_functions(pair) == (*kinds, *(f"{k}_2" for k in kinds))
    assert found.timesteps_of("base_conditional_2") == found.timesteps_of("merged_2")
    recipe_data["transformer"]["passes"] = ["token-merge", W8A8, "guidance-split", "partition"]
    with pytest.raises(SoraCompileError, match="'guidance-split' adds a function that 'quantize' would know nothing"):
        plan(parse_recipe(recipe_data), base=project)


def test_no_component_but_the_denoiser_has_halves() -> None:
    import toolchain

    with pytest.raises(SoraCompileError, match="pass 'guidance-split' on vae: the component has a batch of B=1"):
        toolchain.plan(toolchain.load_recipe("tiny", ["vae.passes=[guidance-split, partition]"]))
