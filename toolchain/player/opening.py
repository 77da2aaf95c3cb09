"""Opening what a bundle holds: a component's target, a block's ports as its artifact has them, and its engine."""

from __future__ import annotations

import os
from pathlib import Path

from toolchain.errors import ResourceError
from toolchain.formats.bundle import Bundle
from toolchain.formats.manifest import BlockEntry, Manifest, TensorSpec
from toolchain.ir.blocks import Port, Signature
from toolchain.ir.dtypes import DTYPES
from toolchain.ir.target import Engine, PreparingEngine, Target, find_target


def target_of(manifest: Manifest, component: str) -> Target:
    """The target of a component of a bundle, with its options.

    Raises:
        RecipeError: the target is not installed, or does not know the options.
    """
    options = manifest.target.options | {"precision": manifest.components[component].precision}
    return find_target(manifest.target.name, options)


def signatures(block: BlockEntry) -> dict[str, Signature]:
    """A block's ports as its artifact has them, by function."""

    def ports(specs: list[TensorSpec], function: str) -> tuple[Port, ...]:
        other = block.other_shapes.get(function, {})
        return tuple(Port(s.name, tuple(other.get(s.name, s.shape)), DTYPES[s.dtype].torch) for s in specs)

    return {f: Signature(ports(list(block.inputs), f), ports(block.outputs, f)) for f in block.functions}


def open_engine(bundle: Bundle, component: str, block: BlockEntry, target: Target | None = None) -> Engine:
    """An engine for a block of a bundle; ``target`` saves looking for it again.

    Raises:
        LoweringError: the artifact is damaged or of another block.
        EngineUnavailableError: this machine cannot run it.
    """
    target = target or target_of(bundle.manifest, component)
    own = signatures(block)[bundle.manifest.components[component].default_function]
    return target.engine(bundle.path / block.artifact, own.inputs, own.outputs)


READ_BYTES = 1 << 22
"""At a time: what is read is only brought into memory."""


def load_engine(
    bundle: Bundle, component: str, block: BlockEntry, function: str, target: Target | None = None
) -> Engine:
    """An engine that is ready to run ``function``, with the block's files in memory.

    Engines map files, and would read them from storage page by page while they run; and some load a function when it
    is first called. A player loads ahead, so all that is done here.

    Raises:
        LoweringError: the artifact is damaged or of another block.
        EngineUnavailableError: this machine cannot run it.
        ResourceError: a file of it cannot be read; names the artifact.
    """
    try:
        for file in block.files:
            read_through(bundle.path / file.path)
        engine = open_engine(bundle, component, block, target)
        if isinstance(engine, PreparingEngine):
            engine.prepare(function)
        return engine
    except OSError as e:
        raise ResourceError(f"'{bundle.path / block.artifact}': cannot be read: {e.strerror or e}") from e


def read_through(path: Path) -> None:
    """Bring a file into the system's memory of files.

    The system is told first, so that it reads on while another thread keeps Python from going on here.
    """
    piece = bytearray(READ_BYTES)
    with path.open("rb", buffering=0) as file:
        if hasattr(os, "posix_fadvise"):
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_WILLNEED)
        while file.readinto(piece):
            pass
