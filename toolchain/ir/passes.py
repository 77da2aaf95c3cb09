"""The protocol of a pass: Graph → Graph, with a frozen config that round-trips to text; and passes in a row."""

from __future__ import annotations

import abc
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from pydantic import ValidationError

from toolchain import plugins
from toolchain.errors import LoweringError, RecipeError
from toolchain.ir.calibration import Calibration
from toolchain.ir.graph import Graph, compute_nodes
from toolchain.ir.graph_text import definition_text
from toolchain.ir.pass_config import PassConfig
from toolchain.ir.pipeline_text import pipeline_text
from toolchain.ir.target import Target
from toolchain.validation import explain

__all__ = ["Pass", "PassConfig", "Phase", "Pipeline", "find_pass", "passes_providing"]

Phase = Literal["rewrite", "partition"]


class Pass(abc.ABC):
    """A pure rewrite of a :class:`Graph`.

    The three steps are those of ``torch.fx.passes.infra.PassBase``, over a graph with several functions,
    and ``ensures`` sees the result, not the argument. Raise :class:`~toolchain.errors.LoweringError`
    with the node's name when a graph does not fit.
    """

    name: ClassVar[str]
    Config: ClassVar[type[PassConfig]] = PassConfig
    phase: ClassVar[Phase] = "rewrite"
    """``partition`` for a pass that gives every node its block; a component has one such pass, and it is the last."""
    provides: ClassVar[tuple[str, ...]] = ()
    """Names of the functions that the pass adds to every graph, as ``merged``."""

    def adds_to(self, functions: Collection[str]) -> tuple[str, ...]:
        """Names of the functions that the pass adds to a graph with ``functions``: what it provides, or more."""
        return self.provides

    @property
    def groups(self) -> int | None:
        """For how many groups of denoising steps the pass makes every function (:mod:`toolchain.ir.functions`).

        None for a pass that leaves functions as they are. Passes that provide functions stand before one that does not.
        """
        return None

    def __init__(self, config: PassConfig | None = None) -> None:
        self.config = config if config is not None else self.Config()

    def __call__(self, graph: Graph, *, beside: Sequence[Graph] = ()) -> Graph:
        """The rewritten graph.

        Args:
            beside: the component's other graphs, before the pass: an option may be for one of them alone.

        Raises:
            LoweringError: the graph does not fit, an option is for none of the component's graphs, or the pass did not
                do what it says of itself.
        """
        before = _everything(graph)
        try:
            self.requires(graph)
            idle = dict(self.idle(graph))
            for other in beside if idle else ():
                idle = {option: why for option, why in idle.items() if option in self.idle(other)}
            for why in idle.values():
                raise LoweringError(why)
            result = self.call(graph)
            if _everything(graph) != before:
                raise LoweringError("changed its argument; work on graph.copy()")
            self._keeps_its_word(graph, result)
            self.ensures(result)
        except LoweringError as e:
            raise LoweringError(f"pass '{self.name}' on {graph.component}: {e}") from e
        return result

    def chosen_for(self, graph: Graph, target: Target) -> Pass:
        """The pass as it is for ``graph`` in the legal forms of ``target``: one that cuts may ask what blocks need."""
        return self

    def requires(self, graph: Graph) -> None:
        """Raise if ``graph`` lacks what the pass needs."""

    def idle(self, graph: Graph) -> Mapping[str, str]:
        """Options that would do nothing to ``graph``, and why: refused if no graph of the component needs them."""
        return {}

    @abc.abstractmethod
    def call(self, graph: Graph) -> Graph:
        """Return the rewritten graph; never edit ``graph`` itself."""

    @property
    def calibration(self) -> Calibration | None:
        """What activations are to be measured on for the storages that the pass sets; None if none of them needs it."""
        return None

    def ensures(self, graph: Graph) -> None:
        """Raise if the pass did not do what it promises."""

    def __str__(self) -> str:
        """The pass as a recipe may have it, with the options that are not as by default."""
        return pipeline_text([(self.name, self.config.written(short=True))])

    def _keeps_its_word(self, graph: Graph, result: Graph) -> None:
        for function in self.adds_to(graph.functions):
            if function not in result.functions:
                raise LoweringError(f"says that it provides '{function}' and did not add this function")
        for function, gm in result.functions.items() if self.phase == "partition" else ():
            for node in compute_nodes(gm):
                if "block" not in node.meta:
                    raise LoweringError(f"is the one that partitions and gave '{node.name}' of '{function}' no block")


@dataclass(frozen=True)
class Pipeline:
    """The passes of a component: those that rewrite its graph, in order, then the one that cuts it into blocks.

    As text it is what :func:`~toolchain.ir.pipeline_text.parse_pipeline` reads.
    """

    rewrites: tuple[Pass, ...]
    partition: Pass

    def __iter__(self) -> Iterator[Pass]:
        return iter((*self.rewrites, self.partition))

    def __str__(self) -> str:
        return " ".join(map(str, self))

    @property
    def groups(self) -> int:
        """For how many groups of denoising steps there is every function."""
        return max((p.groups or 1 for p in self), default=1)

    @property
    def calibration(self) -> Calibration | None:
        """What activations are to be measured on, if a pass says so."""
        return next((found for p in self for found in [p.calibration] if found is not None), None)

    @property
    def provides(self) -> set[str]:
        """Names of the functions that the passes add to a graph with ``base``."""
        found = ["base"]
        for p in self:
            found += p.adds_to(found)
        return set(found[1:])


def find_pass(name: str, options: dict[str, Any], key: str) -> Pass:
    """The pass called ``name`` with its options; ``key`` is where the recipe names it.

    Raises:
        RecipeError: there is no such pass, or its options are wrong.
    """
    cls, key = plugins.find(plugins.PASSES, name, "pass", key), f"{key}.{name}"
    try:
        found: Pass = cls(cls.Config.read(options))
    except ValidationError as e:
        raise RecipeError(explain(e, cls.Config, key)) from e
    except ValueError as e:
        raise RecipeError(f"{key}: {e}") from e
    return found


def passes_providing(function: str) -> list[str]:
    """Names of the installed passes that add ``function`` to a graph; a plug-in that is broken offers none."""
    return [name for name, cls in plugins.importable(plugins.PASSES).items() if function in cls.provides]


def _everything(graph: Graph) -> tuple[Any, ...]:
    """All of a graph that an edit in place could change, as text."""
    notes = [
        [tuple(n.meta.get(k) for k in ("wire", "rate", "unit")) for n in gm.graph.nodes]
        for gm in graph.functions.values()
    ]
    return definition_text(graph), str(notes), str(graph.inputs)
