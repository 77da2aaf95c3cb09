"""Lowering a block to ONNX models.

The weights take no part in it: they are inputs of the graph while it is exported and simplified, so that no
tool can fold, transpose or merge them, and become references to the file of weights only then; those that are
quantized, to their parts. What a model looks like therefore depends on the block's structure alone, and a plain
weight's bytes are its checkpoint's.
"""

from __future__ import annotations

import shutil
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import onnx
import onnxsim
import torch
from onnxscript import ir

from targets.exporting import export, reason
from targets.onnx import weights as store
from targets.onnx.dequantize import dequantize
from targets.onnx.naming import name_values
from targets.onnx.registry import operators_read_once
from targets.onnx.storages import specs
from targets.onnx.translate import OPSET, TRANSLATIONS
from targets.streams import quiet
from targets.unused import unused_left_out
from toolchain.errors import LoweringError
from toolchain.ir.blocks import Block
from toolchain.ir.stored import StoredParts
from toolchain.ir.target import Artifact, distinct_functions


def lower(block: Block, weights: Mapping[str, torch.Tensor], out: Path) -> Artifact:
    """A folder with ``FUNCTION.onnx`` for each distinct function, and one file of weights for all.

    Raises:
        LoweringError: names the block, the function and, where known, the operator or the weight.
    """
    functions = distinct_functions(block)
    slots = store.layout(specs(block.weights))
    models = {}
    for function in functions:
        where = f"block '{block.name}', function '{function}'"
        model = simplify(symbolic(block, function), where)
        tables = dequantize(model, block.weights, where)
        models[function] = refer(model, block.weights, slots, tables)
    out.mkdir()
    try:
        for function, model in models.items():
            (out / f"{function}.onnx").write_bytes(model.SerializeToString(deterministic=True))
        store.write(out / store.FILE, slots, StoredParts(block.weights, weights))
    except BaseException:
        shutil.rmtree(out)
        raise
    return Artifact(out, functions)


def symbolic(block: Block, function: str) -> onnx.ModelProto:
    """A function as the exporter translates it, with its weights as inputs after the ports.

    Raises:
        LoweringError: an operator has no translation; names it.
    """
    unset = {name: torch.empty(weight.shape) for name, weight in block.weights.items()}  # never read
    with quiet(), unused_left_out(), operators_read_once():
        program = export(block, function, unset)
        try:
            exported: Any = torch.onnx.export(
                program,
                dynamo=True,
                optimize=False,
                verbose=False,
                opset_version=OPSET,
                custom_translation_table=dict(TRANSLATIONS),
            )
        except Exception as e:  # the exporter raises whatever it likes
            where = f"block '{block.name}', function '{function}'"
            raise LoweringError(f"{where}: ONNX cannot express it: {_cause(e)}") from e
    model = exported.model
    for name in unset:
        value = model.graph.initializers.pop(name, None)
        if value is not None:
            value.const_value = None
            model.graph.inputs.append(value)
    name_values(model.graph, block, function)
    return ir.to_proto(model)


def simplify(model: onnx.ModelProto, where: str) -> onnx.ModelProto:
    """The model with constants folded and operators fused, checked, and free of everything but itself.

    Raises:
        LoweringError: starts with ``where``.
    """
    with quiet():
        try:
            model, valid = onnxsim.simplify(model, certify=False)
            model = strip(model)
            onnx.checker.check_model(model, full_check=True)
        except Exception as e:
            raise LoweringError(f"{where}: ONNX cannot simplify it: {reason(e)}") from e
    if not valid:
        raise LoweringError(f"{where}: what onnxsim made of it is not valid; use another version of onnxsim")
    return model


def strip(model: onnx.ModelProto) -> onnx.ModelProto:
    """Remove what tools noted down about themselves and this machine, order what has no order; in place.

    A node is called like its first output.
    """
    _forget(model)
    model.producer_name, model.producer_version = "sora-compile", ""
    model.graph.name = "block"
    for node in model.graph.node:
        node.name = node.output[0]
    for part in (model.graph.initializer, model.graph.value_info):
        ordered = sorted(part, key=lambda entry: entry.name)
        del part[:]
        part.extend(ordered)
    return model


def refer(
    model: onnx.ModelProto,
    weights: Collection[str],
    slots: Mapping[str, store.Slot],
    shapes: Mapping[str, tuple[int, ...]],
) -> onnx.ModelProto:
    """The model with those inputs that are weights as references to the file of weights; in place.

    ``shapes`` are those of parts that the model declares otherwise than their slots.
    """
    graph = model.graph
    used = {name for node in graph.node for name in node.input}
    ports = [i for i in graph.input if i.name not in weights]
    del graph.input[:]
    graph.input.extend(ports)
    graph.initializer.extend(slot.reference(shapes.get(key)) for key, slot in slots.items() if key in used)
    return model


def _forget(message: Any) -> None:
    """Clear documentation and metadata of a message and all in it: they hold paths of source files."""
    for field, value in message.ListFields():
        if field.name in ("doc_string", "metadata_props"):
            message.ClearField(field.name)
        elif field.message_type is not None:
            for part in value if hasattr(value, "add") else (value,):
                _forget(part)


def _cause(error: BaseException) -> str:
    """What stopped the exporter: the innermost error, which names the operator."""
    while error.__cause__ is not None:
        error = error.__cause__
    return reason(error)  # type: ignore[arg-type]
