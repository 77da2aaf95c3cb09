"""Digests of a checkpoint's tensors, and of the whole: what decides whether anything is built anew."""

from __future__ import annotations

import functools
import hashlib
import os
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING

from toolchain.system.events import What
from toolchain.system.store import Store
from toolchain.weights.checkpoint import Checkpoint

if TYPE_CHECKING:
    import torch


def tensor_digests(checkpoint: Checkpoint, store: Store | None = None, component: str = "") -> dict[str, str]:
    """sha256 of every tensor's dtype, shape and bytes, by name; remembered by ``store`` while the files stay.

    Args:
        component: whose weights they are, for who is told what is done.
    """
    what = What("digest", component)
    layers: list[dict[str, str]] = []
    for layer in checkpoint.layers():
        digests: dict[str, str] = {}
        for path in layer.files():
            compute = functools.partial(_digests, layer, path)
            digests |= compute() if store is None else store.remembered(path, compute, what, layer.chosen)
        layers.append(digests)
    return checkpoint.combined(layers)


def are_remembered(checkpoint: Checkpoint, store: Store) -> bool:
    """Whether ``store`` knows all of a checkpoint's digests, so that none of its tensors has to be read for them."""
    return all(
        store.recalled(path, layer.chosen) is not None for layer in checkpoint.layers() for path in layer.files()
    )


def _digests(checkpoint: Checkpoint, path: Path) -> dict[str, str]:
    names = [name for name in checkpoint.infos() if checkpoint.file_of(name) == path]
    with ThreadPoolExecutor(os.cpu_count()) as pool:  # hashing leaves the interpreter to others
        return dict(zip(names, pool.map(lambda n: _digest(checkpoint.tensor(n)), names), strict=True))


def _digest(tensor: torch.Tensor) -> str:
    import torch

    whole = hashlib.sha256(f"{tensor.dtype} {list(tensor.shape)}\n".encode())
    flat = tensor.detach().contiguous().reshape(-1)
    if flat.numel():
        whole.update(flat.view(torch.uint8).numpy().data)
    return whole.hexdigest()


def checkpoint_digest(digests: Mapping[str, str]) -> str:
    """A checkpoint's own digest: sha256 over lines ``NAME DIGEST``, sorted; the same however it is split."""
    return hashlib.sha256("".join(f"{n} {d}\n" for n, d in sorted(digests.items())).encode()).hexdigest()
