"""The tutorial: its files are written and its commands run, in order, in one empty folder."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest

PAGE = Path(__file__).parents[2] / "docs" / "tutorial.md"
FENCE = re.compile(r'^```(\w+)(?: title="([^"]*)")?\n(.*?)^```$', re.MULTILINE | re.DOTALL)
NOT_RUN = "not run"


class Fence(NamedTuple):
    language: str
    title: str
    text: str


def fences() -> list[Fence]:
    return [Fence(*found.groups("")) for found in FENCE.finditer(PAGE.read_text())]


def test_every_fence_of_the_page_is_found() -> None:
    assert len(re.findall(r"^```\w", PAGE.read_text(), re.MULTILINE)) == len(fences())


@pytest.mark.slow
def test_the_tutorial_runs_from_its_first_command_to_its_last(tmp_path: Path) -> None:
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    env = {**os.environ, "PATH": path, "OMP_NUM_THREADS": "1", "COLUMNS": "200"}
    said = ""
    for language, title, text in fences():
        if language in ("python", "yaml") and title:
            (tmp_path / title).write_text(text)
        elif language == "sh" and title != NOT_RUN:
            done = subprocess.run(
                ["sh", "-e", "-c", text], cwd=tmp_path, env=env, capture_output=True, text=True, timeout=600
            )
            assert done.returncode == 0, f"{text}\n{done.stdout}\n{done.stderr}"
            said += done.stdout + done.stderr
    for shown in (
        "prefix of all names, left out │ module.",
        "16 denoiser calls, 0 of them merged; onnx",
        "onnx: 13 blocks, 14.1 MB; all executed",
        "onnx: 13 blocks, 7.8 MB; all executed",
        "13 checks, 0 failed; all files are what was built",
        "5 blocks differ, 8 are the same byte for byte",
        "nothing has changed since this bundle was built",
        "4 blocks differ, 9 are the same byte for byte",
    ):
        assert shown in said, said
    made = {file.name for file in tmp_path.iterdir()}
    assert {"circle.mp4", "circle-int8.mp4", "frames", "trace.json", "int8.html", "verify.json"} <= made
