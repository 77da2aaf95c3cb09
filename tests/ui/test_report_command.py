"""``report`` and ``plan --html`` as a user runs them: what is written where, and what is refused in a line."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from toolchain.cli import app

pytestmark = pytest.mark.slow


@pytest.fixture
def run(tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    """Run the command in this process, in a folder of its own: its exit code, what it said, on stdout and stderr."""
    monkeypatch.chdir(tmp_path)

    def run(*arguments: str | Path) -> tuple[int, str, str]:
        code = 0
        try:
            app([str(a) for a in arguments], standalone_mode=False)
        except SystemExit as end:
            code = int(end.code or 0)
        said = capfd.readouterr()
        return code, said.out, said.err

    return run


def test_report_writes_a_page_and_a_picture(run: Callable[..., Any], shown: Any, tmp_path: Path) -> None:
    options = ("--trace", shown.trace, "--png", "t.png", "--json")
    code, out, err = run("report", shown.bundle.path, "-o", "r.html", *options)
    assert (code, err) == (0, "")
    assert json.loads(out) == {"page": "r.html", "png": "t.png"}
    assert (tmp_path / "r.html").read_text().startswith("<!DOCTYPE html>")
    with Image.open(tmp_path / "t.png") as drawn:
        assert drawn.format == "PNG"
        assert drawn.width > 1500
        assert len(drawn.convert("RGB").getcolors(1 << 24) or []) > 20
    assert sorted(p.name for p in tmp_path.iterdir()) == ["r.html", "t.png"]


def test_report_puts_the_page_beside_the_bundle(run: Callable[..., Any], shown: Any, tmp_path: Path) -> None:
    shutil.copytree(shown.bundle.path, tmp_path / "b")
    code, out, err = run("report", "b/")
    assert (code, out.strip(), err) == (0, str(tmp_path / "b.html"), "")
    assert "Predicted: " in (tmp_path / "b.html").read_text()


def test_plan_writes_a_page(run: Callable[..., Any], onnx_bundle: Any, tmp_path: Path) -> None:
    recipe = onnx_bundle.project / "recipe.yaml"
    code, out, err = run("plan", recipe, "--html", "p.html", "--json")
    assert (code, err) == (0, "")
    blocks = [b["name"] for b in json.loads(out)["components"]["transformer"]["blocks"]]
    page = (tmp_path / "p.html").read_text()
    assert "Plan, not built" in page
    assert "Predicted: " in page
    assert all(f">{name}</th>" in page for name in blocks)
    assert run("plan", recipe, "--html", "no/p.html") == (
        6,
        "",
        "sora-compile: --html no/p.html: its folder does not exist or cannot be written\n",
    )


def write(text: str) -> Callable[[Path, Path], None]:
    return lambda bundle, trace: (trace.write_text(text), None)[1]


def of_another(bundle: Path, trace: Path) -> None:
    data = json.loads(trace.read_text())
    data["otherData"]["recipe_sha256"] = "0" * 64
    trace.write_text(json.dumps(data))


def last_span(data: dict[str, Any]) -> dict[str, Any]:
    return next(e for e in reversed(data["traceEvents"]) if e["ph"] == "X")


def of_another_block(bundle: Path, trace: Path) -> None:
    data = json.loads(trace.read_text())
    last_span(data)["args"]["block"] = "transformer/no_such"
    trace.write_text(json.dumps(data))


def endless(bundle: Path, trace: Path) -> None:
    data = json.loads(trace.read_text())
    last_span(data)["dur"] = float("inf")
    trace.write_text(json.dumps(data))


def damage(bundle: Path, trace: Path) -> None:
    with (bundle / "transformer/final/weights.bin").open("ab") as file:
        file.write(b"x")


WRONG: dict[str, tuple[Callable[[Path, Path], None], int, str]] = {
    "damaged": (damage, 2, "'b': 'transformer/final/weights.bin' is not what was built (checksum)"),
    "no bundle": (lambda bundle, trace: shutil.rmtree(bundle), 2, "'b' is not a bundle"),
    "no trace": (lambda bundle, trace: trace.unlink(), 6, "--trace t.json: cannot be read: No such file"),
    "not JSON": (write("{"), 2, "--trace t.json: is not a trace"),
    "too deep": (write("[" * 200_000), 2, "--trace t.json: is not a trace"),
    "not a trace": (write("[1, 2]"), 2, "--trace t.json: is not a trace that this version's"),
    "of no bundle": (write('{"traceEvents": []}'), 2, "--trace t.json: is not a trace that this version's"),
    "another's": (of_another, 2, "--trace t.json: was played with another bundle than 'b'; play this one"),
    "another block": (of_another_block, 2, "--trace t.json: 'b' has no 'transformer/no_such.base'; play this bundle"),
    "endless": (endless, 2, "--trace t.json: is not a trace that this version's"),
}


@pytest.mark.parametrize("name", WRONG)
def test_what_is_wrong_is_said_in_a_line(name: str, run: Callable[..., Any], shown: Any, tmp_path: Path) -> None:
    spoil, expected, message = WRONG[name]
    shutil.copytree(shown.bundle.path, tmp_path / "b")
    shutil.copy(shown.trace, tmp_path / "t.json")
    spoil(tmp_path / "b", tmp_path / "t.json")
    code, out, err = run("report", "b", "-o", "r.html", "--trace", "t.json", "--png", "r.png")
    assert (code, out) == (expected, "")
    (line,) = err.splitlines()
    assert line.startswith(f"sora-compile: {message}")
    assert not [p.name for p in tmp_path.iterdir() if p.name not in ("b", "t.json")]


@pytest.mark.parametrize(
    ("options", "code", "message"),
    [
        (("-o", "no/r.html"), 6, "-o no/r.html: its folder does not exist or cannot be written"),
        (("-o", "."), 2, "-o .: is a folder; expected the name of a file"),
        (("-o", "r", "--png", "r", "--trace", "t"), 2, "-o and --png: name the same file"),
        (("-o", "r", "--png", "no/r", "--trace", "t"), 6, "--png no/r: its folder does not exist or cannot be written"),
    ],
)
def test_places_are_looked_at_first(
    options: tuple[str, ...], code: int, message: str, run: Callable[..., Any], shown: Any
) -> None:
    assert run("report", shown.bundle.path, *options) == (code, "", f"sora-compile: {message}\n")


@pytest.mark.parametrize("package", ["jinja2", "vl_convert"])
def test_a_missing_package_is_named(
    package: str, run: Callable[..., Any], shown: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    code, out, err = run("report", shown.bundle.path, "-o", "r.html")
    assert (code, out) == (6, "")
    assert err == f"sora-compile: a report needs '{package}': pip install 'sora-compile[report]'\n"
    assert not list(tmp_path.iterdir())


def test_a_file_that_is_in_the_way_leaves_nothing(
    run: Callable[..., Any], shown: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The page is written, then the picture cannot be: neither is there, and an older page stands."""
    (tmp_path / "r.html").write_text("older")

    def full(self: Path, data: bytes) -> int:
        if self.name.startswith(".r.png"):
            raise OSError(28, "No space left on device", str(self))
        return int(original(self, data))

    original = Path.write_bytes
    monkeypatch.setattr(Path, "write_bytes", full)
    code, _, err = run("report", shown.bundle.path, "-o", "r.html", "--trace", shown.trace, "--png", "r.png")
    assert code == 6
    assert err.endswith("cannot be written: No space left on device\n")
    assert [p.name for p in tmp_path.iterdir()] == ["r.html"]
    assert (tmp_path / "r.html").read_text() == "older"


def test_a_picture_of_a_bundle_that_predicts_nothing(run: Callable[..., Any], shown: Any, tmp_path: Path) -> None:
    shutil.copytree(shown.bundle.path, tmp_path / "b")
    path = tmp_path / "b/manifest.json"
    data = json.loads(path.read_text())
    data["loading"] |= {"prediction": None, "made_from": None}
    path.write_text(json.dumps(data))
    said = "sora-compile: --png r.png: this bundle predicts no timeline, so there is none to draw without --trace\n"
    assert run("report", "b", "--png", "r.png") == (2, "", said)
