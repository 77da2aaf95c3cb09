"""Gives every leaf of a graph the forms that a target needs; run by the pipeline, before ``partition``."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

from torch import nn

from toolchain.errors import LoweringError
from toolchain.ir.activations import ScaleSource
from toolchain.ir.graph import Graph, leaf_of
from toolchain.ir.leaves import Leaf, LegalForm, LegalLeaf
from toolchain.ir.weights import Weight, WeightSource


def legalise(graph: Graph, forms: Sequence[LegalForm]) -> Graph:
    """The graph with each leaf in the legal forms of its kind and traits, applied in order.

    Weights follow: the result's say where the new leaves' parameters come from. ``graph`` stays as it is.

    Raises:
        LoweringError: a form does not know a leaf that it is for, or does not say where its parameters come
            from; names the leaf, its kind and the form.
    """
    graph = graph.copy()
    weights = dict(graph.weights)
    for form in forms:
        _apply(graph, form, weights)
    return dataclasses.replace(graph, weights=weights)


def _apply(graph: Graph, form: LegalForm, weights: dict[str, Weight]) -> None:
    before = dict(weights)
    # functions share leaves, so they share their legal form; those whose layers round have leaves of their own
    replaced: dict[tuple[str, int], Leaf] = {}
    for gm in graph.functions.values():
        called: dict[str, Leaf] = {}
        for node in gm.graph.nodes:
            leaf, path = leaf_of(gm, node), str(node.target)
            if leaf is None or not (path in called or leaf.is_a(form.of)):
                continue
            if path not in called:
                key, where = (path, id(leaf)), f"{graph.component}: legal form '{form.name}'"
                if key not in replaced:
                    replaced[key] = _legal(leaf, form, before, weights, path, where)
                called[path] = replaced[key]
            gm.set_submodule(path, called[path])
        gm.recompile()


def _legal(
    leaf: Leaf, form: LegalForm, before: Mapping[str, Weight], weights: dict[str, Weight], path: str, where: str
) -> Leaf:
    """The leaf at ``path`` in its legal form; ``weights``, which were ``before``, are brought up to it."""
    legal = form.make(leaf)
    place = f"'{path}' ({leaf.kind or type(leaf).__name__})"
    if legal is None:
        raise LoweringError(f"{where} has no answer for {place}, though it is for '{form.of}'")
    _check_sources(leaf, legal, f"{where} of {place}")
    if legal.sources is not None:
        for name in _tensor_names(leaf):
            weights.pop(f"{path}.{name}", None)
        weights |= _replaced_sources(before, path, legal.sources, where)
    return legal.leaf


def _check_sources(leaf: Leaf, legal: LegalLeaf, where: str) -> None:
    """Hold that every parameter of a legal form comes from one of the leaf's own."""
    own, needed = _tensor_names(leaf), _tensor_names(legal.leaf)
    if legal.sources is None:
        if foreign := needed - own:
            raise LoweringError(f"{where}: gives no sources, but the leaf has no {', '.join(sorted(foreign))}")
        return
    if different := needed ^ set(legal.sources):
        raise LoweringError(f"{where}: its parameters and their sources differ: {', '.join(sorted(different))}")
    if unknown := {name for source in legal.sources.values() for name in source.tensors} - own:
        raise LoweringError(f"{where}: its sources name what the leaf lacks: {', '.join(sorted(unknown))}")


def _tensor_names(module: nn.Module) -> set[str]:
    return {name for name, _ in (*module.named_parameters(), *module.named_buffers())}


def _replaced_sources(
    before: Mapping[str, Weight], path: str, sources: Mapping[str, WeightSource], where: str
) -> dict[str, Weight]:
    prefix, weights = f"{path}.", dict[str, Weight]()
    for name, source in sources.items():
        if len(source.tensors) != 1:
            raise LoweringError(f"{where}: '{path}': '{name}' must come from one of the leaf's parameters")
        (own,) = source.tensors
        whole = before[prefix + own]
        if whole.source.is_part:
            raise LoweringError(f"{where}: '{path}' was legalised before: '{own}' is a part of a tensor")
        if not isinstance(whole.source, ScaleSource):  # which stays the scale that it is
            composed = dataclasses.replace(source, tensors=whole.source.tensors, concat=whole.source.concat)
            whole = dataclasses.replace(whole, source=composed)
        weights[prefix + name] = whole
    return weights
