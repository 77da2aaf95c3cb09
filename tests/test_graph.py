"""Capture, the graph's text, and the blocks that are cut from it."""

from __future__ import annotations

import copy
import json
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from torch import nn

from passes.partition import Partition, PartitionConfig
from passes.token_merge import TokenMerge
from targets.forms.attention import ATTENTION_IN_BATCHES
from targets.forms.gelu import GELU_FORMULA
from targets.forms.patch_embedding import PATCHES_BY_LINEAR
from toolchain.errors import LoweringError
from toolchain.ir.blocks import Block, extract_blocks, table_nodes
from toolchain.ir.feeds import FrameMask, Given, Latents
from toolchain.ir.graph import (
    Graph,
    Input,
    LoweredForm,
    capture,
    compute_nodes,
    leaf_function,
    leaf_of,
    wire,
)
from toolchain.ir.graph_text import graph_text
from toolchain.ir.leaves import Leaf, LegalForm
from toolchain.ir.legalise import legalise
from toolchain.ir.weights import Weight, WeightSource
from toolchain.models.open_sora_v1_2.stdit3 import LoweredSTDiT3, STDiT3, STDiT3Config, position_scale

GEOMETRY = {"batch": 2, "frames": 3, "height": 4, "width": 6, "height_px": 32, "width_px": 48}
FORMS = (PATCHES_BY_LINEAR, ATTENTION_IN_BATCHES, GELU_FORMULA)


def captured(config: STDiT3Config, **options: Any) -> Graph:
    with torch.device("meta"):
        model = STDiT3(config)
    return capture(LoweredSTDiT3(model, **GEOMETRY, **options))


@pytest.fixture(scope="module")
def graph(small_config: STDiT3Config) -> Graph:
    return captured(small_config)


# --- capture -----------------------------------------------------------------------------------------


def test_other_threads_run_modules_and_capture_meanwhile(graph: Graph, small_config: STDiT3Config) -> None:
    """torch.fx replaces the call of every module while it traces."""
    expected, done = graph_text(graph), threading.Event()
    linear, x = nn.Linear(2, 2), torch.ones(2)
    wanted = linear(x)

    def run() -> None:
        while not done.is_set():
            assert torch.equal(linear(x), wanted)

    with ThreadPoolExecutor(3) as threads:
        running = threads.submit(run)
        captures = [threads.submit(captured, small_config) for _ in range(8)]
        try:
            assert [graph_text(c.result()) for c in captures] == [expected] * 8
        finally:
            done.set()
        running.result()


def test_every_module_call_is_a_leaf(graph: Graph) -> None:
    gm = graph.functions["base"]
    modules = [gm.get_submodule(str(n.target)) for n in gm.graph.nodes if n.op == "call_module"]
    assert all(isinstance(m, (Leaf, nn.LayerNorm)) for m in modules)
    kinds = [leaf.kind for n in gm.graph.nodes if (leaf := leaf_of(gm, n)) is not None]
    assert kinds.count("self_attention") == kinds.count("cross_attention") == 4
    assert kinds.count("mlp") == 5  # that of the captions too
    assert {"table", "mask", "patch_embed", "timestep", "modulation", "final", "unpatchify"} < set(kinds)


def test_nothing_is_allocated(graph: Graph, facts: dict[str, Any]) -> None:
    gm = graph.functions["base"]
    tensors = dict(gm.named_parameters()) | dict(gm.named_buffers())
    assert {t.device.type for t in tensors.values()} == {"meta"}
    assert {k: list(v.shape) for k, v in graph.weights.items()} == facts["keys"]
    assert all(weight == Weight(WeightSource((name,), weight.shape)) for name, weight in graph.weights.items())
    assert {n.meta["val"].device.type for n in gm.graph.nodes if isinstance(n.meta.get("val"), torch.Tensor)} == {
        "meta"
    }


def test_wires_name_what_crosses_borders(graph: Graph) -> None:
    gm = graph.functions["base"]
    assert not any(n.target is wire for n in gm.graph.nodes)
    names = [n.meta["wire"] for n in gm.graph.nodes if "wire" in n.meta]
    assert names.count("x") == 5  # after the embedding and after each of four layers
    assert {"pos_embed", "rope", "null_text", "text", "text_bias", "t", "t_mlp", "out"} < set(names)
    assert graph.outputs == ("out", "null_text")


def test_rates_say_how_often_a_value_changes(graph: Graph) -> None:
    rates = {n.meta["wire"]: n.meta["rate"] for n in graph.functions["base"].graph.nodes if "wire" in n.meta}
    assert {k for k, v in rates.items() if v == "build"} == {"pos_embed", "rope", "null_text"}
    assert {k for k, v in rates.items() if v == "prompt"} == {"text", "text_bias"}
    assert {k for k, v in rates.items() if v == "step"} == {"t", "t_mlp", "x", "out"}


def test_units_are_what_partition_may_cut_between(graph: Graph) -> None:
    units = list(dict.fromkeys(n.meta["unit"] for n in compute_nodes(graph.functions["base"])))
    pairs = [(f"pair.{i}", kind) for i in range(2) for kind in ("spatial", "temporal")]
    assert sorted(units) == sorted([("embed",), ("caption",), *pairs, ("final",)])
    assert [u for u in units if len(u) == 2] == pairs
    assert units[-1] == ("final",)


def test_sizes_and_inputs(graph: Graph, small_config: STDiT3Config) -> None:
    assert graph.dims == {"B": 2, "T": 3, "H": 4, "W": 6, "Hp": 2, "Wp": 3, "S": 6, "N": 18, "L": 12, "C": 64}
    assert [i.name for i in graph.inputs] == ["x", "timestep", "y", "mask", "fps"]
    assert {i.name for i in graph.inputs if i.exact} == {"timestep", "fps"}
    conditioned = captured(small_config, frame_conditions=True)
    assert conditioned.inputs[-1] == Input("x_mask", (2, 3), FrameMask())
    assert "t0" in {n.meta.get("wire") for n in conditioned.functions["base"].graph.nodes}


class Toy(LoweredForm):
    """``x`` through one leaf; the leaf and the name of the output are the tests' to choose."""

    component = "toy"

    def __init__(self, leaf: nn.Module, output: Callable[[Any], Any]) -> None:
        super().__init__()
        self.leaf = leaf
        self.output = output

    def inputs(self) -> tuple[Input, ...]:
        return (Input("x", (2, 3), Latents()),)

    def gives(self) -> dict[str, Given]:
        return {"y": "prediction"}

    def dims(self) -> dict[str, int]:
        return {}

    def unit(self, path: str) -> tuple[str, ...]:
        return (path,)

    def forward(self, x: torch.Tensor) -> Any:
        return self.output(self.leaf(x))


def test_outputs_need_names() -> None:
    with pytest.raises(LoweringError, match=r"toy: every output .* wrap it in wire"):
        capture(Toy(nn.Linear(3, 3, device="meta"), lambda y: y))


def test_shapes_that_do_not_fit_name_the_node() -> None:
    with pytest.raises(LoweringError, match=r"shapes do not fit at 'leaf' \(leaf\)"):
        capture(Toy(nn.Linear(4, 3, device="meta"), lambda y: wire(y, "y")))


def test_a_graph_that_is_not_partitioned_has_no_blocks(graph: Graph) -> None:
    assert graph.blocks() == ()
    with pytest.raises(LoweringError, match="transformer: not partitioned"):
        extract_blocks(graph)


def test_functions_are_called_through_on_tensors() -> None:
    @leaf_function
    def double(x: torch.Tensor) -> torch.Tensor:
        return 2 * x

    assert double(torch.ones(1)) == 2
    assert double.__name__ == "double"


FULL_SIZE = """
import resource, sys, time
import torch
from passes.partition import Partition
from passes.token_merge import TokenMerge
from targets.forms.attention import ATTENTION_IN_BATCHES
from targets.forms.gelu import GELU_FORMULA
from targets.forms.patch_embedding import PATCHES_BY_LINEAR
from toolchain.ir.blocks import extract_blocks
from toolchain.ir.graph import capture
from toolchain.ir.legalise import legalise
from toolchain.models.open_sora_v1_2.stdit3 import LoweredSTDiT3, STDiT3, STDiT3Config

def peak():
    try:
        status = open("/proc/self/status").read()
    except OSError:
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # macOS: bytes
    return int(status.split("VmHWM:")[1].split()[0]) * 1024

before, start = peak(), time.perf_counter()
with torch.device("meta"):
    model = STDiT3(STDiT3Config())
graph = capture(LoweredSTDiT3(model, batch=2, frames=20, height=24, width=24, height_px=192, width_px=192))
graph = TokenMerge()(graph)
graph = legalise(graph, (PATCHES_BY_LINEAR, ATTENTION_IN_BATCHES, GELU_FORMULA))
blocks = extract_blocks(Partition()(graph))
structures = {b.structure() for b in blocks if b.name.startswith("pair")}
print(len(blocks), sum(b.parameters for b in blocks), len(structures), peak() - before, time.perf_counter() - start)
"""


@pytest.mark.slow
def test_the_full_size_model_needs_little_memory() -> None:
    done = subprocess.run([sys.executable, "-c", FULL_SIZE], capture_output=True, text=True, check=True)
    blocks, parameters, structures, peak, seconds = done.stdout.split()
    print(f"full size: {int(peak) / 1e6:.0f} MB above the imports, {float(seconds):.1f} s")
    assert (int(blocks), int(structures)) == (28 + 3, 1)
    assert 1.19e9 < int(parameters) < 1.22e9
    assert int(peak) < 300e6


# --- text --------------------------------------------------------------------------------------------


def test_text_of_the_graph(graph: Graph) -> None:
    text = graph_text(graph)
    lines = text.splitlines()
    assert lines[0] == "graph transformer B=2 T=3 H=4 W=6 Hp=2 Wp=3 S=6 N=18 L=12 C=64"
    assert lines[2].startswith("base(%x : f32[2, 4, 3, 4, 6], %timestep : f32[2], ")
    assert "  # pair.1.temporal" in lines
    assert lines[-1].endswith("# out, null_text")
    assert graph_text(graph) == text


def described(config: dict[str, Any]) -> str:
    """Everything about a graph that cache keys are made of."""
    graph = TokenMerge()(captured(STDiT3Config.from_json(config)))
    cut = Partition()(legalise(graph, FORMS))
    return "\n".join([graph_text(graph), graph_text(cut), *(b.structure() for b in extract_blocks(cut))])


@pytest.mark.slow
def test_text_and_digests_are_the_same_in_another_process(facts: dict[str, Any]) -> None:
    code = f"import sys; sys.path[:0] = {sys.path}; import json, test_graph as t; "
    code += f"print(t.described(json.loads({json.dumps(json.dumps(facts['config']))})), end='')"
    env = {**os.environ, "PYTHONHASHSEED": "1234"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=env)
    assert done.stdout == described(facts["config"])


# --- structure ---------------------------------------------------------------------------------------


def pair_digests(config: STDiT3Config, change: Callable[[Any], object]) -> list[str]:
    """Structure digests of the two pairs after ``change`` was made to the second."""
    with torch.device("meta"):
        model = STDiT3(config)
    change(model)
    graph = Partition()(TokenMerge()(capture(LoweredSTDiT3(model, **GEOMETRY))))
    return [b.structure() for b in extract_blocks(graph) if b.name.startswith("pair")]


def test_pairs_share_their_structure(small_config: STDiT3Config) -> None:
    first, second = pair_digests(small_config, lambda model: None)
    assert first == second


def legal(path: str, form: LegalForm) -> Callable[[Any], object]:
    """Puts the leaf at ``path`` into a legal form."""
    return lambda model: model.set_submodule(path, form.make(model.get_submodule(path)).leaf)


def other_mlp(model: Any) -> None:
    with torch.device("meta"):
        model.spatial_blocks[1].mlp = type(model.spatial_blocks[1].mlp)(64, 128, 64)


@pytest.mark.parametrize(
    "change",
    [
        lambda m: setattr(m.spatial_blocks[1].norm1, "eps", 1e-5),
        lambda m: setattr(m.spatial_blocks[1].attn.q_norm, "eps", 1e-5),
        lambda m: setattr(m.temporal_blocks[1].cross_attn, "heads", 8),
        legal("temporal_blocks.1.cross_attn", ATTENTION_IN_BATCHES),
        legal("temporal_blocks.1.mlp", GELU_FORMULA),
        lambda m: setattr(m.spatial_blocks[1].attn, "q_norm", nn.Identity()),
        other_mlp,
    ],
    ids=["eps", "inner-eps", "heads", "kernel", "gelu", "class", "shape"],
)
def test_another_leaf_is_another_structure(small_config: STDiT3Config, change: Callable[[Any], object]) -> None:
    first, second = pair_digests(small_config, change)
    assert first != second


def test_another_geometry_is_another_structure(small_config: STDiT3Config) -> None:
    graphs = [captured(small_config), captured(small_config, frame_conditions=True)]
    digests = [{b.structure() for b in extract_blocks(Partition()(g)) if "pair" in b.name} for g in graphs]
    assert not digests[0] & digests[1]


# --- blocks, one after the other ---------------------------------------------------------------------


def run_in_order(
    blocks: tuple[Block, ...], values: dict[str, torch.Tensor], weights: Callable[[Block], Mapping[str, torch.Tensor]]
) -> torch.Tensor:
    """The last block's output: every block takes only what its sources name."""
    for block in blocks:
        args = [values[block.sources[p.name]] for p in block.inputs]
        assert [(tuple(a.shape), a.dtype) for a in args] == [(p.shape, p.dtype) for p in block.inputs]
        with torch.no_grad():
            results = block.module("base", weights(block))(*args)
        assert [tuple(r.shape) for r in results] == [p.shape for p in block.outputs]
        values |= {f"{block.name}.{p.name}": r for p, r in zip(block.outputs, results, strict=True)}
    return values[f"{blocks[-1].name}.{blocks[-1].outputs[0].name}"]


CUTS: list[tuple[dict[str, Any], int, tuple[LegalForm, ...], bool]] = [
    ({}, 2, (), False),
    ({}, 2, (), True),
    ({}, 2, FORMS, False),
    ({"layers_per_block": 2}, 1, FORMS, True),
    ({"blocks": 1}, 1, (), False),
    ({"max_bytes": "600kB"}, 2, FORMS, False),
    ({"max_bytes": "300kB"}, 4, FORMS, False),
    ({"max_bytes": "300kB"}, 4, FORMS, True),
]


@pytest.mark.parametrize(("options", "layers", "forms", "conditions"), CUTS, ids=str)
@pytest.mark.slow
def test_blocks_in_order_are_the_model(
    small_config: STDiT3Config,
    small_model: Any,
    small_weights: dict[str, torch.Tensor],
    options: dict[str, Any],
    layers: int,
    forms: tuple[LegalForm, ...],
    conditions: bool,
) -> None:
    graph = TokenMerge()(captured(small_config, frame_conditions=conditions))
    graph = legalise(graph, forms)
    graph = Partition(PartitionConfig.model_validate(options))(graph)
    blocks = extract_blocks(graph)
    assert len(blocks) == 3 + layers
    generator = torch.Generator().manual_seed(3)
    inputs = {i.name: torch.randn(i.shape, generator=generator) for i in graph.inputs}
    inputs |= {"mask": (torch.arange(12) < 7).float().expand(2, 12), "timestep": torch.tensor([977.0, 977.0])}
    inputs |= {"x_mask": torch.tensor([[1.0, 0.0, 1.0]] * 2)} if conditions else {}
    tables = {
        "pos_embed": small_model.pos_embed(hp=2, wp=3, scale=position_scale(small_config, 32, 48)),
        "rope": small_model.rope(frames=3),
        "null_text": small_model.y_embedder.y_embedding,
    }
    assert {k: tuple(n.meta["val"].shape) for k, n in table_nodes(graph).items()} == {
        k: tuple(v.shape) for k, v in tables.items()
    }
    values = {f"inputs.{k}": v for k, v in inputs.items()} | {f"tables.{k}": v for k, v in tables.items()}

    def weights(block: Block) -> dict[str, torch.Tensor]:
        return {k: w.source.value(small_weights.__getitem__) for k, w in block.weights.items()}

    out = run_in_order(blocks, values, weights)
    video = {"height": torch.tensor([32.0]), "width": torch.tensor([48.0])}
    with torch.no_grad():
        wanted = small_model(**inputs | {"y": inputs["y"][:, None]}, **video)
    assert (out - wanted).norm() <= 1e-5 * wanted.norm()


def test_blocks_hold_no_weights_of_their_own(small_config: STDiT3Config, small_weights: Any) -> None:
    graph = Partition(PartitionConfig())(captured(small_config))
    block = next(b for b in extract_blocks(graph) if b.name == "pair_1")
    weights = {k: w.source.value(small_weights.__getitem__) for k, w in block.weights.items()}
    assert all(name.split(".")[1] == "1" for w in block.weights.values() for name in w.source.tensors)
    assert all(".0." in k for k in weights)  # numbered from 0 in every block
    module = block.module("base", weights)
    assert {t.device.type for t in module.parameters()} == {"cpu"}
    assert {t.device.type for t in block.functions["base"].parameters()} == {"meta"}
    assert block.parameters == sum(w.numel() for w in weights.values())
    assert copy.deepcopy(module)(*(torch.zeros(p.shape) for p in block.inputs))[0].shape == (2, 18, 64)
