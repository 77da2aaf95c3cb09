"""What an artifact says of itself to tools that show models (Xcode, Netron). Nothing that runs it reads this."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Labels:
    """Facts of a block for people; the same for the same block of the same model, whoever builds it and where."""

    model: str
    """The model family."""
    component: str
    block: str
    inputs: Mapping[str, str]
    """What feeds each input: ``tables.NAME``, ``inputs.NAME`` of the component, or ``BLOCK.PORT``."""
    results: Mapping[str, str]
    """Outputs that are the component's own, by port, and what they are called there."""
    license: str | None = None
    """SPDX expression, of the checkpoint."""
    source: str | None = None
    """Where anybody finds the checkpoint; None of one on a disk."""

    @property
    def title(self) -> str:
        """The block in a sentence."""
        return f"{self.model}: block '{self.block}' of the {self.component.replace('_', ' ')}, made by sora-compile"

    def input(self, name: str) -> str:
        """An input in a few words."""
        place, _, port = self.inputs[name].partition(".")
        kinds = {"tables": f"constant '{port}' of the bundle's tables", "inputs": f"input '{port}' of the component"}
        return kinds.get(place, f"output '{port}' of block '{place}'")

    def output(self, name: str) -> str:
        """An output in a few words."""
        return f"result '{self.results[name]}' of the component" if name in self.results else "for later blocks"
