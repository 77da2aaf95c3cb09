"""From a recipe to a bundle: that the manifest is complete, and that equal builds are equal to the byte."""

from __future__ import annotations

import hashlib
import json
import math
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors import safe_open
from support import write_checkpoint

import toolchain
from toolchain.errors import BundleError, CheckpointError
from toolchain.formats.manifest import Manifest
from toolchain.formats.recipe_file import load_recipe, parse_recipe
from toolchain.formats.schedule import PRESETS
from toolchain.models.family import find_family
from toolchain.weights.checkpoint import open_checkpoint
from toolchain.weights.digests import checkpoint_digest, tensor_digests

slow = pytest.mark.slow
GOLDEN = Path(__file__).parent / "golden"
OFFICIAL: dict[str, list[float]] = json.loads((GOLDEN / "rflow_timesteps.json").read_text())
COMMIT = "c0ffee" + "0" * 34


def contents(folder: Path) -> dict[str, bytes]:
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


@pytest.fixture(params=["onnx", "coreml"])
def built(request: pytest.FixtureRequest) -> Any:
    return request.getfixturevalue(f"{request.param}_bundle")


def manifest_of(folder: Path) -> dict[str, Any]:
    data: dict[str, Any] = json.loads((folder / "manifest.json").read_text())
    return data


# --- the manifest ------------------------------------------------------------------------------------


@slow
def test_the_manifest_reads_back(built: Any) -> None:
    text = (built.path / "manifest.json").read_text()
    manifest = Manifest.model_validate_json(text)
    assert manifest.model_dump(mode="json") == json.loads(text)
    bundle = toolchain.load_bundle(built.path)
    assert bundle.manifest == manifest
    bundle.check_files()


@slow
def test_every_file_is_listed_with_its_digest(built: Any) -> None:
    listed = {f.path: (f.bytes, f.sha256) for f in toolchain.load_bundle(built.path).files()}
    found = {
        k: (len(v), hashlib.sha256(v).hexdigest()) for k, v in contents(built.path).items() if k != "manifest.json"
    }
    assert listed == found


@slow
def test_every_input_has_a_source_that_is_ready(built: Any) -> None:
    """What a player does: run the blocks in order, and find everything a block needs."""
    component = manifest_of(built.path)["components"]["transformer"]
    blocks = {b["name"]: b for b in component["blocks"]}
    assert component["load_order"] == {"prompt": ["caption"], "step": ["embed", "pair_0", "final"]}
    ready = {f"inputs.{i['name']}": (i["dtype"], i["shape"]) for i in component["inputs"]}
    ready |= {f"tables.{t['name']}": (t["dtype"], t["shape"]) for t in component["tables"]}
    for name in [*component["load_order"]["prompt"], *component["load_order"]["step"]]:
        for needed in blocks[name]["inputs"]:
            dtype, shape = ready[needed["source"]]
            assert shape == needed["shape"]
            assert dtype == needed["dtype"] or needed["source"].startswith("tables.")  # tables are always float32
        ready |= {f"{name}.{o['name']}": (o["dtype"], o["shape"]) for o in blocks[name]["outputs"]}
    results = component["outputs"]
    assert results == [{"source": "final.out", "rate": "step", "gives": "prediction"}]
    assert [ready[r["source"]][1] for r in results] == [[2, 8, 5, 4, 6]]


@slow
def test_every_input_says_what_feeds_it(built: Any) -> None:
    inputs = manifest_of(built.path)["components"]["transformer"]["inputs"]
    assert {i["name"]: (i["rate"], i["feed"]) for i in inputs} == {
        "x": ("step", {"kind": "latents"}),
        "timestep": ("step", {"kind": "timestep"}),
        "y": ("prompt", {"kind": "text_embedding", "unconditional": "null_text"}),
        "mask": ("prompt", {"kind": "token_mask"}),
        "fps": ("step", {"kind": "constant", "value": 24.0}),
    }


@slow
def test_blocks_say_what_they_are(built: Any) -> None:
    manifest = manifest_of(built.path)
    limit = manifest["gate"]["limits"]
    for block in manifest["components"]["transformer"]["blocks"]:
        bytes_ = {"float16": 2, "float32": 4}[manifest["components"]["transformer"]["precision"]]
        stored = {manifest["components"]["transformer"]["precision"]: bytes_ * block["parameters"]}
        assert block["weight_bytes"] == stored
        assert block["functions"] == (["base", "merged"] if block["name"] == "pair_0" else ["base"])
        assert (built.path / block["artifact"]).exists()
        assert all(f["path"].startswith(block["artifact"]) for f in block["files"])
        assert re.fullmatch(r"[0-9a-f]{64}", block["structure"])
        assert list(block["accuracy"]) == block["functions"]
        for measured in block["accuracy"].values():
            assert measured["relative_error"] <= measured["limit"] == limit[manifest["target"]["options"]["precision"]]
            assert measured["cosine"] > 0.999
            assert measured["sqnr_db"] == pytest.approx(-20 * math.log10(measured["relative_error"]), abs=0.01)
        assert list(block["activations"]) == block["functions"]
        assert (built.path / block["goldens"]["path"]).is_file()
    assert (manifest["gate"]["mode"], manifest["gate"]["inputs"]) == ("every", 2)


@slow
def test_tables_hold_the_checkpoints_numbers(built: Any, small_weights: Mapping[str, torch.Tensor]) -> None:
    component = manifest_of(built.path)["components"]["transformer"]
    shapes = {t["name"]: t["shape"] for t in component["tables"]}
    assert shapes == {"null_text": [12, 32], "pos_embed": [1, 6, 64], "rope": [2, 5, 8]}
    with safe_open(built.path / component["tables_file"]["path"], framework="pt") as tables:
        assert {k: list(tables.get_tensor(k).shape) for k in tables.keys()} == shapes  # noqa: SIM118 - not a dict
        assert torch.equal(tables.get_tensor("null_text"), small_weights["y_embedder.y_embedding"])
        angles = torch.arange(5.0)[:, None] * small_weights["rope.freqs"]
        torch.testing.assert_close(tables.get_tensor("rope"), torch.stack((angles.cos(), angles.sin())))


@slow
def test_geometry_sampler_and_tools(built: Any) -> None:
    manifest = manifest_of(built.path)
    geometry = {"frames": 17, "height": 32, "width": 48, "fps": 24, "latent_channels": 4}
    assert manifest["geometry"] == geometry | {"latent_frames": 5, "latent_height": 4, "latent_width": 6}
    dims = {"B": 2, "T": 5, "H": 4, "W": 6, "Hp": 2, "Wp": 3, "S": 6, "N": 30, "L": 12, "C": 64}
    assert manifest["components"]["transformer"]["dims"] == dims
    recipe = load_recipe(built.project / "recipe.yaml")
    schedule = find_family(recipe.model).timesteps(recipe)
    sampler = manifest["sampler"]
    assert sampler["guidance"] == 7.0
    assert sampler["leap"] == {"kind": "static", "after": 3}
    steps = sampler["steps"]
    assert [s["timestep"] for s in steps] == list(schedule[:4])  # three steps and the leap, of six
    assert [s["function"] for s in steps] == ["merged", "merged", "base", "base"]
    assert [s["leap"] for s in steps] == [False, False, False, True]
    assert steps[-1]["dt"] == pytest.approx(schedule[3] / 1000, abs=1e-7)
    assert math.fsum(s["dt"] for s in steps) == pytest.approx(1.0, abs=1e-6)
    converter = {"onnx": "onnx", "coreml": "coremltools"}[manifest["target"]["name"]]
    assert {"sora-compile", "python", "torch", converter} <= manifest["tools"].keys()


@pytest.mark.parametrize(
    "key", [k for k in OFFICIAL if "float32" in k and "frames=16" not in k and not k.startswith("144")]
)
def test_timesteps_are_the_official_ones(recipe_data: dict[str, Any], key: str) -> None:
    size, frames, _, discrete = (part.split("=")[-1] for part in key.split("|"))
    height, width = map(int, size.split("_")[-1].split("x"))
    recipe_data["video"] = {"frames": int(frames), "height": height, "width": width}
    recipe_data["sampler"] = {"steps": 30, "discrete_timesteps": discrete == "True"}
    recipe = parse_recipe(recipe_data)
    assert list(find_family(recipe.model).timesteps(recipe)) == OFFICIAL[key]


# --- building again ----------------------------------------------------------------------------------


@slow
def test_the_resolved_recipe_leaves_nothing_open(built: Any) -> None:
    data = yaml.safe_load((built.path / "recipe.yaml").read_text())
    recipe = load_recipe(built.path / "recipe.yaml")
    checkpoint = open_checkpoint("checkpoint", built.project)
    assert data["transformer"]["sha256"] == checkpoint_digest(tensor_digests(checkpoint))
    assert data["transformer"]["config"]["depth"] == 1
    assert [p.name for p in recipe.transformer.passes] == ["token-merge", "partition"]
    assert data["target"]["name"] == manifest_of(built.path)["target"]["name"]  # --set is applied
    assert data["target"]["precision"] == manifest_of(built.path)["target"]["options"]["precision"]
    assert recipe.to_yaml() == (built.path / "recipe.yaml").read_text()


@slow
@pytest.mark.parametrize("target", ["onnx", "coreml"])
def test_the_resolved_recipe_gives_the_same_bundle(
    request: pytest.FixtureRequest, run_cli_process: Any, tmp_path: Path, target: str
) -> None:
    """At another path, with other hashes, over an older bundle: the same bytes."""
    built = request.getfixturevalue(f"{target}_bundle")
    elsewhere = tmp_path / "some where" / "else"
    shutil.copytree(built.project / "checkpoint", elsewhere / "checkpoint")
    shutil.copytree(built.path, elsewhere / "again")
    (elsewhere / "again" / "stray.txt").write_text("not of this build")
    (elsewhere / "again" / "recipe.yaml").write_text("old")
    args = ("compile", built.path / "recipe.yaml", "-o", elsewhere / "again", "--json")
    ran = run_cli_process(*args, cwd=elsewhere, env={"PYTHONHASHSEED": "4321"})
    assert ran.code == 0, ran.err
    first, second = contents(built.path), contents(elsewhere / "again")
    assert first.keys() == second.keys()
    assert [name for name in first if first[name] != second[name]] == []
    answer = json.loads(ran.out)
    assert answer["bundle"] == str(elsewhere / "again")
    assert answer["manifest"] == manifest_of(built.path)
    assert sorted(p.name for p in elsewhere.iterdir()) == ["again", "checkpoint"]


@slow
def test_another_kind_of_recipe(
    run_cli_process: Any, tmp_path: Path, one_pair: Any, recipe_data: dict[str, Any]
) -> None:
    """From the hub, one frame given as condition, no merging, a dynamic leap."""
    repo = tmp_path / "hub" / "models--owner--name"
    write_checkpoint(repo / "snapshots" / COMMIT, *one_pair)
    (repo / "refs").mkdir()
    (repo / "refs" / "main").write_text(COMMIT)
    recipe_data["video"]["frames"] = 1
    recipe_data["sampler"] = {"steps": 20, "leap": "code"}
    recipe_data["transformer"] = {"checkpoint": "hf://owner/name", "frame_conditions": True}
    recipe_data["target"] = {"name": "coreml", "precision": "float32"}
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe_data))
    ran = run_cli_process("recipe.yaml", "-o", "bundle", cwd=tmp_path, env={"HF_HUB_CACHE": str(tmp_path / "hub")})
    assert ran.code == 0, ran.err
    manifest = manifest_of(tmp_path / "bundle")
    sampler = manifest["sampler"]
    assert sampler["leap"] == PRESETS["code"].resolve(20).model_dump()
    assert [s["function"] for s in sampler["steps"]] == ["base"] * 20
    assert not any(s["leap"] for s in sampler["steps"])
    component = manifest["components"]["transformer"]
    assert {i["name"]: i["shape"] for i in component["inputs"]}["x_mask"] == [2, 1]
    assert all(b["functions"] == ["base"] for b in component["blocks"])
    assert {i["dtype"] for b in component["blocks"] for i in b["inputs"]} == {"float32"}
    resolved = yaml.safe_load((tmp_path / "bundle" / "recipe.yaml").read_text())
    assert resolved["transformer"]["checkpoint"] == f"hf://owner/name@{COMMIT}"
    assert resolved["sampler"]["leap"]["kind"] == "dynamic"


# --- the gate ----------------------------------------------------------------------------------------


@slow
def test_a_block_that_fails_names_itself(run_cli: Any, project: Path) -> None:
    before = contents(project)
    args = ("recipe.yaml", "-o", "bundle", "--set", "gate.max_relative_error.float32=1.0e-12")
    ran = run_cli(*args, cwd=project)
    assert (ran.code, ran.out) == (5, "")
    *table, line = ran.err.splitlines()
    assert "what the artifact gave, step by step" in table[0]
    assert re.match(
        r"sora-compile: transformer: block '\w+', function 'base': relative error \S+ is over the limit 1e-12 \(", line
    )
    assert contents(project) == before


@slow
def test_a_limit_of_a_precision_that_is_not_there(run_cli: Any, project: Path) -> None:
    args = ("plan", "recipe.yaml", "--set", "gate.max_relative_error={flaot32: 0.1}")
    ran = run_cli(*args, cwd=project)
    assert ran.code == 2
    assert "did you mean 'float32'" in ran.err


def test_limits_as_people_write_them(project: Path) -> None:
    recipe = load_recipe(project / "recipe.yaml", ["gate.max_relative_error.float32=1e-3"])
    assert recipe.gate.max_relative_error == {"float32": 1e-3}


# --- the library -------------------------------------------------------------------------------------


def test_graphs_are_shown_to_a_listener(project: Path) -> None:
    class Notes(toolchain.Listener):
        def __init__(self) -> None:
            self.seen: list[tuple[str, str, int]] = []

        def graph(self, component: str, after: str, graph: Any) -> None:
            self.seen.append((component, after, len(graph.functions)))

    notes = Notes()
    recipe = toolchain.load_recipe(project / "recipe.yaml")
    planned = toolchain.plan(recipe, base=project, listener=notes)
    assert [b.name for b in planned.blocks][-2:] == ["pair_0", "final"]
    passes = [("capture", 1), ("token-merge", 2), ("legalise", 2), ("partition", 2)]
    assert notes.seen == [("transformer", name, functions) for name, functions in passes]


def test_a_library_call_that_fails_leaves_nothing(project: Path) -> None:
    recipe = toolchain.load_recipe(project / "recipe.yaml", ["transformer.checkpoint=nowhere"])
    with pytest.raises(CheckpointError):
        toolchain.compile_recipe(recipe, project / "bundle", base=project)
    assert sorted(p.name for p in project.iterdir()) == ["checkpoint", "recipe.yaml"]


def test_what_is_no_bundle(tmp_path: Path) -> None:
    for content in (None, "", "[]", '{"name": 1}', "\udcff"):
        if content is not None:
            (tmp_path / "manifest.json").write_text(content, errors="surrogateescape")
        with pytest.raises(BundleError, match=re.escape(str(tmp_path))):
            toolchain.load_bundle(tmp_path)
