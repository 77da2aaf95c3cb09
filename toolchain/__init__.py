"""sora-compile: Open-Sora text-to-video models, from PyTorch to a phone.

>>> import toolchain
>>> recipe = toolchain.load_recipe("tiny", ["target=executorch"])
>>> bundle = toolchain.compile_recipe(recipe, "build/tiny")  # doctest: +SKIP

Names are imported when they are first used: ``import toolchain`` loads neither torch nor a converter.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from toolchain.accuracy.verify import verify
    from toolchain.build.compile import compile_recipe
    from toolchain.build.event_file import EventFile
    from toolchain.build.matrix import build_all
    from toolchain.build.quantizing import quantize
    from toolchain.build.tuning import tune
    from toolchain.errors import CancelledError, SoraCompileError
    from toolchain.formats.bundle import Bundle, load_bundle
    from toolchain.formats.recipe import Recipe
    from toolchain.formats.recipe_file import load_recipe
    from toolchain.listener import Listener
    from toolchain.planning.plan import Plan, plan
    from toolchain.player import Player, play
    from toolchain.system.events import Event

_HOMES = {
    "Bundle": "formats.bundle",
    "CancelledError": "errors",
    "Event": "system.events",
    "EventFile": "build.event_file",
    "Listener": "listener",
    "Plan": "planning.plan",
    "Player": "player",
    "Recipe": "formats.recipe",
    "SoraCompileError": "errors",
    "build_all": "build.matrix",
    "compile_recipe": "build.compile",
    "load_bundle": "formats.bundle",
    "load_recipe": "formats.recipe_file",
    "plan": "planning.plan",
    "play": "player",
    "quantize": "build.quantizing",
    "tune": "build.tuning",
    "verify": "accuracy.verify",
}

__all__ = [
    "Bundle",
    "CancelledError",
    "Event",
    "EventFile",
    "Listener",
    "Plan",
    "Player",
    "Recipe",
    "SoraCompileError",
    "build_all",
    "compile_recipe",
    "load_bundle",
    "load_recipe",
    "plan",
    "play",
    "quantize",
    "tune",
    "verify",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'toolchain' has no attribute '{name}'")
    return getattr(importlib.import_module(f"toolchain.{_HOMES[name]}"), name)
