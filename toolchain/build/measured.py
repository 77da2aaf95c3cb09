"""What a choice of storages costs a component in truth: its graphs run whole on the weights that would be stored."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from toolchain.accuracy.metrics import compare, decibels
from toolchain.accuracy.references import Case, References, Weights, every_run, sample_inputs, stored_case
from toolchain.accuracy.sensitivity import inputs_each
from toolchain.build.artifacts import Builder, code_modules
from toolchain.build.tables import component_tables, tables_origin
from toolchain.ir.blocks import Block
from toolchain.ir.graph import Graph
from toolchain.ir.target import package_versions
from toolchain.planning.plan import Plan
from toolchain.system.code import code_digest
from toolchain.system.memory import release
from toolchain.system.store import NewEntry, key_of

KIND = "sweeps"


@dataclass(frozen=True)
class Measured:
    """``error`` is the squared error of the component's output as a share of the output's square.

    It is the mean over the runs of every function, on the inputs that sensitivities are taken on; of several graphs,
    and of several results, the sum. ``prices`` are the gate's: by block, the relative error of the block alone on
    exact inputs, the worst of the gate's runs.
    """

    error: float
    prices: Mapping[str, float]

    @property
    def sqnr_db(self) -> float:
        """The error as a signal-to-quantization-noise ratio."""
        return decibels(self.error**0.5)


def measure_choice(builder: Builder, planned: Plan) -> Measured:
    """Run a component on its exact weights and on those that its plan stores; from the store if that was done.

    Two blocks' weights are in memory, and the activations between them.
    """
    plan, gate = builder.plan, planned.recipe.gate
    key = key_of(
        {
            "what": "choice",
            "blocks": [
                [p.name, p.lowered.structure(), p.plain.structure(), builder.weights_digest(p.plain)]
                for p in plan.pairs
            ],
            "tables": tables_origin(planned, plan, builder.digests),
            "runs": [[inputs_each(len(g.functions), gate.inputs) for g in plan.graphs], gate.inputs, gate.seed],
            "tools": package_versions("torch"),
            "code": code_digest("toolchain.build.measured", *code_modules(plan.resolved)),
        }
    )

    def make(_: object) -> NewEntry:
        tables, error = component_tables(plan), 0.0
        prices: dict[str, float] = {}
        for graph in plan.graphs:
            found, own = _measure(builder, planned, graph, tables)
            error += found
            prices |= own
        return NewEntry({"error": error, "prices": prices})

    meta: Mapping[str, Any] = builder.store.get_or_make(KIND, key, make).meta
    return Measured(meta["error"], meta["prices"])


def _measure(
    builder: Builder, planned: Plan, graph: Graph, tables: Mapping[str, torch.Tensor]
) -> tuple[float, dict[str, float]]:
    names = set(graph.blocks())
    pairs = [p for p in builder.plan.pairs if p.name in names]
    lowered = {p.name: p.lowered for p in pairs}
    gate = planned.recipe.gate
    inputs = sample_inputs(graph, planned.resolved.family, gate.seed)
    kept: dict[str, Weights] = {}

    def stored(block: Block) -> Weights:
        if block.name not in kept:
            kept.clear()
            quantized = lowered[block.name].quantized
            kept[block.name] = dict(builder.weights(block, stored=lowered[block.name] if quantized else None))
        return kept[block.name]

    blocks = [p.plain for p in pairs]
    number = inputs_each(len(graph.functions), gate.inputs)
    runs = every_run(graph.functions, number)
    exact = References(blocks, runs, inputs, tables, builder.weights)
    chosen = References(blocks, runs, inputs, tables, stored)
    error, prices = 0.0, {}
    for block in blocks:
        truth, off = exact.cases(block.name), chosen.cases(block.name)
        error += sum(_squared(t, o, block) for t, o in zip(truth, off, strict=True)) / len(truth)
        if lowered[block.name].quantized:
            gated = [case for i, case in enumerate(truth) if i % number < gate.inputs]
            alone = [stored_case(block, case, stored(block)) for case in gated]
            prices[block.name] = max(
                compare(a.outputs, t.outputs, 0.0).relative_error for a, t in zip(alone, gated, strict=True)
            )
        release()
    return error, prices


def _squared(truth: Case, off: Case, block: Block) -> float:
    """The squared errors of a block's outputs that are the graph's results, as shares of their squares."""
    total = 0.0
    for port in block.results:
        exact = truth.outputs[port].double()
        least = torch.finfo(torch.float32).tiny
        total += float((off.outputs[port].double() - exact).square().sum() / exact.square().sum().clamp(min=least))
    return total
