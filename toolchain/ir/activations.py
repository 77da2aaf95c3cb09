"""Linear layers that round what comes in to eight bits, with scales that are weights of the graph.

Static quantization: every layer has a scale of its own for each function, and functions may be there once for each
group of denoising steps, since activations grow and shrink from step to step (ViDiT-Q, arXiv 2406.02540; arXiv
2502.15077). Scales are for a whole tensor, and zero is zero, so the structure of a program does not depend on them.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
import math
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from typing import Final, cast

import torch
import torch.nn.functional as F
from torch import fx, nn

from toolchain.ir.functions import grouped
from toolchain.ir.graph import Graph, copy_module
from toolchain.ir.rounding import FORMATS, round_to
from toolchain.ir.weights import Weight, WeightSource

LOWEST: Final = -128
HIGHEST: Final = 127
"""The range of what is rounded; a calibrated layer's largest number becomes 127."""
LEAST_SCALE: Final = 2.0**-14
"""The smallest normal number of float16."""
PREFIX: Final = "input_scale_"
"""How a layer's parameter is called that is its scale in the function whose name follows."""


def scale_of(magnitude: float) -> float:
    """The scale by which the largest number of a calibration becomes 127: a float16 number, whatever the target.

    So what an artifact in float16 divides by is what the eager model divides by. 1 where nothing but zeros was met.

    Args:
        magnitude: the largest absolute value that comes in; finite.
    """
    if magnitude == 0.0:
        return 1.0
    half, wanted = FORMATS["float16"], magnitude / HIGHEST
    found = min(round_to(wanted, half), half.largest)
    if found < wanted < half.largest:  # up, so that the largest number is not cut off
        found += math.ldexp(1.0, max(math.frexp(found)[1] - half.precision, half.smallest))
    return max(found, LEAST_SCALE)


def round_to_int8(x: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """``x`` in steps of ``scale``, ties to even, -128 to 127 of them; the same type and shape."""
    return (x / scale).round_().clamp_(LOWEST, HIGHEST).mul_(scale)


@dataclass(frozen=True)
class ScaleSource(WeightSource):
    """Where a scale comes from: the calibration of the linear layer that ``layer`` is the weight of.

    ``tensors`` is the one name under which the scale, float32 without dimensions, stands beside a checkpoint's tensors.
    It covers what the layer was given in ``function``, or, where that is None, in all functions alike.
    """

    layer: WeightSource = field(kw_only=True)
    function: str | None = field(kw_only=True)


def scale_sources(weights: Mapping[str, Weight]) -> dict[str, ScaleSource]:
    """The sources of those of ``weights`` that are scales, by the name under which each is read."""
    found = (w.source for w in weights.values())
    return {source.tensors[0]: source for source in found if isinstance(source, ScaleSource)}


class RoundedLinear(nn.Linear):
    """``plain``, which it shares its parameters with, over what :func:`round_to_int8` makes of its input.

    Args:
        function: the function that the scale is for; the parameter's name says it.
    """

    def __init__(self, plain: nn.Linear, function: str) -> None:
        super().__init__(plain.in_features, plain.out_features, plain.bias is not None, device="meta")
        self.weight, self.bias = plain.weight, plain.bias
        self.scale_name = PREFIX + function
        self.register_parameter(self.scale_name, nn.Parameter(torch.empty((), device="meta"), requires_grad=False))

    @property
    def plain(self) -> nn.Linear:
        """The layer without rounding."""
        layer = nn.Linear(self.in_features, self.out_features, self.bias is not None, device="meta")
        layer.weight, layer.bias = self.weight, self.bias
        return layer

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.linear(round_to_int8(x, self.get_parameter(self.scale_name)), self.weight, self.bias)


def rounded_layers(gm: fx.GraphModule) -> dict[str, str]:
    """The layers of a function that round: the names of their weights, and of their scales."""
    layers = ((path, m) for path, m in gm.named_modules() if isinstance(m, RoundedLinear))
    return {f"{path}.weight": f"{path}.{layer.scale_name}" for path, layer in layers}


def with_layers(module: nn.Module, change: Callable[[str, nn.Linear], nn.Linear], path: str = "") -> nn.Module:
    """``module`` with every linear layer in it replaced by what ``change`` makes of it; it stays as it is itself.

    ``change`` is given a layer's path, ``path`` in front. All that it gives back unchanged is shared.
    """
    if isinstance(module, nn.Linear):
        return change(path, module)
    parts = {n: with_layers(m, change, f"{path}.{n}" if path else n) for n, m in module.named_children()}
    changed = {n: m for n, m in parts.items() if m is not module._modules[n]}
    if not changed:
        return module
    other = copy.copy(module)
    other._modules = module._modules | cast(dict[str, nn.Module | None], changed)  # torch's own copy shares the table
    return other


Change = Callable[[fx.Node, str, nn.Linear], nn.Linear]
"""Given the node that calls it, its path, and a linear layer: what takes its place."""


def function_with(gm: fx.GraphModule, change: Change) -> fx.GraphModule:
    """A function with other linear layers, and nodes of its own."""
    changed = copy_module(gm)
    for node in changed.graph.nodes:
        if node.op == "call_module":
            path = str(node.target)
            changed.set_submodule(path, with_layers(gm.get_submodule(path), functools.partial(change, node), path))
    changed.recompile()
    return changed


def linear_layers(gm: fx.GraphModule, node: fx.Node) -> dict[str, nn.Linear]:
    """The linear layers of the module that a node calls, by path."""
    modules = gm.get_submodule(str(node.target)).named_modules(prefix=str(node.target))
    return {path: module for path, module in modules if isinstance(module, nn.Linear)}


def rounding_functions(
    graph: Graph, weights: Collection[str], groups: int
) -> tuple[dict[str, fx.GraphModule], dict[str, Weight]]:
    """All functions of ``graph`` for each group of denoising steps, with layers that round.

    Scales differ by function where a layer's input does: what is computed once for a prompt has one for all of them,
    which bears the name of ``base``, and only what is computed at every step has those of a group.

    Args:
        weights: of the layers, by their names in the graph.

    Returns:
        The functions, those of a group one after the other; and the scales as further weights, by name.
    """
    functions: dict[str, fx.GraphModule] = {}
    scales: dict[str, Weight] = {}

    def change(function: str, group: int, node: fx.Node, path: str, layer: nn.Linear) -> nn.Linear:
        name, rate = f"{path}.weight", node.meta["rate"]
        if name not in weights:
            return layer
        once = rate in ("build", "prompt")
        owner = "base" if once else grouped(function, group) if rate == "step" else function
        rounded, plain = RoundedLinear(layer, owner), graph.weights[name]
        source = ScaleSource((f"{name}/{owner}",), (), layer=plain.source, function=None if once else owner)
        scales[f"{path}.{rounded.scale_name}"] = dataclasses.replace(plain, source=source)
        return rounded

    for group in range(groups):
        for function, gm in graph.functions.items():
            functions[grouped(function, group)] = function_with(gm, functools.partial(change, function, group))
    return functions, scales


def unrounded(gm: fx.GraphModule) -> fx.GraphModule:
    """A function with all its linear layers as the model has them."""
    if not rounded_layers(gm):
        return gm
    return function_with(gm, lambda _, __, layer: layer.plain if isinstance(layer, RoundedLinear) else layer)


def without_scales(weights: Mapping[str, Weight]) -> dict[str, Weight]:
    """``weights`` that a checkpoint holds."""
    return {name: weight for name, weight in weights.items() if not isinstance(weight.source, ScaleSource)}
