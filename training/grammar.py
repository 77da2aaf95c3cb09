"""The world that the tiny model knows: scenes of one moving shape, their prompts, and their video.

Every combination of shape, colour, background and motion is a :class:`Scene`; some are held out of all training, in
every size and at every speed.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import random
from dataclasses import dataclass

import torch

SIZE = 64
FRAMES = 17
LONG_FRAMES = 34
"""Two chunks of the video autoencoder."""

SHAPES = ("circle", "square", "triangle")
COLOURS: dict[str, tuple[int, int, int]] = {
    "red": (220, 40, 40),
    "green": (40, 180, 60),
    "blue": (40, 80, 220),
    "yellow": (240, 220, 50),
}
BACKGROUNDS: dict[str, tuple[int, int, int]] = {
    "black": (15, 15, 15),
    "white": (240, 240, 240),
    "gray": (128, 128, 128),
    "blue": (40, 80, 220),
}
MOTIONS: dict[str, tuple[int, int]] = {
    "left to right": (1, 0),
    "right to left": (-1, 0),
    "up": (0, -1),
    "down": (0, 1),
}
"""Name in the plainest prompt, and the direction: x to the right, y downwards."""
SIZES: dict[str, tuple[float, float]] = {"small": (7.5, 8.5), "medium": (10.0, 12.5), "large": (14.5, 16.0)}
"""Least and largest radius in pixels. What is medium has no word for it in the prompt."""
SPEEDS = {"slow": 16.0, "medium": 32.0, "fast": 44.0}
"""Pixels between the shape's first and last place, however many frames there are."""

WORDINGS = {
    "left to right": ("left to right", "from left to right", "right", "to the right", "rightwards"),
    "right to left": ("right to left", "from right to left", "left", "to the left", "leftwards"),
    "up": ("up", "upwards", "upward", "bottom to top", "from bottom to top"),
    "down": ("down", "downwards", "downward", "top to bottom", "from top to bottom"),
}
SIZE_WORDS = {"small": ("small", "little"), "medium": ("",), "large": ("large", "big")}
SPEED_WORDS = {"slow": ("slowly",), "medium": ("",), "fast": ("quickly", "fast")}
PLAIN = "a {colour} {shape} moves {motion} on a {background} background"
TEMPLATES = (
    PLAIN,
    "a {colour} {shape} is moving {motion} on a {background} background",
    "the {colour} {shape} moves {motion} over a {background} background",
    "{colour} {shape} moving {motion}, {background} background",
    "a {colour} {shape} moves {motion} across a {background} background",
    "on a {background} background a {colour} {shape} moves {motion}",
    "the {colour} {shape} moved {motion} in front of a {background} background",
    "one {colour} {shape} that moves {motion}. the background is {background}.",
    "A {colour} {shape} moving {motion} against the {background} background.",
)
HELD_OUT = 24


@dataclass(frozen=True)
class Scene:
    """What a prompt says."""

    shape: str
    colour: str
    background: str
    motion: str
    size: str = "medium"
    speed: str = "medium"

    def prompt(self) -> str:
        """The plainest prompt."""
        return self._filled(PLAIN, self.motion, SIZE_WORDS[self.size][0], SPEED_WORDS[self.speed][0])

    def worded(self, rng: random.Random) -> str:
        """A prompt in other words; the plainest one half of the time."""
        if rng.random() < 0.5:
            return self.prompt()
        motion = rng.choice(WORDINGS[self.motion])
        template = rng.choice(TEMPLATES)
        return self._filled(template, motion, rng.choice(SIZE_WORDS[self.size]), rng.choice(SPEED_WORDS[self.speed]))

    def _filled(self, template: str, motion: str, size: str, speed: str) -> str:
        """Size before the colour, speed before the motion, each only where there is a word."""
        colour, motion = f"{size} {self.colour}".strip(), f"{speed} {motion}".strip()
        return template.format(shape=self.shape, colour=colour, background=self.background, motion=motion)

    def labels(self) -> tuple[int, ...]:
        """Index of shape, colour, background, motion, size and speed."""
        return (
            SHAPES.index(self.shape),
            list(COLOURS).index(self.colour),
            list(BACKGROUNDS).index(self.background),
            list(MOTIONS).index(self.motion),
            list(SIZES).index(self.size),
            list(SPEEDS).index(self.speed),
        )

    def kind(self) -> int:
        """Number of its size and speed, below :data:`KINDS`."""
        return list(SIZES).index(self.size) * len(SPEEDS) + list(SPEEDS).index(self.speed)

    def of_kind(self, kind: int) -> Scene:
        """The same in another size and at another speed."""
        size, speed = divmod(kind, len(SPEEDS))
        return dataclasses.replace(self, size=list(SIZES)[size], speed=list(SPEEDS)[speed])

    def varied(self, rng: random.Random) -> Scene:
        """The same in a random size and at a random speed."""
        return self.of_kind(rng.randrange(KINDS))


KINDS = len(SIZES) * len(SPEEDS)
LABELS = (len(SHAPES), len(COLOURS), len(BACKGROUNDS), len(MOTIONS), len(SIZES), len(SPEEDS))
"""Number of values of each of :meth:`Scene.labels`."""


def scenes() -> list[Scene]:
    """All of them, of medium size and speed; a shape is never of its background's colour."""
    combinations = itertools.product(SHAPES, COLOURS, BACKGROUNDS, MOTIONS)
    return [Scene(*c) for c in combinations if c[1] != c[2]]


@functools.cache
def split() -> tuple[list[Scene], list[Scene]]:
    """Scenes to train on and scenes held out, the same for ever."""
    shuffled = scenes()
    random.Random(2024).shuffle(shuffled)
    return shuffled[HELD_OUT:], shuffled[:HELD_OUT]


@dataclass(frozen=True)
class Look:
    """What the prompt leaves open."""

    radius: float = 11.0
    across: float = 0.0
    """Distance of the path from the middle, in pixels."""
    along: float = 0.0
    """Distance of the path's middle from the picture's, in pixels."""

    @classmethod
    def draw(cls, rng: random.Random, scene: Scene) -> Look:
        """A random one of the scene's size."""
        return cls(rng.uniform(*SIZES[scene.size]), rng.uniform(-8.0, 8.0), rng.uniform(-2.0, 2.0))


def centres(scene: Scene, look: Look, frames: int = FRAMES) -> torch.Tensor:
    """Places of the shape's centre, ``[frames, 2]``: x and y in pixels."""
    dx, dy = MOTIONS[scene.motion]
    half = SPEEDS[scene.speed] / 2
    along = torch.linspace(-half, half, frames) + look.along
    middle = torch.tensor([SIZE / 2, SIZE / 2]) + look.across * torch.tensor([abs(dy), abs(dx)])
    return middle + along[:, None] * torch.tensor([dx, dy])


def coverage(shape: str, x: torch.Tensor, y: torch.Tensor, radius: float | torch.Tensor) -> torch.Tensor:
    """Share of a pixel that the shape covers; ``x``, ``y`` from its centre of mass. Areas are about equal."""
    if shape == "circle":
        distance = torch.sqrt(x * x + y * y) - radius
    elif shape == "square":
        distance = torch.maximum(x.abs(), y.abs()) - radius * 0.886
    else:  # equilateral, one corner up: three half planes at the inscribed circle's radius
        distance = torch.maximum(y, 0.8660254 * x.abs() - 0.5 * y) - radius * 0.777
    return (0.5 - distance).clamp(0.0, 1.0)


def render(scene: Scene, look: Look, frames: int = FRAMES) -> torch.Tensor:
    """The video ``[3, frames, 64, 64]``, -1 … 1."""
    places = centres(scene, look, frames)
    return draw([scene] * frames, torch.full((frames,), look.radius), places).transpose(0, 1)


def draw(what: list[Scene], radius: torch.Tensor, places: torch.Tensor) -> torch.Tensor:
    """One picture a scene ``[n, 3, 64, 64]``, with shapes of ``radius`` ``[n]`` at ``places`` ``[n, 2]``."""
    pixels = torch.arange(SIZE) + 0.5
    x = pixels[None, None, :] - places[:, 0, None, None]
    y = pixels[None, :, None] - places[:, 1, None, None]
    cover = torch.empty(len(what), SIZE, SIZE)
    for shape in SHAPES:
        of_it = torch.tensor([s.shape == shape for s in what])
        cover[of_it] = coverage(shape, x[of_it], y[of_it], radius[of_it, None, None])
    front = torch.tensor([COLOURS[s.colour] for s in what]) / 127.5 - 1.0
    back = torch.tensor([BACKGROUNDS[s.background] for s in what]) / 127.5 - 1.0
    front, back = front[:, :, None, None], back[:, :, None, None]
    return back + cover[:, None] * (front - back)
