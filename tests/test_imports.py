"""Imports stay light: converters, runtimes and torch are loaded by who uses them."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from light_commands import COMMANDS, CONVERTERS, HEAVY, loaded_after

TIMESTEPS = """
import toolchain
from toolchain.models.family import find_family
recipe = toolchain.load_recipe('tiny')
assert len(find_family(recipe.model).timesteps(recipe)) == recipe.sampler.steps
"""


@pytest.mark.parametrize(
    "code",
    [
        "import toolchain",
        "import toolchain.cli",
        "import toolchain.formats.recipe, toolchain.formats.manifest, toolchain.formats.bundle, toolchain.errors",
        "import toolchain\ntoolchain.load_recipe('tiny')",
        "import toolchain.player, toolchain.player.prompt, toolchain.player.tokenizer, toolchain.player.leap",
        TIMESTEPS,
        "import toolchain.ui.console, toolchain.listener, toolchain.validation",
        "import toolchain.planning.loading.planner, toolchain.planning.loading.simulate, toolchain.planning.cost",
    ],
)
def test_nothing_heavy_is_imported(code: str, tmp_path: Path) -> None:
    assert loaded_after(code, tmp_path) == "set()"


def test_commands_that_need_nothing_load_nothing(tmp_path: Path) -> None:
    named = (
        "compile",
        "init",
        "plan",
        "lock",
        "quantize",
        "tune",
        "inspect",
        "verify",
        "diff",
        "report",
        "calibrate",
        "replan",
        "play",
        "sign",
        "verify-signature",
        "bom",
        "card",
    )
    light = [["--help"], ["--version"], *([name, "--help"] for name in named), ["cache"]]
    light += [["schema", "recipe"], ["schema", "manifest"], ["recipes"], ["devices", "--json"]]
    code = f"{COMMANDS}assert [run(*a) for a in {light}] == [0] * {len(light)}\n"
    code += "assert run('tiny', '-o', 'new', '--set', 'sampler.stepz=3') == 2 == run('tyni', '-o', 'new')"
    assert loaded_after(code, tmp_path) == "set()"


def test_passes_and_targets_load_no_converter(tmp_path: Path) -> None:
    targets = "import targets.coreml, targets.executorch, targets.onnx"
    code = f"{targets}\nassert not set({HEAVY}) & set(sys.modules)\nimport passes.partition, passes.token_merge"
    assert loaded_after(code, tmp_path, CONVERTERS) == "set()"


def test_every_public_name_is_there(tmp_path: Path) -> None:
    import toolchain

    assert sorted(toolchain.__all__) == list(toolchain.__all__)
    assert all(getattr(toolchain, name).__name__ == name for name in toolchain.__all__)
    with pytest.raises(AttributeError, match="has no attribute 'no_such_name'"):
        _ = toolchain.no_such_name


def test_the_command_needs_no_home(tmp_path: Path) -> None:
    env = {k: v for k, v in os.environ.items() if k not in ("HOME", "XDG_CACHE_HOME")}
    args = [sys.executable, "-m", "toolchain.cli", "--version"]
    done = subprocess.run(args, capture_output=True, text=True, cwd=tmp_path, env=env, check=True)
    assert done.stdout.strip().count(".") >= 1
