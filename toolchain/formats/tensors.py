"""A bundle's files of tensors, read whole."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from toolchain.errors import BundleError

if TYPE_CHECKING:
    import torch


def read_tensors(path: Path) -> dict[str, torch.Tensor]:
    """What a safetensors file of a bundle holds, by name.

    Raises:
        BundleError: it cannot be read, or is no such file.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        tensors: dict[str, torch.Tensor] = load_file(path)
    except (SafetensorError, OSError, KeyError) as e:  # KeyError: a type that torch lacks
        raise BundleError(f"'{path}' holds no tensors that can be read; build the bundle again") from e
    return tensors
