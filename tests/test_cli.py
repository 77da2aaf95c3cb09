"""The command, as a user runs it: in a process of its own, judged by its exit code and what it prints where."""

from __future__ import annotations

import json
import os
import pickle
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

slow = pytest.mark.slow
Ruin = Callable[[Path], object]


def contents(folder: Path) -> dict[str, bytes | None]:
    """Everything under a folder: files with their bytes, folders and links with None."""
    found = sorted(folder.rglob("*"))
    return {p.relative_to(folder).as_posix(): p.read_bytes() if p.is_file() else None for p in found}


def edit(project: Path, **changes: Any) -> None:
    """Change keys of the project's recipe; ``__`` stands for the dot."""
    path = project / "recipe.yaml"
    data = yaml.safe_load(path.read_text())
    for key, value in changes.items():
        *parents, last = key.split("__")
        place = data
        for part in parents:
            place = place[part]
        place[last] = value
    path.write_text(yaml.safe_dump(data))


# --- one clear line, an exit code, and nothing left behind -------------------------------------------


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
        edit(project, transformer__checkpoint="checkpoint/weights.pt")

    return ruin


def not_a_bundle(project: Path) -> None:
    (project / "bundle").mkdir()
    (project / "bundle" / "thesis.txt").write_text("years of work")


def in_place_of_a_folder(project: Path) -> None:
    (project / "file").write_text("not a folder")


FAILURES: dict[str, tuple[int, Ruin, list[str], str]] = {
    # the recipe: what cannot be
    "misspelt key": (2, lambda p: edit(p, sampler__stepz=3), [], r"sampler\.stepz: unknown key; did you mean 'steps'"),
    "wrong type": (2, lambda p: edit(p, video__frames="many"), [], r"video\.frames: .* integer, got str 'many'"),
    "merged steps": (2, lambda p: edit(p, sampler__merged_steps=7), [], "merged_steps 7 is more than steps 6"),
    "frames": (2, lambda p: edit(p, video__frames=16), [], "video: frames is 16: the official timesteps are not a num"),
    "sizes": (2, lambda p: edit(p, video__height=8), [], r"video\.height: input should be greater than or equal to 16"),
    "override": (2, lambda p: None, ["--set", "sampler.steps"], r"--set sampler\.steps: expected key=value"),
    "no such recipe": (2, lambda p: (p / "recipe.yaml").unlink(), [], r"recipe 'recipe\.yaml' is neither a file nor"),
    "not YAML": (2, lambda p: (p / "recipe.yaml").write_text("a: [\n"), [], r"recipe\.yaml:2: not YAML: "),
    # the recipe: what is not known
    "unknown pass": (
        2,
        lambda p: edit(p, transformer__passes=["token-mrege"]),
        [],
        r"transformer\.passes\.0: no pass is called 'token-mrege'; did you mean 'token-merge'\?",
    ),
    "unknown target": (
        2,
        lambda p: edit(p, target="coermel"),
        [],
        "target: no target is called 'coermel'; did you mean",
    ),
    "unknown option": (
        2,
        lambda p: edit(p, target={"name": "coreml", "precisoin": 1}),
        [],
        r"target\.precisoin: unknown key; did you mean 'precision'\?",
    ),
    "print after": (2, lambda p: None, ["--print-after", "fuse"], "--print-after fuse: no such pass in this recipe"),
    # the checkpoint
    "missing file": (
        3,
        lambda p: edit(p, transformer__checkpoint="m.safetensors"),
        [],
        r"'m\.safetensors' does not ex",
    ),
    "missing folder": (
        3,
        lambda p: edit(p, transformer__checkpoint="nowhere"),
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
        lambda p: edit(p, transformer__sha256="0" * 64),
        [],
        "has sha256 [0-9a-f]{64}, the recipe expects 0{64}",
    ),
    "hub": (3, lambda p: edit(p, transformer__checkpoint="hf://owner/name"), [], "cannot fetch 'hf://owner/name'"),
    # passes
    "cannot be cut": (
        4,
        lambda p: edit(p, transformer__passes=["token-merge", {"partition": {"blocks": 9}}]),
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
    edit(project, transformer__checkpoint="nowhere")
    assert run_cli("recipe.yaml", "-o", "some/where/bundle", cwd=project).code == 3
    assert not (project / "some").exists()


@slow
def test_a_failure_leaves_an_older_bundle_as_it_is(run_cli: Any, project: Path, executorch_bundle: Any) -> None:
    shutil.copytree(executorch_bundle.path, project / "bundle")
    truncate(project)
    before = contents(project)
    assert run_cli("recipe.yaml", "-o", "bundle", cwd=project).code == 3
    assert contents(project) == before


def test_errors_for_machines(run_cli: Any, project: Path) -> None:
    edit(project, sampler__stepz=3)
    ran = run_cli("recipe.yaml", "-o", "bundle", "--json", cwd=project)
    assert ran.code == 2
    assert json.loads(ran.out) == {"error": ran.err.removeprefix("sora-compile: ").strip(), "exit_code": 2}


def test_verbose_errors_have_a_traceback(run_cli: Any, project: Path) -> None:
    edit(project, sampler__stepz=3)
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


# --- interrupted -------------------------------------------------------------------------------------


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


MOMENTS = {"before lowering": "tables.safetensors", "lowering": "embed.pte"}
"""What the build has written by then."""


def underway(project: Path, moment: str) -> bool:
    return any(True for p in partial(project) for _ in p.rglob(MOMENTS[moment]))


@slow
@pytest.mark.parametrize("moment", MOMENTS)
@pytest.mark.parametrize(
    ("number", "code", "says"),
    [(signal.SIGINT, 130, "sora-compile: interrupted; nothing was written\n"), (signal.SIGTERM, 143, "")],
)
def test_interrupted(start_cli: Any, project: Path, moment: str, number: int, code: int, says: str) -> None:
    before = contents(project)
    process = start_cli("recipe.yaml", "-o", "bundle", cwd=project)
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
    edit(project, transformer__checkpoint="nowhere")
    assert run_cli("recipe.yaml", "-o", "bundle", cwd=project).code == 3
    assert sorted(p.name for p in project.iterdir()) == ["checkpoint", "recipe.yaml"]


@slow
def test_leftovers_of_earlier_versions(run_cli: Any, project: Path) -> None:
    """They have no lock, so a young one may be somebody's, whatever process its name tells of; nobody stumbles."""
    young = project / ".b.partial-999999999-xyzb.scratch"
    young.mkdir()
    edit(project, transformer__checkpoint="nowhere")
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


# --- a build -----------------------------------------------------------------------------------------


@slow
@pytest.mark.parametrize("target", ["executorch", "coreml"])
def test_what_a_build_prints(request: pytest.FixtureRequest, target: str) -> None:
    built = request.getfixturevalue(f"{target}_bundle")
    first, second = built.ran.out.splitlines()
    assert first == "bundle"
    assert re.match(rf"{target}\b.*: 4 blocks, \d+\.\d [kM]B; ", second)
    done = [line for line in built.ran.err.splitlines() if line.startswith("transformer/")]
    assert [line.split(":")[0].removeprefix("transformer/") for line in done] == ["caption", "embed", "pair_0", "final"]
    assert [line for line in built.ran.err.splitlines() if line not in done] == []
    assert sorted(p.name for p in built.project.iterdir()) == ["bundle", "checkpoint", "recipe.yaml"]


@slow
@pytest.mark.parametrize("target", ["executorch", "coreml"])
def test_others_can_read_a_bundle(request: pytest.FixtureRequest, target: str) -> None:
    folder = request.getfixturevalue(f"{target}_bundle").path
    modes = {p.relative_to(folder).as_posix(): p.stat().st_mode & 0o777 for p in folder.rglob("*")}
    expected = {p.relative_to(folder).as_posix(): 0o755 if p.is_dir() else 0o644 for p in folder.rglob("*")}
    assert modes == expected
    assert folder.stat().st_mode & 0o777 == 0o755


# --- plan --------------------------------------------------------------------------------------------


@slow
def test_plan(run_cli: Any, project: Path) -> None:
    before = contents(project)
    ran = run_cli("plan", "recipe.yaml", cwd=project)
    assert (ran.code, ran.err) == (0, "")
    for piece in ("caption", "pair_0", "base, merged", "17 frames of 48×32", "4 denoiser calls, 2 of them merged"):
        assert piece in ran.out
    for_machines = run_cli("plan", "recipe.yaml", "--json", "--set", "target=coreml", cwd=project)
    assert (for_machines.code, for_machines.err) == (0, "")
    data = json.loads(for_machines.out)
    blocks = data["components"]["transformer"]["blocks"]
    assert (data["target"], [b["name"] for b in blocks][-2:]) == ("coreml", ["pair_0", "final"])
    assert all(b["weight_bytes"] == 2 * b["parameters"] for b in blocks)
    assert contents(project) == before


@slow
def test_graphs_are_printed_to_stderr(run_cli: Any, project: Path) -> None:
    passes = "token-merge{where=[cross_attention]} partition{max_bytes=200MB}"
    asked = ("plan", "recipe.yaml", "--json", "--set", f"transformer.passes={passes}", "--print-after")
    one = run_cli(*asked, "token-merge", cwd=project)
    every = run_cli(*asked, "all", cwd=project)
    assert one.out == every.out and json.loads(one.out)
    assert one.err.startswith("// after token-merge{where=cross_attention} (transformer)\ngraph transformer B=2 T=5 ")
    assert one.err.count("// after") == 1
    assert "\nmerged(%x : f32[2, 4, 5, 4, 6]" in one.err and "merge_frames(" in one.err
    assert re.findall(r"// after (.+) \(transformer\)", every.err) == [
        "capture",
        "token-merge{where=cross_attention}",
        "legalise",
        "partition{max_bytes=200MB}",
    ]
    assert one.err in every.err


# --- inspect -----------------------------------------------------------------------------------------


@slow
def test_inspect(run_cli: Any, executorch_bundle: Any) -> None:
    ran = run_cli("inspect", executorch_bundle.path, cwd=executorch_bundle.project)
    assert (ran.code, ran.err) == (0, "")
    for piece in (
        "pair_0",
        "base, merged",
        "small (open-sora-v1.2), executorch",
        "17 frames of 48×32",
        "guidance 7.0",
    ):
        assert piece in ran.out
    data = json.loads(run_cli("inspect", "bundle", "--json", cwd=executorch_bundle.project).out)
    assert data["bundle"] == "bundle"
    assert data["manifest"] == json.loads((executorch_bundle.path / "manifest.json").read_text())
    assert data["bytes"] == sum(
        p.stat().st_size for p in executorch_bundle.path.rglob("*") if p.name != "manifest.json" and p.is_file()
    )


def spoil_manifest(change: Callable[[dict[str, Any]], object]) -> Ruin:
    def ruin(bundle: Path) -> None:
        data = json.loads((bundle / "manifest.json").read_text())
        change(data)
        (bundle / "manifest.json").write_text(json.dumps(data))

    return ruin


def tamper(bundle: Path) -> None:
    path = bundle / "transformer" / "final.pte"
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


DAMAGES: dict[str, tuple[Ruin, str]] = {
    "one bit": (tamper, r"'transformer/final\.pte' is not what was built \(checksum\)"),
    "longer": (
        lambda b: (b / "transformer" / "final.pte").open("ab").write(b"x"),
        r"'transformer/final\.pte' is not w",
    ),
    "missing block": (lambda b: (b / "transformer" / "embed.pte").unlink(), r"'transformer/embed\.pte' is missing"),
    "missing recipe": (lambda b: (b / "recipe.yaml").unlink(), r"'recipe\.yaml' is missing"),
    "no manifest": (lambda b: (b / "manifest.json").unlink(), r"is not a bundle: no readable manifest\.json"),
    "empty manifest": (lambda b: (b / "manifest.json").write_text(""), r"manifest\.json' is damaged: "),
    "truncated manifest": (lambda b: (b / "manifest.json").write_text('{"name": "sm'), r"manifest\.json' is damaged: "),
    "unknown key": (spoil_manifest(lambda m: m.update(extra=1)), "damaged: extra: unknown key"),
    "newer": (
        spoil_manifest(lambda m: m.update(format_version=9, new=[])),
        "has manifest version 9, this program knows",
    ),
    "outside": (spoil_manifest(lambda m: m["recipe"].update(path="../x")), r"path '\.\./x' leaves the bundle"),
    "absolute": (
        spoil_manifest(lambda m: m["recipe"].update(path="/etc/group")),
        "path '/etc/group' leaves the bundle",
    ),
    "no folder": (shutil.rmtree, "is not a bundle"),
}


@slow
@pytest.mark.parametrize("name", DAMAGES)
def test_inspect_finds_damage(run_cli: Any, executorch_bundle: Any, tmp_path: Path, name: str) -> None:
    ruin, message = DAMAGES[name]
    shutil.copytree(executorch_bundle.path, tmp_path / "bundle")
    ruin(tmp_path / "bundle")
    ran = run_cli("inspect", "bundle", cwd=tmp_path)
    assert (ran.code, ran.out) == (2, "")
    (line,) = ran.err.splitlines()
    assert re.search(message, line), line


# --- the rest ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("what", ["recipe", "manifest"])
def test_schema(run_cli: Any, tmp_path: Path, what: str) -> None:
    ran = run_cli("schema", what, cwd=tmp_path)
    assert (ran.code, ran.err) == (0, "")
    schema = json.loads(ran.out)
    assert schema["title"] == what.capitalize()
    assert "transformer" in schema["properties"] or "components" in schema["properties"]


def test_schema_of_something_else(run_cli: Any, tmp_path: Path) -> None:
    ran = run_cli("schema", "recip", cwd=tmp_path)
    assert ran.code == 2
    assert ran.err == "sora-compile: schema recip: expected 'recipe' or 'manifest'; did you mean 'recipe'?\n"


def test_help_and_version(run_cli: Any, tmp_path: Path) -> None:
    ran = run_cli("--help", cwd=tmp_path)
    assert ran.code == 0
    assert all(word in ran.out for word in ("RECIPE -o BUNDLE", "plan", "inspect", "schema"))
    assert "Usage" in run_cli(cwd=tmp_path).out + run_cli(cwd=tmp_path).err
    assert re.fullmatch(r"\d+\.\d+\S*\n", run_cli("--version", cwd=tmp_path).out)


def test_compile_is_the_default_command(run_cli: Any, project: Path) -> None:
    edit(project, sampler__stepz=3)
    for arguments in (["recipe.yaml", "-o", "b"], ["-o", "b", "recipe.yaml"], ["compile", "recipe.yaml", "-o", "b"]):
        ran = run_cli(*arguments, cwd=project)
        assert (ran.code, ran.err) == (2, "sora-compile: sampler.stepz: unknown key; did you mean 'steps'?\n")


def test_the_installed_command(tmp_path: Path) -> None:
    script = Path(sys.executable).with_name("sora-compile")
    if not script.exists():
        pytest.skip("not installed as a script")
    done = subprocess.run([script, "schema", "recip"], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 2
    assert "did you mean 'recipe'?" in done.stderr
