"""What the command answers: builds, plans, schemas, help."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from support import contents, edit_recipe

slow = pytest.mark.slow


# --- a build -----------------------------------------------------------------------------------------


@slow
@pytest.mark.parametrize("target", ["onnx", "coreml"])
def test_what_a_build_prints(request: pytest.FixtureRequest, target: str) -> None:
    built = request.getfixturevalue(f"{target}_bundle")
    first, second = built.ran.out.splitlines()
    assert first == "bundle"
    assert re.match(rf"{target}\b.*: 4 blocks, \d+\.\d [kM]B; ", second)
    done = [line for line in built.ran.err.splitlines() if line.startswith("transformer/")]
    assert [line.split(":")[0].removeprefix("transformer/") for line in done] == ["caption", "embed", "pair_0", "final"]
    total, *summary = [line for line in built.ran.err.splitlines() if line not in done]
    assert re.fullmatch(r"\d+\.\d\d s, of which", total)
    assert {"build", "plan", "digest", "artifact", "gate", "bundle"} <= {line.split()[0] for line in summary}
    assert sorted(p.name for p in built.project.iterdir()) == ["bundle", "checkpoint", "recipe.yaml"]


@slow
@pytest.mark.parametrize("target", ["onnx", "coreml"])
def test_others_can_read_a_bundle(request: pytest.FixtureRequest, target: str) -> None:
    folder = request.getfixturevalue(f"{target}_bundle").path
    modes = {p.relative_to(folder).as_posix(): p.stat().st_mode & 0o777 for p in folder.rglob("*")}
    expected = {p.relative_to(folder).as_posix(): 0o755 if p.is_dir() else 0o644 for p in folder.rglob("*")}
    assert modes == expected
    assert folder.stat().st_mode & 0o777 == 0o755


# --- completion in a shell ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("line", "found"),
    [
        ("sora-compile in", ["init", "inspect"]),
        ("sora-compile plan --se", ["--set"]),
        ("sora-compile tiny --gat", ["--gate"]),  # the default command's
    ],
)
def test_completion(run_cli: Any, tmp_path: Path, line: str, found: list[str]) -> None:
    env = {"_SORA_COMPILE_COMPLETE": "complete_bash", "COMP_WORDS": line, "COMP_CWORD": str(len(line.split()) - 1)}
    assert run_cli(cwd=tmp_path, env=env).out.split() == found


# --- plan --------------------------------------------------------------------------------------------


@slow
def test_plan(run_cli: Any, run_cli_process: Any, project: Path) -> None:
    before = contents(project)
    ran = run_cli_process("plan", "recipe.yaml", cwd=project)
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


# --- the rest ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("what", ["recipe", "manifest", "matrix"])
def test_schema(run_cli: Any, tmp_path: Path, what: str) -> None:
    ran = run_cli("schema", what, cwd=tmp_path)
    assert (ran.code, ran.err) == (0, "")
    schema = json.loads(ran.out)
    assert schema["title"] == what.capitalize()
    assert {"transformer", "components", "axes"} & set(schema["properties"])


def test_schema_of_something_else(run_cli: Any, tmp_path: Path) -> None:
    ran = run_cli("schema", "recip", cwd=tmp_path)
    assert ran.code == 2
    assert ran.err == "sora-compile: schema recip: expected 'recipe', 'manifest' or 'matrix'; did you mean 'recipe'?\n"


def test_help_and_version(run_cli: Any, tmp_path: Path) -> None:
    ran = run_cli("--help", cwd=tmp_path)
    assert ran.code == 0
    assert all(word in ran.out for word in ("RECIPE -o BUNDLE", "plan", "inspect", "schema"))
    assert "Usage" in run_cli(cwd=tmp_path).out + run_cli(cwd=tmp_path).err
    assert re.fullmatch(r"\d+\.\d+\S*\n", run_cli("--version", cwd=tmp_path).out)


def test_compile_is_the_default_command(run_cli: Any, project: Path) -> None:
    edit_recipe(project, sampler__stepz=3)
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
