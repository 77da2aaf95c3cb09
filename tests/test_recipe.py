"""Recipes: what is accepted, what is refused and with which words, and what comes back out."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import TypeAdapter
from support import load_passes

import toolchain
from passes.partition import PartitionConfig
from passes.token_merge import TokenMergeConfig
from toolchain.errors import LoweringError, RecipeError, SoraCompileError
from toolchain.formats.manifest import Manifest
from toolchain.formats.recipe import Recipe
from toolchain.formats.recipe_file import find_recipe, load_recipe, parse_recipe, shipped
from toolchain.models.family import find_family
from toolchain.validation import Bytes, shortest_size

TINY = {"hidden_size": 8, "num_heads": 2, "depth": 2, "caption_channels": 4, "model_max_length": 3}
SHIPPED = [
    "open-sora-v1.2-android",
    "open-sora-v1.2-android-int8",
    "open-sora-v1.2-iphone-15-pro",
    "open-sora-v1.2-iphone-15-pro-int4",
    "open-sora-v1.2-iphone-15-pro-int8",
    "tiny",
    "tiny-int8",
]


def changed(data: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    """A copy with values set by path; a value of ``...`` takes the key away."""
    data = copy.deepcopy(data)
    for path, value in changes.items():
        *parents, last = path.split(".")
        place: Any = data
        for part in parents:
            place = place[int(part)] if isinstance(place, list) else place.setdefault(part, {})
        if value is ...:
            del place[last]
        else:
            place[int(last) if isinstance(place, list) else last] = value
    return data


def complaint(data: dict[str, Any], *, planned: bool = False, kind: type[SoraCompileError] = RecipeError) -> str:
    with pytest.raises(kind) as raised:
        recipe = parse_recipe(data)
        if planned:
            toolchain.plan(recipe)
    assert raised.value.exit_code == (2 if kind is RecipeError else 4)
    return str(raised.value)


# --- what the file may say ---------------------------------------------------------------------------

REFUSED = [
    ({"vdieo": {}}, "vdieo: unknown key; did you mean 'video'?"),
    ({"video.frame": 17}, "video.frame: unknown key; did you mean 'frames'?"),
    ({"sampler.merged_step": 1}, "sampler.merged_step: unknown key; did you mean 'merged_steps'?"),
    ({"transformer.checkpiont": "x"}, "transformer.checkpiont: unknown key; did you mean 'checkpoint'?"),
    ({"gate.max_relative_eror": {}}, "gate.max_relative_eror: unknown key; did you mean 'max_relative_error'?"),
    ({"video.colour": 1}, "video.colour: unknown key; known keys: fps, frames, height, width"),
    ({"video.frame": 17, "video.hight": 1}, "video.frame: unknown key; did you mean 'frames'? (and 1 more problem)"),
    ({"name": ...}, "name: field required"),
    ({"video.frames": ...}, "video.frames: field required"),
    ({"target": ...}, "target: field required"),
    ({"version": 2}, "version: input should be 1, got int 2"),
    ({"name": ""}, "name: string should have at least 1 character, got str ''"),
    ({"name": 3}, "name: input should be a valid string, got int 3"),
    ({"model": "open-sora-v2"}, "model: no model is called 'open-sora-v2'; did you mean 'open-sora-v1.2'?"),
    ({"model": 3}, "model: input should be a valid string, got int 3"),
    ({"video": None}, "video: input should be a valid dictionary or instance of Video, got NoneType None"),
    ({"video.frames": "17"}, "video.frames: input should be a valid integer, got str '17'"),
    ({"video.frames": 17.0}, "video.frames: input should be a valid integer, got float 17.0"),
    ({"video.frames": True}, "video.frames: input should be a valid integer, got bool True"),
    ({"video.frames": 0}, "video.frames: input should be greater than or equal to 1, got int 0"),
    ({"video.height": 8}, "video.height: input should be greater than or equal to 16, got int 8"),
    ({"video.width": 5000}, "video.width: input should be less than or equal to 4096, got int 5000"),
    ({"sampler.steps": 0}, "sampler.steps: input should be greater than or equal to 1, got int 0"),
    ({"sampler.guidance": "7"}, "sampler.guidance: input should be a valid number, got str '7'"),
    ({"sampler.guidance": -1}, "sampler.guidance: input should be greater than or equal to 0, got int -1"),
    ({"sampler.merged_steps": 7}, "sampler: merged_steps 7 is more than steps 6"),
    ({"sampler.leap": 6}, "sampler: leap.after is 6, but there are 6 steps; choose 1 to 5"),
    ({"sampler.leap": "papers"}, "sampler.leap: no leap rule is called 'papers'; known: paper, code"),
    (
        {"sampler.leap": "code"},
        "sampler: leap could come at step index 16 at the earliest, but the last of 6 steps is 5",
    ),
    ({"transformer.passes": None}, "transformer.passes: input should be a valid list, got NoneType None"),
    ({"transformer.passes": "a{b}"}, "transformer.passes: column 4: expected '=' and a value after 'b', got '}'"),
    ({"transformer.passes.1": "a{b=[1}"}, "transformer.passes.1: column 7: expected ',' or ']', got '}'"),
    ({"transformer.passes.1": "a b"}, "transformer.passes.1: expected one pass in an item of the list, got 2; or one "),
    ({"transformer.passes": [3]}, "transformer.passes.0: expected a name, or a name with options such as"),
    ({"transformer.passes": ["a", {"b": 1}]}, "transformer.passes.1: expected a name, or a name with options such as"),
    ({"transformer.sha256": 3}, "transformer.sha256: input should be a valid string, got int 3"),
    ({"target": 3}, "target: expected a target's name, or 'name: coreml' with its options beside it"),
    ({"target": {"precision": "float16"}}, "target: expected a target's name"),
    ({"gate.seed": -1}, "gate.seed: input should be greater than or equal to 0, got int -1"),
    ({"gate.max_relative_error": 1.0}, "gate.max_relative_error: input should be a valid dictionary, got float 1.0"),
    ({"gate.max_relative_error.float32": "small"}, "gate.max_relative_error.float32: input should be a valid number"),
]


@pytest.mark.parametrize(("changes", "message"), REFUSED, ids=[",".join(c) for c, _ in REFUSED])
def test_refused_with_the_keys_path(recipe_data: dict[str, Any], changes: dict[str, Any], message: str) -> None:
    text = complaint(changed(recipe_data, changes))
    assert text.startswith(message)
    assert "\n" not in text


@pytest.mark.parametrize("frames", range(2, 17))
def test_frames_that_the_official_schedule_cannot_do(recipe_data: dict[str, Any], frames: int) -> None:
    text = complaint(changed(recipe_data, {"video.frames": frames}))
    assert text == (
        f"video: frames is {frames}: the official timesteps are not a number for 2 to 16 frames; use 1 or at least 17"
    )


@pytest.mark.parametrize(("key", "meant"), [("video.frame", "frames"), ("transformer.checkpiont", "checkpoint")])
def test_a_misspelt_key_that_is_needed(recipe_data: dict[str, Any], key: str, meant: str) -> None:
    parent = key.split(".")[0]
    text = complaint(changed(recipe_data, {key: "x", f"{parent}.{meant}": ...}))
    assert text.startswith(f"{key}: unknown key; did you mean '{meant}'?")


def test_the_path_of_a_leaps_key_is_what_the_user_wrote(recipe_data: dict[str, Any]) -> None:
    text = complaint(changed(recipe_data, {"sampler.leap": {"kind": "static", "after": 2, "until": 3}}))
    assert text.startswith("sampler.leap.until: unknown key; known keys: after, kind")


@pytest.mark.parametrize("key", ["sampler.guidance", "gate.max_relative_error.float32"])
def test_infinite_numbers(recipe_data: dict[str, Any], key: str) -> None:
    assert complaint(changed(recipe_data, {key: float("inf")})).startswith(f"{key}: ")


@pytest.mark.parametrize(
    "changes",
    [
        {"sampler.leap": {"kind": "static", "after": "2"}},
        {"transformer.passes": [{"partition": {"layers_per_block": "2"}}]},
        {"transformer.passes": [{"partition": {"layers_per_block": True}}]},
    ],
    ids=str,
)
def test_numbers_in_quotes(recipe_data: dict[str, Any], changes: dict[str, Any]) -> None:
    complaint(changed(recipe_data, {"transformer.config": TINY, "sampler.merged_steps": 0} | changes), planned=True)


# --- what passes, targets and the model say ----------------------------------------------------------

MERGED_NEEDED = (
    "sampler.merged_steps: needs a pass in transformer.passes that provides 'merged'; installed: token-merge"
)
UNPLANNABLE = [
    (
        {"transformer.passes.0": "token-merg"},
        "transformer.passes.0: no pass is called 'token-merg'; did you mean 'token-merge'?",
    ),
    (
        {"transformer.passes.1": "quantise"},
        "transformer.passes.1: no pass is called 'quantise'; did you mean 'quantize'?",
    ),
    (
        {"transformer.passes.1": {"partition": {"layer_per_block": 1}}},
        "transformer.passes.1.partition.layer_per_block: unknown key; did you mean 'layers_per_block'?",
    ),
    (
        {"transformer.passes.1": {"partition": {"max_bytes": "lots"}}},
        "transformer.passes.1.partition.max_bytes: could not parse value and unit from byte string, got str 'lots'",
    ),
    ({"transformer.passes.0": {"token-merge": {"where": ["mlp"]}}}, "transformer.passes.0.token-merge.where.0: "),
    ({"transformer.passes": ["partition", "token-merge"]}, "transformer.passes: 'partition' must be the last pass"),
    ({"transformer.passes": ["partition"]}, MERGED_NEEDED),
    ({"transformer.passes": "partition{blocks=1}"}, MERGED_NEEDED),
    (
        {"transformer.passes": "token-merge partition{blocks=1 max_byte=1}"},
        "transformer.passes.1.partition.max_byte: unknown key; did you mean 'max_bytes'?",
    ),
    (
        {"transformer.passes.0": {"token-merge": {"version": 3}}},
        "transformer.passes.0.token-merge: options are of version 3, this sora-compile knows 1; update it",
    ),
    (
        {"transformer.passes.0": "token-merge{version='1'}"},
        "transformer.passes.0.token-merge: version: expected a whole number of 1 or more, got '1'",
    ),
    ({"target": "corml"}, "target: no target is called 'corml'; did you mean 'coreml'?"),
    ({"target": "vulkan"}, "target: no target is called 'vulkan'; known: "),
    ({"target": {"name": "coreml", "precison": "x"}}, "target.precison: unknown key; did you mean 'precision'?"),
    (
        {"target": {"name": "coreml", "precision": "float64"}},
        "target.precision: input should be 'float16' or 'float32'",
    ),
    ({"target": {"name": "executorch", "precision": "float16"}}, "target.precision: input should be 'float32'"),
    (
        {"transformer.config.num_heads": 3},
        "transformer.config: hidden_size 8 does not divide into 3 heads of even size",
    ),
    ({"transformer.config.patch_size": [2, 2, 2]}, "transformer.config: patch_size [2, 2, 2]: only [1, p, p]"),
]


@pytest.mark.parametrize(("changes", "message"), UNPLANNABLE, ids=[str(c) for c, _ in UNPLANNABLE])
def test_refused_when_planned(recipe_data: dict[str, Any], changes: dict[str, Any], message: str) -> None:
    recipe_data["transformer"]["config"] = TINY
    text = complaint(changed(recipe_data, changes), planned=True)
    assert text.startswith(message)
    assert "\n" not in text


def test_a_graph_that_does_not_fit_a_pass(recipe_data: dict[str, Any]) -> None:
    recipe_data["transformer"] |= {"config": TINY, "passes": ["token-merge", {"partition": {"max_bytes": 10}}]}
    text = complaint(recipe_data, planned=True, kind=LoweringError)
    assert text.startswith("pass 'partition' on transformer: max_bytes: 'pair.0.spatial' alone has ")


def test_a_check_of_several_options_names_the_pass(recipe_data: dict[str, Any]) -> None:
    recipe_data["transformer"] |= {"config": TINY, "passes": [{"partition": {"blocks": 1, "layers_per_block": 1}}]}
    recipe_data["sampler"]["merged_steps"] = 0
    assert complaint(recipe_data, planned=True).startswith("transformer.passes.0.partition: give one of")


def test_a_components_precision_is_named_as_such(recipe_data: dict[str, Any]) -> None:
    recipe_data["transformer"] |= {"config": TINY, "precision": "float8"}
    assert complaint(recipe_data, planned=True).startswith("transformer.precision: ")


@pytest.mark.parametrize(
    "config",
    [
        {"hidden_size": -64},
        {"patch_size": [1, 0, 0]},
        {"depth": -1},
        {"model_max_length": 0},
        {"input_sq_size": 0},
        {"qk_norm": "no"},
    ],
    ids=str,
)
def test_configs_out_of_range(recipe_data: dict[str, Any], config: dict[str, Any]) -> None:
    recipe_data["transformer"] |= {"config": TINY | config, "passes": []}
    recipe_data["sampler"]["merged_steps"] = 0
    (key,) = config
    assert key in complaint(recipe_data, planned=True)


# --- files -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("name: a\nvideo: {frames: 17\nmodel: x\n", r"r\.yaml:3: not YAML: "),
        ("name: a\n  video: 3\n", r"r\.yaml:2: not YAML: "),
        ("name: a\nmodel: b\nname: c\n", r"r\.yaml:3: not YAML: key 'name' is given twice"),
        ("video:\n  frames: 17\n  frames: 34\n", r"r\.yaml:3: not YAML: key 'frames' is given twice"),
        ("name: !!python/object/apply:os.system [ls]\n", r"r\.yaml:1: not YAML: could not determine a constructor"),
        ("- a\n- b\n", r"r\.yaml: expected keys and values"),
        ("", r"r\.yaml: expected keys and values"),
        ("name: \x00", r"r\.yaml: cannot be read"),
        ("a: " + "[" * 5000, r"r\.yaml: cannot be read: it is nested too deeply"),
    ],
)
def test_files_that_are_no_recipes(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "r.yaml").write_text(text)
    with pytest.raises(RecipeError, match=message):
        load_recipe(tmp_path / "r.yaml")


def test_a_file_that_is_not_text(tmp_path: Path) -> None:
    (tmp_path / "r.yaml").write_bytes(b"name: \xff\xfe")
    with pytest.raises(RecipeError, match=r"r\.yaml: cannot be read"):
        load_recipe(tmp_path / "r.yaml")


def test_a_key_that_is_a_list(tmp_path: Path) -> None:
    (tmp_path / "r.yaml").write_text("? [a, b]\n: c\n")
    with pytest.raises(RecipeError, match=r"r\.yaml:1: not YAML"):
        load_recipe(tmp_path / "r.yaml")


def test_recipes_are_found_by_path_or_shipped_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert sorted(shipped()) == SHIPPED
    assert find_recipe("tiny") == find_recipe("tiny.yaml") == shipped()["tiny"]
    monkeypatch.chdir(tmp_path)
    (tmp_path / "tiny.yaml").write_text("name: mine\n")
    assert find_recipe("tiny.yaml") == Path("tiny.yaml")
    assert find_recipe("tiny") == shipped()["tiny"]
    with pytest.raises(RecipeError, match=r"'tinny' is neither a file nor a shipped recipe; did you mean 'tiny'\?"):
        find_recipe("tinny")
    with pytest.raises(RecipeError, match=r"shipped recipes: open-sora-v1\.2-android-int8, open-sora-v1\.2-android, "):
        find_recipe("no/such.yaml")


# --- overrides ---------------------------------------------------------------------------------------


@pytest.fixture
def recipe_file(tmp_path: Path, recipe_data: dict[str, Any]) -> Path:
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe_data))
    return path


@pytest.mark.parametrize(
    ("override", "path", "value"),
    [
        ("sampler.steps=20", "sampler.steps", 20),
        ("sampler.leap=null", "sampler.leap", None),
        ("name=a = b", "name", "a = b"),
        ("target=coreml", "target", "coreml"),
        ("target.precision=float32", "target", {"name": "onnx", "precision": "float32"}),
        ("target={name: coreml, precision: float32}", "target", {"name": "coreml", "precision": "float32"}),
        ("gate.max_relative_error.float32=0.5", "gate.max_relative_error", {"float32": 0.5}),
        ("transformer.passes=[token-merge]", "transformer.passes", ["token-merge"]),
        ("transformer.passes.1={partition: {blocks: 1}}", "transformer.passes.1", {"partition": {"blocks": 1}}),
        ("transformer.passes=partition", "transformer.passes", ["partition"]),
        ("transformer.passes=", "transformer.passes", []),
        (
            "transformer.passes=token-merge partition{max_bytes=200MB}",
            "transformer.passes",
            ["token-merge", {"partition": {"max_bytes": "200MB"}}],
        ),
        ("transformer.passes=a{b={c: [1]}, d=' #'}", "transformer.passes", [{"a": {"b": {"c": [1]}, "d": " #"}}]),
        ("transformer.passes.1=partition{blocks=1}", "transformer.passes.1", {"partition": {"blocks": 1}}),
        ("transformer.config.depth=3", "transformer.config", {"depth": 3}),
        ("sampler.discrete_timesteps=true", "sampler.discrete_timesteps", True),
    ],
)
def test_overrides(recipe_file: Path, recipe_data: dict[str, Any], override: str, path: str, value: Any) -> None:
    assert load_recipe(recipe_file, [override]) == parse_recipe(changed(recipe_data, {path: value}))


def test_overrides_are_applied_in_order(recipe_file: Path) -> None:
    recipe = load_recipe(recipe_file, ["sampler={}", "sampler.steps=9", "sampler.steps=8"])
    assert (recipe.sampler.steps, recipe.sampler.leap, recipe.sampler.merged_steps) == (8, None, 0)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("sampler.steps", "--set sampler.steps: expected key=value, such as sampler.steps=20"),
        ("=3", "--set =3: expected key=value"),
        ("name=[", "--set name=[: the value is not YAML"),
        ("name.first=a", "--set name.first=a: 'name' has no keys in it"),
        ("sampler.leap.after=2", "--set sampler.leap.after=2: 'sampler.leap' has no keys in it"),
        ("transformer.passes.2=x", "--set transformer.passes.2=x: '2' is not an index into a list of 2"),
        ("transformer.passes.last=x", "--set transformer.passes.last=x: 'last' is not an index into a list of 2"),
        ("sampler.stepz=3", "sampler.stepz: unknown key; did you mean 'steps'?"),
        ("sampler.steps=many", "sampler.steps: input should be a valid integer, got str 'many'"),
    ],
)
def test_overrides_that_are_refused(recipe_file: Path, override: str, message: str) -> None:
    with pytest.raises(RecipeError) as raised:
        load_recipe(recipe_file, [override])
    assert str(raised.value).startswith(message)


@pytest.mark.parametrize("override", ["transformer.passes.first.0=x", "transformer.passes.7.1=x"])
def test_an_override_through_a_list_needs_an_index(recipe_file: Path, override: str) -> None:
    with pytest.raises(RecipeError, match="not an index"):
        load_recipe(recipe_file, [override])


# --- shipped recipes ---------------------------------------------------------------------------------


@pytest.mark.parametrize("name", SHIPPED)
def test_shipped_recipes_load_and_come_back(name: str) -> None:
    recipe = load_recipe(name)
    assert recipe.name == name
    assert parse_recipe(yaml.safe_load(recipe.to_yaml())) == recipe


@pytest.mark.parametrize(
    "name", ["tiny", pytest.param(SHIPPED[0], marks=pytest.mark.slow), pytest.param(SHIPPED[1], marks=pytest.mark.slow)]
)
def test_shipped_recipes_plan(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)  # the full-size ones need no checkpoint: their configuration is written out
    blocks = toolchain.plan(load_recipe(name)).blocks
    pairs = [b for b in blocks if b.component == "transformer" and b.name.startswith("pair")]
    assert len(pairs) == (4 if name == "tiny" else 28)
    assert len({b.structure() for b in pairs}) == 1


# --- coming back out ---------------------------------------------------------------------------------

text = st.text(st.characters(codec="utf-8", exclude_categories=("Cc", "Cs")), min_size=1, max_size=20)
rules = st.sampled_from([{}, {"layers_per_block": 2}, {"blocks": 1}, {"max_bytes": "2MB"}, {"max_bytes": 10**9}])


@st.composite
def recipes(draw: st.DrawFn) -> dict[str, Any]:
    steps = draw(st.integers(2, 60))
    passes: list[Any] = [{"partition": draw(rules)}] if draw(st.booleans()) else ["partition"]
    leaps: list[Any] = [None, draw(st.integers(1, steps - 1))]
    leaps += [{"kind": "static", "after": 1}] + (["paper", "code"] if steps >= 20 else [])
    data: dict[str, Any] = {
        "name": draw(text),
        "model": "open-sora-v1.2",
        "video": {
            "frames": draw(st.one_of(st.just(1), st.integers(17, 300))),
            "height": draw(st.integers(16, 512)),
            "width": draw(st.integers(16, 512)),
        },
        "sampler": {
            "steps": steps,
            "guidance": draw(st.floats(0, 1e6) | st.integers(0, 20)),
            "leap": draw(st.sampled_from(leaps)),
            "merged_steps": draw(st.integers(0, steps)),
            "discrete_timesteps": draw(st.booleans()),
        },
        "transformer": {
            "checkpoint": draw(text),
            "config": draw(st.none() | st.just(TINY)),
            "sha256": draw(st.none() | st.just("0" * 64)),
            "passes": draw(st.sampled_from([["token-merge", *passes], "token-merge partition{max_bytes='2 MB'}"])),
        },
        "memory_budget": draw(st.none() | st.integers(1, 10**15) | st.sampled_from(["2.5GB", "3 GiB", "1.5 kB"])),
        "target": draw(st.sampled_from(["coreml", {"name": "coreml", "precision": "float32"}, {"name": "executorch"}])),
        "gate": {"max_relative_error": {"float32": draw(st.floats(1e-12, 1.0))}, "seed": draw(st.integers(0, 2**32))},
    }
    return data


@settings(max_examples=60, deadline=None)
@given(data=recipes())
def test_what_is_written_is_what_was_read(tmp_path_factory: pytest.TempPathFactory, data: dict[str, Any]) -> None:
    recipe = parse_recipe(data)
    written = recipe.to_yaml()
    path = tmp_path_factory.mktemp("written") / "recipe.yaml"
    path.write_text(written, encoding="utf-8")
    again = load_recipe(path)
    assert again == recipe
    assert again.to_yaml() == written
    family = find_family(recipe.model)
    assert family.timesteps(again) == family.timesteps(recipe)


@pytest.mark.parametrize(
    ("given_", "size", "written"),
    [
        ("2.5GB", 2_500_000_000, "2.5GB"),
        ("2500 mb", 2_500_000_000, "2.5GB"),
        (2**30, 2**30, "1GiB"),
        (2**30 + 1, 2**30 + 1, 2**30 + 1),
        (1000, 1000, "1KB"),
        (1024, 1024, 1024),
        (1, 1, 1),
    ],
)
def test_sizes_are_written_in_the_shortest_exact_way(
    recipe_data: dict[str, Any], given_: Any, size: int, written: Any
) -> None:
    recipe = parse_recipe(recipe_data | {"memory_budget": given_})
    assert recipe.memory_budget == size == recipe.model_dump()["memory_budget"]
    assert recipe.model_dump(mode="json")["memory_budget"] == written
    assert parse_recipe(json.loads(recipe.model_dump_json())) == recipe
    schema = Recipe.model_json_schema()["properties"]["memory_budget"]["anyOf"]
    assert schema == [{"type": ["string", "integer"]}, {"type": "null"}]
    assert Recipe.model_json_schema(mode="serialization")["properties"]["memory_budget"]["anyOf"] == schema


@given(size=st.integers(1, 10**19))
def test_every_size_comes_back(size: int) -> None:
    written = shortest_size(size)
    assert TypeAdapter(Bytes).validate_python(written) == size
    assert len(str(written)) <= len(str(size))


@pytest.mark.parametrize(
    "passes",
    [
        "token-merge{where=self_attention} partition{max_bytes=200MB}",
        "token-merge{where=[self_attention]}\npartition{max_bytes=200MB}\n",
        ["token-merge{where=self_attention}", {"partition": {"max_bytes": "200MB"}}],
        [{"token-merge": {"where": "self_attention"}}, "partition{max_bytes=200000000}"],
        ["token-merge{version=1 where=[self_attention]}", "partition{max_bytes='200 MB'}"],
    ],
)
def test_all_ways_to_write_passes_mean_the_same(recipe_data: dict[str, Any], passes: Any) -> None:
    recipe = parse_recipe(changed(recipe_data, {"transformer.passes": passes}))
    pipeline = load_passes(recipe, "transformer")
    assert str(pipeline) == "token-merge{where=self_attention} partition{max_bytes=200MB}"
    assert [p.config for p in pipeline] == [
        TokenMergeConfig(where=("self_attention",)),
        PartitionConfig(max_bytes=200_000_000),
    ]
    again = parse_recipe(changed(recipe_data, {"transformer.passes": str(pipeline)}))
    assert str(load_passes(again, "transformer")) == str(pipeline)


LOOKALIKES = ["1.5", "0x10", "yes", "null", "~", "2026-01-01", "a: b", "#1", "'", "é 視"]


@pytest.mark.parametrize("name", [*LOOKALIKES, "1e3", "-2E10"])
def test_names_that_look_like_something_else(tmp_path: Path, recipe_data: dict[str, Any], name: str) -> None:
    recipe = parse_recipe(recipe_data | {"name": name})
    (tmp_path / "recipe.yaml").write_text(recipe.to_yaml(), encoding="utf-8")
    assert load_recipe(tmp_path / "recipe.yaml") == recipe


# --- JSON Schema -------------------------------------------------------------------------------------


def violations(value: Any, schema: dict[str, Any], root: dict[str, Any], path: str = "") -> Iterator[str]:
    """What of ``value`` breaks ``schema``; of JSON Schema what our schemas use."""
    if "$ref" in schema:
        yield from violations(value, root["$defs"][schema["$ref"].removeprefix("#/$defs/")], root, path)
    for kind in ("anyOf", "oneOf"):
        if kind in schema and all(any(violations(value, s, root, path) or ()) for s in schema[kind]):
            yield f"{path}: none of {kind}"
    if ("const" in schema and value != schema["const"]) or ("enum" in schema and value not in schema["enum"]):
        yield f"{path}: {value!r} is not allowed"
    types = {
        "object": dict,
        "array": list,
        "string": str,
        "integer": int,
        "number": (int, float),
        "boolean": bool,
        "null": type(None),
    }
    named = schema.get("type", [])
    named = [named] if isinstance(named, str) else named
    if named and not any(isinstance(value, types[n]) for n in named):
        yield f"{path}: {value!r} is no {named}"
    if isinstance(value, dict):
        yield from (f"{path}.{k}: needed" for k in schema.get("required", []) if k not in value)
        for key, part in value.items():
            inner = schema.get("properties", {}).get(key, schema.get("additionalProperties", True))
            if inner is False:
                yield f"{path}.{key}: unknown"
            elif isinstance(inner, dict):
                yield from violations(part, inner, root, f"{path}.{key}")
    if isinstance(value, list) and isinstance(schema.get("items"), dict):
        for i, part in enumerate(value):
            yield from violations(part, schema["items"], root, f"{path}.{i}")


def references(schema: Any) -> Iterator[str]:
    if isinstance(schema, dict):
        yield from ([schema["$ref"]] if isinstance(schema.get("$ref"), str) else [])
        schema = list(schema.values())
    if isinstance(schema, list):
        for part in schema:
            yield from references(part)


@pytest.mark.parametrize("model", [Recipe, Manifest])
def test_schemas_are_whole(model: type[Recipe] | type[Manifest]) -> None:
    schema = model.model_json_schema()
    assert json.loads(json.dumps(schema)) == schema
    assert {r.removeprefix("#/$defs/") for r in references(schema)} == schema["$defs"].keys()
    assert schema["type"] == "object"


NO_PASSES = ".transformer.passes: 3 is no ['array', 'string']"


@pytest.mark.parametrize("name", SHIPPED)
def test_shipped_recipes_obey_the_schema(name: str) -> None:
    schema = Recipe.model_json_schema()
    data = yaml.safe_load(shipped()[name].read_text())
    assert list(violations(load_recipe(name).model_dump(mode="json"), schema, schema)) == []
    wrong = changed(data, {"video.frame": 1, "target": ..., "transformer.passes": 3, "sampler.leap": None})
    found = set(violations(wrong, schema, schema))
    assert found == {".target: needed", ".video.frame: unknown", NO_PASSES}


def test_shipped_recipes_obey_the_schema_as_they_are_written() -> None:
    schema = Recipe.model_json_schema()
    data = yaml.safe_load(shipped()["tiny"].read_text())
    assert list(violations(data, schema, schema)) == []
