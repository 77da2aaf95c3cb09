"""Pipelines of passes: as text that parses back, by phase, with versions of options, and pure."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any, ClassVar

import pytest
import yaml
from entry_points import registered
from hypothesis import given, settings
from hypothesis import strategies as st
from support import RECIPE

import toolchain
from passes.partition import Partition, PartitionConfig
from passes.token_merge import TokenMerge, TokenMergeConfig
from toolchain.errors import LoweringError, RecipeError
from toolchain.formats.recipe import Recipe
from toolchain.formats.recipe_file import load_recipe, parse_recipe
from toolchain.ir.graph import Graph
from toolchain.ir.passes import Pass, PassConfig, Pipeline, find_pass
from toolchain.ir.pipeline_text import parse_pipeline, pipeline_text
from toolchain.ir.storage import FLOAT16
from toolchain.models.family import find_family
from toolchain.planning.resolve import load_pipeline

# --- text --------------------------------------------------------------------------------------------

names = st.from_regex(r"[a-z][a-z0-9-]{0,12}", fullmatch=True)
keys = st.from_regex(r"[a-z_][a-z0-9_]{0,8}", fullmatch=True)
scalars = (
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=12)
)
values = st.recursive(
    scalars,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=6), inner, max_size=3),
    max_leaves=8,
)
pipelines = st.lists(st.tuples(names, st.dictionaries(keys, values, max_size=3)), max_size=4)


@given(pipelines)
@settings(max_examples=300)
def test_what_is_written_is_read_back(passes: list[tuple[str, dict[str, Any]]]) -> None:
    assert list(parse_pipeline(pipeline_text(passes))) == passes


def test_people_may_write_it_in_several_ways() -> None:
    expected = (("token-merge", {"where": "self_attention"}), ("partition", {"max_bytes": "200MB"}))
    for text in (
        "token-merge{where=self_attention} partition{max_bytes=200MB}",
        "  token-merge{ where = self_attention }\n partition{max_bytes='200MB'}\n",
        'token-merge{where="self_attention"}, partition{max_bytes=200MB,}',
    ):
        assert parse_pipeline(text) == expected
    nested = parse_pipeline('quantize{rules=[{match: "pair.*.mlp", scheme: int8}, {match: a}] block=32}')
    assert nested == (
        ("quantize", {"rules": [{"match": "pair.*.mlp", "scheme": "int8"}, {"match": "a"}], "block": 32}),
    )
    assert parse_pipeline("") == ()


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("{a=1}", "column 1: expected a pass's name, not '{a=1}'"),
        ("merge{a=1", "column 6: '{' is never closed, not '{a=1'"),
        ("merge{a}", "column 7: expected key=value, not 'a}'"),
        ("merge{a=}", "column 9: expected a value for 'a', not '}'"),
        ("merge{a=1 a=2}", "column 11: option 'a' is given twice, not 'a=2}'"),
        ("merge{a=[1}", "column 9: '[' is never closed, not '[1}'"),
        ("merge{a=1}cut", "column 11: expected a space between passes, not 'cut'"),
        ('merge{a="b}', "column 9: '\"' is never closed, not '\"b}'"),
    ],
)
def test_a_text_that_is_no_pipeline(text: str, said: str) -> None:
    with pytest.raises(RecipeError) as error:
        parse_pipeline(text)
    assert str(error.value) == said


@pytest.mark.parametrize(
    ("made", "text"),
    [
        (TokenMerge(), "token-merge"),
        (TokenMerge(TokenMergeConfig(where=("self_attention",))), "token-merge{where=self_attention}"),
        (Partition(PartitionConfig(max_bytes=200_000_000)), "partition{max_bytes=200MB}"),
        (Partition(PartitionConfig(max_bytes=2_500_000_000)), "partition{max_bytes=2.5GB}"),
        (Partition(PartitionConfig(max_bytes=123_456_789)), "partition{max_bytes=123456789}"),
        (Partition(PartitionConfig(layers_per_block=2)), "partition{layers_per_block=2}"),
    ],
)
def test_a_pass_is_text_that_makes_the_same_pass(made: Pass, text: str) -> None:
    assert str(made) == text
    ((name, options),) = parse_pipeline(text)
    again = find_pass(name, options, "passes")
    assert (type(again), again.config) == (type(made), made.config)


@given(st.integers(min_value=1, max_value=1 << 60))
def test_sizes_are_read_back(count: int) -> None:
    config = PartitionConfig(max_bytes=count)
    assert PartitionConfig.model_validate(config.model_dump(mode="json")) == config


# --- in a recipe -------------------------------------------------------------------------------------


def recipe(passes: Any, **sampler: Any) -> Recipe:
    transformer = {"checkpoint": "checkpoint", "passes": passes}
    return parse_recipe({**RECIPE, "transformer": transformer, "sampler": {"steps": 6} | sampler})


def pipeline(passes: Any, component: str = "transformer", **sampler: Any) -> Pipeline:
    whole = recipe(passes, **sampler)
    return load_pipeline(whole, component, find_family(whole.model))


@pytest.mark.parametrize(
    "passes",
    [
        "token-merge{where=self_attention} partition{max_bytes=200MB}",
        ["token-merge{where=self_attention}", "partition{max_bytes=200MB}"],
        [{"token-merge": {"where": ["self_attention"]}}, {"partition": {"max_bytes": "200MB"}}],
        [{"token-merge": {"where": "self_attention", "version": 1}}, {"partition": {"max_bytes": 200_000_000}}],
    ],
)
def test_every_way_to_write_a_recipe_is_the_same(passes: Any) -> None:
    found = pipeline(passes)
    assert str(found) == "token-merge{where=self_attention} partition{max_bytes=200MB}"
    assert str(pipeline(str(found))) == str(found)
    assert str(pipeline(yaml.safe_load(recipe(passes).to_yaml())["transformer"]["passes"])) == str(found)


def test_a_pipeline_can_be_set_from_the_command_line(project: Path) -> None:
    loaded = load_recipe(project / "recipe.yaml", ["transformer.passes=token-merge partition{blocks=1}"])
    assert str(load_pipeline(loaded, "transformer", find_family(loaded.model))) == "token-merge partition{blocks=1}"


def test_a_text_with_a_mistake_names_the_key() -> None:
    with pytest.raises(RecipeError, match=r"^transformer\.passes: column 12: '\{' is never closed"):
        recipe("token-merge{where=self_attention")


def test_the_partition_is_a_phase() -> None:
    found = pipeline(["token-merge"])
    assert ([p.name for p in found.rewrites], found.partition.name) == (["token-merge"], "partition")
    for wrong in (["partition", "token-merge"], ["partition", "partition"]):
        with pytest.raises(RecipeError) as error:
            pipeline(wrong)
        assert str(error.value) == "transformer.passes: 'partition' must be the last pass, and be listed once"


def test_the_family_says_how_a_component_is_cut() -> None:
    whole = load_recipe("tiny")
    cuts = {name: str(load_pipeline(whole, name, find_family(whole.model)).partition) for name in whole.components()}
    assert cuts == {"text_encoder": "partition", "transformer": "partition", "vae": "partition{max_bytes=200MB}"}


def test_merged_steps_need_a_pass_that_provides_them() -> None:
    with pytest.raises(RecipeError) as error:
        pipeline(["partition"], merged_steps=2)
    assert str(error.value) == (
        "sampler.merged_steps: needs a pass that provides 'merged' in transformer.passes: 'token-merge' does"
    )


# --- a third party's passes --------------------------------------------------------------------------


class Renamed(PassConfig):
    """Options of version 3; up to 2 the option was called ``size``."""

    current_version: ClassVar[int] = 3
    layers: int = 1

    @classmethod
    def migrate(cls, options: dict[str, Any], version: int) -> dict[str, Any]:
        return {"layers": options.pop("size", 1), **options}


class CutInOne(Pass):
    """All that runs is one block."""

    name = "cut-in-one"
    phase = "partition"
    Config = Renamed

    def call(self, graph: Graph) -> Graph:
        graph = graph.copy()
        for gm in graph.functions.values():
            for node in gm.graph.nodes:
                if node.op not in ("placeholder", "output", "get_attr"):
                    node.meta["block"] = "tables" if node.meta["rate"] == "build" else f"all_{node.meta['rate']}"
        return graph


class Impure(Pass):
    """Keeps a weight otherwise, in the graph that it was given."""

    name = "impure"

    def call(self, graph: Graph) -> Graph:
        name, weight = next(iter(graph.weights.items()))
        graph.weights[name] = dataclasses.replace(weight, storage=FLOAT16)  # type: ignore[index]
        return graph


@pytest.fixture
def third_party(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    own = {"cut-in-one": f"{__name__}:CutInOne", "impure": f"{__name__}:Impure"}
    monkeypatch.syspath_prepend(str(registered(tmp_path / "site", "their-passes", {"sora_compile.passes": own})))


@pytest.mark.usefixtures("third_party")
def test_a_third_partys_partition(project: Path) -> None:
    loaded = load_recipe(project / "recipe.yaml", ["transformer.passes=token-merge cut-in-one"])
    blocks = toolchain.plan(loaded, base=project).blocks
    assert [b.name for b in blocks] == ["all_prompt", "all_step"]
    with pytest.raises(RecipeError, match="'cut-in-one' must be the last pass, and be listed once"):
        pipeline(["cut-in-one", "partition"])


@pytest.mark.usefixtures("third_party")
def test_options_have_a_version() -> None:
    old = find_pass("cut-in-one", {"size": 4}, "transformer.passes.0")
    assert old.config == Renamed(version=3, layers=4)
    assert str(old) == "cut-in-one{version=3 layers=4}"
    ((name, options),) = parse_pipeline(str(old))
    assert find_pass(name, options, "").config == old.config
    with pytest.raises(RecipeError) as error:
        find_pass("cut-in-one", {"version": 4}, "transformer.passes.0")
    assert str(error.value) == (
        "transformer.passes.0.cut-in-one: options are of version 4, this sora-compile knows 3; update it"
    )
    with pytest.raises(RecipeError, match=r"^passes\.0\.token-merge: options are of version 2, .* knows 1"):
        find_pass("token-merge", {"version": 2}, "passes.0")


@pytest.mark.usefixtures("third_party")
def test_a_pass_that_changes_its_argument_is_refused(project: Path) -> None:
    loaded = load_recipe(project / "recipe.yaml", ["transformer.passes=token-merge impure"])
    with pytest.raises(LoweringError) as error:
        toolchain.plan(loaded, base=project)
    assert str(error.value) == ("pass 'impure' on transformer: changed its argument; let it work on graph.copy()")
