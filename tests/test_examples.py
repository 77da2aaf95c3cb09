"""The example plug-in, installed as a user would: found by the command, compiled with, played, and held to the kit."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[1]
EXAMPLE = ROOT / "examples" / "their_plugin"
SMALL = ("sampler.steps=2", "sampler.leap=null", "gate.golden=null", "video.height=16", "video.width=16")
PASSES = "transformer.passes=[clamp-outputs, token-merge, partition]"


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Mapping[str, str]:
    """The environment of processes that have the plug-in; ``THEIRS`` is the folder it is installed in."""
    folder = tmp_path_factory.mktemp("theirs")
    shutil.copytree(EXAMPLE, folder / "source", ignore=shutil.ignore_patterns("__pycache__"))
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--no-index"]
    options = ["--no-deps", "--no-build-isolation", "--target", str(folder / "site")]
    subprocess.run([*pip, *options, str(folder / "source")], check=True, timeout=300)
    path = os.pathsep.join((str(folder / "site"), str(ROOT)))
    return {**os.environ, "PYTHONPATH": path, "THEIRS": str(folder / "site" / "their_plugin")}


def python(env: Mapping[str, str], cwd: Path, *args: str) -> str:
    done = subprocess.run([sys.executable, *args], cwd=cwd, env=dict(env), capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


COMMANDS = """
import json, sys
from toolchain.cli import main
for arguments in json.loads(sys.argv[1]):
    sys.argv = ["sora-compile", *arguments]
    try:
        main()
    except SystemExit as e:
        assert not e.code, (arguments, e.code)
"""
"""Runs the command several times in one process, which imports torch once."""


def test_plan_compile_play(installed: Mapping[str, str], tmp_path: Path) -> None:
    sets = [a for s in ("target=torch-export", PASSES, *SMALL) for a in ("--set", s)]
    assert "torch-export" in python(installed, tmp_path, "-m", "toolchain.cli", "plan", "tiny", *sets)
    commands = (
        ["tiny", *sets, "-o", "bundle"],
        ["verify", "bundle"],
        ["play", "bundle", "--prompt", "a circle", "-o", "circle.mp4"],
    )
    python(installed, tmp_path, "-c", COMMANDS, json.dumps(commands))
    blocks = sorted(p.name for p in (tmp_path / "bundle" / "transformer").glob("*.ptx"))
    assert blocks, "no artifact of theirs"
    assert (tmp_path / "circle.mp4").stat().st_size > 0


def test_their_own_tests(installed: Mapping[str, str], tmp_path: Path) -> None:
    shutil.copytree(EXAMPLE / "tests", tmp_path / "tests", ignore=shutil.ignore_patterns("__pycache__"))
    assert "2 passed" in python(installed, tmp_path, "-m", "pytest", "-q", "-p", "no:cacheprovider", "tests")


def test_a_helper_is_part_of_the_key(installed: Mapping[str, str], tmp_path: Path) -> None:
    code = "from toolchain.system.code import code_digest as d; print(d('their_plugin.target'))"
    helper = Path(installed["THEIRS"]) / "programs.py"
    before, text = python(installed, tmp_path, "-c", code), helper.read_text()
    assert python(installed, tmp_path, "-c", code) == before
    try:
        helper.write_text(f"{text}\n# another line\n")
        assert python(installed, tmp_path, "-c", code) != before
    finally:
        helper.write_text(text)
    assert python(installed, tmp_path, "-c", code) == before
