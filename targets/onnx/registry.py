"""What torch's exporter knows of operators, read once a process and not for every graph."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator
from typing import Any

from torch.onnx._internal.exporter import _registration

_apis: Any = vars(_registration)["onnxscript_apis"]
_read_once = functools.cache(_apis.get_torchlib_ops)


@contextlib.contextmanager
def operators_read_once() -> Iterator[None]:
    """Within it an export does not parse the source of some thousand translations anew: half a second of CPU."""
    read = _apis.get_torchlib_ops
    _apis.get_torchlib_ops = _read_once
    try:
        yield
    finally:
        _apis.get_torchlib_ops = read
