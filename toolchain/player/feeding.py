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
        BundleError: nothing feeds an input, or what does has another shape; there is no such table.
    """
    fed = {}
    for spec in inputs:
        value = _value(spec, given, tables)
        if value.shape not in ((), spec.shape, (1, *spec.shape[1:])):
            raise BundleError(
                f"input '{spec.name}' is {list(spec.shape)}, but its {spec.feed.kind} is {list(value.shape)}"
            )
        fed[spec.name] = value.expand(spec.shape)
    return fed


def _value(spec: Fed, given: Mapping[str, torch.Tensor], tables: Mapping[str, torch.Tensor]) -> torch.Tensor:
    feed = spec.feed
    if isinstance(feed, Constant):
        return torch.tensor(feed.value)
    if feed.kind not in given:
        raise BundleError(f"input '{spec.name}' wants {feed.kind}, which nothing gives here")
    value = given[feed.kind]
    if not isinstance(feed, TextEmbedding):
        return value
    table = tables.get(feed.unconditional)
    if table is None:
        raise BundleError(f"input '{spec.name}' wants the table '{feed.unconditional}', which there is not")
    if table.shape != value.shape[1:]:
        raise BundleError(
            f"input '{spec.name}': the table '{feed.unconditional}' is {list(table.shape)}, "
            f"but its {feed.kind} is {list(value.shape)}"
        )
    return torch.cat((value, table[None]))
