"""Digests of blocks' weights: what decides whether a block must be stamped anew."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from toolchain.ir.activations import ScaleSource, without_scales
from toolchain.ir.blocks import Block
from toolchain.ir.storage import Need
from toolchain.ir.weights import Weight, WeightSource
from toolchain.system.store import key_of
from toolchain.weights.block_weights import held_name


def source_digest(source: WeightSource, digests: Mapping[str, str], aliases: Mapping[str, str]) -> list[object]:
    """What decides a parameter's numbers: its tensors' digests, and what is made of them; plain data."""
    return [[digests[held_name(name, digests, aliases)] for name in source.tensors], *source.describe()]


def block_digest(
    block: Block,
    digests: Mapping[str, str],
    aliases: Mapping[str, str],
    statistics: Callable[[Weight, Need], str] | None = None,
    scale: Callable[[ScaleSource], float] | None = None,
) -> str:
    """Digest of a block's weights: each parameter's tensors and what is made of them.

    Args:
        statistics: gives the digest of the statistic that a weight's storage needs; it decides what is stored.
        scale: gives the scales that layers round with; only needed for a block that has some.
    """
    found = {name: source_digest(w.source, digests, aliases) for name, w in without_scales(block.weights).items()}
    for name, weight in block.weights.items():
        if isinstance(weight.source, ScaleSource):
            assert scale is not None, "a block that rounds is given its scales"
            found[name] = ["scale", scale(weight.source)]
    for name, weight in block.weights.items():
        if statistics is not None and (need := weight.storage.needs) is not None:
            found[name] = [*found[name], need, statistics(weight, need)]
    return key_of(found)
