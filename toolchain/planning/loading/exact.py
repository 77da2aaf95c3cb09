"""The best schedule of a small run: dynamic programming over stages and what is in memory.

A state is a stage and the set of blocks in memory; what led to it is a label: when the computer, the loader and each
loaded block are ready, and how much was loaded. In a stage, any absent block that is called again may be loaded if it
fits, any number in any order; then the call runs; then its block stays or is freed. Of labels of the same state only
those are kept that no other beats in everything, and that could still beat the best schedule known. That is every
schedule there is (:mod:`toolchain.planning.loading.schedule` says why holding a block longer, or waiting, gains
nothing), so what is found is the best.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from toolchain.planning.loading.schedule import Schedule, timed
from toolchain.planning.loading.unrolled import Unrolled

MOST_BLOCKS = 8
MOST_CALLS = 24
"""Of a run that is small enough to try."""
MOST_COMPARISONS = 300_000
"""Of labels with one another: about a second. What takes more is given up, for it may take hours."""


def is_small(u: Unrolled) -> bool:
    return len(u.size) <= MOST_BLOCKS and len(u.block) <= MOST_CALLS


@dataclass(frozen=True)
class _Label:
    """``ready`` is by block; times before ``computer`` are all as good as ``computer``, and set to it."""

    computer: float
    loader: float
    loaded: float
    ready: tuple[float, ...]
    loads: tuple[tuple[int, int], ...]
    stays: tuple[bool, ...]

    def beats(self, other: _Label, count_loads: bool) -> bool:
        if self.computer > other.computer or self.loader > other.loader:
            return False
        if count_loads and self.loaded > other.loaded:
            return False
        return all(a <= b for a, b in zip(self.ready, other.ready, strict=True))


States = dict[int, list[_Label]]
"""Labels by the set of blocks in memory, as bits."""


class _CutShortError(Exception):
    """More labels had to be compared than is allowed."""


def best_schedule(u: Unrolled, budget_bytes: int, overlap_loss: float, known: Schedule) -> Schedule | None:
    """The schedule that takes least time; ``known``, a schedule within the budget, if none is faster.

    None if the search takes more than :data:`MOST_COMPARISONS`.
    """
    try:
        return _Search(u, budget_bytes, overlap_loss, known).schedule()
    except _CutShortError:
        return None


class _Search:
    def __init__(self, u: Unrolled, budget_bytes: int, overlap_loss: float, known: Schedule) -> None:
        self.u, self.loss, self.known = u, overlap_loss, known
        self.best_s = known.total_s(overlap_loss)
        self.space = [budget_bytes - r for r in u.room]
        self.comparisons = 0
        count = len(u.block)
        self.compute_left = [0.0] * (count + 1)
        self.called_later: list[int] = [0] * (count + 1)  # from a stage on, as bits
        for i in range(count - 1, -1, -1):
            self.compute_left[i] = self.compute_left[i + 1] + u.compute[i]
            self.called_later[i] = self.called_later[i + 1] | 1 << u.block[i]

    def schedule(self) -> Schedule:
        u = self.u
        states: States = {0: [_Label(0.0, 0.0, 0.0, (0.0,) * len(u.size), (), ())]}
        for stage in range(len(u.block)):
            states = self._loaded(states, stage)
            states = self._run(states, stage)
        best = min(
            (label for labels in states.values() for label in labels),
            key=lambda label: self._least(label, 0, len(u.block)),
            default=None,
        )
        if best is None:
            return self.known
        found = timed(u, best.loads, best.stays)
        return found if found.total_s(self.loss) < self.known.total_s(self.loss) else self.known

    def _loaded(self, states: States, stage: int) -> States:
        """All that loading in a stage can lead to, the states before included."""
        found: States = {}
        queue = [(held, label) for held, labels in states.items() for label in labels]
        while queue:
            held, label = queue.pop()
            if self._added(found, held, label, stage):
                queue += self._loads(held, label, stage)
        return found

    def _loads(self, held: int, label: _Label, stage: int) -> Iterator[tuple[int, _Label]]:
        u = self.u
        used = self._bytes(held)
        for b in self._blocks(self.called_later[stage] & ~held):
            if used + u.size[b] <= self.space[stage]:
                loader = label.loader + u.load[b]
                ready = (*label.ready[:b], loader, *label.ready[b + 1 :])
                loads = (*label.loads, (stage, b))
                yield held | 1 << b, _Label(label.computer, loader, label.loaded + u.load[b], ready, loads, label.stays)

    def _run(self, states: States, stage: int) -> States:
        """What running the stage's call leads to, its block kept or freed."""
        u, block = self.u, self.u.block[stage]
        again = u.following[stage] < len(u.block)
        at_once = again and u.following[stage] == stage + 1
        found: States = {}
        for held, labels in states.items():
            if not held >> block & 1:
                continue
            for label in labels:
                computer = max(label.computer, label.ready[block]) + u.compute[stage]
                ready = tuple(max(computer, r) for r in label.ready)
                for stays in (True, False):
                    left = held if stays else held & ~(1 << block)
                    fits = stage + 1 == len(u.block) or self._bytes(left) <= self.space[stage + 1]
                    sensible = again if stays else not at_once
                    if fits and sensible:
                        kept = ready if stays else (*ready[:block], computer, *ready[block + 1 :])
                        loader = max(label.loader, computer)
                        new = _Label(computer, loader, label.loaded, kept, label.loads, (*label.stays, stays))
                        self._added(found, left, new, stage + 1)
        return found

    def _added(self, states: States, held: int, label: _Label, stage: int) -> bool:
        """Add a label unless another beats it, or it cannot beat the best schedule known."""
        if self._least(label, held, stage) >= self.best_s:
            return False
        labels = states.setdefault(held, [])
        counts = self.loss > 0
        self.comparisons += len(labels)
        if self.comparisons > MOST_COMPARISONS:
            raise _CutShortError
        if any(other.beats(label, counts) for other in labels):
            return False
        labels[:] = [other for other in labels if not label.beats(other, counts)]
        labels.append(label)
        return True

    def _least(self, label: _Label, held: int, stage: int) -> float:
        """What a run takes at least that goes on from a label."""
        missing = sum(self.u.load[b] for b in self._blocks(self.called_later[stage] & ~held))
        finish = max(label.computer + self.compute_left[stage], label.loader + missing)
        serial = self.compute_left[0] + label.loaded + missing
        return (1 - self.loss) * finish + self.loss * serial

    def _bytes(self, held: int) -> int:
        return sum(self.u.size[b] for b in self._blocks(held))

    def _blocks(self, held: int) -> Iterator[int]:
        return (b for b in range(len(self.u.size)) if held >> b & 1)
