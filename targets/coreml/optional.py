"""Keeps coremltools from importing what it could convert from, and is not asked to.

Importing coremltools imports every package that it has a converter or a use for and finds: scikit-learn, transformers,
torchao, ExecuTorch with its compiler. That takes ten times as long as all else that it needs.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from types import FrameType, ModuleType

UNUSED = ("executorch", "sklearn", "tensorflow", "torchao", "transformers", "xgboost")
"""None of them plays a part in converting a program of torch.export."""


class _Unused(MetaPathFinder):
    """Tells coremltools, and nobody else, that these packages are not installed."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname.partition(".")[0] in UNUSED and _importer().partition(".")[0] == "coremltools":
            raise ModuleNotFoundError(f"'{fullname}' is not used with coremltools here", name=fullname)
        return None


def _importer() -> str:
    """The module whose statement is being carried out."""
    frame: FrameType | None = sys._getframe(2)
    while frame is not None and str(frame.f_globals.get("__name__", "")).startswith("importlib."):
        frame = frame.f_back
    return "" if frame is None else str(frame.f_globals.get("__name__", ""))


def hide_unused() -> None:
    """Do so from now on, in this process."""
    if not any(isinstance(finder, _Unused) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Unused())
