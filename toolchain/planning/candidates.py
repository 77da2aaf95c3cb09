"""The ways that weights may be kept in, as the target takes them, and the rules that pin which one each of them is."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from toolchain.errors import RecipeError
from toolchain.formats.pass_specs import Named
from toolchain.formats.recipe import Recipe
from toolchain.ir.calibration import Calibration
from toolchain.ir.graph import Graph
from toolchain.ir.legalise import legalise
from toolchain.ir.passes import find_pass
from toolchain.ir.pipeline_text import parse_pipeline, pipeline_text
from toolchain.ir.target import UnsupportedStorageError
from toolchain.ir.uses import LEAST_NUMBERS, weight_uses
from toolchain.ir.weights import Weight, WeightSource
from toolchain.planning.budgets import DEFAULT, PASS
from toolchain.planning.plan import ComponentPlan, kept_storage, rewritten_graphs

CALIBRATION = "calibration"
"""The option of the pass that says what activations are measured on."""


@dataclass(frozen=True)
class Candidate:
    """A way to keep a weight: the options of a rule. As text it is what :func:`read_candidates` reads.

    ``calibration`` is what the pass has beside its rules, where one of the options needs it.
    """

    scheme: str
    options: tuple[tuple[str, Any], ...] = ()
    calibration: Calibration | None = None

    @property
    def rule(self) -> dict[str, Any]:
        """As the pass takes it."""
        return {"scheme": self.scheme, **dict(self.options)}

    @property
    def beside(self) -> dict[str, Any]:
        """What the pass needs beside such a rule."""
        return {} if self.calibration is None else {CALIBRATION: self.calibration.model_dump()}

    def __str__(self) -> str:
        return pipeline_text([(self.scheme, {**dict(self.options), **self.beside})])


def read_candidates(text: str, key: str) -> tuple[Candidate, ...]:
    """Candidates as people write them, ``float int8 palette{bits=6}``; ``key`` is where they do.

    Raises:
        RecipeError: the text is wrong, a scheme or an option is unknown, one is given twice, or two have different
            calibrations, of which a pass has one.
    """
    try:
        parsed = parse_pipeline(text)
    except ValueError as e:
        raise RecipeError(f"{key}: {e}") from e
    found = tuple(_candidate(name, options, f"{key} '{pipeline_text([(name, options)])}'") for name, options in parsed)
    if len({c.calibration for c in found} - {None}) > 1:
        raise RecipeError(f"{key}: candidates have different calibrations; a component has one")
    if not found or len(set(found)) < len(found):
        raise RecipeError(f"{key}: expected different ways to keep a weight, such as '{DEFAULT[:26]}…'")
    return found


def _candidate(name: str, options: Mapping[str, Any], where: str) -> Candidate:
    calibration = find_pass(PASS, {"scheme": name, **options}, where).calibration
    return Candidate(name, tuple((k, v) for k, v in options.items() if k != CALIBRATION), calibration)


@dataclass(frozen=True)
class Item:
    """A weight that the target can keep in several ways.

    ``sizes`` are its bytes in all blocks that have it, by candidate; None where the target cannot keep it so.
    """

    component: str
    names: tuple[str, ...]
    """In the graph; of more than one, all are the same tensors."""
    address: str
    source: WeightSource
    copies: int
    """How many blocks have it."""
    sizes: tuple[int | None, ...]


@dataclass(frozen=True)
class ChoiceGraph:
    """One graph of a component, with the weights that there is a choice for.

    ``stored`` has, for each candidate, the weights of the legal graph as they are then kept.
    """

    items: tuple[Item, ...]
    stored: tuple[Mapping[str, Weight], ...]


def choice_graphs(plan: ComponentPlan, candidates: Sequence[Candidate]) -> tuple[ChoiceGraph, ...]:
    """What there is to choose in a component that was planned without quantization, graph by graph.

    There is a choice for every matrix, convolution and table that is looked up, small ones left out. What the model
    calls delicate is no exception: what it costs is measured.

    Raises:
        LoweringError: a pass cannot be applied.
    """
    graphs = rewritten_graphs(plan.definition, plan.passes, plan.target)
    copies: Counter[WeightSource] = Counter(w.source for pair in plan.pairs for w in pair.plain.weights.values())
    return tuple(_choices(graph, plan, candidates, copies) for graph in graphs)


def _choices(
    graph: Graph, plan: ComponentPlan, candidates: Sequence[Candidate], copies: Mapping[WeightSource, int]
) -> ChoiceGraph:
    uses = weight_uses(graph)
    names: dict[WeightSource, list[str]] = {}
    for name, use in uses.items():
        source = graph.weights[name].source
        if use.use != "other" and graph.weights[name].parameters >= LEAST_NUMBERS and copies.get(source):
            names.setdefault(source, []).append(name)
    if not names:
        return ChoiceGraph((), ({},) * len(candidates))
    stored, sizes = [], []
    for candidate in candidates:
        named = [{"match": name, **candidate.rule} for of in names.values() for name in of]
        quantize = find_pass(PASS, {"scheme": "float", "rules": named, **candidate.beside}, PASS)
        legal = legalise(quantize(graph), plan.target.forms)
        kept = _kept(legal, plan)
        stored.append({name: weight for name, weight in kept.items() if weight is not None})
        sizes.append({source: _bytes(of[0], source, legal, kept) for source, of in names.items()})
    items = []
    for source, of in names.items():
        found = (by[source] for by in sizes)
        own = tuple(None if size is None else size * copies[source] for size in found)
        items.append(Item(graph.component, tuple(of), uses[of[0]].address, source, copies[source], own))
    return ChoiceGraph(tuple(items), tuple(stored))


def _kept(legal: Graph, plan: ComponentPlan) -> dict[str, Weight | None]:
    """The weights of a legal graph as the target keeps them; None for what it cannot."""
    uses = weight_uses(legal)
    found: dict[str, Weight | None] = {}
    for name, weight in legal.weights.items():
        try:
            storage = kept_storage(weight, uses[name].use if name in uses else "other", plan.target)
        except UnsupportedStorageError:
            found[name] = None
        else:
            found[name] = dataclasses.replace(weight, storage=storage)
    return found


def _bytes(name: str, source: WeightSource, legal: Graph, kept: Mapping[str, Weight | None]) -> int | None:
    """Bytes of a weight in its leaf's legal form, which may be of several parts; None if one cannot be kept so."""
    same = name in legal.weights and legal.weights[name].source == source
    parts = [name] if same else [n for n, w in legal.weights.items() if w.source.tensors == source.tensors]
    total = 0
    for part in parts:
        weight = kept[part]
        if weight is None:
            return None
        total += weight.bytes
    return total


def quantizing(recipe: Recipe, component: str) -> tuple[list[Named], int]:
    """A component's passes without the one that quantizes, and where that one stands or belongs: before the cut."""
    specs = recipe.components()[component].passes
    others = [s for s in specs if s.name != PASS]
    for place, spec in enumerate(specs):
        if spec.name == PASS:
            return others, place
    cuts = [i for i, s in enumerate(others) if find_pass(s.name, s.options, f"{component}.passes").phase == "partition"]
    return others, cuts[0] if cuts else len(others)


def with_rules(recipe: Recipe, options: Mapping[str, dict[str, Any] | None]) -> Recipe:
    """``recipe`` with other options for the pass that quantizes, by component; None leaves the pass out."""
    data = recipe.model_dump(mode="json")
    for component, given in options.items():
        others, place = quantizing(recipe, component)
        specs = [s.model_dump(mode="json") for s in others]
        if given is not None:
            specs.insert(place, {PASS: given})
        data[component]["passes"] = specs
    return Recipe.model_validate(data)


def rules(items: Iterable[tuple[Item, Candidate]]) -> dict[str, Any] | None:
    """The options of the pass that keep each weight as chosen: a rule for each that is quantized, by its own name.

    None if none is.
    """
    chosen = [(item, candidate) for item, candidate in items if candidate.scheme != "float"]
    found = [{"match": name, **candidate.rule} for item, candidate in chosen for name in item.names]
    beside = {k: v for _, candidate in chosen for k, v in candidate.beside.items()}
    return {"scheme": "float", "rules": found, **beside} if found else None
