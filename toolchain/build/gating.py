"""A component's whole passage through the gate as one task: what any process can do once its artifacts are there."""

from __future__ import annotations

from toolchain.build.artifacts import Builder, code_modules
from toolchain.build.gate import ComponentGate, stretches
from toolchain.build.tables import component_tables, tables_origin
from toolchain.errors import AccuracyError
from toolchain.listener import Listener
from toolchain.planning.plan import Plan
from toolchain.system.code import code_digest
from toolchain.system.events import What
from toolchain.system.store import NewEntry, key_of


def gate_key(planned: Plan, builder: Builder) -> str:
    """Key of a component's passage: two with the same one execute the same on the same inputs, within the same limits.

    It is made without reading weights.
    """
    plan, by_weights = builder.plan, planned.recipe.gate.mode != "structure" or builder.direct
    blocks = []
    for pair in plan.pairs:
        exact = pair.plain.unrounded()
        made = builder.artifact_key(pair.lowered) if by_weights else builder.template_key(pair.lowered)
        read = builder.weights_digest(exact) if by_weights else None
        blocks.append([pair.name, made, pair.plain.structure(), exact.structure(), read])
    return key_of(
        {
            "what": "component",
            "blocks": blocks,
            "tables": tables_origin(planned, plan, builder.digests) if by_weights else None,
            "gate": planned.recipe.gate.model_dump(mode="json", exclude={"golden"}),
            "times": [sorted(stretches(graph, planned).items()) for graph in plan.graphs],
            "code": code_digest("toolchain.build.gating", *code_modules(plan.resolved)),
        }
    )


def run_gate(planned: Plan, builder: Builder, key: str) -> None:
    """Hold a component's artifacts, block by block, so that the results are in the store, and note that they are.

    Raises:
        AccuracyError: names the block, the function and the figures; its notes are what a listener would be told.
    """
    said = _Remarks()

    def hold() -> NewEntry:
        gate = ComponentGate(builder, planned, component_tables(builder.plan), said)
        for pair in builder.plan.pairs:
            gate.hold(pair, builder.artifact(pair.lowered))
        return NewEntry()

    try:
        builder.store.get_or_make("gates", key, lambda _: hold(), What("gate", builder.plan.name))
    except AccuracyError as e:
        for text in said.texts:
            e.add_note(text)
        raise


class _Remarks(Listener):
    """Keeps remarks. Those of a passage that ends well are made again by who takes its results from the store."""

    def __init__(self) -> None:
        self.texts: list[str] = []

    def remark(self, text: str) -> None:
        self.texts.append(text)
