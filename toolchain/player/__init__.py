"""From a prompt to a video with nothing but a bundle.

Nothing here imports ``toolchain.models``: what a player has to know is in the manifest.
"""

from toolchain.player.player import Player, play

__all__ = ["Player", "play"]
