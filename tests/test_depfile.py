"""What a bundle depends on, as a file that Make and Ninja read: every input, whatever it is called, also unchanged."""

from __future__ import annotations

import os
import shutil
import subprocess
import time
from importlib.metadata import files
from pathlib import Path
from typing import Any

import pytest
from support import edit_recipe

from toolchain.errors import RecipeError
from toolchain.formats.depfile import depfile_text

NINJA = next(str(f.locate()) for f in files("ninja") or () if f.name == "ninja")
ODD = [
    "plain",
    "with space",
    "two  spaces",
    "a#b",
    "cost$",
    "${x}",
    "a:b",
    "back\\slash",
    "b\\ c",
    "ü",
    "100%",
]


def test_one_rule() -> None:
    assert depfile_text("b/manifest.json", ["/r.yaml", "/a b"]) == "b/manifest.json: \\\n  /r.yaml \\\n  /a\\ b\n"
    assert depfile_text("b", []) == "b:\n"
    for path in ("a\nb", "a\tb"):
        with pytest.raises(RecipeError, match="a tab or a line break"):
            depfile_text("b", [path])


@pytest.mark.parametrize("tool", ["ninja", "make"])
def test_tools_read_every_name(tmp_path: Path, tool: str) -> None:
    """Each file, when it is touched, has the output made again, and only then."""
    if tool == "make" and shutil.which("make") is None:
        pytest.skip("no make here")
    inputs = [tmp_path / "in" / name for name in ODD]
    inputs[0].parent.mkdir()
    for file in inputs:
        file.write_text("")
        os.utime(file, (1, 1))
    (tmp_path / "out.d").write_text(depfile_text("out", map(str, inputs)))
    if tool == "ninja":
        rule = "rule r\n  command = cp made.d $out.d; touch $out; echo made\n  depfile = $out.d\nbuild out: r\n"
        (tmp_path / "build.ninja").write_text(rule)
        (tmp_path / "out.d").rename(tmp_path / "made.d")
        command: list[str | Path] = [NINJA]
    else:
        (tmp_path / "Makefile").write_text("out:\n\ttouch out; echo made\ninclude out.d\n")
        command = ["make"]

    def made() -> bool:
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr
        return "\nmade\n" in f"\n{done.stdout}"

    assert made()
    assert not made()
    for file in inputs:
        os.utime(file, (time.time() + 5, time.time() + 5))
        assert made(), file
        os.utime(file, (1, 1))
        assert not made(), file


def dependencies(project: Path, file: str = "deps") -> tuple[str, list[str]]:
    target, _, rest = (project / file).read_text().partition(": ")
    return target, [line.strip() for line in rest.split("\\\n") if line.strip()]


@pytest.mark.slow
def test_what_a_build_depends_on(project: Path, run_cli: Any) -> None:
    (project / "child.yaml").write_text("extends: recipe.yaml\n")
    args = ("child.yaml", "-o", "out/b", "--no-gate", "--depfile", "deps")
    ran = run_cli(*args, cwd=project)
    assert ran.code == 0, ran.err
    target, found = dependencies(project)
    assert target == "out/b/manifest.json"
    assert all(Path(path).is_absolute() and Path(path).is_file() for path in found)
    own = [Path(p).relative_to(project).as_posix() for p in found if Path(p).is_relative_to(project)]
    assert own == ["child.yaml", "recipe.yaml", "checkpoint/model.safetensors", "checkpoint/config.json"]
    assert [Path(p).name for p in found[len(own) :]] == ["unspecified.yaml"]

    (project / "deps").unlink()
    manifest = project / "out" / "b" / "manifest.json"
    os.utime(manifest, (1, 1))
    ran = run_cli(*args, cwd=project)
    assert (ran.code, "nothing has changed" in ran.err) == (0, True)
    assert dependencies(project) == (target, found)
    assert manifest.stat().st_mtime > 1  # Make and Ninja see that it is newer than its inputs


def test_refused_before_anything_is_done(project: Path, run_cli: Any) -> None:
    ran = run_cli("recipe.yaml", "-o", "b", "--depfile", "no/such/deps", cwd=project)
    assert (ran.code, ran.out) == (6, "")
    assert ran.err.startswith("sora-compile: --depfile no/such/deps: its folder does not exist")
    edit_recipe(project, sampler__steps="x")
    assert run_cli("recipe.yaml", "-o", "b", "--depfile", "deps", cwd=project).code == 2
    assert not (project / "deps").exists()
