"""A toy denoiser, text encoder and image decoder, written to be lowered.

The denoiser fuses query, key and value, which its checkpoints keep apart; the decoder's checkpoint keeps weight and
bias in one tensor, which the model takes apart.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from toolchain.ir.feeds import Frames as FramesFeed
from toolchain.ir.feeds import Given, Latents, TextEmbedding, Timestep, TokenIds
from toolchain.ir.graph import Input, Leaf, LoweredForm, wire
from toolchain.ir.weights import WeightSource

RATIO = 4
"""Pixels a latent pixel; frames are latent frames."""
SPLIT = ("query", "key", "value")


class Lift(Leaf):
    """Latent pixels to tokens: ``[B, c, T, H, W]`` to ``[B, T·H·W, C]``."""

    kind = "lift"

    def __init__(self, channels: int, width: int) -> None:
        super().__init__()
        self.lift = nn.Linear(channels, width)

    def forward(self, latent: torch.Tensor) -> torch.Tensor:
        b, c, t, h, w = latent.shape
        tokens = latent.permute(0, 2, 3, 4, 1).reshape(b, t * h * w, c)
        out: torch.Tensor = self.lift(tokens)
        return out


class Drop(Leaf):
    """Tokens back to latent pixels."""

    kind = "drop"

    def __init__(self, channels: int, width: int) -> None:
        super().__init__()
        self.drop = nn.Linear(width, channels)

    def forward(self, x: torch.Tensor, sizes: tuple[int, int, int]) -> torch.Tensor:
        t, h, w = sizes
        out: torch.Tensor = self.drop(x)
        return out.reshape(x.shape[0], t, h, w, -1).permute(0, 4, 1, 2, 3)


class Mood(Leaf):
    """The caption's mean and the noise level as one vector ``[B, 1, C]``."""

    kind = "mood"

    def __init__(self, text: int, width: int) -> None:
        super().__init__()
        self.words = nn.Linear(text, width)
        self.level = nn.Linear(1, width)

    def forward(self, caption: torch.Tensor, level: torch.Tensor) -> torch.Tensor:
        words: torch.Tensor = self.words(caption).mean(dim=1, keepdim=True)
        noise: torch.Tensor = self.level(level.reshape(-1, 1, 1) * 0.001)
        return words + noise


class Attend(Leaf):
    """Tokens of a frame attend to one another."""

    kind = "self_attention"

    def __init__(self, width: int) -> None:
        super().__init__()
        self.fused = nn.Linear(width, 3 * width)

    def forward(self, x: torch.Tensor, frames: int) -> torch.Tensor:
        b, n, c = x.shape
        groups = self.fused(x).reshape(b * frames, n // frames, 3 * c)
        q, k, v = (groups[:, :, i * c : (i + 1) * c] for i in range(3))
        weights = torch.softmax(torch.bmm(q, k.transpose(1, 2)) * c**-0.5, dim=-1)
        return torch.bmm(weights, v).reshape(b, n, c)


class Layer(nn.Module):
    """Attention with the mood added to what it sees; a residual."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.attend = Attend(width)

    def forward(self, x: torch.Tensor, mood: torch.Tensor, frames: int) -> torch.Tensor:
        out: torch.Tensor = x + self.attend(x + mood, frames=frames)
        return out


class ToyDenoiser(nn.Module):
    def __init__(self, channels: int, width: int, text: int, words: int, layers: int) -> None:
        super().__init__()
        self.lift = Lift(channels, width)
        self.mood = Mood(text, width)
        self.layers = nn.ModuleList(Layer(width) for _ in range(layers))
        self.drop = Drop(channels, width)
        self.silence = nn.Parameter(torch.zeros(words, text))


class LoweredDenoiser(LoweredForm):
    component = "transformer"

    def __init__(self, model: ToyDenoiser, latent: tuple[int, int, int, int], words: int, text: int) -> None:
        super().__init__()
        self.lift, self.mood, self.layers, self.drop = model.lift, model.mood, model.layers, model.drop
        self.silence = model.silence
        self._latent, self._words, self._text = latent, words, text

    def inputs(self) -> tuple[Input, ...]:
        silent = TextEmbedding(unconditional="silence")
        return (
            Input("noisy", (2, *self._latent), Latents()),
            Input("caption", (2, self._words, self._text), silent, rate="prompt"),
            Input("level", (2,), Timestep(), exact=True),
        )

    def gives(self) -> dict[str, Given]:
        return {"velocity": "prediction"}

    def dims(self) -> dict[str, int]:
        _, t, h, w = self._latent
        return {"B": 2, "T": t, "H": h, "W": w, "S": h * w, "N": t * h * w}

    def source(self, parameter: str, shape: tuple[int, ...]) -> WeightSource:
        if ".fused." not in parameter:
            return WeightSource((parameter,), shape)
        return WeightSource(tuple(parameter.replace("fused", part) for part in SPLIT), shape)

    def unit(self, path: str) -> tuple[str, ...]:
        parts = path.split(".")
        return (f"layer.{parts[1]}",) if parts[0] == "layers" else ("start" if parts[0] != "drop" else "end",)

    def forward(self, noisy: torch.Tensor, caption: torch.Tensor, level: torch.Tensor) -> tuple[torch.Tensor, ...]:
        _, t, h, w = self._latent
        mood = wire(self.mood(caption, level), "mood")
        stream = wire(self.lift(noisy), "stream")
        for layer in self.layers:
            stream = wire(layer(stream, mood, t), "stream")
        return wire(self.drop(stream, sizes=(t, h, w)), "velocity"), wire(self.silence, "silence")


class Words(Leaf):
    """A vector for each token."""

    kind = "embedding"

    def __init__(self, vocabulary: int, text: int) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.zeros(vocabulary, text))

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return torch.tanh(F.embedding(ids, self.table))


class LoweredReader(LoweredForm):
    component = "text_encoder"

    def __init__(self, words: Words, count: int) -> None:
        super().__init__()
        self.words, self._count = words, count

    def inputs(self) -> tuple[Input, ...]:
        return (Input("tokens", (1, self._count), TokenIds(), rate="prompt", dtype=torch.int32),)

    def gives(self) -> dict[str, Given]:
        return {"meaning": "text_embedding"}

    def dims(self) -> dict[str, int]:
        return {"L": self._count}

    def unit(self, path: str) -> tuple[str, ...]:
        return ("words",)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        return wire(self.words(tokens), "meaning")


class Paint(Leaf):
    """A latent pixel to ``RATIO`` × ``RATIO`` pixels."""

    kind = "paint"

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(3 * RATIO * RATIO, channels))
        self.bias = nn.Parameter(torch.zeros(3 * RATIO * RATIO))

    def forward(self, latent: torch.Tensor) -> torch.Tensor:
        n, c, h, w = latent.shape
        painted = F.linear(latent.permute(0, 2, 3, 1).reshape(n, h * w, c), self.weight, self.bias)
        return F.pixel_shuffle(torch.tanh(painted).transpose(1, 2).reshape(n, -1, h, w), RATIO)


class LoweredPainter(LoweredForm):
    component = "vae"

    def __init__(self, paint: Paint, frames: int, latent: tuple[int, int, int, int]) -> None:
        super().__init__()
        self.paint, self._frames, self._latent = paint, frames, latent

    def inputs(self) -> tuple[Input, ...]:
        c, _, h, w = self._latent
        return (Input("sketch", (self._frames, c, h, w), FramesFeed(), rate="frames"),)

    def gives(self) -> dict[str, Given]:
        return {"picture": "pixels"}

    def dims(self) -> dict[str, int]:
        return {"F": self._frames}

    def source(self, parameter: str, shape: tuple[int, ...]) -> WeightSource:
        channels = self._latent[0]
        taken = (1, 0, channels) if parameter == "paint.weight" else (1, channels, 1)
        return WeightSource(("paint.packed",), shape, narrow=(taken,))

    def unit(self, path: str) -> tuple[str, ...]:
        return ("paint",)

    def forward(self, sketch: torch.Tensor) -> torch.Tensor:
        return wire(self.paint(sketch), "picture")
