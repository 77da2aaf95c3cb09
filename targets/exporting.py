"""What the targets share: exporting a block's function, and keeping converters quiet."""

from __future__ import annotations

import contextlib
import logging
import os
import sys
import warnings
from collections.abc import Iterator, Mapping

import torch

from toolchain.blocks import Block
from toolchain.errors import LoweringError


def export(block: Block, function: str, weights: Mapping[str, torch.Tensor]) -> torch.export.ExportedProgram:
    """A function of ``block`` as an exported program, with fused attention and linear kept whole.

    Raises:
        LoweringError: names the block, the function and the operator.
    """
    args = tuple(torch.zeros(p.shape, dtype=p.dtype) for p in block.inputs)
    try:
        program = torch.export.export(block.module(function, weights), args, strict=False)
        # the empty table keeps attention, linear and gelu as they are; the default one takes them apart
        return program.run_decompositions({})
    except Exception as e:
        reason = str(e).splitlines()[0] if str(e) else type(e).__name__
        raise LoweringError(f"block '{block.name}', function '{function}': cannot export: {reason}") from e


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Silence converters: progress bars of their own, remarks on versions, missing accelerators and the CPU.

    They write to the process's streams from Python and from C++, so the streams themselves are redirected;
    what they raise is not touched.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    kept = [(stream, os.dup(stream)) for stream in (1, 2)]
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with open(os.devnull, "w") as nowhere, warnings.catch_warnings():
            warnings.simplefilter("ignore")
            for stream, _ in kept:
                os.dup2(nowhere.fileno(), stream)
            yield
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        for stream, copy in kept:
            os.dup2(copy, stream)
            os.close(copy)
        logging.disable(before)
