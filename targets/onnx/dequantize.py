"""Rewriting a model so that each use of a quantized weight reads the weight's parts.

This is the last step of lowering: until then a weight is an input like any other, and no tool sees that it is
anything but float32. Values keep their names, so that they still tell which step of the block computes them.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import onnx
from onnx import TensorProto, helper

from toolchain.errors import LoweringError
from toolchain.ir.affine import SCALE, ZERO, Affine
from toolchain.ir.residual import LEFT, RIGHT, LowRank
from toolchain.ir.storage import VALUES, Plain
from toolchain.ir.stored import part_key
from toolchain.ir.weights import Weight

MICROSOFT = "com.microsoft"
"""The domain of ONNX Runtime's own operators."""
FLOAT32_ARITHMETIC = 1
"""Of ``MatMulNBits``, its ``accuracy_level``. The runtime may otherwise round what comes in to int8 as well."""

Shape = tuple[int, ...]


def dequantize(model: onnx.ModelProto, weights: Mapping[str, Weight], where: str) -> dict[str, Shape]:
    """Rewrite every use of a weight that is not kept plainly; in place.

    Returns:
        The shapes of parts that the model declares otherwise than :func:`targets.onnx.storages.specs`, by key.

    Raises:
        LoweringError: starts with ``where``, and names a weight and the operator that cannot read it as it is kept.
    """
    rewriting = _Rewriting(model, weights, where)
    rewriting.run()
    return rewriting.tables


class _Rewriting:
    def __init__(self, model: onnx.ModelProto, weights: Mapping[str, Weight], where: str) -> None:
        self._model, self._weights, self._where = model, weights, where
        self._ranks = {n: w.storage for n, w in weights.items() if isinstance(w.storage, LowRank)}
        self._storages = {n: w.storage for n, w in weights.items() if isinstance(w.storage, Affine)}
        self._storages |= {n: s.main for n, s in self._ranks.items()}
        self._names = {name for node in model.graph.node for name in (*node.input, *node.output)}
        self._shapes = {v.name: tuple(d.dim_value for d in v.type.tensor_type.shape.dim) for v in self._values()}
        self._first: list[onnx.NodeProto] = []
        self._matrices: set[str] = set()
        self.tables: dict[str, Shape] = {}

    def _values(self) -> Iterator[onnx.ValueInfoProto]:
        graph = self._model.graph
        yield from (*graph.value_info, *graph.input, *graph.output)

    def run(self) -> None:
        graph = self._model.graph
        nodes = [new for node in graph.node for new in self._rewritten(node)]
        # ONNX Runtime walks back from the outputs and takes, of an operator's inputs, first what stands last in the
        # file. So what stands first runs right before its use; else all weights would be expanded before anything runs.
        nodes = [*self._first, *nodes]
        del graph.node[:]
        graph.node.extend(nodes)
        for value in graph.output:
            if value.name in self._storages:
                raise LoweringError(f"{self._where}: weight '{value.name}' is an output; keep it as float32")
        for key in self.tables.keys() & self._matrices:
            raise LoweringError(f"{self._where}: '{key}' is both looked up and multiplied; keep it as float32")
        if any(node.domain == MICROSOFT for node in nodes):
            self._model.opset_import.append(helper.make_opsetid(MICROSOFT, 1))
        described = sorted(graph.value_info, key=lambda value: value.name)
        del graph.value_info[:]
        graph.value_info.extend(described)

    def _rewritten(self, node: onnx.NodeProto) -> Sequence[onnx.NodeProto]:
        """What stands for a node, in its place."""
        used = [(i, name) for i, name in enumerate(node.input) if name in self._storages]
        if not used:
            return [node]
        at, name = used[0]
        storage = self._storages[name]
        attributes = {a.name: helper.get_attribute_value(a) for a in node.attribute}
        linear = node.op_type == "Gemm" and at == 1 and len(used) == 1 and _is_linear(attributes)
        if any(n in self._ranks for _, n in used):
            if linear:
                return self._with_product(node, name, storage)
        elif node.op_type == "Gather" and at == 0 and attributes.get("axis", 0) == 0:
            if storage.block is not None:
                return self._looked_up_blocks(node, name, storage)
            if storage.bits == 8:
                return self._looked_up(node, name)
        elif all(self._storages[n].block is None for _, n in used):
            for i, n in used:
                node.input[i] = self._expanded(node, n)
            return [node]
        elif linear:
            return self._multiplied(node, name, storage)
        kept = self._weights[name].storage
        raise LoweringError(
            f"{self._where}: weight '{name}' is kept as {kept}, which operator '{node.output[0]}' "
            f"({node.op_type}) cannot read; keep it as float32"
        )

    def _expanded(self, node: onnx.NodeProto, name: str) -> str:
        """The value of a weight for one use of it; the runtime would make a node for each use of one value itself."""
        self._matrices.update(self._parts(name))
        output = self._new(node, "DequantizeLinear", TensorProto.FLOAT, self._weights[name].shape)
        self._first.append(_node("DequantizeLinear", self._parts(name), output, axis=0))
        return output

    def _multiplied(self, node: onnx.NodeProto, name: str, storage: Affine) -> Sequence[onnx.NodeProto]:
        """A linear layer that reads blocks; a bias that is one number a row goes into it."""
        rows, columns = self._weights[name].shape
        values, scale, *zero = self._parts(name)
        self._matrices.update(self._parts(name))
        bias = node.input[2] if len(node.input) > 2 else ""
        weight = self._weights.get(bias)
        inside = not bias or (weight is not None and isinstance(weight.storage, Plain) and weight.shape == (rows,))
        inputs = [node.input[0], values, scale, *(zero or [""]), "", bias if inside else ""]
        while not inputs[-1]:
            inputs.pop()
        product = node.output[0]
        if not inside:
            product = self._new(node, "MatMulNBits", TensorProto.FLOAT, self._shapes[product])
        options = {"K": columns, "N": rows, "bits": storage.bits, "block_size": storage.block}
        options["accuracy_level"] = FLOAT32_ARITHMETIC
        nodes = [_node("MatMulNBits", inputs, product, MICROSOFT, **options)]
        return nodes if inside else [*nodes, _node("Add", [product, bias], node.output[0])]

    def _with_product(self, node: onnx.NodeProto, name: str, storage: Affine) -> Sequence[onnx.NodeProto]:
        """A linear layer that adds, to what the integers give, what the two thin matrices give."""
        result, rank = node.output[0], self._ranks[name].rank
        rows = self._shapes[result][0]
        thin = self._new(node, "right", TensorProto.FLOAT, (rows, rank))
        main = onnx.NodeProto()
        main.CopyFrom(node)
        main.name = main.output[0] = self._new(node, "main", TensorProto.FLOAT, self._shapes[result])
        self._shapes[main.name] = self._shapes[result]
        if storage.block is None:
            main.input[1] = self._expanded(main, name)
            nodes: Sequence[onnx.NodeProto] = [main]
        else:
            nodes = self._multiplied(main, name, storage)
        left, right = (part_key(name, part) for part in (LEFT, RIGHT))
        return [
            *nodes,
            _node("Gemm", [node.input[0], right], thin, transB=1),
            _node("Gemm", [thin, left, main.name], result, transB=1),
        ]

    def _looked_up(self, node: onnx.NodeProto, name: str) -> Sequence[onnx.NodeProto]:
        """Rows and their scales, looked up side by side and multiplied then: the table itself is never expanded."""
        width = self._weights[name].shape[1]
        found, gathers = [], []
        types = (TensorProto.INT8, TensorProto.FLOAT, TensorProto.INT8)
        for key, kind in zip(self._parts(name), types, strict=False):
            place = self._new(node, "Gather", kind)
            gathers.append(_node("Gather", [key, node.input[1]], place, axis=0))
            found.append(place)
            if not key.endswith(VALUES):
                self.tables[key] = (self._weights[name].shape[0], 1)
        rank = len(self._shapes[node.output[0]])
        return [*gathers, _node("DequantizeLinear", found, node.output[0], axis=rank - 1, block_size=width)]

    def _looked_up_blocks(self, node: onnx.NodeProto, name: str, storage: Affine) -> Sequence[onnx.NodeProto]:
        values, scale, *zero = self._parts(name)
        rows, columns = self._weights[name].shape
        self.tables[values] = (rows, columns * storage.bits // 8)
        options = {"gather_axis": 0, "quantize_axis": 1, "bits": storage.bits, "block_size": storage.block}
        inputs = [values, node.input[1], scale, *zero]
        return [_node("GatherBlockQuantized", inputs, node.output[0], MICROSOFT, **options)]

    def _parts(self, name: str) -> list[str]:
        parts = (VALUES, SCALE) if self._storages[name].symmetric else (VALUES, SCALE, ZERO)
        return [part_key(name, part) for part in parts]

    def _new(self, node: onnx.NodeProto, op: str, kind: int, shape: Shape | None = None) -> str:
        """A name for a further value of ``node``, as the exporter names those that one operator needs."""
        name = candidate = f"{node.output[0]}_{op}"
        number = 0
        while name in self._names:
            number += 1
            name = f"{candidate}_{number}"
        self._names.add(name)
        if shape is not None:
            self._model.graph.value_info.append(helper.make_tensor_value_info(name, kind, shape))
        return name


def _node(op: str, inputs: Sequence[str], output: str, domain: str = "", **attributes: Any) -> onnx.NodeProto:
    return helper.make_node(op, inputs, [output], name=output, domain=domain, **attributes)


def _is_linear(attributes: Mapping[str, Any]) -> bool:
    """Whether a Gemm is what a linear layer is translated to."""
    given = {"alpha": 1.0, "beta": 1.0, "transA": 0, "transB": 0} | dict(attributes)
    return given == {"alpha": 1.0, "beta": 1.0, "transA": 0, "transB": 1}
