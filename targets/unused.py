"""What torch does for every graph that a lowering makes, some thousands of them, though no artifact depends on it."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from typing import Any

from torch.fx import GraphModule
from torch.fx.graph import _PyTreeCodeGen
from torch.fx.traceback import NodeSource


@contextlib.contextmanager
def unused_left_out() -> Iterator[None]:
    """Within it the same bytes are made in less time: ExecuTorch takes two thirds of it, ONNX nine tenths.

    Nodes share what torch notes of where they come from, which nothing changes and every pass would copy; and a graph
    is turned into Python code only once that is asked for, which is so for one graph of seventy.
    """
    real, thread = GraphModule.recompile, threading.get_ident()

    def recompile(module: Any) -> Any:
        return _put_off(module, real) if threading.get_ident() == thread else real(module)

    name = "__deepcopy__"
    setattr(NodeSource, name, lambda self, memo: self)
    GraphModule.recompile = recompile  # type: ignore[method-assign, assignment]
    try:
        yield
    finally:
        GraphModule.recompile = real  # type: ignore[method-assign]
        delattr(NodeSource, name)


class _CodeOnDemand:
    """Stands in the place of a graph's code, until that is first read."""

    def __init__(self, compile_: Any) -> None:
        self._compile = compile_

    def __get__(self, module: Any, kind: type) -> str:
        self._compile(module)
        code: str = module.__dict__["_code"]
        return code


def _put_off(module: Any, compile_: Any) -> None:
    """Compile a graph when its code is read or the graph is called; every graph has a class of its own."""
    codegen = module.graph._codegen
    if isinstance(codegen, _PyTreeCodeGen):
        module._in_spec, module._out_spec = codegen.pytree_info.in_spec, codegen.pytree_info.out_spec
    kind = type(module)

    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        compile_(self)
        return kind.forward(self, *args, **kwargs)

    module.__dict__.pop("_code", None)
    kind._code = _CodeOnDemand(compile_)
    kind.forward = forward
