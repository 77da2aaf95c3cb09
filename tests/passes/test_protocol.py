"""The protocol of passes: what is checked at every run, options of several versions, and passes of a third party."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Callable, Iterator, Mapping
from importlib.metadata import EntryPoint, EntryPoints
from typing import Any, ClassVar

import pytest
import torch
from pydantic import Field, ValidationError
from support import load_passes
from torch import nn

import toolchain
import toolchain.plugins
from passes.partition import Partition
from passes.token_merge import FUNCTION, TokenMerge
from toolchain.build.pinning import pinned_recipe
from toolchain.errors import LoweringError, RecipeError
from toolchain.formats.recipe import Recipe
from toolchain.formats.recipe_file import parse_recipe
from toolchain.ir.feeds import Given, Latents
from toolchain.ir.graph import Graph, Input, Leaf, LoweredForm, WeightSource, capture, compute_nodes, wire
from toolchain.ir.graph_text import graph_text
from toolchain.ir.passes import Pass, PassConfig, Pipeline
from toolchain.ir.pipeline_text import parse_pipeline

TINY = {"hidden_size": 8, "num_heads": 2, "depth": 2, "caption_channels": 4, "model_max_length": 3}


class Scale(Leaf):
    kind = "scale"

    def __init__(self) -> None:
        super().__init__()
        self.factor = 2.0
        self.weight = nn.Parameter(torch.empty(3, device="meta"))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * self.weight * self.factor


class Scales(LoweredForm):
    component = "scales"

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = Scale(), Scale()

    def inputs(self) -> tuple[Input, ...]:
        return (Input("x", (2, 3), Latents()),)

    def gives(self) -> dict[str, Given]:
        return {"x": "prediction"}

    def dims(self) -> dict[str, int]:
        return {"B": 2}

    def unit(self, path: str) -> tuple[str, ...]:
        return (path,)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return (wire(self.second(self.first(x)), "x"),)


@pytest.fixture
def graph() -> Graph:
    return capture(Scales())


# --- purity and promises -----------------------------------------------------------------------------


class Edit(Pass):
    """Does to its argument what it is told."""

    name = "edit"

    def __init__(self, edit: Callable[[Graph], object]) -> None:
        super().__init__()
        self.edit = edit

    def call(self, graph: Graph) -> Graph:
        self.edit(graph)
        return graph


def second(graph: Graph) -> Any:
    return list(compute_nodes(graph.functions["base"]))[1]


def skip_the_first(graph: Graph) -> None:
    first = next(compute_nodes(graph.functions["base"]))
    second(graph).replace_input_with(first, first.args[0])


EDITS: dict[str, Callable[[Graph], object]] = {
    "argument": skip_the_first,
    "target": lambda g: setattr(second(g), "target", "first"),
    "name": lambda g: setattr(second(g), "name", "other"),
    "block": lambda g: second(g).meta.update(block="b"),
    "unit": lambda g: second(g).meta.update(unit=("first",)),
    "rate": lambda g: second(g).meta.update(rate="build"),
    "wire": lambda g: second(g).meta.pop("wire"),
    "shape": lambda g: second(g).meta.pop("val"),
    "leaf": lambda g: g.functions["base"].set_submodule("second", nn.Identity()),
    "number in a leaf": lambda g: setattr(g.functions["base"].get_submodule("second"), "factor", 3.0),
    "source of a weight": lambda g: g.weights.update({"first.weight": WeightSource("second.weight", (3,))}),  # type: ignore[attr-defined]
    "function": lambda g: g.functions.update(other=g.functions["base"]),  # type: ignore[attr-defined]
    "size": lambda g: g.dims.update(B=3),  # type: ignore[attr-defined]
}


@pytest.mark.parametrize("edit", EDITS.values(), ids=EDITS)
def test_a_pass_that_edits_its_argument(graph: Graph, edit: Callable[[Graph], object]) -> None:
    with pytest.raises(LoweringError) as raised:
        Edit(edit)(graph)
    assert str(raised.value) == "pass 'edit' on scales: changed its argument; work on graph.copy()"


def test_a_result_may_share_nodes_with_the_argument(graph: Graph) -> None:
    assert Edit(lambda g: None)(graph) is graph
    merged = dataclasses.replace(graph, functions={**graph.functions, "again": graph.functions["base"]})

    class Again(Edit):
        provides = ("again",)

        def call(self, graph: Graph) -> Graph:
            return merged

    assert Again(lambda g: None)(graph) is merged


def test_a_function_that_was_promised(graph: Graph) -> None:
    class Promise(Edit):
        provides = ("base", "again")

    with pytest.raises(LoweringError, match="pass 'edit' on scales: says that it provides 'again' and did not add"):
        Promise(lambda g: None)(graph)
    assert TokenMerge.provides == (FUNCTION,) == ("merged",)


def test_a_partition_that_forgets_a_node(graph: Graph) -> None:
    class Forgets(Edit):
        phase = "partition"

        def call(self, graph: Graph) -> Graph:
            graph = graph.copy()
            second(graph).meta["block"] = "b"
            return graph

    with pytest.raises(LoweringError, match="is the one that partitions and gave 'first' of 'base' no block"):
        Forgets(lambda g: None)(graph)


# --- options -----------------------------------------------------------------------------------------


class OldConfig(PassConfig):
    """Version 2 calls ``size`` what was ``bytes``; version 3 has two sizes."""

    current_version: ClassVar[int] = 3
    sizes: tuple[int, ...] = (1, 2)
    words: list[str] | None = Field(default_factory=list)
    depth: int | None = 3
    either: int | list[int] = 0
    nested: tuple[list[int], ...] = ()

    @classmethod
    def migrate(cls, options: dict[str, Any], version: int) -> dict[str, Any]:
        if "bits" in options:
            raise ValueError("bits: sizes are in bytes since version 2; use 'sizes'")
        if version == 1 and "bytes" in options:
            options["size"] = options.pop("bytes")
        if "size" in options:
            options["sizes"] = [options.pop("size")] * 2
        return options


class Old(Pass):
    name = "old"
    Config = OldConfig

    def call(self, graph: Graph) -> Graph:
        return graph


def test_older_options_are_migrated() -> None:
    now = OldConfig(sizes=(7, 7))
    assert now.version == 3
    given = [{"bytes": 7}, {"version": 1, "bytes": 7}, {"version": 2, "size": 7}, {"version": 3, "sizes": [7, 7]}]
    assert [OldConfig.read(g) for g in given] == [now] * 4
    assert given[0] == {"bytes": 7}
    with pytest.raises(ValidationError, match="bytes"):
        OldConfig.read({"version": 2, "bytes": 7})
    with pytest.raises(ValueError, match="options are of version 4, this sora-compile knows 3; update it"):
        OldConfig.read({"version": 4})
    with pytest.raises(ValidationError, match=r"version: 2 is not 3; read\(\) takes others too"):
        OldConfig(version=2)


@pytest.mark.parametrize("version", [0, True, "2", None, 1.0])
def test_versions_that_are_none(version: Any) -> None:
    with pytest.raises(ValueError, match="version: expected a whole number of 1 or more, got "):
        PassConfig.read({"version": version})


def test_the_first_version_is_not_written() -> None:
    assert PassConfig().model_dump() == PassConfig().model_dump(mode="json") == {}
    assert PassConfig().model_dump_json() == "{}"
    assert PassConfig.read({"version": 1}) == PassConfig()
    assert OldConfig().model_dump()["version"] == 3


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({}, "old{version=3}"),
        ({"sizes": (1, 2), "words": [], "depth": 3}, "old{version=3}"),
        ({"sizes": (7,), "words": ["a b"]}, 'old{version=3 sizes=7 words="a b"}'),
        ({"sizes": (), "words": None, "depth": None}, "old{version=3 sizes=[] words=null depth=null}"),
        ({"either": [1], "nested": ([1],)}, "old{version=3 either=[1] nested=[[1]]}"),
    ],
)
def test_options_round_trip(options: dict[str, Any], text: str) -> None:
    config = OldConfig(**options)
    assert str(Old(config)) == text
    ((_, read),) = parse_pipeline(text)
    assert OldConfig.read(read) == config
    for defaults in (False, True):
        for short in (False, True):
            assert OldConfig.read(config.written(defaults=defaults, short=short)) == config
    assert config.written(defaults=True).keys() >= {"version", "sizes", "either", "nested"}
    assert OldConfig.model_validate_json(config.model_dump_json()) == config


# --- pipelines and passes of a third party -----------------------------------------------------------


class HalvesConfig(PassConfig):
    current_version: ClassVar[int] = 2
    names: tuple[str, str] = ("early", "late")


class Halves(Pass):
    """Two blocks: everything before the last unit, and the last unit."""

    name = "halves"
    phase = "partition"
    Config = HalvesConfig
    config: HalvesConfig

    def call(self, graph: Graph) -> Graph:
        graph = graph.copy()
        for gm in graph.functions.values():
            for node in compute_nodes(gm):
                late = node.meta["unit"] == ("final",)
                node.meta["block"] = "tables" if node.meta["rate"] == "build" else self.config.names[late]
        return graph


class Merge(TokenMerge):
    name = "merge"


@pytest.fixture
def third_party(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Passes of this module, and one whose module is missing, as if installed."""
    own = {"halves": f"{__name__}:Halves", "merge": f"{__name__}:Merge", "broken": "no_such_module:Pass"}
    found = toolchain.plugins.entry_points

    def with_ours(**selection: str) -> EntryPoints:
        ours = EntryPoints(EntryPoint(n, v, toolchain.plugins.PASSES) for n, v in own.items())
        return EntryPoints((*found(**selection), *ours.select(**selection)))

    assert __name__ in sys.modules
    monkeypatch.setattr(toolchain.plugins, "entry_points", with_ours)
    yield


def recipe_with(recipe_data: Mapping[str, Any], passes: Any, merged_steps: int = 0) -> Recipe:
    transformer = {**recipe_data["transformer"], "config": TINY, "passes": passes}
    return parse_recipe({**recipe_data, "transformer": transformer, "sampler": {"merged_steps": merged_steps}})


def test_another_pass_may_partition(recipe_data: dict[str, Any], third_party: None) -> None:
    recipe = recipe_with(recipe_data, "token-merge halves{version=2 names=[a, b]}")
    pipeline = load_passes(recipe, "transformer")
    assert [type(p) for p in pipeline] == [TokenMerge, Halves]
    assert ([type(p) for p in pipeline.rewrites], type(pipeline.partition)) == ([TokenMerge], Halves)
    assert str(pipeline) == "token-merge halves{version=2 names=[a, b]}"
    shown: list[str] = []

    class Notes(toolchain.Listener):
        def graph(self, component: str, after: str, graph: Graph) -> None:
            shown.append(after)

    planned = toolchain.plan(recipe, listener=Notes())
    assert [b.name for b in planned.blocks] == ["a", "b"]
    assert shown[:2] == ["capture", "token-merge"] and shown[-1] == "halves{version=2 names=[a, b]}"

    resolved = pinned_recipe(planned, {"transformer": {"checkpoint": "x", "sha256": None}})
    listed = resolved.model_dump(mode="json")["transformer"]["passes"]
    assert listed == [
        {"token-merge": {"where": ["self_attention", "cross_attention"]}},
        {"halves": {"version": 2, "names": ["a", "b"]}},
    ]
    assert [p.config for p in load_passes(resolved, "transformer")] == [p.config for p in pipeline]
    assert [graph_text(g) for g in toolchain.plan(resolved).components["transformer"].graphs] == [
        graph_text(g) for g in planned.components["transformer"].graphs
    ]


def test_the_usual_partition_is_added() -> None:
    assert str(Pipeline((), Partition())) == "partition"
    assert str(Pipeline((TokenMerge(),), Partition())) == "token-merge partition"


@pytest.mark.parametrize(
    ("passes", "wanted"),
    [("", ["partition"]), ("token-merge", ["token-merge", "partition"]), ("merge halves", ["merge", "halves"])],
)
def test_phases_sort_passes(recipe_data: dict[str, Any], third_party: None, passes: str, wanted: list[str]) -> None:
    pipeline = load_passes(recipe_with(recipe_data, passes), "transformer")
    assert [p.name for p in pipeline] == wanted
    assert [p.phase for p in pipeline] == ["rewrite"] * (len(wanted) - 1) + ["partition"]


@pytest.mark.parametrize(
    ("passes", "wrong"),
    [("halves token-merge", "halves"), ("halves partition", "halves"), ("partition halves", "partition")],
)
def test_what_partitions_stands_last(recipe_data: dict[str, Any], third_party: None, passes: str, wrong: str) -> None:
    with pytest.raises(RecipeError) as raised:
        load_passes(recipe_with(recipe_data, passes), "transformer")
    assert str(raised.value) == f"transformer.passes: '{wrong}' must be the last pass, and be listed once"


def test_merged_steps_need_any_pass_that_provides_them(recipe_data: dict[str, Any], third_party: None) -> None:
    planned = toolchain.plan(recipe_with(recipe_data, "merge", merged_steps=1))
    assert "merged" in planned.components["transformer"].graphs[0].functions
    with pytest.raises(RecipeError) as raised:
        load_passes(recipe_with(recipe_data, "halves", merged_steps=1), "transformer")
    assert str(raised.value) == (
        "sampler.merged_steps: needs a pass in transformer.passes that provides 'merged'; installed: merge, token-merge"
    )
