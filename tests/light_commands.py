"""What a fresh interpreter imports: for tests of who may load torch, converters and runtimes."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

CONVERTERS = ("coremltools", "executorch", "onnx", "onnx_ir", "onnxruntime", "onnxscript", "onnxsim", "torchao")
HEAVY = (*CONVERTERS, "torch", "transformers", "numpy", "huggingface_hub")
COMMANDS = """
import contextlib, io
from toolchain.cli import main
def run(*arguments):
    sys.argv, said = ['sora-compile', *arguments], io.StringIO()
    with contextlib.redirect_stderr(said):
        try:
            main()
        except SystemExit as e:
            return e.code or 0
"""
"""Defines ``run``, which gives the exit code of a command."""


def loaded_after(code: str, cwd: Path, modules: tuple[str, ...] = HEAVY) -> str:
    """Which of ``modules`` a fresh interpreter holds after ``code``."""
    script = f"import sys\n{code}\nprint(set({modules}) & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=cwd)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()[-1]
