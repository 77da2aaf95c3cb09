"""How much the numbers of a weight matter for what its layer gives, as storages use it."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

LEAST = 2.0**-20
"""Of the largest in a row: what a calibration did not see may come all the same."""


def floored(importance: torch.Tensor) -> torch.Tensor:
    """Importance ``[R, n]`` with none that is nothing against the largest of its row; all alike where all are zero."""
    import torch

    largest = importance.float().amax(1, keepdim=True)
    raised = torch.maximum(importance.float(), largest * LEAST)
    return torch.where(largest > 0, raised, torch.ones_like(raised))
