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
    from toolchain.bundle import Bundle, load_bundle
    from toolchain.errors import SoraCompileError
    from toolchain.listener import Listener
    from toolchain.lowering import Plan, plan
    from toolchain.pipeline import compile_recipe
    from toolchain.player import Player, play
    from toolchain.recipe import Recipe, load_recipe
    from toolchain.verification import verify

_HOMES = {
    "Bundle": "bundle",
    "Listener": "listener",
    "Plan": "lowering",
    "Player": "player",
    "Recipe": "recipe",
    "SoraCompileError": "errors",
    "compile_recipe": "pipeline",
    "load_bundle": "bundle",
    "load_recipe": "recipe",
    "plan": "lowering",
    "play": "player",
    "verify": "verification",
}

__all__ = [
    "Bundle",
    "Listener",
    "Plan",
    "Player",
    "Recipe",
    "SoraCompileError",
    "compile_recipe",
    "load_bundle",
    "load_recipe",
    "plan",
    "play",
    "verify",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'toolchain' has no attribute '{name}'")
    return getattr(importlib.import_module(f"toolchain.{_HOMES[name]}"), name)
