"""What a build tells whoever watches it. The base class says nothing; subclass what you need."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from toolchain.formats.manifest import Accuracy
    from toolchain.ir.graph import Graph


class Listener:
    """Told of progress, in order; must not raise."""

    def graph(self, component: str, after: str, graph: Graph) -> None:
        """A pass is done and this is its graph; ``after`` is its text, options included, and ``capture`` at first."""

    def start(self, component: str, blocks: list[str]) -> None:
        """These blocks will be built."""

    def working(self, component: str, block: str, what: str) -> None:
        """A block is being lowered, checked or executed."""

    def finished(self, component: str, block: str, accuracy: Mapping[str, Accuracy] | None) -> None:
        """A block is done; its accuracy by function, or None where it could not be executed."""

    def remark(self, text: str) -> None:
        """Something that a user should know."""
