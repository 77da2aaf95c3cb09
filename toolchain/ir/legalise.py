"""The pass that gives every leaf the form a target needs; targets name the rules, leaves know the forms."""

from __future__ import annotations

import dataclasses

from toolchain.errors import LoweringError
from toolchain.ir.graph import Graph, Leaf, WeightSource, leaf_of
from toolchain.ir.passes import Pass, PassConfig


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
        for rule in self.config.rules:
            _apply(graph, rule, weights)
        return dataclasses.replace(graph, weights=weights)


def _apply(graph: Graph, rule: str, weights: dict[str, WeightSource]) -> None:
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


def _replace_sources(weights: dict[str, WeightSource], path: str, sources: object) -> None:
    assert isinstance(sources, dict)
    prefix = f"{path}."
    old = {k: weights.pop(k) for k in list(weights) if k.startswith(prefix)}
    for name, source in sources.items():
        whole = old[prefix + source.tensor]
        if whole.select:
            raise LoweringError(f"'{path}' was legalised twice: '{source.tensor}' is already a part of a tensor")
        weights[prefix + name] = dataclasses.replace(source, tensor=whole.tensor)
