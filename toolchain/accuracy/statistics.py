"""What comes into the linear layers and convolutions of a block, measured while it is run in eager mode.

Calls are met where torch itself is called, and told apart by the weight that they read, so that it does not matter
whether a leaf calls a module or the function behind it.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch.overrides import TorchFunctionMode

from toolchain.accuracy.references import Values, Weights
from toolchain.ir.blocks import Block

LINEAR: frozenset[Any] = frozenset({F.linear})
CONVOLUTIONS: frozenset[Any] = frozenset({F.conv1d, F.conv2d, F.conv3d})
LOOKED_UP: frozenset[Any] = frozenset({F.embedding, torch.embedding})
ROWS = 4096
"""Rows of an input that are squared in float32; sums over more are of float64."""


@dataclass(frozen=True)
class Range:
    """The least and the largest number that came into a layer in one run of a function, and that it gave."""

    low: float
    high: float
    out_low: float
    out_high: float

    def with_(self, other: Range) -> Range:
        """The range of both."""
        lows = min(self.low, other.low), min(self.out_low, other.out_low)
        highs = max(self.high, other.high), max(self.out_high, other.out_high)
        return Range(lows[0], highs[0], lows[1], highs[1])


class Total:
    """Sums over all inputs of one weight, float64.

    ``squares`` has the shape of the weight without its first dimension, ones in the place of a convolution's kernel;
    ``products`` is ``[K, K]``, None unless it was asked for. ``count`` is how many numbers a column was given.
    """

    def __init__(self) -> None:
        self.count = 0
        self.squares: torch.Tensor | None = None
        self.products: torch.Tensor | None = None

    def add(self, count: int, squares: torch.Tensor, products: torch.Tensor | None) -> None:
        """Add what another input had."""
        self.count += count
        self.squares = squares if self.squares is None else self.squares + squares
        if products is not None:
            self.products = products.clone() if self.products is None else self.products.add_(products)


class Watch(TorchFunctionMode):
    """While it is entered, measures every layer that reads one of ``weights``.

    Args:
        weights: by name; they have to be the very tensors that layers are given.
        products: names of the weights whose inputs' second moments are summed as well.
    """

    def __init__(self, weights: Mapping[str, torch.Tensor], products: Collection[str]) -> None:
        super().__init__()
        self._weights, self._products = weights, products
        self._names = {w.data_ptr(): n for n, w in weights.items() if w.is_floating_point()}
        self._last: tuple[torch.Tensor, int, torch.Tensor] | None = None
        self.totals: dict[str, Total] = {}
        self.ranges: dict[str, Range] = {}
        """Since they were taken last."""

    def take_ranges(self) -> dict[str, Range]:
        """The ranges of the layers that were met since this was called before."""
        found, self.ranges = self.ranges, {}
        return found

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        if func in LINEAR or func in CONVOLUTIONS or func in LOOKED_UP:
            given = [a for a in (*args, *(kwargs or {}).values()) if isinstance(a, torch.Tensor)]
            names = [name for a in given for name in [self._names.get(a.data_ptr())] if name is not None]
            matrix = next((n for n in names if self._weights[n].dim() > 1), None)
            if matrix is not None:
                self._meet(func, matrix, given[0], result)
        return result

    def _meet(self, func: Callable[..., Any], name: str, x: torch.Tensor, result: torch.Tensor) -> None:
        shape, total = self._weights[name].shape[1:], self.totals.setdefault(name, Total())
        if func in LOOKED_UP:  # what is looked up is the result, so all of its numbers count alike
            identity = torch.eye(shape[0], dtype=torch.float64) if name in self._products else None
            total.add(1, torch.ones(shape, dtype=torch.float64), identity)
            return
        if func in LINEAR:
            rows = x.reshape(-1, x.shape[-1])
            total.add(
                len(rows), _squares(rows).reshape(shape), self._second(x, rows) if name in self._products else None
            )
        else:
            channels = x.reshape(x.shape[0], x.shape[1], -1)
            squares = sum((_squares(part.T) for part in channels), start=torch.zeros((), dtype=torch.float64))
            grouped = squares.reshape(-1, shape[0]).mean(0)  # the groups of a convolution share its columns
            total.add(channels.shape[0] * channels.shape[2], grouped.reshape(-1, *(1 for _ in shape[1:])), None)
        met = Range(*(float(v) for t in (x, result) for v in t.aminmax()))
        self.ranges[name] = self.ranges[name].with_(met) if name in self.ranges else met

    def _second(self, x: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
        """The products of an input's columns; layers that read the same input, as queries and keys do, share them."""
        if self._last is None or self._last[0] is not x or self._last[1] != x._version:
            self._last = x, x._version, _second(rows)
        return self._last[2]


def _squares(rows: torch.Tensor) -> torch.Tensor:
    """Sums of squares of columns ``[n, K]``, float64."""
    found = torch.zeros(rows.shape[1], dtype=torch.float64)
    for piece in torch.split(rows, ROWS):
        found += piece.square().sum(0, dtype=torch.float64)
    return found


def _second(rows: torch.Tensor) -> torch.Tensor:
    """Sums of products of columns ``[n, K]``: ``[K, K]``, float64."""
    found = torch.zeros(rows.shape[1], rows.shape[1], dtype=torch.float64)
    for piece in torch.split(rows, ROWS):
        found += piece.T @ piece
    return found


class Watched:
    """A block that is run on one input after the other, and watched.

    Args:
        weights: of the block, by its own names.
        products: names of the weights whose inputs' second moments are summed.
    """

    def __init__(self, block: Block, weights: Weights, products: Collection[str]) -> None:
        self._block, self._weights = block, weights
        self._watch = Watch(weights, products)

    def run(self, function: str, inputs: Mapping[str, torch.Tensor]) -> tuple[Values, dict[str, Range]]:
        """The outputs by port, and the ranges by weight; ``inputs`` by port."""
        block = self._block
        module = block.module(block.own_function(function), self._weights)
        with torch.no_grad(), self._watch:
            results = module(*(inputs[p.name] for p in block.inputs))
        return dict(zip((p.name for p in block.outputs), results, strict=True)), self._watch.take_ranges()

    @property
    def totals(self) -> Mapping[str, Total]:
        """What all runs had in sum, by weight; of weights that no layer read there is nothing."""
        return self._watch.totals
