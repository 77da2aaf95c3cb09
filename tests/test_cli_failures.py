"""What the command says when it fails: one clear line, an exit code, and nothing left behind."""

from __future__ import annotations

import json
import os
import pickle
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from support import contents, edit_recipe

slow = pytest.mark.slow
Ruin = Callable[[Path], object]


def weights(project: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    path = project / "checkpoint" / "model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path)


def truncate(project: Path) -> None:
    path = project / "checkpoint" / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1000])


def other_model(project: Path) -> None:
    tensors = {f"encoder.block.{i}.weight": torch.zeros(2) for i in range(30)}
    save_file(tensors, project / "checkpoint" / "model.safetensors")


class Payload:
    """What is pickled where weights should be: code."""

    def __reduce__(self) -> Any:
        return os.system, ("touch ran",)


def pickled(dump: Callable[[Path], object]) -> Ruin:
    def ruin(project: Path) -> None:
        dump(project / "checkpoint" / "weights.pt")
        edit_recipe(project, transformer__checkpoint="checkpoint/weights.pt")

    return ruin


def not_a_bundle(project: Path) -> None:
    (project / "bundle").mkdir()
    (project / "bundle" / "thesis.txt").write_text("years of work")


def in_place_of_a_folder(project: Path) -> None:
    (project / "file").write_text("not a folder")


FAILURES: dict[str, tuple[int, Ruin, list[str], str]] = {
    # the recipe: what cannot be
    "misspelt key": (
        2,
        lambda p: edit_recipe(p, sampler__stepz=3),
        [],
        r"sampler\.stepz: unknown key; did you mean 'steps'",
    ),
    "wrong type": (2, lambda p: edit_recipe(p, video__frames="many"), [], r"video\.frames: .* integer, got str 'many'"),
    "merged steps": (2, lambda p: edit_recipe(p, sampler__merged_steps=7), [], "merged_steps 7 is more than steps 6"),
    "frames": (
        2,
        lambda p: edit_recipe(p, video__frames=16),
        [],
        "video: frames is 16: the official timesteps are not a num",
    ),
    "sizes": (
        2,
        lambda p: edit_recipe(p, video__height=8),
        [],
        r"video\.height: input should be greater than or equal to 16",
    ),
    "override": (2, lambda p: None, ["--set", "sampler.steps"], r"--set sampler\.steps: expected key=value"),
    "no such recipe": (2, lambda p: (p / "recipe.yaml").unlink(), [], r"recipe 'recipe\.yaml' is neither a file nor"),
    "not YAML": (2, lambda p: (p / "recipe.yaml").write_text("a: [\n"), [], r"recipe\.yaml:2: not YAML: "),
    # the recipe: what is not known
    "unknown pass": (
        2,
        lambda p: edit_recipe(p, transformer__passes=["token-mrege"]),
        [],
        r"transformer\.passes\.0: no pass is called 'token-mrege'; did you mean 'token-merge'\?",
    ),
    "unknown target": (
        2,
        lambda p: edit_recipe(p, target="coermel"),
        [],
        "target: no target is called 'coermel'; did you mean",
    ),
    "unknown option": (
        2,
        lambda p: edit_recipe(p, target={"name": "coreml", "precisoin": 1}),
        [],
        r"target\.precisoin: unknown key; did you mean 'precision'\?",
    ),
    "print after": (2, lambda p: None, ["--print-after", "fuse"], "--print-after fuse: no such pass in this recipe"),
    # the checkpoint
    "missing file": (
        3,
        lambda p: edit_recipe(p, transformer__checkpoint="m.safetensors"),
        [],
        r"'m\.safetensors' does not ex",
    ),
    "missing folder": (
        3,
        lambda p: edit_recipe(p, transformer__checkpoint="nowhere"),
        [],
        "checkpoint 'nowhere' does not exist",
    ),
    "no weights": (3, lambda p: (p / "checkpoint" / "model.safetensors").unlink(), [], "no weights in 'checkpoint'"),
    "no config": (3, lambda p: (p / "checkpoint" / "config.json").unlink(), [], r"no config\.json beside 'checkpoint'"),
    "truncated": (3, truncate, [], r"model\.safetensors' is truncated or not a safetensors file"),
    "wrong shape": (
        3,
        lambda p: weights(p, lambda w: w.update({"t_block.1.bias": torch.zeros(7)})),
        [],
        r"does not fit transformer: 1 of the wrong shape \(t_block\.1\.bias is \[7\], expected \[384\]\); check its co",
    ),
    "missing and extra key": (
        3,
        lambda p: weights(p, lambda w: w.update({"extra": w.pop("rope.freqs")})),
        [],
        r"1 missing \(rope\.freqs\); 1 unexpected \(extra\)",
    ),
    "another model": (
        3,
        other_model,
        [],
        r"missing \(.*, and \d+ more\); 30 unexpected \(.*\); it is of another model or",
    ),
    "pickle": (3, pickled(lambda f: torch.save(Payload(), f)), [], r"weights\.pt' holds more than weights; refused"),
    "changed": (
        3,
        lambda p: edit_recipe(p, transformer__sha256="0" * 64),
        [],
        "has sha256 [0-9a-f]{64}, the recipe expects 0{64}",
    ),
    "hub": (
        3,
        lambda p: edit_recipe(p, transformer__checkpoint="hf://owner/name"),
        [],
        "cannot fetch 'hf://owner/name'",
    ),
    # passes
    "cannot be cut": (
        4,
        lambda p: edit_recipe(p, transformer__passes=["token-merge", {"partition": {"blocks": 9}}]),
        [],
        "pass 'partition' on transformer: blocks: 9 is more than the 1 layers",
    ),
    # the output
    "not a bundle": (2, not_a_bundle, [], r"-o .*bundle: exists and is not a bundle; choose another folder or remove"),
    "a file": (2, lambda p: (p / "bundle").write_text("mine"), [], r"-o .*bundle: exists and is not a bundle"),
    "in a file": (6, in_place_of_a_folder, ["-o", "file/bundle"], r"-o .*file/bundle: cannot be written: "),
}
FAST = {"misspelt key", "wrong type", "merged steps", "frames", "sizes", "override", "no such recipe", "not YAML"}


@pytest.mark.parametrize("name", [n if n in FAST else pytest.param(n, marks=slow) for n in FAILURES])
def test_failures(run_cli: Any, project: Path, name: str) -> None:
    code, ruin, arguments, message = FAILURES[name]
    ruin(project)
    before = contents(project)
    output = [] if "-o" in arguments else ["-o", "bundle"]
    ran = run_cli("recipe.yaml", *output, *arguments, cwd=project)
    assert ran.code == code, ran.err
    assert ran.out == ""
    (line,) = ran.err.splitlines()
    assert line.startswith("sora-compile: ")
    assert re.search(message, line), line
    assert contents(project) == before


@slow
@pytest.mark.parametrize("name", ["misspelt key", "wrong shape", "cannot be cut", "in a file"])
def test_the_shell_is_told_the_same(run_cli: Any, run_cli_process: Any, project: Path, name: str) -> None:
    """One failure of each exit code, in a process of its own."""
    _, ruin, arguments, _ = FAILURES[name]
    ruin(project)
    output = [] if "-o" in arguments else ["-o", "bundle"]
    before = contents(project)
    assert run_cli_process("recipe.yaml", *output, *arguments, cwd=project) == run_cli(
        "recipe.yaml", *output, *arguments, cwd=project
    )
    assert contents(project) == before


@slow
def test_a_plain_pickle_gives_one_line_too(run_cli: Any, project: Path) -> None:
    pickled(lambda f: f.write_bytes(pickle.dumps(Payload())))(project)
    ran = run_cli("recipe.yaml", "-o", "bundle", cwd=project)
    assert ran.code == 3
    assert not (project / "ran").exists()
    (line,) = ran.err.splitlines()
    assert "holds more than weights" in line


@slow
def test_a_folder_that_cannot_be_written(run_cli: Any, project: Path) -> None:
    if os.geteuid() == 0:  # to whom permissions mean nothing; nobody can write here
        place = Path("/proc")
        if not place.is_dir():
            pytest.skip("needs a user other than root, or /proc")
    else:
        place = project / "locked"
        place.mkdir(mode=0o555)
    ran = run_cli("recipe.yaml", "-o", place / "bundle", cwd=project)
    assert ran.code == 6
    assert re.fullmatch(r"sora-compile: -o /.*/bundle: cannot be written: .+\n", ran.err)
    assert not (place / "bundle").exists()


@slow
def test_a_failure_leaves_no_folders_above_the_bundle(run_cli: Any, project: Path) -> None:
    edit_recipe(project, transformer__checkpoint="nowhere")
    assert run_cli("recipe.yaml", "-o", "some/where/bundle", cwd=project).code == 3
    assert not (project / "some").exists()


@slow
def test_a_failure_leaves_an_older_bundle_as_it_is(run_cli: Any, project: Path, onnx_bundle: Any) -> None:
    shutil.copytree(onnx_bundle.path, project / "bundle")
    truncate(project)
    before = contents(project)
    assert run_cli("recipe.yaml", "-o", "bundle", cwd=project).code == 3
    assert contents(project) == before


def test_errors_for_machines(run_cli: Any, project: Path) -> None:
    edit_recipe(project, sampler__stepz=3)
    ran = run_cli("recipe.yaml", "-o", "bundle", "--json", cwd=project)
    assert ran.code == 2
    assert json.loads(ran.out) == {"error": ran.err.removeprefix("sora-compile: ").strip(), "exit_code": 2}


def test_verbose_errors_have_a_traceback(run_cli: Any, project: Path) -> None:
    edit_recipe(project, sampler__stepz=3)
    lines = run_cli("recipe.yaml", "-o", "bundle", "-v", cwd=project).err.splitlines()
    assert lines[0].startswith("Traceback")
    assert lines[-1].startswith("sora-compile: sampler.stepz")


@pytest.mark.parametrize(
    "arguments",
    [
        ["recipe.yaml"],
        ["recipe.yaml", "-o"],
        ["plan", "recipe.yaml", "--fast"],
        ["inspect"],
        ["recipe.yaml", "a", "-o", "b"],
    ],
    ids=" ".join,
)
def test_wrong_usage(run_cli: Any, project: Path, arguments: list[str]) -> None:
    before = contents(project)
    ran = run_cli(*arguments, cwd=project)
    assert (ran.code, ran.out) == (2, "")
    assert "Error" in ran.err and "Traceback" not in ran.err
    assert contents(project) == before
