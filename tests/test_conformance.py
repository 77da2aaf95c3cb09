"""The conformance kit: what we ship holds to the protocols, and whatever does not is caught."""

from __future__ import annotations

import dataclasses
import itertools
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from fake_target import FakeConfig, FakeTarget

from passes.guidance_split import GuidanceSplit
from passes.partition import Partition, PartitionConfig
from passes.token_merge import TokenMerge, TokenMergeConfig
from targets.coreml import CoreMLConfig, CoreMLTarget
from targets.executorch import ExecuTorchTarget
from targets.onnx import OnnxTarget
from toolchain.errors import LoweringError
from toolchain.ir.blocks import Block
from toolchain.ir.graph import Graph, compute_nodes, copy_module, output_node
from toolchain.ir.leaves import LegalForm, LegalLeaf
from toolchain.ir.passes import Pass, PassConfig
from toolchain.ir.target import (
    Artifact,
    EngineUnavailableError,
    Target,
    Template,
    UnboundTemplateError,
    UnsupportedStorageError,
)
from toolchain.testing.passes import check_pass
from toolchain.testing.samples import sample_graph, sample_pairs
from toolchain.testing.targets import check_target

# --- what we ship ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options",
    [
        {"where": "self_attention"},
        {},
        {"unmerge": "linear", "pairs": "alternating"},
        {"layers": {"first": 1, "last": 1}},
    ],
    ids=str,
)
def test_token_merge(options: Any) -> None:
    merge = TokenMerge(TokenMergeConfig.read(options))
    refuses = [sample_graph(layers=0), sample_graph(merged=True)]
    assert not check_pass(merge, [sample_graph(), sample_graph(frames=2)], keeps_base=True, refuses=refuses).skipped


def test_guidance_split() -> None:
    twice = GuidanceSplit()(sample_graph())
    graphs = [sample_graph(), sample_graph(merged=True, frames=2)]
    assert not check_pass(GuidanceSplit(), graphs, keeps_base=True, refuses=[twice]).skipped


@pytest.mark.parametrize("options", [{}, {"layers_per_block": 2}, {"blocks": 3}, {"max_bytes": "3KB"}], ids=str)
def test_partition(options: Any) -> None:
    cut = Partition(PartitionConfig.read(options))
    graphs = [sample_graph(layers=3), sample_graph(merged=True, layers=4)]
    assert not check_pass(cut, graphs, keeps_base=True, refuses=[Partition()(sample_graph())]).skipped


@pytest.mark.slow
@pytest.mark.parametrize(
    ("target", "limit", "converters"),
    [
        (OnnxTarget(), 1e-5, ("onnx", "onnxruntime", "onnxscript", "onnxsim")),
        (ExecuTorchTarget(), 1e-4, ("executorch",)),
        (CoreMLTarget(CoreMLConfig(precision="float16")), 5e-3, ("coremltools",)),
        (CoreMLTarget(CoreMLConfig(precision="float32")), 1e-5, ("coremltools",)),
    ],
    ids=["onnx", "executorch", "coreml-float16", "coreml-float32"],
)
def test_targets(target: Target, limit: float, converters: tuple[str, ...], tmp_path: Path) -> None:
    merge = TokenMerge(TokenMergeConfig(unmerge="linear", pairs="alternating"))
    graph = GuidanceSplit()(merge(sample_graph()))
    functions = {name: graph.functions[name] for name in ("base", "merged_conditional")}
    pairs = sample_pairs(target, dataclasses.replace(graph, functions=functions))
    pairs = tuple(p for p in pairs if p.name != "layer_0")  # its pairs of frames are the plain ones
    assert not check_target(target, pairs, tmp_path, relative_error=limit, converters=converters).skipped


@pytest.mark.parametrize("precision", ["float32", "float16"])
def test_the_fake_target(precision: Any, tmp_path: Path) -> None:
    target = FakeTarget(FakeConfig(precision=precision))
    pairs = sample_pairs(target)
    report = check_target(target, pairs, tmp_path, relative_error=1e-6, converters=("onnx",))
    assert not report.skipped
    assert "block 'layer_0': stamping" in report.checked


# --- passes that are broken --------------------------------------------------------------------------


class Broken(Pass):
    """Does to a copy of its argument what a test says."""

    name = "broken"
    provides = ()

    def call(self, graph: Graph) -> Graph:
        graph = graph.copy()
        return self.edit(graph) or graph

    def edit(self, graph: Graph) -> Graph | None:
        return None


def first(graph: Graph) -> Any:
    return next(compute_nodes(graph.functions["base"]))


def pass_that(edit: Callable[..., Any], **attributes: Any) -> Pass:
    made: Pass = type("Made", (Broken,), {"edit": lambda self, graph: edit(graph), **attributes})()
    return made


class Forgetful(PassConfig):
    size: int = 1

    def written(self, *, defaults: bool = False, short: bool = False) -> dict[str, Any]:
        return {}


class Counting(Broken):
    count = itertools.count()

    def edit(self, graph: Graph) -> None:
        first(graph).name = f"renamed_{next(self.count)}"


class Editing(Broken):
    def __call__(self, graph: Graph) -> Graph:
        first(graph).meta["unit"] = ("other",)
        return graph


def outputs_swapped(graph: Graph) -> None:
    node = output_node(graph.functions["base"])
    node.args = (tuple(reversed(node.args[0])),)


def doubled(graph: Graph) -> None:
    gm = graph.functions["base"]
    node = output_node(gm)
    value = node.args[0][0]
    with gm.graph.inserting_before(node):
        new = gm.graph.call_function(torch.mul, (value, 2.0))
    new.meta = dict(value.meta)
    node.args = ((new, *node.args[0][1:]),)


def without_a_weight(graph: Graph) -> Graph:
    return dataclasses.replace(graph, weights=dict(list(graph.weights.items())[1:]))


def foreign_source(graph: Graph) -> Graph:
    weights = dict(graph.weights)
    name, weight = weights.popitem()
    source = dataclasses.replace(weight.source, tensors=("elsewhere",))
    return dataclasses.replace(graph, weights={**weights, name: dataclasses.replace(weight, source=source)})


def other_shape(graph: Graph) -> None:
    first(graph).meta["val"] = torch.empty(1, device="meta")


def unordered(graph: Graph) -> None:
    last = list(compute_nodes(graph.functions["base"]))[-1]
    last.append(first(graph))


def shorter_function(graph: Graph) -> Graph:
    gm = copy_module(graph.functions["base"])
    output_node(gm).args = (output_node(gm).args[0][:1],)
    return dataclasses.replace(graph, functions={**graph.functions, "short": gm})


BROKEN_PASSES: dict[str, tuple[Pass, str]] = {
    "text": (type("Made", (Broken,), {"Config": Forgetful})(Forgetful(size=2)), "reads as"),
    "counts": (Counting(), "a second run on the same graph gives another result"),
    "edits its argument": (Editing(), "it changed its argument"),
    "promise": (pass_that(lambda g: None, provides=("more",)), "says that it provides 'more'"),
    "no promise kept": (
        pass_that(lambda g: None, provides=("more",), __call__=lambda self, g: g),
        "function 'more' is missing",
    ),
    "no val": (pass_that(lambda g: (first(g).meta.pop("val"), None)[1]), r"has no meta\['val'\]"),
    "no unit": (pass_that(lambda g: (first(g).meta.pop("unit"), None)[1]), r"has no meta\['unit'\]"),
    "shape": (pass_that(other_shape), r"says f32\[1\] and gives"),
    "order": (pass_that(unordered), "nodes and shapes"),
    "weight": (pass_that(without_a_weight), "which the graph has no weight for"),
    "source": (pass_that(foreign_source), "comes from 'elsewhere', which no weight came from before"),
    "outputs": (pass_that(outputs_swapped), "function 'base' gives"),
    "names": (pass_that(lambda g: dataclasses.replace(g, outputs=("a", "b"))), "outputs were"),
    "function": (pass_that(shorter_function), "function 'short' gives"),
    "numbers": (pass_that(doubled), "output 'out' of 'base' is off by a relative error of 1"),
}


@pytest.mark.parametrize(("made", "said"), BROKEN_PASSES.values(), ids=BROKEN_PASSES)
def test_broken_passes(made: Pass, said: str) -> None:
    with pytest.raises(AssertionError, match=f"^pass 'broken': .*{said}"):
        check_pass(made, [sample_graph()], keeps_base=True)


class Unrefusing(Broken):
    said: str | None = None

    def requires(self, graph: Graph) -> None:
        if self.said and graph.component == "refused":
            raise ValueError(self.said) if "ValueError" in self.said else LoweringError(self.said)


@pytest.mark.parametrize(
    ("text", "said"),
    [(None, "takes the graph of refused"), ("a ValueError", "instead of LoweringError"), ("a\nb", "not one line")],
)
def test_broken_refusals(text: str | None, said: str) -> None:
    made: Pass = type("Made", (Unrefusing,), {"said": text})()
    with pytest.raises(AssertionError, match=said):
        check_pass(made, [sample_graph()], refuses=[dataclasses.replace(sample_graph(), component="refused")])


class LosesPartition(Partition):
    """Leaves the last node without a block, unseen by what passes are held to when they run."""

    def __call__(self, graph: Graph) -> Graph:
        graph = super().__call__(graph)
        del list(compute_nodes(graph.functions["base"]))[-1].meta["block"]
        return graph


class BackwardPartition(Partition):
    """Puts the end of the model into its first block."""

    def call(self, graph: Graph) -> Graph:
        graph = super().call(graph)
        nodes = list(compute_nodes(graph.functions["base"]))
        nodes[-1].meta["block"] = nodes[0].meta["block"]
        return graph

    def ensures(self, graph: Graph) -> None:
        pass


@pytest.mark.parametrize(
    ("made", "said"), [(LosesPartition(), "has no block"), (BackwardPartition(), "blocks in a row are the graph")]
)
def test_broken_partitions(made: Pass, said: str) -> None:
    with pytest.raises(AssertionError, match=said):
        check_pass(made, [sample_graph()])


# --- targets that are broken -------------------------------------------------------------------------


def altered(method: str, change: Callable[..., Any]) -> dict[str, Any]:
    """A method whose result is what ``change`` makes of it and of the arguments."""
    plain = getattr(FakeTarget, method)
    return {method: lambda self, *args: change(plain(self, *args), *args)}


def note(name: str, text: Callable[[], str]) -> Callable[..., Artifact]:
    def change(artifact: Artifact, *_: Any) -> Artifact:
        (artifact.path / name).write_text(text())
        return artifact

    return change


def exact_gelu(x: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.gelu(x) * 1.01


def edited(leaf: Any) -> LegalLeaf:
    leaf.gelu = exact_gelu
    return LegalLeaf(leaf)


def gelu_form(make: Callable[..., Any]) -> dict[str, Any]:
    return {"forms": property(lambda self: (LegalForm("theirs", "gelu", make),))}


def whole_template(self: Any, artifact: Artifact, weights: Mapping[str, torch.Tensor]) -> Template:
    return Template(artifact, [])


def unbound(self: Any, artifact: Artifact, weights: Mapping[str, torch.Tensor]) -> Template:
    raise UnboundTemplateError("one is found twice")


def stamp_in_place(artifact: Artifact, template: Template, *_: Any) -> Artifact:
    (template.artifact.path / "used").write_text("")
    return artifact


def careless(self: Any, block: Block, weights: Mapping[str, torch.Tensor], out: Path) -> None:
    (out / "weights.bin").write_bytes(
        b"".join(weights[n].float().contiguous().numpy().tobytes() for n in block.weights)
    )


def nameless(self: Any, block: Block, weights: Mapping[str, torch.Tensor], out: Path) -> None:
    if not all(torch.isfinite(weights[n]).all() for n in block.weights):
        raise LoweringError("a weight is not finite")
    careless(self, block, weights, out)


def trusting(self: Any, path: Path, block: Block) -> None:
    pass


def writing_check(self: Any, path: Path, block: Block) -> None:
    (path / "checked").write_text("")


BUFFER = torch.zeros(10000)


def reused(self: Any, value: torch.Tensor) -> torch.Tensor:
    return BUFFER[: value.numel()].copy_(value.reshape(-1)).view(value.shape)


def rough_read(self: Any, path: Path) -> Any:
    try:
        return FakeTarget.read(self, path)
    except LoweringError as e:
        raise KeyError(str(e)) from e


def refusing(said: str) -> Any:
    def keep(self: Any, asked: Any, use: Any) -> Any:
        raise UnsupportedStorageError(said)

    return keep


COUNT = itertools.count()
BROKEN_TARGETS: dict[str, tuple[dict[str, Any], str]] = {
    "storage": ({"keep": refusing("it takes int4")}, "it refuses to keep a weight as float32"),
    "refusal": ({"keep": refusing("no")}, "which does not say what it takes"),
    "versions": ({"versions": lambda self: {"torch": 2}}, "needed is a dict of texts"),
    "random versions": ({"versions": lambda self: {"a": str(next(COUNT))}}, "differ from call to call"),
    "form without answer": (gelu_form(lambda leaf: None), "has no answer"),
    "form that edits": (gelu_form(edited), "changed the leaf itself"),
    "form that is wrong": (gelu_form(lambda leaf: LegalLeaf(leaf.changed(gelu=exact_gelu))), "in legal forms: 'x_out'"),
    "random bytes": (altered("lower", note("noise", lambda: os.urandom(9).hex())), "lowered twice"),
    "changed weights": (
        altered("lower", lambda a, b, w, o: next(iter(w.values())).mul_(2) is None or a),
        "changed weight",
    ),
    "another place": (altered("lower", lambda a, *_: dataclasses.replace(a, path=a.path / "x")), "asked for was"),
    "functions": (altered("lower", lambda a, *_: dataclasses.replace(a, functions=())), "the artifact has"),
    "digests": (
        altered("lower", lambda a, *_: dataclasses.replace(a, digests={a.path / "block.json": "0"})),
        "the digest of 'block.json'",
    ),
    "numbers": ({"computed": lambda self, value: value * 1.001}, "off by a relative error of 0.001"),
    "shape": ({"computed": lambda self, value: value.reshape(-1)}, "not"),
    "NaN": ({"computed": lambda self, value: value * float("nan")}, "off by a relative error of inf"),
    "reused memory": ({"computed": reused}, "another call changed"),
    "weights in the template": ({"bind": whole_template}, "is still in the template"),
    "slots": (altered("bind", lambda t, *_: dataclasses.replace(t, slots=("a",))), "not plain data"),
    "stamp": (altered("stamp", note("mark", str)), "'mark' is in one artifact and not in the other"),
    "random stamp": (altered("stamp", note("block.json", lambda: os.urandom(9).hex())), "stamping: .*block.json"),
    "used template": (altered("stamp", stamp_in_place), "stamp changed the template"),
    "bad weights": ({"write": careless}, "NaN in .*stamp takes it"),
    "nameless refusal": ({"write": nameless}, "does not name"),
    "trusts files": ({"check": trusting}, "check takes the artifact of"),
    "writes in check": ({"check": writing_check}, "check changed the artifact"),
    "crashes": ({"read": rough_read}, "fails with KeyError"),
}


@pytest.mark.parametrize(("parts", "said"), BROKEN_TARGETS.values(), ids=BROKEN_TARGETS)
def test_broken_targets(parts: dict[str, Any], said: str, tmp_path: Path) -> None:
    target: Target = type("Made", (FakeTarget,), parts)()
    plain = FakeTarget()
    forms = target if said.startswith("in legal forms") else plain
    pairs = sample_pairs(forms, sample_graph(layers=1, merged=True))[1:]
    with pytest.raises(AssertionError, match=f"^target 'fake': .*{said}"):
        check_target(target, pairs, tmp_path, relative_error=1e-5)


def test_a_form_that_edits_is_caught_where_pairs_are_made() -> None:
    target: Target = type("Made", (FakeTarget,), gelu_form(edited))()
    with pytest.raises(AssertionError, match="target 'fake': a legal form edits the leaf that it is given"):
        sample_pairs(target)


def test_too_large_for_float16(tmp_path: Path) -> None:
    def capped(self: Any, block: Block, weights: Mapping[str, torch.Tensor], out: Path) -> None:
        limited = {n: w.float().clamp(-65504, 65504) if w.isfinite().all() else w for n, w in weights.items()}
        FakeTarget.write(self, block, limited, out)

    target: Target = type("Made", (FakeTarget,), {"write": capped})(FakeConfig(precision="float16"))
    with pytest.raises(AssertionError, match=r"a number too large for float16 in .*stamp takes it"):
        check_target(target, sample_pairs(target)[-1:], tmp_path, relative_error=1e-6)


def test_what_cannot_be_checked_is_said(tmp_path: Path) -> None:
    def unavailable(self: Any, *_: Any) -> Any:
        raise EngineUnavailableError("needs a phone")

    parts = {"engine": unavailable, "bind": unbound}
    target: Target = type("Made", (FakeTarget,), parts)()
    report = check_target(target, sample_pairs(target)[-1:], tmp_path, relative_error=1e-6)
    missing = "its weights cannot all be found: one is found twice"
    assert report.skipped == {
        "block 'final': numbers": "needs a phone",
        "block 'final': template": missing,
        "block 'final': stamping": missing,
        "block 'final': bad weights are refused": missing,
        "another block's artifact is refused": "no two blocks differ in their ports",
    }


def test_imports_are_looked_at_in_another_process(tmp_path: Path) -> None:
    target = FakeTarget()
    with pytest.raises(AssertionError, match="importing it imports numpy"):
        check_target(target, sample_pairs(target)[:1], tmp_path, relative_error=1e-6, converters=("numpy",))
