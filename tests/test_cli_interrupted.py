"""The command interrupted or killed: nothing half-written stays, and what stays is removed by the next run."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from support import contents, edit_recipe

slow = pytest.mark.slow


def wait_for(process: subprocess.Popen[str], ready: Callable[[], bool]) -> None:
    for _ in range(2400):
        if ready():
            return
        assert process.poll() is None, process.communicate()
        time.sleep(0.05)
    process.kill()
    raise AssertionError("never got there")


def partial(project: Path) -> list[Path]:
    return list(project.glob(".bundle.partial-*"))


MOMENTS = {"before lowering": "tables.safetensors", "lowering": "caption*"}
"""What the build has written by then: of the second moment, the first of its blocks."""


def underway(project: Path, moment: str) -> bool:
    return any(True for p in partial(project) for _ in p.rglob(MOMENTS[moment]))


@slow
@pytest.mark.parametrize("moment", MOMENTS)
@pytest.mark.parametrize(
    ("target", "number", "code", "says"),
    [
        ("coreml", signal.SIGINT, 130, "sora-compile: interrupted; nothing was written\n"),
        ("onnx", signal.SIGTERM, 143, ""),
    ],
)
def test_interrupted(
    start_cli: Any, project: Path, moment: str, target: str, number: int, code: int, says: str
) -> None:
    before = contents(project)
    process = start_cli("recipe.yaml", "-o", "bundle", "--set", f"target={target}", cwd=project)
    wait_for(process, lambda: underway(project, moment))
    process.send_signal(number)
    out, err = process.communicate(timeout=120)
    assert (process.returncode, out, err) == (code, "", says)
    assert contents(project) == before


WRAPPED = """
import os, signal, time
signal.signal(signal.SIGINT, signal.default_int_handler)  # a background job is born deaf to it
from toolchain.ui.console import Console
with Console(as_json=False, verbose=False):
    try:
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(10)
    except KeyboardInterrupt as e:
        raise RuntimeError("validator could not be built") from e
"""


def test_an_interrupt_that_a_library_wraps_is_one(tmp_path: Path) -> None:
    """pydantic does so while it builds a model, executorch while it loads a program."""
    done = subprocess.run([sys.executable, "-c", WRAPPED], capture_output=True, text=True, cwd=tmp_path)
    assert (done.returncode, done.stderr) == (130, "sora-compile: interrupted; nothing was written\n")


@slow
def test_what_a_killed_run_left_is_removed_by_the_next(start_cli: Any, run_cli: Any, project: Path) -> None:
    process = start_cli("recipe.yaml", "-o", "bundle", cwd=project)
    wait_for(process, lambda: underway(project, "before lowering"))
    process.kill()
    process.communicate(timeout=60)
    assert partial(project) and not (project / "bundle").exists()
    edit_recipe(project, transformer__checkpoint="nowhere")
    assert run_cli("recipe.yaml", "-o", "bundle", cwd=project).code == 3
    assert sorted(p.name for p in project.iterdir()) == ["checkpoint", "recipe.yaml"]


@slow
def test_leftovers_of_earlier_versions(run_cli: Any, project: Path) -> None:
    """They have no lock, so a young one may be somebody's, whatever process its name tells of; nobody stumbles."""
    young = project / ".b.partial-999999999-xyzb.scratch"
    young.mkdir()
    edit_recipe(project, transformer__checkpoint="nowhere")
    ran = run_cli("recipe.yaml", "-o", "b", cwd=project)
    assert ran.code == 3, ran.err
    assert young.exists()


@slow
def test_a_running_build_is_no_leftover(start_cli: Any, run_cli: Any, project: Path) -> None:
    process = start_cli("recipe.yaml", "-o", "bundle", cwd=project)
    wait_for(process, lambda: underway(project, "before lowering"))
    mine = partial(project)
    run_cli("recipe.yaml", "-o", "bundle", "--set", "transformer.checkpoint=nowhere", cwd=project)
    assert set(mine) <= set(partial(project))
    process.terminate()
    process.communicate(timeout=120)
