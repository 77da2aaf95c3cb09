"""Checkpoints in files of ``torch.save``: a state_dict, or one of several that a training run has put into a file."""

from __future__ import annotations

import functools
import pickle
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from toolchain.errors import CheckpointError
from toolchain.ir.dtypes import DTYPES
from toolchain.weights.checkpoint import FileCheckpoint, TensorInfo

DEPTH = 2
"""How deep state_dicts are looked for: ``{"ema": {"module": {…}}}``. Deeper lie the states of optimizers."""
TYPES = frozenset(d.torch for d in DTYPES.values())


class TorchCheckpoint(FileCheckpoint):
    """Files of ``torch.save``, loaded with ``weights_only``: no code of theirs is run."""

    @functools.cached_property
    def _held(self) -> dict[str, tuple[Path, torch.Tensor]]:
        """By the names in the files."""
        return {n: (path, t) for path in self._shards for n, t in self._state_dict(path).items()}

    def _state_dict(self, path: Path) -> Mapping[str, torch.Tensor]:
        """The one that was chosen, or the only one.

        Raises:
            CheckpointError: there is none, or there are several and none of them was chosen.
        """
        found = dict(_state_dicts(_load(path), ()))
        if self.chosen:
            if self.chosen not in found:
                there = f"there are {', '.join(found)}" if any(found) else "it is no file of several"
                raise CheckpointError(f"'{path}' has no state_dict '{self.chosen}'; {there}")
            chosen = found[self.chosen]
        elif len(found) > 1:
            example = f"{self.location}#{min(found)}"
            raise CheckpointError(
                f"'{path}' holds several state_dicts ({', '.join(found)}); choose one, as in 'checkpoint: {example}'"
            )
        elif not found:
            raise CheckpointError(f"'{path}' is not a state_dict (names to tensors); save model.state_dict()")
        else:
            (chosen,) = found.values()
        for name, tensor in chosen.items():
            if tensor.dtype not in TYPES:
                known = ", ".join(DTYPES)
                raise CheckpointError(f"'{path}': tensor '{name}' is of type {tensor.dtype}; known are {known}")
        return chosen

    def read_headers(self) -> dict[str, tuple[Path, TensorInfo]]:
        return {n: (path, TensorInfo(tuple(t.shape), t.dtype)) for n, (path, t) in self._held.items()}

    def tensor(self, name: str) -> torch.Tensor:
        return self._held[self.wrapper() + name][1]  # memory-mapped: read when used


def _state_dicts(data: Any, keys: tuple[str, ...]) -> Iterator[tuple[str, Mapping[str, torch.Tensor]]]:
    """Every mapping of names to tensors in what a file holds, by the keys that lead to it, joined by dots."""
    if not isinstance(data, Mapping):
        return
    if data and all(isinstance(k, str) and isinstance(v, torch.Tensor) for k, v in data.items()):
        yield ".".join(keys), data
    elif len(keys) < DEPTH:
        for key, value in data.items():
            if isinstance(key, str):
                yield from _state_dicts(value, (*keys, key))


def _load(path: Path) -> Any:
    def load(mmap: bool) -> Any:
        return torch.load(path, map_location="cpu", weights_only=True, mmap=mmap)

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                return load(mmap=True)
            except RuntimeError:  # files of torch < 1.6 cannot be mapped
                return load(mmap=False)
    except pickle.UnpicklingError as e:
        raise CheckpointError(f"'{path}' holds more than weights; refused, since loading it would run its code") from e
    except Exception as e:  # noise makes the unpickler raise nearly anything
        raise CheckpointError(f"'{path}' is truncated or not a file of torch.save; fetch it again") from e
