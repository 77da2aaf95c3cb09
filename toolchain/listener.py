"""What a build tells whoever watches it. The base class says nothing; subclass what you need."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from toolchain.formats.manifest import Accuracy
    from toolchain.ir.graph import Graph
    from toolchain.system.events import Event


class Listener:
    """Told of progress, in order; must not raise. :meth:`task_done` and :meth:`event` come from other threads,
    one at a time.
    """

    def cancelled(self) -> bool:
        """Whether the build is to end, with :class:`toolchain.CancelledError`.

        Asked before each thing of a build is begun (at most a block's lowering apart), and several times a second
        while other processes work, which then end at once. What is done is kept in the store; no bundle is left.
        """
        return False

    def event(self, event: Event) -> None:
        """Something was begun, was there already, is done or failed; of what another process did, when it has told."""

    def build(self, name: str, number: int, builds: int) -> None:
        """What follows is about one of several builds; ``number`` counts from 1."""

    def built(self, name: str, error: BaseException | None) -> None:
        """One of several builds is done, or failed."""

    def lined_up(self, tasks: int, cached: int) -> None:
        """So many tasks are given to other processes; so many more things are in the store already."""

    def task_done(self, done: int, tasks: int) -> None:
        """So many of the tasks are done."""

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
