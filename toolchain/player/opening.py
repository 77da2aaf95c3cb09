"""Opening what a bundle holds: a component's target, a block's ports as its artifact has them, and its engine."""

from __future__ import annotations

from toolchain.formats.bundle import Bundle
from toolchain.formats.manifest import BlockEntry, Manifest, TensorSpec
from toolchain.ir.blocks import Port, Signature
from toolchain.ir.dtypes import DTYPES
from toolchain.ir.target import Engine, Target, find_target


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
