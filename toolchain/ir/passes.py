"""The protocol of a pass: Graph → Graph, with a frozen config that round-trips to text."""

from __future__ import annotations

import abc
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

from pydantic import BaseModel, ConfigDict

from toolchain import plugins
from toolchain.errors import LoweringError
from toolchain.ir.graph import Graph


class PassConfig(BaseModel):
    """Base of a pass's options: frozen and strict, so that its JSON is both cache key and record."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)


@dataclass(frozen=True)
class PassResult:
    graph: Graph
    modified: bool


class Pass(abc.ABC):
    """A pure rewrite of a :class:`Graph`.

    The three steps are those of ``torch.fx.passes.infra.PassBase``, over a graph with several functions,
    and ``ensures`` sees the result, not the argument. Raise :class:`~toolchain.errors.LoweringError`
    with the node's name when a graph does not fit.
    """

    name: ClassVar[str]
    Config: ClassVar[type[PassConfig]] = PassConfig

    def __init__(self, config: PassConfig | None = None) -> None:
        self.config = config if config is not None else self.Config()

    def __call__(self, graph: Graph) -> PassResult:
        try:
            self.requires(graph)
            result = self.call(graph)
            self.ensures(result.graph)
        except LoweringError as e:
            raise LoweringError(f"pass '{self.name}' on {graph.component}: {e}") from e
        return result

    def requires(self, graph: Graph) -> None:
        """Raise if ``graph`` lacks what the pass needs."""

    @abc.abstractmethod
    def call(self, graph: Graph) -> PassResult:
        """Return the rewritten graph; never edit ``graph`` itself."""

    def ensures(self, graph: Graph) -> None:
        """Raise if the pass did not do what it promises."""

    def __str__(self) -> str:
        options = self.config.model_dump_json(exclude_defaults=True)
        return self.name if options == "{}" else f"{self.name}{options}"


@dataclass(frozen=True)
class Pipeline:
    """A component's passes: rewrites in their order, then the one that cuts it into blocks."""

    rewrites: tuple[Pass, ...]
    partition: Pass

    def __iter__(self) -> Iterator[Pass]:
        yield from self.rewrites
        yield self.partition

    def __str__(self) -> str:
        return " ".join(str(p) for p in self)


def find_pass(name: str, options: dict[str, Any], key: str) -> Pass:
    """The pass called ``name`` with its options; ``key`` is where the recipe names it.

    Raises:
        RecipeError: there is no such pass, or its options are wrong.
    """
    found: Pass = plugins.configured(plugins.find(plugins.PASSES, name, "pass", key), options, f"{key}.{name}")
    return found
