"""The protocol of a pass: Graph → Graph, with a frozen config that round-trips to text."""

from __future__ import annotations

import abc
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, get_origin

from pydantic import BaseModel, ConfigDict, Field, model_validator

from toolchain import plugins
from toolchain.errors import LoweringError
from toolchain.ir.graph import Graph
from toolchain.ir.graph_text import definition_text
from toolchain.ir.pipeline_text import pipeline_text


class PassConfig(BaseModel):
    """Base of a pass's options: frozen and strict, so that its JSON is both cache key and record.

    Options carry a version: 1 where none is given. A class whose options have changed says so in ``current_version``
    and brings older ones up to date in :meth:`migrate`; newer ones are refused.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)
    current_version: ClassVar[int] = 1

    version: int = Field(default=1, ge=1, description="Of these options.")

    @classmethod
    def migrate(cls, options: dict[str, Any], version: int) -> dict[str, Any]:
        """Options of an older ``version`` as today's; without the key ``version``."""
        return options

    @model_validator(mode="before")
    @classmethod
    def _up_to_date(cls, data: Any) -> Any:
        if not isinstance(data, dict):
            return data
        version = data.get("version", 1)
        if isinstance(version, int) and not isinstance(version, bool) and version >= 1:
            if version > cls.current_version:
                raise ValueError(
                    f"options are of version {version}, this sora-compile knows {cls.current_version}; update it"
                )
            options = {k: v for k, v in data.items() if k != "version"}
            data = cls.migrate(options, version) if version < cls.current_version else options
            data = {**data, "version": cls.current_version}
        return {k: cls._as_list(k, v) for k, v in data.items()}

    @classmethod
    def _as_list(cls, name: str, value: Any) -> Any:
        """One element stands for a list of it, where a list is meant."""
        field = cls.model_fields.get(name)
        several = field is not None and get_origin(field.annotation) in (tuple, list)
        return [value] if several and isinstance(value, (str, int, float, dict)) else value


class Pass(abc.ABC):
    """A pure rewrite of a :class:`Graph`.

    The three steps are those of ``torch.fx.passes.infra.PassBase``, over a graph with several functions,
    and ``ensures`` sees the result, not the argument. Raise :class:`~toolchain.errors.LoweringError`
    with the node's name when a graph does not fit. A pass that changes its argument is refused when it runs.
    """

    name: ClassVar[str]
    Config: ClassVar[type[PassConfig]] = PassConfig
    phase: ClassVar[Literal["rewrite", "partition"]] = "rewrite"
    """``partition``: it gives every node its block, and runs after all rewrites and the target's legal forms."""
    provides: ClassVar[tuple[str, ...]] = ()
    """Functions that a graph has after it and had not before."""

    def __init__(self, config: PassConfig | None = None) -> None:
        self.config = config if config is not None else self.Config()

    def __call__(self, graph: Graph) -> Graph:
        before = definition_text(graph)
        try:
            self.requires(graph)
            result = self.call(graph)
            self.ensures(result)
            if definition_text(graph) != before:
                raise LoweringError("changed its argument; let it work on graph.copy()")
        except LoweringError as e:
            raise LoweringError(f"pass '{self.name}' on {graph.component}: {e}") from e
        return result

    def requires(self, graph: Graph) -> None:
        """Raise if ``graph`` lacks what the pass needs."""

    @abc.abstractmethod
    def call(self, graph: Graph) -> Graph:
        """Return the rewritten graph; never edit ``graph`` itself."""

    def ensures(self, graph: Graph) -> None:
        """Raise if the pass did not do what it promises."""

    def __str__(self) -> str:
        given = self.config.model_dump(mode="json", exclude_defaults=True)
        return pipeline_text([(self.name, {k: _element(v) for k, v in given.items()})])


def _element(value: Any) -> Any:
    """A list of one as its element, which is read as a list again; others as they are."""
    return value[0] if isinstance(value, list) and len(value) == 1 and not isinstance(value[0], list) else value


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

    @property
    def provides(self) -> set[str]:
        """Functions that the passes add."""
        return {function for p in self for function in p.provides}


def find_pass(name: str, options: dict[str, Any], key: str) -> Pass:
    """The pass called ``name`` with its options; ``key`` is where the recipe names it.

    Raises:
        RecipeError: there is no such pass, or its options are wrong.
    """
    found: Pass = plugins.configured(plugins.find(plugins.PASSES, name, "pass", key), options, f"{key}.{name}")
    return found


def passes_providing(function: str) -> list[str]:
    """Names of the installed passes that add a function."""
    every = {name: plugins.find(plugins.PASSES, name, "pass", "passes") for name in plugins.names(plugins.PASSES)}
    return [name for name, cls in every.items() if function in cls.provides]
