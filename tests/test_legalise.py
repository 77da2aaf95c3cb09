"""Legal forms: how targets register them, what is refused, and that each shipped one computes what the leaf does."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from targets.coreml import CoreMLConfig, CoreMLTarget
from targets.executorch import ExecuTorchTarget
from targets.forms.attention import ATTENTION_IN_BATCHES, attend_in_batches
from targets.forms.conv3d import CONV3D_BY_TAPS
from targets.forms.gelu import GELU_FORMULA, GELU_SIGMOID
from targets.forms.patch_embedding import PATCHES_BY_LINEAR
from targets.forms.residual_stream import RESIDUAL_SCALE, SMALL_RESIDUAL_STREAM
from toolchain.errors import LoweringError
from toolchain.ir.contracts import AttentionLeaf, GeluLeaf, ResidualLeaf, attend, tanh_gelu
from toolchain.ir.feeds import Given, Latents
from toolchain.ir.graph import Graph, Input, LoweredForm, capture, leaf_of, wire
from toolchain.ir.graph_text import graph_text, leaves_text
from toolchain.ir.leaves import Leaf, LegalForm, LegalLeaf, plain_attributes
from toolchain.ir.legalise import legalise
from toolchain.ir.target import Target
from toolchain.ir.weights import Weight, WeightSource
from toolchain.models.open_sora_v1_2.stdit3 import LoweredSTDiT3, STDiT3, STDiT3Config
from toolchain.models.open_sora_v1_2.stdit3_leaves import Mlp, PatchEmbed
from toolchain.models.open_sora_v1_2.vae_conv import CausalConv3d

FORMS = (PATCHES_BY_LINEAR, ATTENTION_IN_BATCHES, GELU_FORMULA)


@pytest.fixture(scope="module")
def graph(small_config: STDiT3Config) -> Graph:
    with torch.device("meta"):
        model = STDiT3(small_config)
    return capture(LoweredSTDiT3(model, batch=2, frames=3, height=4, width=6, height_px=32, width_px=48))


class OneLeaf(LoweredForm):
    """``x`` through one leaf."""

    component = "toy"

    def __init__(self, leaf: Leaf, shape: tuple[int, ...]) -> None:
        super().__init__()
        self.leaf, self.shape = leaf, shape

    def inputs(self) -> tuple[Input, ...]:
        return (Input("x", self.shape, Latents()),)

    def gives(self) -> dict[str, Given]:
        return {"y": "prediction"}

    def dims(self) -> dict[str, int]:
        return {}

    def unit(self, path: str) -> tuple[str, ...]:
        return (path,)

    def forward(self, x: torch.Tensor) -> Any:
        return wire(self.leaf(x), "y")


def captured(leaf: Leaf, *shape: int) -> Graph:
    return capture(OneLeaf(leaf.to("meta"), shape))


def leaves(graph: Graph) -> dict[str, Leaf]:
    gm = graph.functions["base"]
    return {str(n.target): leaf for n in gm.graph.nodes if (leaf := leaf_of(gm, n)) is not None}


# --- registering -------------------------------------------------------------------------------------


class ReluMlp(Leaf):
    """What no shipped target asks for: rectified linear units in an MLP's place."""

    kind = "mlp"

    def __init__(self, plain: nn.Module) -> None:
        super().__init__()
        self.fc1, self.fc2 = plain.fc1, plain.fc2

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.fc2(torch.relu(self.fc1(x)))
        return out


RELU_MLP = LegalForm("relu-mlp", "mlp", lambda leaf: LegalLeaf(ReluMlp(leaf)))


class NewTarget(CoreMLTarget):
    """A target with a form of its own, after others'."""

    @property
    def forms(self) -> tuple[LegalForm, ...]:
        return PATCHES_BY_LINEAR, RELU_MLP


def test_a_new_target_brings_its_form(graph: Graph) -> None:
    legal = legalise(graph, NewTarget().forms)
    found = leaves(legal)
    assert {type(leaf).__name__ for leaf in found.values() if leaf.kind == "mlp"} == {"ReluMlp"}
    assert isinstance(found["x_embedder"].proj, nn.Linear)
    assert legal.weights == graph.weights | {
        "x_embedder.proj.weight": Weight(WeightSource(("x_embedder.proj.weight",), (64, 16)))
    }  # all other parameters are shared


def test_a_target_needs_no_forms() -> None:
    assert Target.forms.fget is not None
    assert Target.forms.fget(CoreMLTarget()) == ()


def test_legalise_leaves_its_argument_alone(graph: Graph) -> None:
    before, classes = graph_text(graph), {path: type(leaf) for path, leaf in leaves(graph).items()}
    details = leaves_text(graph.functions["base"])
    legal = legalise(graph, FORMS)
    assert graph_text(graph) == before
    assert leaves_text(graph.functions["base"]) == details
    assert {path: type(leaf) for path, leaf in leaves(graph).items()} == classes
    attending = [leaf for leaf in leaves(legal).values() if leaf.is_a("attention")]
    assert len(attending) == 8
    assert all(isinstance(leaf, AttentionLeaf) and leaf.kernel is attend_in_batches for leaf in attending)


@pytest.mark.parametrize("target", [CoreMLTarget(CoreMLConfig(precision="float16")), ExecuTorchTarget()])
def test_legalising_twice_changes_nothing_more(graph: Graph, target: Target) -> None:
    once = legalise(graph, target.forms)
    twice = legalise(once, target.forms)
    assert twice.weights == once.weights
    assert leaves_text(twice.functions["base"]) == leaves_text(once.functions["base"])


def test_a_form_for_what_the_graph_lacks_does_nothing(graph: Graph) -> None:
    def never(leaf: Leaf) -> LegalLeaf | None:
        raise AssertionError(leaf)

    legal = legalise(graph, (LegalForm("new", "no-such-kind", never), CONV3D_BY_TAPS, SMALL_RESIDUAL_STREAM))
    assert legal.weights == graph.weights
    assert leaves(legal) == leaves(graph)


def test_functions_share_a_legal_leaf(graph: Graph) -> None:
    both = dataclasses.replace(graph, functions={"base": graph.functions["base"], "merged": graph.functions["base"]})
    base, merged = legalise(both, FORMS).functions.values()
    assert base is not merged
    assert base.get_submodule("final_layer") is merged.get_submodule("final_layer")
    assert base.get_submodule("spatial_blocks.0.attn") is merged.get_submodule("spatial_blocks.0.attn")


def test_a_leaf_has_its_kind_and_the_traits_of_all_its_contracts() -> None:
    class Both(ResidualLeaf, GeluLeaf):
        kind = "mlp"

    assert all(Both().is_a(name) for name in ("mlp", "gelu", "residual_stream"))
    assert not any(Both().is_a(name) for name in ("attention", "conv3d"))
    assert not Leaf().is_a("mlp")


# --- what is refused ---------------------------------------------------------------------------------


def test_no_answer_is_an_error_that_names_leaf_kind_and_form(graph: Graph) -> None:
    silent = LegalForm("my-form", "self_attention", lambda leaf: None)
    message = r"transformer: legal form 'my-form' has no answer for 'spatial_blocks\.0\.attn' \(self_attention\)"
    with pytest.raises(LoweringError, match=message):
        legalise(graph, (silent,))


def test_a_kind_without_its_contract_is_an_error() -> None:
    class Foreign(Leaf):
        kind = "conv3d"

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x

    with pytest.raises(LoweringError, match=r"toy: legal form 'conv3d-by-taps' has no answer for 'leaf' \(conv3d\)"):
        legalise(captured(Foreign(), 1), ExecuTorchTarget().forms)


def test_a_part_of_a_tensor_is_not_divided_again() -> None:
    graph = legalise(captured(CausalConv3d(3, 5, 3), 1, 3, 4, 4, 4), (CONV3D_BY_TAPS,))

    def halve(leaf: Leaf) -> LegalLeaf:
        names = [name for name, _ in leaf.named_parameters()]
        return LegalLeaf(leaf.changed(), {n: WeightSource((n,), (1,), select=((0, 0),)) for n in names})

    with pytest.raises(LoweringError, match=r"'halves': 'leaf' was legalised before: 'taps\.0\.weight' is a part"):
        legalise(graph, (LegalForm("halves", "conv3d", halve),))


@pytest.mark.parametrize(
    ("sources", "message"),
    [
        (None, "gives no sources, but the leaf has no own.weight"),
        ({}, "parameters and their sources differ: own.weight"),
        ({"own.weight": WeightSource(("weight",), (6, 6))}, "sources name what the leaf lacks: weight"),
    ],
    ids=["shared", "none", "wrong"],
)
def test_parameters_without_a_source_are_refused(sources: Mapping[str, WeightSource] | None, message: str) -> None:
    class Other(Leaf):
        kind = "mlp"

        def __init__(self) -> None:
            super().__init__()
            self.own = nn.Linear(6, 6, bias=False, device="meta")

    form = LegalForm("other", "mlp", lambda leaf: LegalLeaf(Other(), sources))
    with pytest.raises(LoweringError, match=rf"toy: legal form 'other' of 'leaf' \(mlp\): .*{message}"):
        legalise(captured(Mlp(6, 6, 6), 1, 6), (form,))


# --- leaves ------------------------------------------------------------------------------------------


def test_a_changed_leaf_shares_all_else() -> None:
    leaf = Mlp(4, 8, 4)
    other = leaf.changed(gelu=torch.relu, fc2=nn.Identity())
    assert isinstance(leaf.fc2, nn.Linear)
    assert leaf.gelu is tanh_gelu
    assert other.fc1 is leaf.fc1
    x = torch.randn(2, 4)
    assert torch.equal(other(x), torch.relu(leaf.fc1(x)))


def test_functions_are_told_apart_by_their_full_names() -> None:
    leaf = Mlp(4, 8, 4)
    assert plain_attributes(leaf) == {}
    assert plain_attributes(leaf.changed(gelu=tanh_gelu)) == {"gelu": "toolchain.ir.contracts.tanh_gelu"}
    with pytest.raises(LoweringError, match=r"'Mlp\.gelu' is .*<lambda>: define it at the top of a module"):
        plain_attributes(leaf.changed(gelu=lambda x: x))


# --- the shipped forms compute what the leaf does ----------------------------------------------------


def made(form: LegalForm, leaf: Leaf) -> Leaf:
    """The legal form with the leaf's numbers."""
    legal = form.make(leaf)
    assert legal is not None
    if legal.sources is not None:
        state = leaf.state_dict()
        legal.leaf.load_state_dict({k: s.value(state.__getitem__) for k, s in legal.sources.items()}, assign=True)
    return legal.leaf


def assert_close(got: torch.Tensor, want: torch.Tensor) -> None:
    assert got.shape == want.shape
    with torch.no_grad():
        assert float((got - want).norm()) <= 1e-5 * float(want.norm()) + 1e-7


sizes = st.integers(1, 5)


@settings(max_examples=40, deadline=None)
@given(st.tuples(sizes, sizes, sizes, sizes, sizes), st.sampled_from(["none", "keys", "scores"]))
def test_batched_attention(shape: tuple[int, ...], biased: str) -> None:
    groups, tokens, keys, heads, size = shape
    q = torch.randn(groups, tokens, heads, size)
    k, v = torch.randn(2, groups, keys, heads, size)
    biases = {"none": None, "keys": torch.randn(groups, 1, 1, keys), "scores": torch.randn(1, heads, tokens, keys)}
    assert_close(attend_in_batches(q, k, v, biases[biased]), attend(q, k, v, biases[biased]))


@pytest.mark.parametrize("form", [GELU_FORMULA, GELU_SIGMOID], ids=lambda f: f.name)
def test_gelus(form: LegalForm) -> None:
    leaf = Mlp(6, 40, 6)
    x = torch.randn(50, 6) * 5
    assert_close(made(form, leaf)(x), leaf(x))
    assert isinstance(made(form, leaf), Mlp)


@settings(max_examples=30, deadline=None)
@given(sizes, sizes, st.integers(1, 9), st.integers(1, 9), st.sampled_from([1, 2, 3]))
def test_patches_by_linear(batch: int, frames: int, height: int, width: int, patch: int) -> None:
    leaf = PatchEmbed(3, 8, (1, patch, patch))
    x = torch.randn(batch, 3, frames, height, width)
    legal = made(PATCHES_BY_LINEAR, leaf)
    assert isinstance(leaf.proj, nn.Conv3d)
    assert_close(legal(x), leaf(x))


CONVOLUTIONS: Mapping[str, Callable[[bool], CausalConv3d]] = {
    "plain": lambda bias: CausalConv3d(2, 3, 3, bias=bias),
    "pointwise": lambda bias: CausalConv3d(2, 3, 1, bias=bias),
    "time stride": lambda bias: CausalConv3d(2, 3, 3, bias=bias, time_stride=2),
    "time up": lambda bias: CausalConv3d(2, 3, 3, bias=bias, time_up=2),
}


@settings(max_examples=40, deadline=None)
@given(st.sampled_from(sorted(CONVOLUTIONS)), st.booleans(), st.integers(1, 2), sizes, sizes, sizes)
def test_conv3d_by_taps(kind: str, bias: bool, batch: int, frames: int, height: int, width: int) -> None:
    leaf = CONVOLUTIONS[kind](bias)
    x = torch.randn(batch, 2, max(frames, leaf.time_stride), height, width)
    with torch.no_grad():
        assert_close(made(CONV3D_BY_TAPS, leaf)(x), leaf(x))


def test_small_residual_stream() -> None:
    class Adds(ResidualLeaf):
        kind = "adds"

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.scaled(x)

    legal = made(SMALL_RESIDUAL_STREAM, Adds())
    x = torch.randn(3)
    assert legal.output_scale == RESIDUAL_SCALE
    assert torch.equal(legal(x), x * RESIDUAL_SCALE)
    assert torch.equal(Adds()(x), x)
