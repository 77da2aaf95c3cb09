"""Digests of a checkpoint's tensors: what decides whether a block must be stamped anew."""

from __future__ import annotations

import functools
import hashlib
import os
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor

import torch

from toolchain.ir.activations import ScaleSource, without_scales
from toolchain.ir.blocks import Block
from toolchain.ir.storage import Need
from toolchain.ir.weights import Weight, WeightSource
from toolchain.system.store import Store, key_of
from toolchain.weights.block_weights import held_name
from toolchain.weights.checkpoint import Checkpoint


def tensor_digests(checkpoint: Checkpoint, store: Store | None = None) -> dict[str, str]:
    """sha256 of every tensor's dtype, shape and bytes, by name; remembered by ``store`` while the files stay."""
    by_file: dict[str, list[str]] = {}
    for name in checkpoint.infos():
        by_file.setdefault(str(checkpoint.file_of(name)), []).append(name)
    digests: dict[str, str] = {}
    for path in checkpoint.files():
        names = by_file.get(str(path), [])
        if store is None:
            digests |= _digests(checkpoint, names)
        else:
            digests |= store.remembered(path, functools.partial(_digests, checkpoint, names))
    return digests


def _digests(checkpoint: Checkpoint, names: Iterable[str]) -> dict[str, str]:
    names = list(names)
    with ThreadPoolExecutor(os.cpu_count()) as pool:  # hashing leaves the interpreter to others
        return dict(zip(names, pool.map(lambda n: _digest(checkpoint.tensor(n)), names), strict=True))


def _digest(tensor: torch.Tensor) -> str:
    whole = hashlib.sha256(f"{tensor.dtype} {list(tensor.shape)}\n".encode())
    flat = tensor.detach().contiguous().reshape(-1)
    if flat.numel():
        whole.update(flat.view(torch.uint8).numpy().data)
    return whole.hexdigest()


def checkpoint_digest(digests: Mapping[str, str]) -> str:
    """A checkpoint's own digest: sha256 over lines ``NAME DIGEST``, sorted; the same however it is split."""
    return hashlib.sha256("".join(f"{n} {d}\n" for n, d in sorted(digests.items())).encode()).hexdigest()


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
