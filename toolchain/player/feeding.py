"""Making a component's inputs from what the manifest says feeds them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch

from toolchain.errors import BundleError
from toolchain.ir.feeds import Constant, Feed, TextEmbedding


@dataclass(frozen=True)
class Fed:
    """An input: its name, its whole shape, and what feeds it."""

    name: str
    shape: tuple[int, ...]
    feed: Feed


def feed_inputs(
    inputs: Iterable[Fed], given: Mapping[str, torch.Tensor], tables: Mapping[str, torch.Tensor]
) -> dict[str, torch.Tensor]:
    """Inputs by name.

    Args:
        given: values by kind of feed. ``text_embedding`` is the conditional half's alone; what has one row, or is one
            number, serves the whole batch.
        tables: the component's.

    Raises:
        BundleError: nothing feeds an input, or what does has another shape.
    """
    fed = {}
    for spec in inputs:
        value = _value(spec, given, tables)
        try:
            fed[spec.name] = value.expand(spec.shape)
        except RuntimeError as e:
            raise BundleError(
                f"input '{spec.name}' is {list(spec.shape)}, but its {spec.feed.kind} is {list(value.shape)}"
            ) from e
    return fed


def _value(spec: Fed, given: Mapping[str, torch.Tensor], tables: Mapping[str, torch.Tensor]) -> torch.Tensor:
    feed = spec.feed
    if isinstance(feed, Constant):
        return torch.tensor(feed.value)
    if feed.kind not in given:
        raise BundleError(f"input '{spec.name}' wants {feed.kind}, which nothing gives here")
    value = given[feed.kind]
    if isinstance(feed, TextEmbedding):
        return torch.cat((value, tables[feed.unconditional].reshape(1, *value.shape[1:])))
    return value
