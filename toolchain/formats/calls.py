"""The order in which a whole video's blocks are called: text encoder, denoiser, decoder. Players keep to it."""

from __future__ import annotations

from collections.abc import Container, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

from toolchain.formats.reuse import Reusing, kept_after

Rate = Literal["prompt", "step", "chunk", "frames", "encode_chunk", "encode_frames"]
"""How often something runs or changes: once for a prompt; at every denoising step; in the VAE for every micro
chunk of latents and for every group of frames (``encode_…`` for the encoder's)."""
PROMPT, STEP = "prompt", "step"


class Piece(Protocol):
    @property
    def function(self) -> str: ...


class Tiles(Protocol):
    @property
    def count(self) -> int: ...


class Stage(Protocol):
    """A stage of decoding, as the manifest has it."""

    @property
    def rate(self) -> str: ...

    @property
    def pieces(self) -> Sequence[Piece]: ...

    @property
    def tiles(self) -> Tiles | None: ...


class Step(Reusing, Protocol):
    """A step of the sampler."""

    @property
    def function(self) -> str: ...


class Range(Protocol):
    """A range of blocks, and the bytes of what is kept of it."""

    @property
    def blocks(self) -> Sequence[str]: ...

    @property
    def bytes(self) -> int: ...


class Rule(Protocol):
    """A rule that chooses the steps that reuse a range, and the bytes of what it observes."""

    @property
    def range(self) -> str: ...

    @property
    def bytes(self) -> int: ...

    def kept_after(self, steps: int) -> list[bool]: ...


@dataclass(frozen=True)
class Kept:
    """Bytes that are held for a range beside the calls of a round: before block ``first``, and from it on.

    While the range is computed that is what went into it, afterwards what it added.
    """

    first: str
    before_bytes: int
    then_bytes: int


@dataclass(frozen=True)
class StepCalls:
    """A step's ``function``, the blocks that it leaves out, and what it keeps for others.

    ``held_bytes`` are held all along its calls, whatever they are.
    """

    function: str
    skipped: frozenset[str] = frozenset()
    kept: tuple[Kept, ...] = ()
    held_bytes: int = 0


@dataclass(frozen=True)
class Round:
    """The blocks of a component's rate, once, in their order, asked for ``function``; None is the default one."""

    component: str
    rate: str
    function: str | None
    skipped: frozenset[str] = frozenset()
    kept: tuple[Kept, ...] = ()
    held_bytes: int = 0


def step_calls(
    steps: Sequence[Step], ranges: Mapping[str, Range], rule: Rule | None = None, difference_bytes: int = 0
) -> Iterator[StepCalls]:
    """What each step calls, and keeps of the ranges of blocks that steps reuse.

    With a rule that chooses the steps, these are the calls if it never leaves anything out, and what is kept if it may.

    Args:
        difference_bytes: of the difference of the halves of guidance, which is held from the first step that computes
            both on.
    """
    kept = kept_after(steps, {name: own.blocks for name, own in ranges.items()})
    sizes = [(own.blocks[0], own.bytes, kept[name]) for name, own in ranges.items()]
    if rule is not None:
        first, bytes_ = ranges[rule.range].blocks[0], ranges[rule.range].bytes
        observed = [True] * (len(steps) - 1) + [False]
        sizes = [(first, bytes_, rule.kept_after(len(steps))), (first, rule.bytes, observed)]
    difference = False
    for i, step in enumerate(steps):
        held = (Kept(first, n * (i > 0 and after[i - 1]), n * after[i]) for first, n, after in sizes)
        yield StepCalls(
            step.function,
            frozenset(ranges[step.reuse].blocks) if step.reuse is not None else frozenset(),
            tuple(k for k in held if k.before_bytes or k.then_bytes),
            difference_bytes * difference,
        )
        difference = difference or step.guidance == "both"


def rounds(
    components: Container[str],
    steps: Iterable[StepCalls],
    stages: Iterable[Stage],
    *,
    text: str = PROMPT,
    once: str = PROMPT,
    each: str = STEP,
) -> Iterator[Round]:
    """The rounds of a video, for the components that there are.

    Args:
        steps: each call of the denoiser. A static leap shortens them; with a dynamic one they are all there are, and a
            player that leaps leaves out the rest.
        stages: of decoding, in order.
        text, once, each: rates of the text encoder, of the denoiser before its first step, and at every step.
    """
    if "text_encoder" in components:
        yield Round("text_encoder", text, None)
    if "transformer" in components:
        yield Round("transformer", once, None)
        for step in steps:
            yield Round("transformer", each, step.function, step.skipped, step.kept, step.held_bytes)
    if "vae" in components:
        for stage in stages:
            for piece in stage.pieces:
                for _ in range(stage.tiles.count if stage.tiles is not None else 1):
                    yield Round("vae", stage.rate, piece.function)
