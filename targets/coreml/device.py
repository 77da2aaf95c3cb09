"""Running a package with Core ML itself, on macOS."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import coremltools as ct
import numpy as np
import torch

from targets.coreml.package import Package
from targets.exporting import reason
from targets.streams import quiet
from toolchain.errors import LoweringError
from toolchain.ir.blocks import Port


class CoreMLDevice:
    """A saved package, run by Core ML on whatever compute units it chooses; functions load at their first call.

    Args:
        path: the ``.mlpackage``.
        inputs: ports that every function has.
        outputs: ports that calls return.

    Raises:
        LoweringError: the package is damaged, or a port is missing.
    """

    def __init__(self, path: Path, inputs: Sequence[Port], outputs: Sequence[Port]) -> None:
        self._path = path
        self._package = Package(path, inputs, outputs)
        self._outputs = [p.name for p in outputs]
        self._models: dict[str, Any] = {}

    @property
    def functions(self) -> set[str]:
        return set(self._package.functions)

    def __call__(self, function: str, inputs: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Run a function: tensors by port name in, float32 or integer tensors by port name out.

        Raises:
            LoweringError: there is no such function, an input does not fit, or Core ML refuses the package.
        """
        given = {
            port.name: tensor.numpy().astype(np.dtype(port.dtype.name))
            for port, tensor in self._package.admit(function, inputs)
        }
        try:
            with quiet():
                found = self._model(function).predict(given)
                results = {name: np.ascontiguousarray(found[name]) for name in self._outputs}
        except Exception as e:  # coremltools raises whatever it likes, Exception itself among it
            raise LoweringError(
                f"'{self._path.name}', function '{function}': Core ML cannot run it: {reason(e)}"
            ) from e
        floats = {n: r.astype(np.float32 if r.dtype.kind == "f" else r.dtype) for n, r in results.items()}
        return {n: torch.from_numpy(r) for n, r in floats.items()}

    def _model(self, function: str) -> Any:
        if function not in self._models:
            name = None if self._package.is_plain else function
            self._models[function] = ct.models.MLModel(
                str(self._path), function_name=name, compute_units=ct.ComputeUnit.ALL
            )
        return self._models[function]
