"""A component's blocks by themselves: names, functions, ports, and what was measured and predicted of them."""

from __future__ import annotations

import math

from toolchain.formats.consistency.names import check_names
from toolchain.formats.consistency.numbers import check_shape
from toolchain.formats.consistency.shapes import result
from toolchain.formats.manifest import BlockEntry, Component, Manifest
from toolchain.ir.dtypes import DTYPES


def check_blocks(manifest: Manifest) -> None:
    """Hold every component's and block's names, shapes and figures against one another.

    Raises:
        ValueError: names the key.
    """
    check_names("components", manifest.components, "/.")
    for name, component in manifest.components.items():
        where = f"components.{name}"
        check_names(f"{where}.blocks", (b.name for b in component.blocks))
        check_names(f"{where}.blocks: outputs", (f"{b.name}.{o.name}" for b in component.blocks for o in b.outputs))
        _check_component(where, component)
        for block in component.blocks:
            own = f"{where}.blocks.{block.name}"
            check_names(f"{own}.functions", block.functions)
            _check_ports(own, block)
            _check_figures(own, block)
            _check_memory(own, block)


def _check_component(where: str, component: Component) -> None:
    check_names(f"{where}.inputs", (f"{i.rate} {i.name}" for i in component.inputs))
    check_names(f"{where}.tables", (t.name for t in component.tables))
    check_names(f"{where}.outputs", (f"{o.rate} {o.gives}" for o in component.outputs))
    for given in component.inputs:
        check_shape(f"{where}.inputs.{given.name}", given.shape, given.dtype)
    for name, size in component.dims.items():
        if size < 1:
            raise ValueError(f"{where}.dims.{name}: {size} is below 1")
    for output in component.outputs:
        if result(component, output.source)[0].rate != output.rate:
            raise ValueError(f"{where}.outputs: '{output.source}' does not come at rate '{output.rate}'")
    bytes_ = 0
    for table in component.tables:
        check_shape(f"{where}.tables.{table.name}", table.shape, table.dtype)
        bytes_ += math.prod(table.shape) * DTYPES[table.dtype].bytes
    held = component.tables_file.bytes if component.tables_file is not None else 0
    if bytes_ > held:
        raise ValueError(f"{where}.tables: they take {bytes_} bytes, but tables_file has {held}")


def _check_ports(where: str, block: BlockEntry) -> None:
    ports = {p.name: p.dtype for p in (*block.inputs, *block.outputs)}
    for what, own in (("inputs", block.inputs), ("outputs", block.outputs)):
        check_names(f"{where}.{what}", [p.name for p in own])
        for port in own:
            check_shape(f"{where}.{what}.{port.name}", port.shape, port.dtype)
    for function, shapes in block.other_shapes.items():
        if function not in block.functions:
            raise ValueError(f"{where}.other_shapes: there is no function '{function}'")
        for name, shape in shapes.items():
            if name not in ports:
                raise ValueError(f"{where}.other_shapes.{function}: there is no port '{name}'")
            check_shape(f"{where}.other_shapes.{function}.{name}", shape, ports[name])


def _check_figures(where: str, block: BlockEntry) -> None:
    for what, measured in (("accuracy", block.accuracy), ("quantization", block.quantization)):
        for function, a in (measured or {}).items():
            _check_function(f"{where}.{what}", block, function)
            if min(a.relative_error, a.max_abs, a.limit) < 0 or abs(a.cosine) > 1.001:
                raise ValueError(f"{where}.{what}.{function}: an error is negative, or a cosine beyond 1")
    executed = [sorted(own) if own is not None else None for own in (block.accuracy, block.activations)]
    if executed[0] != executed[1]:
        raise ValueError(f"{where}: accuracy is of functions {executed[0]}, but activations of {executed[1]}")
    for function, ranges in (block.activations or {}).items():
        _check_function(f"{where}.activations", block, function)
        if ranges.low > ranges.high:
            raise ValueError(f"{where}.activations.{function}: low {ranges.low} is above high {ranges.high}")
    if block.parameters < 0 or min(block.weight_bytes.values(), default=0) < 0:
        raise ValueError(f"{where}: parameters or weight_bytes are negative")


def _check_memory(where: str, block: BlockEntry) -> None:
    weights = sum(block.weight_bytes.values())
    for function, memory in (block.memory or {}).items():
        if function not in block.functions:  # a player does not ask for it, so it contradicts nothing
            continue
        own = f"{where}.memory.{function}"
        shapes = block.other_shapes.get(function, {})
        ports = sum(
            math.prod(shapes.get(p.name, p.shape)) * DTYPES[p.dtype].bytes for p in (*block.inputs, *block.outputs)
        )
        for key, said, other in (("weights", memory.weights, weights), ("ports", memory.ports, ports)):
            if said != other:
                raise ValueError(f"{own}.{key}: {said} bytes, but the block's have {other}")
        if memory.ports > memory.activations:
            raise ValueError(f"{own}.activations: {memory.activations} bytes are fewer than ports {memory.ports}")


def _check_function(where: str, block: BlockEntry, function: str) -> None:
    if function not in block.functions:
        raise ValueError(f"{where}: there is no function '{function}'")
