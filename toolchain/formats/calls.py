"""The order in which a whole video's blocks are called: text encoder, denoiser, decoder. Players keep to it."""

from __future__ import annotations

from collections.abc import Container, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

PROMPT, STEP = "prompt", "step"


class Piece(Protocol):
    @property
    def function(self) -> str: ...


class Stage(Protocol):
    """A stage of decoding, as the manifest has it."""

    @property
    def rate(self) -> str: ...

    @property
    def pieces(self) -> Sequence[Piece]: ...


@dataclass(frozen=True)
class Round:
    """All blocks of a component's rate, once, in their order, asked for ``function``; None is the default one."""

    component: str
    rate: str
    function: str | None


def rounds(
    components: Container[str],
    steps: Iterable[str],
    stages: Iterable[Stage],
    *,
    text: str = PROMPT,
    once: str = PROMPT,
    each: str = STEP,
) -> Iterator[Round]:
    """The rounds of a video, for the components that there are.

    Args:
        steps: function of each call of the denoiser. A static leap shortens them; with a dynamic one they are all
            there are, and a player that leaps leaves out the rest.
        stages: of decoding, in order.
        text, once, each: rates of the text encoder, of the denoiser before its first step, and at every step.
    """
    if "text_encoder" in components:
        yield Round("text_encoder", text, None)
    if "transformer" in components:
        yield Round("transformer", once, None)
        for function in steps:
            yield Round("transformer", each, function)
    if "vae" in components:
        for stage in stages:
            for piece in stage.pieces:
                yield Round("vae", stage.rate, piece.function)
