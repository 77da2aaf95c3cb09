"""A saved package as its engines see it: functions with ports, and what calls may give them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import torch

from targets.coreml.program import Function, Tensor, read_program
from targets.coreml.values import MalformedError
from toolchain.errors import LoweringError
from toolchain.ir.blocks import Port


class Package:
    """A package's functions, by the names that calls use: a lone ``main`` is ``base``.

    Args:
        inputs: ports that every function must have as inputs.
        outputs: likewise as outputs.

    Raises:
        LoweringError: the package is damaged, or a port is missing.
    """

    def __init__(self, path: Path, inputs: Sequence[Port], outputs: Sequence[Port]) -> None:
        self.name = path.name
        try:
            functions = read_program(path)
        except MalformedError as e:
            raise LoweringError(f"'{path.name}': {e}") from e
        self.is_plain = functions.keys() == {"main"}
        """It is no multifunction package."""
        self.functions: dict[str, Function] = {"base": functions["main"]} if self.is_plain else functions
        for name, function in self.functions.items():
            for side, ports, have in (
                ("input", inputs, [t.name for t in function.inputs]),
                ("output", outputs, function.outputs),
            ):
                absent = [p.name for p in ports if p.name not in have]
                if absent:
                    raise LoweringError(
                        f"'{path.name}', function '{name}': has no {side} '{absent[0]}', only {', '.join(have)}; "
                        "the package is of another block"
                    )

    def function(self, name: str) -> Function:
        """
        Raises:
            LoweringError: there is none of that name.
        """
        if name not in self.functions:
            have = ", ".join(sorted(self.functions))
            raise LoweringError(f"'{self.name}' has no function '{name}'; call one of {have}")
        return self.functions[name]

    def admit(self, name: str, inputs: Mapping[str, torch.Tensor]) -> Iterator[tuple[Tensor, torch.Tensor]]:
        """A function's ports, each with the tensor that is given for it.

        Raises:
            LoweringError: an input is missing, unknown, or of another shape; or integers are given for
                floats or the reverse.
        """
        ports = self.function(name).inputs
        where, names = f"'{self.name}', function '{name}'", ", ".join(p.name for p in ports)
        for unknown in sorted(inputs.keys() - {p.name for p in ports}):
            raise LoweringError(f"{where}: has no input '{unknown}'; give it {names}")
        for port in ports:
            if port.name not in inputs:
                raise LoweringError(f"{where}: input '{port.name}' is missing; give it {names}")
            given = inputs[port.name]
            if not agrees(given, port) or given.is_floating_point() != port.dtype.is_float:
                dtype = str(given.dtype).removeprefix("torch.")
                raise LoweringError(
                    f"{where}: input '{port.name}' is {dtype} {list(given.shape)}; give it {describe(port)}"
                )
            yield port, given.detach()


def agrees(value: torch.Tensor, declared: Tensor) -> bool:
    """Whether ``value`` has the declared shape."""
    return value.dim() == len(declared.shape) and all(
        want is None or have == want for have, want in zip(value.shape, declared.shape, strict=True)
    )


def describe(tensor: Tensor) -> str:
    """Type and sizes, such as ``float16 [2, 30, 32]``; sizes that are not fixed as ``?``."""
    return f"{tensor.dtype.name} [{', '.join('?' if s is None else str(s) for s in tensor.shape)}]"
