"""Names of the values of a model: a port's, a weight's, or the step of the block and the operator behind it."""

from __future__ import annotations

import ast
from typing import Any

from toolchain.ir.blocks import Block
from toolchain.ir.target import STEP

SCOPES = "pkg.torch.onnx.name_scopes"
"""Where the exporter notes the modules that a node comes from, the outermost first, then the exported node."""


def name_values(graph: Any, block: Block, function: str) -> None:
    """Name inputs and outputs of an exported graph like the block's ports, and what is inside after its steps.

    A value is called ``STEP__OPERATOR`` as :func:`targets.exporting.export` calls operators; further values that
    the translation of one operator needs have the ONNX operator's type at the end. Weights keep their names.
    """
    signature = block.signatures[function]
    ports = list(zip(graph.inputs, signature.inputs, strict=False))  # weights come after the ports
    ports += zip(graph.outputs, signature.outputs, strict=True)
    outside = {id(value) for value, _ in ports}
    known = {port.name for _, port in ports} | set(block.weights)
    steps = _steps(block, function)
    for node in graph:
        for value in node.outputs:
            if id(value) not in outside:
                value.name = _unused(_name(node, value.name, steps), known)
    for value, port in ports:
        value.name = port.name


def _steps(block: Block, function: str) -> set[str]:
    """The names of the block's own nodes, which are modules while it is exported."""
    nodes = block.functions[function].graph.nodes
    return {str(n.target) if n.op == "call_module" else n.name for n in nodes}


def _name(node: Any, name: str, steps: set[str]) -> str:
    *scopes, exported = ast.literal_eval(node.metadata_props.get(SCOPES, "['']"))
    if not exported:
        return name
    if name != exported:
        name = f"{exported}_{node.op_type}"
    step = next((s for s in scopes if s in steps), None)
    return name if step is None else f"{step.replace('.', '_')}{STEP}{name}"


def _unused(name: str, known: set[str]) -> str:
    candidate, number = name, 1
    while candidate in known:
        candidate, number = f"{name}_{number}", number + 1
    known.add(candidate)
    return candidate
