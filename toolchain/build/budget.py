"""From a budget to rules: sweep, allocate, measure what was chosen, and choose again where the estimate was off.

The errors of weights are taken to add up. What was chosen is then run as a whole, so that what is reported is measured
and no estimate; a target in decibels is held on what was measured.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from toolchain.accuracy.metrics import decibels
from toolchain.build.measured import Measured, measure_choice
from toolchain.build.sweep import Sweep
from toolchain.build.sweep_tasks import run_sweeps
from toolchain.build.tasks import builders
from toolchain.errors import RecipeError
from toolchain.formats.budget import Budget
from toolchain.formats.recipe import QUANTIZATION_DEFAULT, Recipe
from toolchain.listener import Listener
from toolchain.planning.allocation import Allocation, Option, UnreachableError, allocate, frontier
from toolchain.planning.budgets import PASS
from toolchain.planning.candidates import Candidate, Item, read_candidates, rules, with_rules
from toolchain.planning.plan import Plan, plan_resolved
from toolchain.planning.resolve import resolve
from toolchain.system.disk import readable_size
from toolchain.system.memory import return_large_allocations
from toolchain.system.store import Store

TRIES = 6
"""How often is chosen and measured at most."""
NEAR_DB = 0.2
"""What a choice may be better than a target in decibels before a smaller one is looked for."""
FIRMER = 1.5
"""How much more than it is over the gate's limit a block's errors are made to count in the next choice."""


@dataclass(frozen=True)
class Chosen:
    """How a weight is to be kept; ``error`` is what that is expected to cost the output (squared, as a share)."""

    item: Item
    candidate: Candidate
    bytes: int
    error: float


@dataclass(frozen=True)
class Point:
    """A size of all weights, and the error expected of it; ``name`` where all weights are kept alike."""

    bytes: int
    error: float
    name: str = ""

    @property
    def sqnr_db(self) -> float:
        """The error in decibels."""
        return decibels(math.sqrt(self.error))


@dataclass(frozen=True)
class Settled:
    """What a budget of one or several components became.

    ``bytes`` are those of all their weights, ``plain_bytes`` what they would be without quantization. ``expected`` is
    the error that was reckoned with, ``measured`` what it is, by component. ``gap`` bounds how much less the expected
    error (or, of a budget of error, the bytes) could have been, relatively. ``curve`` has the best choices at other
    sizes, ``alike`` each candidate for all weights that can be kept so; both expected.
    """

    components: tuple[str, ...]
    budget: Budget
    chosen: tuple[Chosen, ...]
    bytes: int
    plain_bytes: int
    expected: float
    measured: Mapping[str, Measured]
    gap: float
    curve: tuple[Point, ...]
    alike: tuple[Point, ...]

    @property
    def error(self) -> float:
        """The measured errors of all components, added."""
        return sum(m.error for m in self.measured.values())


def settle(
    recipe: Recipe,
    base: Path,
    store: Store,
    components: Sequence[str],
    budget: Budget,
    candidates: str,
    listener: Listener | None = None,
    *,
    jobs: int = 1,
    executor: Executor | None = None,
) -> tuple[Recipe, Settled]:
    """Choose how every weight of ``components`` is kept.

    Several components share a budget of bytes: the sum of their outputs' errors, each as a share of its own output, is
    least. The same arguments give the same rules.

    Args:
        candidates: see :func:`toolchain.planning.candidates.read_candidates`; those that the target lacks are left out.
        jobs: how many processes measure blocks at once.
        executor: runs the tasks (:func:`toolchain.build.sweep_tasks.run_sweep_task`) instead; it is not shut down.

    Returns:
        The recipe with rules for these components, and what they are expected to be and are.

    Raises:
        RecipeError: the budget cannot be met; says what can be.
    """
    listener = listener or Listener()
    return_large_allocations()
    ways = read_candidates(candidates, "candidates")
    plain = with_rules(recipe, dict.fromkeys([*components, *_unsettled(recipe)]))
    planned = plan_resolved(resolve(plain, base, checkpoints=True))
    made = builders(planned, store, direct=False)
    sweeps = {name: Sweep(made[name], planned, ways) for name in components}
    run_sweeps(sweeps, plain, base, ways, store, listener, jobs, executor)
    problem = _Problem(planned, sweeps, ways)
    if not problem.items:
        raise RecipeError(f"{', '.join(components)}: there is no weight to choose for; all are small or vectors")

    def measure(chosen: Sequence[int]) -> tuple[Plan, dict[str, Measured]]:
        with_them = plan_resolved(resolve(with_rules(plain, problem.rules(chosen)), base, checkpoints=True))
        own = builders(with_them, store, direct=False)
        for name in components:
            listener.working(name, "all", "measure what was chosen")
        return with_them, {name: measure_choice(own[name], with_them) for name in components}

    search = _Search(problem, budget, plain)
    for _ in range(TRIES):
        allocation = search.next()
        with_them, measured = measure(allocation.chosen)
        if search.enough(allocation, with_them, measured):
            break
    for allocation in search.alike():
        search.record(allocation, measure(allocation.chosen)[1])
    best = search.best
    if best.missed:
        reached = decibels(math.sqrt(sum(m.error for m in best.measured.values())))
        raise RecipeError(
            f"{search.where}: a budget of {budget} cannot be met: {reached:.2f} dB is the best that was measured; give "
            "candidates with more bits, such as float"
        )
    for warning in best.warnings:
        listener.remark(warning)
    rewritten = with_rules(recipe, problem.rules(best.allocation.chosen))
    return rewritten, problem.settled(budget, best.allocation, best.measured)


def _unsettled(recipe: Recipe) -> list[str]:
    """Components with a budget, which no pass takes: they are looked at without quantization meanwhile."""
    parts = recipe.components().items()
    return [n for n, part in parts if any(s.name == PASS and "budget" in s.options for s in part.passes)]


class _Problem:
    """The weights of some components, and what each candidate costs in bytes and in error."""

    def __init__(self, planned: Plan, sweeps: Mapping[str, Sweep], ways: Sequence[Candidate]) -> None:
        self.components = tuple(sweeps)
        self.items = [item for sweep in sweeps.values() for item in sweep.items]
        errors = [found for sweep in sweeps.values() for found in sweep.errors()]
        self.ways = ways
        self.options = [
            [(k, s, e) for k, (s, e) in enumerate(zip(item.sizes, own, strict=True)) if s is not None and e is not None]
            for item, own in zip(self.items, errors, strict=True)
        ]
        for item, options in zip(self.items, self.options, strict=True):
            if not options:
                raise RecipeError(
                    f"{item.component}: weight '{item.names[0]}' can be kept in none of the candidates; add float"
                )
        self.plain_bytes = sum(planned.components[name].weight_bytes for name in self.components)
        plainly = (planned.components[item.component].target.storage for item in self.items)
        copies = (item.copies for item in self.items)
        own = (s.bytes(i.source.shape) * n for s, i, n in zip(plainly, self.items, copies, strict=True))
        self.fixed = self.plain_bytes - sum(own)
        """Bytes of the weights that there is no choice for."""

    def rules(self, chosen: Sequence[int]) -> dict[str, dict[str, Any] | None]:
        """The options of the pass by component."""
        both = list(zip(self.items, (self._way(i, k) for i, k in enumerate(chosen)), strict=True))
        return {name: rules((i, c) for i, c in both if i.component == name) for name in self.components}

    def _way(self, item: int, option: int) -> Candidate:
        return self.ways[self.options[item][option][0]]

    def bytes(self, chosen: Sequence[int]) -> int:
        """Of all weights of the components."""
        return self.fixed + sum(options[k][1] for options, k in zip(self.options, chosen, strict=True))

    def error(self, chosen: Sequence[int]) -> float:
        """What is expected."""
        return sum(options[k][2] for options, k in zip(self.options, chosen, strict=True))

    def settled(self, budget: Budget, allocation: Allocation, measured: Mapping[str, Measured]) -> Settled:
        chosen = [
            Chosen(item, self._way(i, k), self.options[i][k][1], self.options[i][k][2])
            for i, (item, k) in enumerate(zip(self.items, allocation.chosen, strict=True))
        ]
        own = [[Option(size, error) for _, size, error in options] for options in self.options]
        curve = [Point(self.fixed + int(cost), value) for cost, value in frontier(own)]
        return Settled(
            self.components,
            budget,
            tuple(chosen),
            self.bytes(allocation.chosen),
            self.plain_bytes,
            self.error(allocation.chosen),
            measured,
            allocation.gap,
            tuple(curve),
            tuple(self._alike()),
        )

    def _alike(self) -> list[Point]:
        return [Point(self.bytes(chosen), self.error(chosen), str(way)) for way, chosen in self.uniform()]

    def uniform(self) -> Iterator[tuple[Candidate, list[int]]]:
        """Candidates that quantize and that all weights can be kept in, each with the choice of it everywhere."""
        for k, way in enumerate(self.ways):
            chosen = [next((i for i, (w, *_) in enumerate(options) if w == k), -1) for options in self.options]
            if -1 not in chosen and way.scheme != "float":
                yield way, chosen


@dataclass(frozen=True)
class _Attempt:
    allocation: Allocation
    measured: Mapping[str, Measured]
    missed: bool
    """The target in decibels was."""
    excess: float
    """How much the worst block is over the gate's limit, relatively."""
    objective: float
    warnings: tuple[str, ...]


class _Search:
    """What to try next, and which try was the best."""

    def __init__(self, problem: _Problem, budget: Budget, recipe: Recipe) -> None:
        self._problem, self._budget = problem, budget
        self._limits = {n: recipe.gate.max_quantization_error.get(n, QUANTIZATION_DEFAULT) for n in problem.components}
        self._weights = [1.0] * len(problem.items)
        self._target = 10 ** (-budget.sqnr_db / 10) if budget.sqnr_db is not None else None
        self._bound = self._target
        self._met, self._missed = 0.0, math.inf
        """The largest bound whose choice met the target, and the least whose choice missed it."""
        self._attempts: list[_Attempt] = []
        self.where = ", ".join(problem.components)

    def alike(self) -> list[Allocation]:
        """The best way to keep all weights alike in a budget of bytes, to be measured too: estimates may be off."""
        if self._budget.bytes is None:
            return []
        found: list[Allocation] = []
        bound = min((a.allocation.bound for a in self._attempts), default=0.0)
        for _, chosen in self._problem.uniform():
            size, error = self._problem.bytes(chosen), self._problem.error(chosen)
            if size <= self._budget.bytes:
                found.append(Allocation(tuple(chosen), size - self._problem.fixed, error, min(bound, error)))
        return [min(found, key=lambda a: a.value)] if found else []

    def next(self) -> Allocation:
        """The choice to measure.

        Raises:
            RecipeError: there is none within the budget.
        """
        problem = self._problem
        if self._bound is not None:
            swapped = [
                [Option(error * weight, size) for _, size, error in options]
                for options, weight in zip(problem.options, self._weights, strict=True)
            ]
            try:
                return allocate(swapped, self._bound)
            except UnreachableError as e:
                if self._attempts:  # a bound that was made too tight
                    return self._attempts[-1].allocation
                raise RecipeError(
                    f"{self.where}: a budget of {self._budget} cannot be met: {decibels(math.sqrt(e.least)):.2f} dB is "
                    "the best that these candidates can do; give candidates with more bits, such as float"
                ) from e
        assert self._budget.bytes is not None
        own = [
            [Option(size, error * weight) for _, size, error in options]
            for options, weight in zip(problem.options, self._weights, strict=True)
        ]
        try:
            return allocate(own, self._budget.bytes - problem.fixed)
        except UnreachableError as e:
            least = problem.fixed + int(e.least)
            raise RecipeError(
                f"{self.where}: a budget of {self._budget} cannot be met: {least} bytes ({readable_size(least)}) are "
                "the least that these candidates make of it; give more bytes, or candidates with fewer bits"
            ) from e

    def record(self, allocation: Allocation, measured: Mapping[str, Measured]) -> dict[tuple[str, str], float]:
        """Take down what a choice is.

        Returns:
            Component and block → how many times the gate's limit a block's error is, where it is more than once.
        """
        error = sum(m.error for m in measured.values())
        over = {
            (name, block): price / self._limits[name]
            for name, found in measured.items()
            for block, price in found.prices.items()
            if price > self._limits[name]
        }
        warnings = tuple(
            f"{name}: block '{block}' loses a relative error of {self._limits[name] * ratio:.3g}, over the limit "
            f"{self._limits[name]:.3g} of the gate; raise gate.max_quantization_error.{name} or the budget"
            for (name, block), ratio in over.items()
        )
        missed = self._target is not None and error > self._target
        objective = error if self._target is None else self._problem.bytes(allocation.chosen)
        excess = max(over.values(), default=1.0) - 1.0
        self._attempts.append(_Attempt(allocation, measured, missed, excess, objective, warnings))
        return over

    def enough(self, allocation: Allocation, planned: Plan, measured: Mapping[str, Measured]) -> bool:
        """Take down what a choice is; says whether to stop, else the next one will be another."""
        again = any(a.allocation.chosen == allocation.chosen for a in self._attempts)
        over = self.record(allocation, measured)
        self._weigh(over, planned)
        error, missed = sum(m.error for m in measured.values()), self._attempts[-1].missed
        if self._bound is None or self._target is None:
            return again or not over
        if over:  # other weights, other bounds
            self._met, self._missed = 0.0, math.inf
        elif missed:  # as would every bound down to what was expected of this choice
            self._missed = min(self._missed, allocation.cost)
        else:
            self._met = max(self._met, self._bound)
        near = self._target * 10 ** (-NEAR_DB / 10) <= error <= self._target
        if self._met > 0 and self._missed < math.inf:
            self._bound = math.sqrt(self._met * self._missed)
        elif missed:
            self._bound = min(self._bound, allocation.cost) * self._target / error * 0.98
        elif error > 0:
            self._bound *= self._target / error
        return (again and not self.best.missed) or ((near or error == 0) and not over)

    def _weigh(self, over: Mapping[tuple[str, str], float], planned: Plan) -> None:
        """Have the errors of blocks that are over the gate's limit count for more."""
        for (name, block), ratio in over.items():
            (pair,) = (p for p in planned.components[name].pairs if p.name == block)
            sources = {w.source for w in pair.plain.weights.values()}
            for i, item in enumerate(self._problem.items):
                if item.component == name and item.source in sources:
                    self._weights[i] *= FIRMER * ratio**2

    @property
    def best(self) -> _Attempt:
        """The attempt that keeps to the target and, if any does, to the limits of the gate, and is the best of such."""
        return min(self._attempts, key=lambda a: (a.missed, a.excess > 0, a.objective))
