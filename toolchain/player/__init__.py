"""From a prompt to a video with nothing but a bundle.

Nothing here imports ``toolchain.models``: what a player has to know is in the manifest. Names are imported when they
are first used, so that preparing a prompt loads no torch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from toolchain.player.player import Player, play

__all__ = ["Player", "play"]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module 'toolchain.player' has no attribute '{name}'")
    from toolchain.player import player

    return getattr(player, name)
