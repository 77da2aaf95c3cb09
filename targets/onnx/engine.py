"""Running a lowered block on this machine with ONNX Runtime."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import onnx
import onnxruntime as ort
import torch

from toolchain.errors import LoweringError
from toolchain.ir.blocks import Port
from toolchain.ir.target import OpValue

FATAL = 4
"""Log severity; whatever goes wrong is raised as well."""
TRACED_BYTES = 1 << 30
"""Most bytes of operators' results that a trace holds at once."""


class OnnxEngine:
    """A lowered block; functions are loaded at their first call, or by :meth:`prepare`.

    Runs on as many threads as PyTorch does at that time.
    """

    def __init__(self, path: Path, inputs: Sequence[Port], outputs: Sequence[Port]) -> None:
        self._path = path
        self._inputs, self._outputs = inputs, outputs
        self._sessions: dict[str, ort.InferenceSession] = {}

    def prepare(self, function: str) -> None:
        """Load a function, so that its first call does not.

        Raises:
            LoweringError: it cannot be loaded.
        """
        if function not in self._sessions:
            self._sessions[function] = self._load(function, str(self._path / f"{function}.onnx"))

    def __call__(self, function: str, inputs: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """A function's outputs, by port.

        Raises:
            LoweringError: names the file, the function and, where known, the operator.
        """
        self.prepare(function)
        names = [p.name for p in self._outputs]
        return dict(zip(names, self._run(self._sessions[function], function, names, inputs), strict=True))

    def trace(self, function: str, inputs: Mapping[str, torch.Tensor]) -> Iterator[OpValue]:
        """Every operator's result, in the order in which they run, for comparing them one by one.

        The runtime gives them when it has run to the end; where they are too large to be kept at once, it runs
        several times. Do not count on operators being fused as in a call.

        Raises:
            LoweringError: as a call.
        """
        model = onnx.load(str(self._path / f"{function}.onnx"), load_external_data=False)
        graph = model.graph
        nodes = {o: node for node in graph.node for o in node.output if o}
        typed = {v.name: v for v in (*graph.value_info, *graph.output)}
        for group in _groups([typed.get(name, onnx.ValueInfoProto(name=name)) for name in nodes]):
            del graph.output[:]
            graph.output.extend(group)
            session = self._load(function, model.SerializeToString())
            results = self._run(session, function, [v.name for v in group], inputs)
            results.reverse()
            for name in [v.name for v in group]:
                value = results.pop()  # let go of each as it is handed over
                dtype = str(value.dtype).removeprefix("torch.")
                yield OpValue(name, nodes[name].op_type, dtype, value, tuple(nodes[name].input))
                del value

    def _load(self, function: str, model: str | bytes) -> ort.InferenceSession:
        options = ort.SessionOptions()
        options.log_severity_level = FATAL
        options.use_deterministic_compute = True
        options.intra_op_num_threads = torch.get_num_threads()
        options.inter_op_num_threads = 1
        options.enable_mem_reuse = False  # or dead buffers wait for the next value of their shape, half of the peak
        options.enable_cpu_mem_arena = False  # or every function would keep the most that it ever needed
        # read weights where they lie in the mapped file: blocks are called once or twice before they are freed
        options.add_session_config_entry("session.disable_prepacking", "1")
        options.add_session_config_entry("session.model_external_initializers_file_folder_path", str(self._path))
        try:
            return ort.InferenceSession(model, options, providers=["CPUExecutionProvider"])
        except Exception as e:  # the runtime raises whatever it likes
            raise self._error(function, "cannot be loaded; lower it again", e) from e

    def _run(
        self, session: ort.InferenceSession, function: str, names: list[str], inputs: Mapping[str, torch.Tensor]
    ) -> list[torch.Tensor]:
        try:
            arrays = {p.name: inputs[p.name].detach().contiguous().numpy() for p in self._inputs}
            return [torch.from_numpy(result) for result in session.run(names, arrays)]
        except Exception as e:
            raise self._error(function, "failed when run", e) from e

    def _error(self, function: str, what: str, error: Exception) -> LoweringError:
        operator = re.search(r"running (\S+) node\. Name:'([^']*)'", str(error))
        where = f", operator '{operator[1]}' ({operator[2]})" if operator else ""
        return LoweringError(f"'{self._path.name}', function '{function}'{where}: {what}: {_told(error)}")


def _groups(values: Sequence[onnx.ValueInfoProto]) -> Iterator[list[onnx.ValueInfoProto]]:
    """``values`` in their order, as many at a time as :data:`TRACED_BYTES` holds, if they are of four bytes."""
    group: list[onnx.ValueInfoProto] = []
    held = 0
    for value in values:
        size = 4 * math.prod(d.dim_value for d in value.type.tensor_type.shape.dim)
        if group and held + size > TRACED_BYTES:
            yield group
            group, held = [], 0
        group.append(value)
        held += size
    if group:
        yield group


def _told(error: Exception) -> str:
    """What the runtime has to say, without its codes and places in its source; the end matters most."""
    text = re.split(r"\[ONNXRuntimeError\] : \d+ : \w+ : |Status Message: ", " ".join(str(error).split()))[-1]
    return re.sub(r"^\S+\.cc:\d+ \S+ ", "", text)[-300:] or type(error).__name__
