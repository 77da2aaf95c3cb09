"""What the documentation tells to type: every command line parses, every block of Python compiles, and many are run."""

from __future__ import annotations

import contextlib
import io
import shutil
from pathlib import Path
from typing import Any

import pytest
import typer.main
from commands import RunCli
from documents import ROOT, Command, blocks, commands, documents, name_of

from toolchain.cli import app

NOT_RUN = {
    "open-sora-v1.2-iphone-15-pro": "needs the official checkpoints, or seconds to plan, as tests/planning does",
    "build-all": "builds four bundles, which tests/test_build_all.py does",
    "init": "asks in a terminal; with flags, as tests/test_init.py does",
    "mine.yaml": "is a recipe of one's own, as in tests/test_locking.py",
    "sign": "needs a key, as tests/test_provenance.py makes one",
    "quantize": "measures for minutes, as tests/test_quantize_command.py does",
    "tune": "measures for minutes, as tests/planning does",
    "schema": "prints a schema, as tests/docs/test_site.py does",
}
"""Commands with one of these words are not run, and why."""
RUN = ("README.md", "docs/report.md")
"""Files whose commands are run, in order, after the first build of docs/index.md."""


@pytest.mark.parametrize("path", [p for p in documents() if commands(p)], ids=name_of)
def test_command_lines_parse(path: Path) -> None:
    for command in commands(path):
        assert (problem := _problem(command)) is None, f"{command}: {problem}"


def _problem(command: Command) -> str | None:
    """What the command would say of its words before it does anything."""
    group: Any = typer.main.get_command(app)
    try:
        with group.make_context("sora-compile", list(command.words[1:])) as context:
            name, own, rest = group.resolve_command(context, [*context._protected_args, *context.args])
            with own.make_context(name, rest, parent=context):
                return None
    except Exception as e:
        return f"{type(e).__name__}: {e}"


@pytest.mark.parametrize("line", ["play build/tiny --prompt x", "plan tiny --loud", "verifi build/tiny", "tiny -o"])
def test_a_wrong_command_line_is_found(line: str) -> None:
    assert _problem(Command("none", ("sora-compile", *line.split()))) is not None


@pytest.mark.parametrize("path", [p for p in documents() if blocks(p, "python")], ids=name_of)
def test_python_compiles(path: Path) -> None:
    for i, block in enumerate(blocks(path, "python")):
        compile(block.text, f"{block.file}[{i}]", "exec")


@pytest.mark.slow
def test_commands_run(run_cli: RunCli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In one folder, in order, on the miniature for ONNX; then the blocks of Python on what they left."""
    first, *rest = commands(ROOT / "docs/index.md")
    _run(run_cli, first, tmp_path)
    shutil.copytree(tmp_path / "build/tiny", tmp_path / "build/yesterday")
    lines = [*rest, *(c for name in RUN for c in commands(ROOT / name) if not NOT_RUN.keys() & set(c.words))]
    for command in lines:
        _run(run_cli, command, tmp_path)
    monkeypatch.chdir(tmp_path)
    for block in blocks(ROOT / "docs/library.md", "python"):
        with contextlib.redirect_stdout(io.StringIO()) as said:
            exec(compile(block.text, block.file, "exec"), {"__name__": "__main__"})
        assert said.getvalue()


def _run(run_cli: RunCli, command: Command, folder: Path) -> None:
    words = list(command.words[1:])
    if "tiny" in words and not any(w.startswith("target=") for w in words):
        words += ["--set", "target=onnx"]
    ran = run_cli(*words, cwd=folder)
    assert ran.code == 0, f"{command}\n{ran.err}"
