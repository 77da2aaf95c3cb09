"""What a caller of the library has: names, progress, cancellation, builds within other programs."""

from __future__ import annotations

import asyncio
import inspect
import io
import json
import re
import subprocess
import sys
import typing
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from support import CHEAP, contents, write_project

import toolchain
from toolchain.system.store import Store

ROOT = Path(__file__).parents[1]
slow = pytest.mark.slow


def test_what_is_public_is_documented_and_typed() -> None:
    rows = re.findall(r"^\| (`.*?`) \|", (ROOT / "docs/library.md").read_text(), re.MULTILINE)
    assert sorted(re.findall(r"`(\w+)`", " ".join(rows))) == sorted(toolchain.__all__)
    for name in toolchain.__all__:
        found = getattr(toolchain, name)
        assert found.__doc__, name
        if inspect.isfunction(found):
            parameters = inspect.signature(found).parameters.values()
            assert all(p.annotation is not p.empty for p in parameters) and "return" in found.__annotations__, name
    assert typing.get_type_hints(toolchain.Listener.cancelled) == {"return": bool}


@pytest.fixture(scope="module")
def small(one_pair: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_project(tmp_path_factory.mktemp("library") / "project", one_pair)


def build(project: Path, folder: Path, **options: Any) -> toolchain.Bundle:
    recipe = toolchain.load_recipe(project / "recipe.yaml", CHEAP)
    return toolchain.compile_recipe(recipe, folder / "bundle", base=project, store=Store(folder / "store"), **options)


class Stopped(toolchain.Listener):
    """Cancels when something has happened."""

    def __init__(self, when: Callable[[toolchain.Event], bool]) -> None:
        self._when, self._now = when, False
        self.seen: list[str] = []

    def cancelled(self) -> bool:
        return self._now

    def event(self, event: toolchain.Event) -> None:
        self.seen.append(f"{event.event} {event.what.kind}")
        self._now = self._now or self._when(event)


@slow
@pytest.mark.parametrize("jobs", [1, 2])
def test_a_cancelled_build(small: Path, tmp_path: Path, jobs: int) -> None:
    """It ends with an error of its own, leaves no bundle, and what was done is not done again."""
    moment = ("done", "template") if jobs == 1 else ("started", "wait")
    stopped = Stopped(lambda e: (e.event, e.what.kind) == moment)
    with pytest.raises(toolchain.CancelledError):
        build(small, tmp_path, listener=stopped, jobs=jobs)
    assert " ".join(moment) in stopped.seen and "done build" not in stopped.seen
    assert sorted(p.name for p in tmp_path.iterdir()) == ["store"]
    assert list((tmp_path / "store/scratch").iterdir()) == []
    if jobs == 1:
        again = Stopped(lambda e: False)
        build(small, tmp_path, listener=again)
        assert "cached artifact" in again.seen


@slow
def test_within_an_event_loop_and_streams_of_others(
    small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As in a notebook, whose streams are no files and whose cells run within a loop."""
    out, err = io.StringIO(), io.StringIO()
    monkeypatch.setattr(sys, "stdout", out)
    monkeypatch.setattr(sys, "stderr", err)

    async def cell() -> toolchain.Bundle:
        return build(small, tmp_path)

    bundle = asyncio.run(cell())
    assert bundle.manifest.name and (out.getvalue(), err.getvalue()) == ("", "")
    assert sys.stdout is out


@slow
def test_the_build_script_of_an_app(small: Path, tmp_path: Path) -> None:
    def script(*args: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, str(ROOT / "examples/app/build.py"), str(recipe), "Resources", *args]
        return subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=300)

    recipe = tmp_path / "recipe.yaml"
    written = toolchain.load_recipe(small / "recipe.yaml", CHEAP).located(lambda place: str(small / place))
    recipe.write_text(written.to_yaml())
    late = script("--minutes", "0")
    assert (late.returncode, late.stdout) == (130, "") and "not done in time" in late.stderr
    assert not (tmp_path / "Resources/Video.bundle").exists()
    ran = script()
    assert ran.returncode == 0, ran.stderr
    assert "transformer/pair_0" in ran.stdout
    shown = json.loads((tmp_path / "Resources/video.json").read_text())
    before = contents(tmp_path / "Resources")
    again = script()
    assert again.returncode == 0 and "nothing has changed" in again.stdout
    assert contents(tmp_path / "Resources") == before
    fat = script("--most-mb", str(shown["megabytes"] / 2))
    assert fat.returncode == 1 and "the app may carry" in fat.stderr
    recipe.write_text("name: none\n")
    wrong = script()
    assert wrong.returncode == 2 and wrong.stderr.startswith("error: ") and len(wrong.stderr.splitlines()) == 1
