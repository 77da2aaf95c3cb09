"""What loading was planned for, against the blocks and calls that there are, and the prediction against the plan."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from typing import Final

from toolchain.formats.loading import WholeRunData, loads_of
from toolchain.formats.manifest import Manifest

SAME: Final = 1e-6
"""Sums of seconds may differ so far, in the order of adding."""


def check_loading(manifest: Manifest) -> None:
    """Hold the run that a plan was made from, and its prediction, against the rest of the manifest.

    Raises:
        ValueError: names the key.
    """
    loading = manifest.loading
    budget = loading.plan["budget_bytes"]
    if manifest.memory_budget_bytes not in (None, budget):
        raise ValueError(f"loading.plan.budget_bytes: {budget}, but memory_budget_bytes {manifest.memory_budget_bytes}")
    weights = {
        f"{name}/{b.name}": sum(b.weight_bytes.values()) for name, c in manifest.components.items() for b in c.blocks
    }
    if unknown := loads_of(loading.plan).keys() - weights.keys():
        raise ValueError(f"loading.plan: it loads '{min(unknown)}', which is no block")
    if loading.made_from is not None:
        _check_run(manifest, loading.made_from.run, weights)
    if (loading.made_from is None) != (loading.prediction is None):
        raise ValueError("loading: there is one of prediction and made_from, and not the other")
    if loading.prediction is not None and loading.made_from is not None:
        said, loads = loading.prediction, loads_of(loading.plan)
        load_s = {b["name"]: b["load_s"] for b in loading.made_from.run["blocks"]}
        if unknown := loads.keys() - load_s.keys():
            raise ValueError(f"loading.plan: it loads '{min(unknown)}', which made_from.run does not know")
        _check_seconds("load_s", said.load_s, sum(load_s[block] * n for block, n in loads.items()))
        if not max(said.compute_s, said.stalls_s, said.bound_s) <= said.total_s * (1 + SAME):
            raise ValueError(f"loading.prediction.total_s: {said.total_s} is less than compute_s, stalls_s or bound_s")
        expected = sum(weights[block] * n for block, n in loads.items())
        if said.loads_bytes != expected:
            raise ValueError(
                f"loading.prediction.loads_bytes: {said.loads_bytes}, but the plan's loads have {expected}"
            )
        if said.peak_bytes > budget:
            raise ValueError(f"loading.prediction.peak_bytes: {said.peak_bytes} is over the plan's budget of {budget}")


def _check_run(manifest: Manifest, run: WholeRunData, weights: dict[str, int]) -> None:
    where = "loading.made_from.run"
    own = [b["name"] for b in run["blocks"]]
    if len(set(own)) != len(own):
        raise ValueError(f"{where}.blocks: a block is there twice")
    for block in run["blocks"]:
        if block["weight_bytes"] != weights.get(block["name"]):
            raise ValueError(
                f"{where}.blocks: '{block['name']}' has {block['weight_bytes']} bytes of weights, but the component's "
                f"block {weights.get(block['name'], 'is not there')}"
            )
    for place, (mine, asked) in enumerate(itertools.zip_longest(_calls(run), manifest.calls())):
        if mine != asked:
            raise ValueError(f"{where}.phases: call {place} is {mine}, but the video's is {asked}")
    if missing := {block for block, _ in manifest.calls()} - set(own):
        raise ValueError(f"{where}.blocks: '{min(missing)}' is called, and not there")
    _check_held(manifest, run)
    predicted = sum(phase["times"] * call["compute_s"] for phase in run["phases"] for call in phase["calls"])
    if manifest.loading.prediction is not None:
        _check_seconds("compute_s", manifest.loading.prediction.compute_s, predicted)


def _check_held(manifest: Manifest, run: WholeRunData) -> None:
    """What calls hold, against the budget and against what blocks say that they need."""
    budget = manifest.loading.plan["budget_bytes"]
    needs = {
        (f"{name}/{b.name}", function): memory.activations + memory.waiting
        for name, c in manifest.components.items()
        for b in c.blocks
        for function, memory in (b.memory or {}).items()
    }
    for phase in run["phases"]:
        for call in phase["calls"]:
            held = call["activation_bytes"] + call["live_bytes"]
            where = f"loading.made_from.run.phases: a call of '{call['block']}' holds"
            if held > budget:
                raise ValueError(f"{where} {held} bytes, over the plan's budget")
            need = needs.get((call["block"], call["function"]), held)
            # a part of what it needs is left to others, and so live beside it; more may be live
            if not call["activation_bytes"] <= need <= held:
                raise ValueError(f"{where} {call['activation_bytes']} to {held} bytes, but its memory is {need}")


def _check_seconds(key: str, said: float, expected: float) -> None:
    if not math.isclose(said, expected, rel_tol=SAME, abs_tol=SAME):
        raise ValueError(f"loading.prediction.{key}: {said}, but by made_from.run it is {expected}")


def _calls(run: WholeRunData) -> Iterator[tuple[str, str]]:
    for phase in run["phases"]:
        if not phase["calls"]:
            raise ValueError(f"loading.made_from.run.phases: '{phase['name']}' has no calls")
        for _ in range(phase["times"]):
            yield from ((call["block"], call["function"]) for call in phase["calls"])
