"""Budgets as recipes and users give them, settled: what the command ``quantize`` and every build call."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from concurrent.futures import Executor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from toolchain.build.budget import Settled, settle
from toolchain.errors import RecipeError
from toolchain.formats.budget import Budget, read_budget
from toolchain.formats.recipe import Recipe
from toolchain.listener import Listener
from toolchain.planning.budgets import DEFAULT, budgets_of
from toolchain.system.store import Store


@dataclass(frozen=True)
class Quantized:
    """A recipe with rules that pin how each weight is kept, and what is known of them, budget by budget."""

    recipe: Recipe
    settled: tuple[Settled, ...]


def quantize(
    recipe: Recipe,
    *,
    base: str | Path | None = None,
    budget: Mapping[str, Any] | None = None,
    component: str | None = None,
    candidates: str | None = None,
    listener: Listener | None = None,
    jobs: int = 1,
    executor: Executor | None = None,
    store: Store | None = None,
) -> Quantized:
    """Choose how every weight is kept, under a budget. What was measured before is taken from the store.

    Args:
        base: folder that relative checkpoint paths are looked for in first.
        budget: ``{"bytes": "1.2GB"}`` or ``{"sqnr_db": 30.0}``; what the recipe's passes have if None or empty. What
            they say besides is replaced.
        component: choose for this one alone. Without it, all share a budget of bytes, and each has to reach a budget
            in decibels.
        candidates: ways to keep a weight, as ``float int8 palette{bits=6}``.
        listener: is told of progress.
        jobs: how many processes measure blocks at once.
        executor: runs the tasks (:func:`toolchain.build.sweep_tasks.run_sweep_task`) instead; it is not shut down.
        store: where results are kept; the user's cache folder if None.

    Raises:
        RecipeError: the budget cannot be met, and what can be; or there is none.
    """
    where, store = Path(base or "."), store or Store()
    if jobs < 1:
        raise RecipeError(f"--jobs {jobs}: must be at least 1")
    parts = list(recipe.components())
    if component is not None and component not in parts:
        close = difflib.get_close_matches(component, parts, n=1)
        hint = f"did you mean '{close[0]}'?" if close else f"it has {', '.join(parts)}"
        raise RecipeError(f"--component {component}: the recipe has no such component; {hint}")
    asked: list[tuple[list[str], Budget, str]]
    if budget:
        given = read_budget(dict(budget), "budget")
        chosen = [component] if component is not None else parts
        groups = [chosen] if given.bytes is not None else [[name] for name in chosen]
        asked = [(group, given, candidates or DEFAULT) for group in groups]
    else:
        own = {n: b for n, b in budgets_of(recipe).items() if component in (None, n)}
        if not own:
            raise RecipeError("quantize: no budget is given; use --bytes or --sqnr-db, or 'budget' in the recipe")
        asked = [([name], given, candidates or ways) for name, (given, ways) in own.items()]
    settled = []
    for group, given, ways in asked:
        recipe, found = settle(recipe, where, store, group, given, ways, listener, jobs=jobs, executor=executor)
        settled.append(found)
    store.evict()
    return Quantized(recipe, tuple(settled))


def settle_budgets(
    recipe: Recipe, base: Path, store: Store, listener: Listener, *, jobs: int, executor: Executor | None
) -> Recipe:
    """``recipe`` with rules in the place of every budget; the recipe itself if it has none.

    Raises:
        RecipeError: as :func:`quantize`.
    """
    for component, (budget, ways) in budgets_of(recipe).items():
        recipe, _ = settle(recipe, base, store, [component], budget, ways, listener, jobs=jobs, executor=executor)
    return recipe
