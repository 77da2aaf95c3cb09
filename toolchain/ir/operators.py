"""A block's function as the operators that it runs, in order: what each reads and gives, in shapes and types alone.

Leaves are run on ``meta`` tensors, which have no memory, and every call of torch's functions is written down. So this
takes a fraction of a second whatever the sizes; nothing is exported or lowered.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode, resolve_name
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from toolchain.ir.blocks import Block, Port


@dataclass(frozen=True)
class Value:
    """A tensor that an operator reads or gives.

    ``memory`` is a number that it shares with its views, as torch has them. ``weight`` is the name of the weight that
    it is, or is a view of.
    """

    number: int
    memory: int
    shape: tuple[int, ...]
    dtype: torch.dtype
    weight: str | None = None
    exact: bool = False

    @property
    def elements(self) -> int:
        return torch.Size(self.shape).numel()


@dataclass(frozen=True)
class Operator:
    """A call of a torch function; ``name`` is the function's, such as ``linear``, ``permute``, ``add``."""

    name: str
    reads: tuple[Value, ...]
    gives: tuple[Value, ...]

    @property
    def is_view(self) -> bool:
        """Whether torch computes nothing, but looks at the memory of what it was given in another way."""
        return bool(self.gives) and {v.memory for v in self.gives} <= {v.memory for v in self.reads}


@dataclass(frozen=True)
class OperatorGraph:
    """The operators of a function in order, with the values that are its ports.

    ``flops`` are those of its matrix products, convolutions and attention, as torch counts them: a multiplication and
    an addition are two.
    """

    operators: tuple[Operator, ...]
    inputs: tuple[tuple[Port, Value], ...]
    outputs: tuple[tuple[Port, Value], ...]
    flops: int = 0


def operator_graph(block: Block, function: str, whole: Mapping[Callable[..., Any], str] | None = None) -> OperatorGraph:
    """The operators of a function of ``block``.

    Args:
        whole: functions of legal forms that a target has one operator for, and how that is called: they are not
            looked into.
    """
    weights = {n: torch.empty(w.shape, device="meta") for n, w in block.weights.items()}
    module = block.module(function, weights)
    signature = block.signatures[function]
    recorder = _Recorder(module)
    inputs = [torch.empty(p.shape, dtype=p.dtype, device="meta") for p in signature.inputs]
    ports = tuple((p, recorder.value(t)) for p, t in zip(signature.inputs, inputs, strict=True))
    _keep_whole(module, whole or {}, recorder)
    counter = _Flops()
    with torch.no_grad(), torch.device("meta"), counter, recorder:
        results = module(*inputs)
    outputs = tuple((p, recorder.value(t)) for p, t in zip(signature.outputs, results, strict=True))
    return OperatorGraph(tuple(recorder.operators), ports, outputs, counter.total)


class _Flops(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Sums floating-point operations by torch's formulas.

    torch's own ``FlopCounterMode`` also follows modules by hooks of the whole process, on which gradients fail that
    another thread is taking.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.total = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if (count := flop_registry.get(func.overloadpacket)) is not None:
            self.total += count(*args, **(kwargs or {}), out_val=result)
        return result


class _Recorder(TorchFunctionMode):
    """Writes down what torch functions are given and give."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.operators: list[Operator] = []
        self._kept: list[torch.Tensor] = []  # so that no number is given twice
        self._values: dict[int, Value] = {}
        self._memories: dict[int, int] = {}
        self._weights: dict[int, str] = {}
        for name, tensor in (*module.named_parameters(), *module.named_buffers()):
            self._weights.setdefault(self._memory(tensor), name)

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        if not _is_attribute(func):
            self.record(_name(func), (*args, *(kwargs or {}).values()), result)
        return result

    def record(self, name: str, given: Iterable[Any], result: Any) -> None:
        reads = tuple(self.value(t) for t in _tensors(given))
        if gives := tuple(self.value(t) for t in _tensors([result])):
            self.operators.append(Operator(name, reads, gives))

    def value(self, tensor: torch.Tensor) -> Value:
        if id(tensor) not in self._values:
            self._kept.append(tensor)
            memory = self._memory(tensor)
            weight = self._weights.get(memory)
            self._values[id(tensor)] = Value(len(self._values), memory, tuple(tensor.shape), tensor.dtype, weight)
        return self._values[id(tensor)]

    def _memory(self, tensor: torch.Tensor) -> int:
        self._kept.append(tensor)
        with torch._C.DisableTorchFunction():
            return self._memories.setdefault(tensor.untyped_storage()._cdata, len(self._memories))


def _keep_whole(module: nn.Module, whole: Mapping[Callable[..., Any], str], recorder: _Recorder) -> None:
    """Have the module's own copies of leaves call functions of ``whole`` without looking into them."""

    def recorded(function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            with torch._C.DisableTorchFunction():
                result = function(*args, **kwargs)
            recorder.record(whole[function], (*args, *kwargs.values()), result)
            return result

        return call

    for part in module.modules():
        for name, value in list(vars(part).items()):
            if callable(value) and not isinstance(value, type) and value in whole:
                setattr(part, name, recorded(value))


def _is_attribute(func: Callable[..., Any]) -> bool:
    """Reads of ``.shape``, ``.dtype`` and the like, which torch takes for calls; ``.T`` is a view and counts."""
    return getattr(func, "__name__", "") == "__get__"


def _name(func: Callable[..., Any]) -> str:
    """``add`` for ``torch.add``, ``Tensor.add`` and ``Tensor.__add__``."""
    name = getattr(func, "__name__", None) or str(resolve_name(func))
    return name if name in ("__getitem__",) else name.strip("_")


def _tensors(arguments: Iterable[Any]) -> Iterator[torch.Tensor]:
    for argument in arguments:
        if isinstance(argument, torch.Tensor):
            yield argument
        elif isinstance(argument, (list, tuple)):
            yield from _tensors(argument)
