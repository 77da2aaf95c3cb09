"""Running a Core ML package's program on torch, wherever torch runs.

It computes what the program says: graph, weights and their packing, types and rounding. It does not
reproduce Apple's kernels, which fuse, reorder and accumulate as they like; see ``device.py`` for these.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch

from targets.coreml.dtypes import held_as
from targets.coreml.linking import Linked, link
from targets.coreml.package import Package, agrees, describe
from targets.coreml.program import Ref, Tensor
from targets.coreml.steps import Bound, Step
from targets.coreml.values import MalformedError
from targets.exporting import reason
from toolchain.errors import LoweringError
from toolchain.ir.blocks import Port
from toolchain.ir.target import OpValue

PIECE = 1 << 15
"""Elements that torch handles in one thread: on a busy machine, threads that wait for one another cost most."""
Arithmetic = Literal["rounded", "native"]


class CoreMLEngine:
    """A saved package, loaded: its weights are mapped into memory and read when they are used.

    Args:
        path: the ``.mlpackage``; functions are those of a multifunction package, or ``main``, which ``base``
            stands for.
        inputs: ports that every function has.
        outputs: ports that calls return.
        arithmetic: ``rounded`` computes each operator in float32 and rounds its result to the type that the
            program declares. ``native`` computes float16 in float16 and rounds every step inside an operator
            but the sums of products: slow, and shows where something in an operator overflows.

    Raises:
        LoweringError: the package is damaged, or has an operator that this engine does not know; names it.
    """

    def __init__(
        self, path: Path, inputs: Sequence[Port], outputs: Sequence[Port], arithmetic: Arithmetic = "rounded"
    ) -> None:
        self._package, self._native = Package(path, inputs, outputs), arithmetic == "native"
        self._outputs = [p.name for p in outputs]
        try:
            self._functions = {name: link(name, f) for name, f in self._package.functions.items()}
        except MalformedError as e:
            raise LoweringError(f"'{path.name}': {e}") from e

    @property
    def functions(self) -> set[str]:
        return set(self._functions)

    def __call__(self, function: str, inputs: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Run a function.

        Args:
            inputs: tensors by port name, of the ports' shapes; floats of any width, and integers.

        Returns:
            Outputs by port name: float32, or integers.

        Raises:
            LoweringError: there is no such function, an input is missing, unknown, or of another shape or
                type, or an operator fails; names it.
        """
        values = self._enter(function, inputs)
        for _ in self._steps(function, values):
            pass
        found = {name: self._value(Ref(name), values, self._functions[function]) for name in self._outputs}
        # outputs may be views of inputs, weights and one another
        return {n: v.float() if v.dtype == torch.float16 else v.clone() for n, v in found.items()}

    def trace(self, function: str, inputs: Mapping[str, torch.Tensor]) -> Iterator[OpValue]:
        """Run a function and yield what every operation gives, in order. Do not write to the values.

        float16 comes as float32 or, with native arithmetic, as it is.

        Raises:
            LoweringError: as a call.
        """
        values = self._enter(function, inputs)
        for step in self._steps(function, values):
            for output in step.operation.outputs:
                yield OpValue(output.name, step.operation.type, output.dtype.name, values[output.name], step.reads)

    def held(self, function: str, inputs: Mapping[str, torch.Tensor]) -> Iterator[tuple[str, int]]:
        """Run a function and yield, for every operation, its name and the bytes of all values that are held with it.

        Types are counted as the program declares them, and what views share is counted once. Inputs and outputs are
        held all along. Weights are not counted while they are stored, but what they are decompressed to is.

        Raises:
            LoweringError: as a call.
        """
        values = self._enter(function, inputs)
        linked = self._functions[function]
        declared = {t.name: t.dtype for t in linked.inputs}
        declared |= {t.name: t.dtype for step in linked.steps for t in step.operation.outputs}
        given = {values[t.name].untyped_storage().data_ptr() for t in linked.inputs}
        ports = sum(values[t.name].numel() * t.dtype.bits // 8 for t in linked.inputs)
        shapes = {t.name: t for step in linked.steps for t in step.operation.outputs}
        ports += sum(
            math.prod(int(s or 0) for s in shapes[o].shape) * shapes[o].dtype.bits // 8 for o in linked.outputs
        )
        for step in self._steps(function, values):
            own: dict[int, int] = {}
            for name, value in values.items():
                storage = value.untyped_storage()
                if name not in linked.outputs and storage.data_ptr() not in given:
                    own[storage.data_ptr()] = storage.nbytes() // value.itemsize * declared[name].bits // 8
            for name in linked.outputs:
                if name in values:
                    own.pop(values[name].untyped_storage().data_ptr(), None)
            yield step.operation.name, ports + sum(own.values())

    def _enter(self, function: str, inputs: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return {port.name: self._hold(given, port, True) for port, given in self._package.admit(function, inputs)}

    def _steps(self, function: str, values: dict[str, torch.Tensor]) -> Iterator[Step]:
        """Run every step; what nothing needs any more is dropped once the step has been looked at."""
        linked = self._functions[function]
        for step in linked.steps:
            try:
                with torch.no_grad():
                    self._run(step, values, linked)
            except (RuntimeError, ValueError, IndexError, TypeError, KeyError, NotImplementedError) as e:
                where = f"operator '{step.operation.name}' ({step.operation.type})"
                raise LoweringError(
                    f"'{self._package.name}', function '{function}', {where}: failed when run: {reason(e)}"
                ) from e
            yield step
            for name in step.done:
                del values[name]

    def _run(self, step: Step, values: dict[str, torch.Tensor], linked: Linked) -> None:
        arguments: dict[str, Any] = {}
        for name, argument in step.arguments.items():
            get = self._value if step.operator.parameters[name].tensor else self._python
            if isinstance(argument, tuple):
                arguments[name] = [get(a, values, linked) for a in argument]
            else:
                arguments[name] = get(argument, values, linked)
        results = step.operator.call(**arguments)
        results = results if isinstance(results, tuple) else (results,)
        given = {t.untyped_storage().data_ptr() for t in _tensors(arguments.values())}
        for declared, result in zip(step.operation.outputs, results, strict=True):
            if not agrees(result, declared):
                raise ValueError(f"gives {list(result.shape)}, the program declares {describe(declared)}")
            own = result.untyped_storage().data_ptr() not in given
            values[declared.name] = self._hold(result, declared, step.operator.rounds, own)

    def _value(self, argument: Bound, values: Mapping[str, torch.Tensor], linked: Linked) -> torch.Tensor:
        if isinstance(argument, Ref):
            if argument.name in values:
                return values[argument.name]
            argument = linked.constants[argument.name]
        return argument.tensor(self._native)

    def _python(self, argument: Bound, values: Mapping[str, torch.Tensor], linked: Linked) -> Any:
        if isinstance(argument, Ref):
            if argument.name in values:
                return values[argument.name].tolist()
            argument = linked.constants[argument.name]
        return argument.value()

    def _hold(self, value: torch.Tensor, declared: Tensor, rounds: bool, own: bool = False) -> torch.Tensor:
        """``value`` as the engine holds the declared type, rounded to it if it ``rounds``: in place, if ``own``."""
        held = held_as(declared.dtype, self._native)
        if rounds and declared.dtype.name == "float16" and not self._native:
            if own and value.dtype == held and value.is_contiguous():
                return _rounded_in_place(value)
            value = value.to(torch.float16)
        return value.to(held)


def _rounded_in_place(value: torch.Tensor) -> torch.Tensor:
    """Round to float16, in pieces that stay in the processor's cache: a new tensor costs ten times as much."""
    for piece in value.view(-1).split(PIECE):
        piece.copy_(piece.to(torch.float16))
    return value


def _tensors(arguments: Iterable[Any]) -> Iterator[torch.Tensor]:
    for argument in arguments:
        if isinstance(argument, torch.Tensor):
            yield argument
        elif isinstance(argument, list) and argument and isinstance(argument[0], torch.Tensor):
            yield from argument
