"""``inspect``: what a bundle holds, and whether it is what was built."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from light_commands import COMMANDS, loaded_after

slow = pytest.mark.slow
Ruin = Callable[[Path], object]


@slow
def test_inspect(run_cli: Any, run_cli_process: Any, onnx_bundle: Any) -> None:
    ran = run_cli_process("inspect", onnx_bundle.path, cwd=onnx_bundle.project)
    assert (ran.code, ran.err) == (0, "")
    for piece in (
        "pair_0",
        "base, merged",
        "small (open-sora-v1.2), onnx",
        "17 frames of 48×32",
        "guidance 7.0",
    ):
        assert piece in ran.out
    data = json.loads(run_cli("inspect", "bundle", "--json", cwd=onnx_bundle.project).out)
    assert data["bundle"] == "bundle"
    assert data["manifest"] == json.loads((onnx_bundle.path / "manifest.json").read_text())
    assert data["bytes"] == sum(
        p.stat().st_size for p in onnx_bundle.path.rglob("*") if p.name != "manifest.json" and p.is_file()
    )


@slow
def test_a_bundle_that_is_there_needs_no_torch(onnx_bundle: Any) -> None:
    """To show what it holds, and to find that nothing has changed since it was built."""
    before = onnx_bundle.path.stat().st_mtime_ns
    again = ["recipe.yaml", "--set", "target=onnx", "-o", "bundle"]
    code = f"{COMMANDS}assert run(*{again}) == 0 == run('inspect', 'bundle')"
    assert loaded_after(code, onnx_bundle.project) == "set()"
    assert onnx_bundle.path.stat().st_mtime_ns == before


def spoil_manifest(change: Callable[[dict[str, Any]], object]) -> Ruin:
    def ruin(bundle: Path) -> None:
        data = json.loads((bundle / "manifest.json").read_text())
        change(data)
        (bundle / "manifest.json").write_text(json.dumps(data))

    return ruin


def tamper(bundle: Path) -> None:
    path = bundle / "transformer" / "final" / "weights.bin"
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


DAMAGES: dict[str, tuple[Ruin, str]] = {
    "one bit": (tamper, r"'transformer/final/weights\.bin' is not what was built \(checksum\)"),
    "longer": (
        lambda b: (b / "transformer" / "final" / "weights.bin").open("ab").write(b"x"),
        r"'transformer/final/weights\.bin' is not w",
    ),
    "missing block": (
        lambda b: (b / "transformer" / "embed" / "base.onnx").unlink(),
        r"'transformer/embed/base\.onnx' is missing",
    ),
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
def test_inspect_finds_damage(run_cli: Any, onnx_bundle: Any, tmp_path: Path, name: str) -> None:
    ruin, message = DAMAGES[name]
    shutil.copytree(onnx_bundle.path, tmp_path / "bundle")
    ruin(tmp_path / "bundle")
    ran = run_cli("inspect", "bundle", cwd=tmp_path)
    assert (ran.code, ran.out) == (2, "")
    (line,) = ran.err.splitlines()
    assert re.search(message, line), line
