"""Running an ExecuTorch program on this machine."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from executorch.runtime import Method, Program, Runtime, Verification

from targets.streams import quiet
from toolchain.errors import LoweringError
from toolchain.ir.blocks import Block, Port
from toolchain.ir.target import distinct_functions


class ExecuTorchEngine:
    """A loaded program. One function is loaded at a time, at its first call or by :meth:`prepare`.

    The runtime packs a function's weights for itself and keeps that as long as the program, so the program is loaded
    anew for another function: or a block that has run both would hold its weights twice.
    """

    def __init__(self, path: Path, inputs: Sequence[Port], outputs: Sequence[Port]) -> None:
        self._path = path
        self._inputs, self._outputs = inputs, outputs
        self._function: str | None = None
        self._program = self._opened()

    @property
    def functions(self) -> set[str]:
        return set(self._program.method_names)

    def prepare(self, function: str) -> None:
        """Load a function, so that its first call does not.

        Raises:
            LoweringError: it cannot be loaded.
        """
        with quiet(alone=False):  # the runtime describes the CPU at first, and failures only here
            try:
                self._method(function)
            except RuntimeError as e:
                raise LoweringError(f"'{self._path.name}', function '{function}': cannot be loaded: {e}") from e

    def __call__(self, function: str, inputs: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        with quiet(alone=False) as said:
            try:
                results = self._method(function).execute([inputs[p.name].contiguous() for p in self._inputs])
            except RuntimeError as e:
                operator = re.search(r"in operator (\S+):\s", said())
                where = f", operator '{operator[1]}'" if operator else ""
                raise LoweringError(f"'{self._path.name}', function '{function}'{where}: failed when run: {e}") from e
        # the runtime reuses its buffers at the next call
        return {p.name: r.clone() for p, r in zip(self._outputs, results, strict=True)}

    def _opened(self) -> Program:
        try:
            with quiet(alone=False):  # the runtime describes the CPU when it first starts
                return Runtime.get().load_program(self._path, verification=Verification.InternalConsistency)
        except RuntimeError as e:
            raise LoweringError(f"'{self._path.name}' is not a program that ExecuTorch can load: {e}") from e

    def _method(self, function: str) -> Method:
        if self._function not in (None, function):
            self._function = None
            del self._program
            self._program = self._opened()
        method = self._program.load_method(function)
        assert method is not None  # it raises where there is none
        self._function = function
        return method


def check(path: Path, block: Block) -> None:
    """Hold the program's methods, and the shapes they take and give, against the block."""
    engine = ExecuTorchEngine(path, block.inputs, block.outputs)
    expected = set(distinct_functions(block))
    if engine.functions != expected:
        raise LoweringError(
            f"block '{block.name}': program has {sorted(engine.functions)}, expected {sorted(expected)}"
        )
    for function in expected:
        meta = engine._program.metadata(function)
        shapes = [tuple(meta.input_tensor_meta(i).sizes()) for i in range(meta.num_inputs())]
        shapes += [tuple(meta.output_tensor_meta(i).sizes()) for i in range(meta.num_outputs())]
        signature = block.signatures[function]
        if shapes != [p.shape for p in (*signature.inputs, *signature.outputs)]:
            raise LoweringError(f"block '{block.name}', function '{function}': program's shapes are {shapes}")
