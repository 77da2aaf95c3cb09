"""Bundles under Ninja and CMake, run for real: a second build does nothing, and what has changed is made again."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from importlib.metadata import files
from pathlib import Path
from typing import Any

import pytest
import yaml
from support import edit_recipe

ROOT = Path(__file__).parents[1]
EXAMPLES = ROOT / "examples"
COMMAND = [sys.executable, "-m", "toolchain.cli"]
IDLE = "no work to do"


@pytest.fixture
def project(onnx_bundle: Any, tmp_path: Path) -> Path:
    """A folder with a recipe and its checkpoint, of which the cache has the artifacts."""
    there: Path = shutil.copytree(onnx_bundle.project, tmp_path / "project", ignore=shutil.ignore_patterns("bundle"))
    return there


def program(package: str) -> str:
    """A program that comes with a Python package of its name."""
    return next(str(f.locate()) for f in files(package) or () if f.name == package and f.parent.name == "bin")


def run(*args: str | Path, cwd: Path) -> str:
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([*map(str, args)], cwd=cwd, env=env, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


def touch(path: Path) -> None:
    os.utime(path)


@pytest.mark.slow
def test_cmake_and_ninja(project: Path) -> None:
    shutil.copytree(EXAMPLES / "cmake", project / "app with space")
    build = project / "build"
    sets = (
        f"-DSORA_COMPILE={';'.join(COMMAND)}",
        "-DRECIPE=../recipe.yaml",
        f"-DCMAKE_MAKE_PROGRAM={program('ninja')}",
    )
    run(program("cmake"), "-G", "Ninja", "-S", "app with space", "-B", "build", *sets, cwd=project)
    cmake = (program("cmake"), "--build", "build")
    assert IDLE not in run(*cmake, cwd=project)
    manifest = build / "film" / "manifest.json"
    first = manifest.read_text()
    assert IDLE in run(*cmake, cwd=project)

    touch(project / "checkpoint" / "config.json")  # known from the depfile alone
    assert "nothing has changed" in run(*cmake, cwd=project)
    assert IDLE in run(*cmake, cwd=project)
    edit_recipe(project, sampler__guidance=3.0)
    assert IDLE not in run(*cmake, cwd=project)
    assert manifest.read_text() != first
    assert IDLE in run(*cmake, cwd=project)


@pytest.mark.slow
def test_ninja_alone(project: Path) -> None:
    (project / "recipe.yaml").rename(project / "film.yaml")
    text = (EXAMPLES / "ninja" / "build.ninja").read_text()
    (project / "build.ninja").write_text(text.replace("sora = sora-compile", f"sora = {' '.join(COMMAND)}"))
    ninja = (program("ninja"),)
    assert IDLE not in run(*ninja, cwd=project)
    assert IDLE in run(*ninja, cwd=project)
    touch(project / "film.yaml")
    assert "nothing has changed" in run(*ninja, cwd=project)
    assert IDLE in run(*ninja, cwd=project)


def test_examples_that_are_not_run_can_be_read() -> None:
    """Starlark is a part of Python's grammar."""
    for file in ("sora.bzl", "BUILD.bazel"):
        compile((EXAMPLES / "bazel" / file).read_text(), file, "exec")
    workflow = yaml.safe_load((EXAMPLES / "github-actions" / "bundles.yml").read_text())
    steps = workflow["jobs"]["film"]["steps"]
    assert any(step.get("uses", "").startswith("actions/cache@") for step in steps)
