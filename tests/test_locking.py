"""Locks: what a build was given, and how a build that may take nothing else says what differs."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file
from support import contents, edit_recipe

from toolchain.build.locking import frozen, make_lock
from toolchain.errors import RecipeError
from toolchain.formats.lock import Lock, lock_path, read_lock
from toolchain.formats.recipe_file import parse_source, recipe_source
from toolchain.weights.hub import OFFLINE_VARIABLE, is_offline

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture
def team(project: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A recipe that extends another and uses a variable, locked."""
    monkeypatch.delenv("NAME", raising=False)
    (project / "own").mkdir()
    child = project / "own" / "r.yaml"
    child.write_text("extends: ../recipe.yaml\nenv: {NAME: small}\nname: ${NAME}\n")
    source = recipe_source(child)
    lock_path(child).write_text(make_lock(source, parse_source(source)).to_json())
    return child


def refused(recipe: Path, *overrides: str) -> str:
    source = recipe_source(recipe)
    with pytest.raises(RecipeError) as raised, frozen(source, parse_source(source, overrides)):
        pytest.fail("not refused")
    assert "\n" not in str(raised.value)
    return str(raised.value)


def test_what_is_locked(team: Path) -> None:
    lock = read_lock(team)
    assert lock_path(team).name == "r.yaml.lock"
    assert sorted(lock.recipes) == ["../recipe.yaml", "r.yaml"]
    assert lock.env == {"NAME": "small"}
    assert sorted(lock.inputs) == ["device", "transformer.checkpoint", "transformer.config"]
    assert {"sora-compile", "torch", "onnx"} <= lock.tools.keys()
    assert Lock.model_validate(json.loads(lock.to_json())) == lock


def test_nothing_has_changed(team: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(OFFLINE_VARIABLE)
    source = recipe_source(team)
    with frozen(source, parse_source(source, ["sampler.steps=5"])):
        assert is_offline() and os.environ[OFFLINE_VARIABLE] == "1"
    assert not is_offline()


def checkpoint(team: Path) -> None:
    file = team.parents[1] / "checkpoint" / "model.safetensors"
    save_file({k: v + 1 for k, v in load_file(file).items()}, file)


def config(team: Path) -> None:
    file = team.parents[1] / "checkpoint" / "config.json"
    file.write_text(file.read_text() + "\n")


def base(team: Path) -> None:
    edit_recipe(team.parents[1], sampler__steps=7)


def tools(team: Path) -> None:
    data = json.loads(lock_path(team).read_text())
    data["tools"] |= {"torch": "1.0", "onnx": "0.1"}
    lock_path(team).write_text(json.dumps(data))


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (checkpoint, "not what was locked: transformer.checkpoint (locked "),
        (config, "not what was locked: transformer.config (locked "),
        (base, "not what was locked: ../recipe.yaml (locked "),
        (tools, "not what was locked: tools.onnx (locked '0.1', found '"),
    ],
)
def test_what_differs_is_named(team: Path, change: Callable[[Path], None], named: str) -> None:
    change(team)
    text = refused(team)
    assert text.startswith(f"{team}.lock: {named}")
    assert f"if that is meant, write it anew with 'sora-compile lock {team}'" in text
    assert text.count("locked ") == (2 if change is tools else 1)


def test_variables_and_overrides(team: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert "device (locked " in refused(team, "device=iphone-15-pro")
    assert "transformer.checkpoint (locked " in refused(team, "transformer.checkpoint=shipped://tiny/transformer")
    monkeypatch.setenv("NAME", "other")
    assert "env.NAME (locked 'small', found 'other')" in refused(team)


def test_locks_that_are_none(team: Path) -> None:
    lock_path(team).write_text('{"version": 1}')
    assert "recipes: field required" in refused(team)
    lock_path(team).write_text("[")
    assert "not YAML" in refused(team)
    lock_path(team).unlink()
    text = refused(team)
    assert text == f"{team}.lock: there is no lock of '{team}'; write it with 'sora-compile lock {team}'"


@pytest.mark.parametrize(
    ("key", "location"),
    [
        ("transformer.checkpoint", "hf://me/it"),
        ("transformer.checkpoint", "hf://me/it@main"),
        ("transformer.checkpoint", f"hf://me/it@{COMMIT[:-1]}"),
        ("transformer.loras.0.checkpoint", "hf://me/lora@v1/a.safetensors"),
    ],
)
def test_what_is_not_pinned_is_refused(team: Path, key: str, location: str) -> None:
    loras = f"transformer.loras=[{location}]"
    text = refused(team, f"{key}={location}" if "loras" not in key else loras)
    assert text.startswith(f"{key}: '{location}' is not pinned to a commit")


def test_pinned_and_in_the_cache(team: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants

    snapshot = tmp_path / "hub" / "models--me--it" / "snapshots" / COMMIT
    shutil.copytree(team.parents[1] / "checkpoint", snapshot)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    source = recipe_source(team)
    recipe = parse_source(source, [f"transformer.checkpoint=hf://me/it@{COMMIT}"])
    with frozen(source, recipe):  # the same weights as were locked
        pass
    save_file({k: v + 1 for k, v in load_file(snapshot / "model.safetensors").items()}, snapshot / "model.safetensors")
    assert "transformer.checkpoint (locked " in refused(team, f"transformer.checkpoint=hf://me/it@{COMMIT}")


def test_pinned_and_not_in_the_cache(team: Path, run_cli: Any) -> None:
    override = f"transformer.checkpoint=hf://me/no-such@{COMMIT}"
    ran = run_cli("r.yaml", "-o", "b", "--frozen", "--set", override, cwd=team.parent)
    assert (ran.code, ran.out) == (3, "")
    assert "no network and nothing in the cache" in ran.err


def test_the_command(team: Path, run_cli: Any) -> None:
    written = lock_path(team).read_text()
    lock_path(team).unlink()
    ran = run_cli("r.yaml", "-o", "b", "--frozen", cwd=team.parent)
    assert ran.code == 2 and "there is no lock of 'r.yaml'" in ran.err
    ran = run_cli("lock", "r.yaml", cwd=team.parent)
    assert (ran.code, ran.out.splitlines()[0], ran.err) == (0, "r.yaml.lock", "")
    assert lock_path(team).read_text() == written
    ran = run_cli("lock", "r.yaml", "--json", cwd=team.parent)
    assert json.loads(ran.out)["path"] == "r.yaml.lock"
    for args in (("lock", "tiny"), ("tiny", "-o", "b", "--frozen")):
        ran = run_cli(*args, cwd=team.parent)
        assert ran.code == 2 and "'tiny' is a shipped recipe, which has no lock; extend it" in ran.err
    ran = run_cli("r.yaml", "-o", "b", "--frozen", "--calibration", "c.yaml", cwd=team.parent)
    assert ran.code == 2 and "--frozen and --calibration" in ran.err
    assert sorted(p.name for p in team.parent.iterdir()) == ["r.yaml", "r.yaml.lock"]


@pytest.mark.slow
def test_a_frozen_build_gives_the_same_bytes(team: Path, run_cli: Any) -> None:
    for out, more in (("a", ()), ("b", ("--frozen", "--depfile", "d"))):
        ran = run_cli("r.yaml", "-o", out, "--no-gate", *more, cwd=team.parent)
        assert ran.code == 0, ran.err
    assert contents(team.parent / "a") == contents(team.parent / "b")
    assert f"{lock_path(team)}" in (team.parent / "d").read_text()
