"""A first recipe: from flags, from answers, and what is refused; it is one that compiles."""

from __future__ import annotations

import io
import json
import re
import sys
from pathlib import Path
from typing import Any

import pytest
from support import contents

from toolchain.formats.recipe_file import load_recipe

TINY = ("--checkpoint", "shipped://tiny", "--target", "onnx", "--video", "17x32x48")


def test_from_flags(tmp_path: Path, run_cli: Any) -> None:
    ran = run_cli("init", *TINY, "--device", "iphone-15-pro", "-o", "film.yaml", cwd=tmp_path)
    assert (ran.code, ran.out, ran.err) == (0, "film.yaml\nnext: sora-compile film.yaml -o BUNDLE\n", "")
    found = load_recipe(tmp_path / "film.yaml")
    assert (found.name, found.model, found.target.name, found.device) == (
        "film", "open-sora-v1.2", "onnx", "iphone-15-pro",
    )  # fmt: skip
    assert [p.checkpoint for p in found.components().values()] == [
        f"shipped://tiny/{name}" for name in ("text_encoder", "transformer", "vae")
    ]
    text = (tmp_path / "film.yaml").read_text()
    commented = [line.lstrip(" #") for line in text.splitlines() if line.lstrip().startswith("# ")]
    assert any(line.startswith("leap: 15") for line in commented)
    assert max(map(len, text.splitlines())) <= 140


def test_every_key_in_a_comment_is_one(tmp_path: Path, run_cli: Any) -> None:
    assert run_cli("init", *TINY, cwd=tmp_path).code == 0
    path = tmp_path / "recipe.yaml"
    text, count = re.subn(r"(?m)^( *)# ([a-z_]+: )", r"\1\2", path.read_text())
    path.write_text(text.replace("NAME", "iphone-15-pro"))
    found = load_recipe(path)
    assert (found.memory_budget, found.gate.mode, found.device) == (2_500_000_000, "structure", "iphone-15-pro")
    assert (found.sampler.leap is not None, found.transformer.passes, count) == (True, [], 5)


def test_a_component_each_and_a_target_with_float16(project: Path, run_cli: Any) -> None:
    (project / "new").mkdir()
    odd = project / "a ${B} #1"
    (project / "checkpoint").rename(odd)
    args = ("--checkpoint", f"transformer={odd.name}", "--checkpoint", "vae=hf://me/vae", "--target", "coreml")
    ran = run_cli("init", *args, "-o", "new/r.yaml", "--json", cwd=project)
    assert (ran.code, json.loads(ran.out)) == (0, {"path": "new/r.yaml"})
    found = load_recipe(project / "new" / "r.yaml")
    assert found.transformer.checkpoint == f"../{odd.name}"
    assert found.vae is not None and (found.vae.checkpoint, found.vae.precision) == ("hf://me/vae", "float32")
    assert found.text_encoder is None


@pytest.mark.parametrize(
    ("args", "code", "message"),
    [
        ((), 2, "init: give --checkpoint; without a terminal nobody can be asked"),
        (("--checkpoint", "shipped://tiny"), 2, "init: give --target; "),
        ((*TINY, "--model", "open-sora"), 2, "--model: no model is called 'open-sora'; did you mean 'open-sora-v1.2'?"),
        (("--checkpoint", "shipped://tiny", "--target", "onxx"), 2, "--target: no target is called 'onxx'; did you"),
        ((*TINY, "--device", "iphone"), 2, "unknown device 'iphone'; near ones are "),
        ((*TINY, "--video", "17x32"), 2, "--video 17x32: expected FRAMESxHEIGHTxWIDTH"),
        ((*TINY, "--video", "5x32x48"), 2, "video: frames is 5"),
        ((*TINY, "--checkpoint", "vae=shipped://tiny/vae"), 2, "--checkpoint vae=shipped://tiny/vae: the vae has one"),
        (("--checkpoint", "vae=hf://me/it", "--target", "onnx"), 2, "--checkpoint: there is no transformer"),
        (("--checkpoint", "no/such", "--target", "onnx"), 3, "checkpoint 'no/such' does not exist"),
        (("--checkpoint", ".", "--target", "onnx"), 3, "--checkpoint .: has neither weights nor a folder"),
        ((*TINY, "-o", "no/such/r.yaml"), 6, "-o no/such/r.yaml: its folder does not exist"),
        ((*TINY, "-o", "there.yaml"), 2, "-o there.yaml: exists; choose another name or remove it"),
    ],
    ids=str,
)
def test_refused(
    tmp_path: Path, run_cli: Any, monkeypatch: pytest.MonkeyPatch, args: tuple[str, ...], code: int, message: str
) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO())
    (tmp_path / "there.yaml").write_text("name: mine")
    before = contents(tmp_path)
    ran = run_cli("init", *args, cwd=tmp_path)
    assert (ran.code, ran.out) == (code, "")
    assert ran.err.startswith(f"sora-compile: {message}") and ran.err.count("\n") == 1
    assert contents(tmp_path) == before


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_asks_at_a_terminal(tmp_path: Path, run_cli: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdin", Terminal("shipped://tiny\nonnx\n\n"))
    ran = run_cli("init", "--video", "17x32x48", cwd=tmp_path)
    assert ran.code == 0, ran.err
    assert ran.out.startswith("recipe.yaml\n")
    found = load_recipe(tmp_path / "recipe.yaml")
    assert (found.target.name, found.device) == ("onnx", None)


def test_no_answer(tmp_path: Path, run_cli: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdin", Terminal("shipped://tiny\n"))
    ran = run_cli("init", cwd=tmp_path)
    assert ran.code == 2 and "init: --target is needed, and there was no answer" in ran.err


@pytest.mark.slow
def test_it_compiles(tmp_path: Path, run_cli: Any) -> None:
    """The transformer; the other components are as in other recipes, and lower for a minute."""
    args = ("--checkpoint", "shipped://tiny/transformer", *TINY[2:])
    assert run_cli("init", *args, cwd=tmp_path).code == 0
    ran = run_cli("recipe.yaml", "-o", "bundle", "--no-gate", cwd=tmp_path)
    assert ran.code == 0, ran.err
    assert (tmp_path / "bundle" / "manifest.json").is_file()
