"""Every kind of feed makes the input that it says, and what cannot be made is refused by name."""

from __future__ import annotations

from typing import get_args

import pytest
import torch

from toolchain.errors import BundleError
from toolchain.ir.feeds import (
    Constant,
    Feed,
    FrameMask,
    Frames,
    Latents,
    Pixels,
    TextEmbedding,
    Timestep,
    TokenIds,
    TokenMask,
)
from toolchain.player.feeding import Fed, feed_inputs

NULL = torch.arange(12.0).reshape(4, 3)
TABLES = {"null": NULL, "other": torch.zeros(1)}
PROMPT = 100 + torch.arange(12.0).reshape(1, 4, 3)
CLIP = torch.randn(1, 2, 3, 4, 5, generator=torch.Generator().manual_seed(0))
KINDS = {kind.model_fields["kind"].default for kind in get_args(get_args(Feed)[0])}

CASES: dict[str, tuple[Fed, dict[str, torch.Tensor], torch.Tensor]] = {
    "token_ids": (
        Fed("ids", (1, 4), TokenIds()),
        {"token_ids": torch.tensor([[5, 1, 0, 0]], dtype=torch.int32)},
        torch.tensor([[5, 1, 0, 0]], dtype=torch.int32),
    ),
    "token_mask": (
        Fed("keep", (2, 4), TokenMask()),
        {"token_mask": torch.tensor([[1.0, 1.0, 0.0, 0.0]])},
        torch.tensor([[1.0, 1.0, 0.0, 0.0]] * 2),
    ),
    "text_embedding": (
        Fed("text", (2, 4, 3), TextEmbedding(unconditional="null")),
        {"text_embedding": PROMPT},
        torch.stack((PROMPT[0], NULL)),
    ),
    "latents": (
        Fed("z", (2, 2, 3, 4, 5), Latents()),
        {"latents": torch.cat((CLIP, CLIP))},
        torch.cat((CLIP, CLIP)),
    ),
    "timestep": (Fed("t", (2,), Timestep()), {"timestep": torch.tensor(977.5)}, torch.tensor([977.5, 977.5])),
    "constant": (Fed("speed", (2, 1), Constant(value=24.0)), {}, torch.tensor([[24.0], [24.0]])),
    "frame_mask": (
        Fed("given", (2, 3), FrameMask()),
        {"frame_mask": torch.tensor([[0.0, 1.0, 1.0]])},
        torch.tensor([[0.0, 1.0, 1.0]] * 2),
    ),
    "frames": (Fed("frames", (1, 2, 3, 4, 5), Frames()), {"frames": CLIP}, CLIP),
    "pixels": (Fed("pictures", (3, 2, 4, 5), Pixels()), {"pixels": CLIP[0].transpose(0, 1)}, CLIP[0].transpose(0, 1)),
}


def test_every_kind_is_here() -> None:
    assert CASES.keys() == KINDS


@pytest.mark.parametrize("kind", CASES)
def test_a_feed_makes_its_input(kind: str) -> None:
    spec, given, expected = CASES[kind]
    assert spec.feed.kind == kind
    before = {k: v.clone() for k, v in given.items()}
    (found,) = feed_inputs([spec], given | {"something else": torch.zeros(7)}, TABLES).items()
    assert found[0] == spec.name
    assert (found[1].shape, found[1].dtype) == (spec.shape, expected.dtype)
    assert torch.equal(found[1], expected)
    assert all(torch.equal(given[k], v) for k, v in before.items())


def test_inputs_together_and_two_of_one_kind() -> None:
    """Names mean nothing: two inputs may have one feed, each in its own shape."""
    specs = [spec for spec, _, _ in CASES.values()] + [Fed("again", (1, 4), TokenMask())]
    given: dict[str, torch.Tensor] = {}
    for _, own, _ in CASES.values():
        given |= own
    found = feed_inputs(specs, given, TABLES)
    assert list(found) == [spec.name for spec in specs]
    for spec, _, expected in CASES.values():
        assert torch.equal(found[spec.name], expected)
    assert torch.equal(found["again"], given["token_mask"])


def test_nothing_is_fed_to_nothing() -> None:
    assert feed_inputs([], {"latents": CLIP}, TABLES) == {}


@pytest.mark.parametrize("kind", sorted(KINDS - {"constant"}))
def test_what_nothing_gives(kind: str) -> None:
    spec = CASES[kind][0]
    with pytest.raises(BundleError, match=f"^input '{spec.name}' wants {kind}, which nothing gives here$"):
        feed_inputs([spec], {"constant": torch.zeros(1)}, TABLES)


@pytest.mark.parametrize(
    ("spec", "given", "said"),
    [
        (Fed("t", (2,), Timestep()), {"timestep": torch.zeros(3)}, "input 't' is [2], but its timestep is [3]"),
        (
            Fed("keep", (2, 5), TokenMask()),
            {"token_mask": torch.zeros(1, 4)},
            "input 'keep' is [2, 5], but its token_mask is [1, 4]",
        ),
        (
            Fed("z", (2, 2, 3, 4, 5), Latents()),
            {"latents": CLIP[0]},
            "input 'z' is [2, 2, 3, 4, 5], but its latents is [2, 3, 4, 5]",
        ),
        (
            Fed("given", (2, 3), FrameMask()),
            {"frame_mask": torch.zeros(2, 1)},
            "input 'given' is [2, 3], but its frame_mask is [2, 1]",
        ),
        (Fed("ids", (4,), TokenIds()), {"token_ids": torch.zeros(1, 4)}, "input 'ids' is [4], but its token_ids"),
        (
            Fed("text", (4, 4, 3), TextEmbedding(unconditional="null")),
            {"text_embedding": PROMPT},
            "input 'text' is [4, 4, 3], but its text_embedding is [2, 4, 3]",
        ),
        (
            Fed("text", (2, 4, 3), TextEmbedding(unconditional="other")),
            {"text_embedding": PROMPT},
            "input 'text': the table 'other' is [1], but its text_embedding is [1, 4, 3]",
        ),
        (
            Fed("text", (2, 4, 3), TextEmbedding(unconditional="nul")),
            {"text_embedding": PROMPT},
            "input 'text' wants the table 'nul', which there is not",
        ),
    ],
    ids=["rows", "length", "rank", "columns", "too many dimensions", "both halves", "table's shape", "no table"],
)
def test_what_does_not_fit(spec: Fed, given: dict[str, torch.Tensor], said: str) -> None:
    with pytest.raises(BundleError) as error:
        feed_inputs([spec], given, TABLES)
    assert str(error.value).startswith(said)
    assert "\n" not in str(error.value)


def test_the_first_that_does_not_fit_is_named() -> None:
    specs = [Fed("right", (2,), Timestep()), Fed("wrong", (3, 3), Timestep())]
    with pytest.raises(BundleError, match="input 'wrong'"):
        feed_inputs(specs, {"timestep": torch.zeros(2)}, {})
