"""The player needs nothing but the bundle: no checkpoint, no recipe, no model, no converter."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import av
import pytest

from toolchain.formats.bundle import Bundle

ROOT = Path(__file__).parents[2]
HEAVY = ("coremltools", "executorch", "onnx", "onnxruntime", "transformers", "diffusers", "toolchain.models")

WITHOUT_MODELS = """
import sys

class NoModels:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[:2] == ["toolchain", "models"]:
            raise ImportError(f"{name} is not installed here")

sys.meta_path.insert(0, NoModels())
"""
PLAY = """
import toolchain

bundle, out = sys.argv[1:]
toolchain.play(bundle, "a red fox", out, seed=3)
loaded = sorted(n for n in sys.modules if n.split(".")[:2] == ["toolchain", "models"])
assert not loaded, loaded
others = sorted({"coremltools", "onnx", "onnxruntime", "transformers", "toolchain.build.compile"} & sys.modules.keys())
assert not others, others
"""


def python(code: str, *args: str | Path, cwd: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", code, *map(str, args)]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=300)


@pytest.mark.slow
def test_plays_without_models_checkpoint_and_recipe(bundle: Bundle, tmp_path: Path) -> None:
    moved = tmp_path / "elsewhere"
    bundle.path.rename(moved)
    try:
        done = python(WITHOUT_MODELS + PLAY, moved, tmp_path / "fox.mp4", cwd=tmp_path)
    finally:
        moved.rename(bundle.path)
    assert done.returncode == 0, done.stderr
    with av.open(str(tmp_path / "fox.mp4")) as container:
        assert sum(1 for _ in container.decode(video=0)) == 22


def test_the_refusal_of_models_works(tmp_path: Path) -> None:
    """Else the test above would prove nothing."""
    for module in ("toolchain.models", "toolchain.models.open_sora_v1_2.vae"):
        done = python(f"{WITHOUT_MODELS}\nimport {module}", cwd=tmp_path)
        assert done.returncode == 1
        assert "is not installed here" in done.stderr


def test_importing_the_player_is_light(tmp_path: Path) -> None:
    code = f"import sys, toolchain.player\nprint([n for n in {HEAVY!r} if n in sys.modules])"
    done = python(code, cwd=tmp_path)
    assert (done.returncode, done.stdout.strip()) == (0, "[]"), done.stderr


def test_no_source_of_the_player_names_the_models() -> None:
    for path in (ROOT / "toolchain/player").glob("*.py"):
        assert "import toolchain.models" not in path.read_text()
        assert "from toolchain.models" not in path.read_text()
