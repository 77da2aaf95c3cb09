"""The pass that gives every leaf the form a target needs; targets name the rules, leaves know the forms."""

from __future__ import annotations

import dataclasses

from toolchain.errors import LoweringError
from toolchain.ir.graph import Graph, Leaf, leaf_of
from toolchain.ir.passes import Pass, PassConfig
from toolchain.ir.weights import Weight


class LegaliseConfig(PassConfig):
    rules: tuple[str, ...] = ()


class Legalise(Pass):
    """Replace each leaf by its form under the configured rules, and say where its weights come from."""

    name = "legalise"
    Config = LegaliseConfig
    config: LegaliseConfig

    def call(self, graph: Graph) -> Graph:
        graph = graph.copy()
        weights = dict(graph.weights)
        replaced: dict[str, Leaf] = {}
        for rule in self.config.rules:
            replaced |= _apply(graph, rule, weights)
        return dataclasses.replace(graph, weights=weights)


def _apply(graph: Graph, rule: str, weights: dict[str, Weight]) -> dict[str, Leaf]:
    replaced: dict[str, Leaf] = {}
    for gm in graph.functions.values():
        for node in gm.graph.nodes:
            leaf, path = leaf_of(gm, node), str(node.target)
            if leaf is None:
                continue
            if path not in replaced:  # functions share leaves, so they share their legal form
                legal = leaf.legal(rule)
                if legal is None:
                    continue
                replaced[path] = legal.leaf
                if legal.sources is not None:
                    _replace_sources(weights, path, legal.sources)
            gm.set_submodule(path, replaced[path])
        gm.recompile()
    return replaced


def _replace_sources(weights: dict[str, Weight], path: str, sources: object) -> None:
    assert isinstance(sources, dict)
    prefix = f"{path}."
    old = {k: weights.pop(k) for k in list(weights) if k.startswith(prefix)}
    for name, source in sources.items():
        (own,) = source.tensors
        whole = old[prefix + own]
        if whole.source.is_part:
            raise LoweringError(f"'{path}' was legalised twice: '{own}' is already a part of a tensor")
        composed = dataclasses.replace(source, tensors=whole.source.tensors, concat=whole.source.concat)
        weights[prefix + name] = dataclasses.replace(whole, source=composed)
