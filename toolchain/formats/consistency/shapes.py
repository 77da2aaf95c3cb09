"""The shapes that ports have in a function, and which functions a video's blocks are asked for."""

from __future__ import annotations

from typing import cast

from toolchain.formats.calls import Rate
from toolchain.formats.manifest import BlockEntry, Component, ComponentInput, Manifest, TensorSpec


def shape_in(component: Component, block: BlockEntry, port: TensorSpec, asked: str) -> list[int]:
    """A port's shape when ``asked`` is asked for of its block."""
    return block.other_shapes.get(component.own_function(block, asked), {}).get(port.name, port.shape)


def asked_functions(manifest: Manifest, name: str) -> dict[str, list[str]]:
    """By rate of a component, the functions that a video asks its blocks for; rates in the order in which they run.

    Rates that a video does not run (an encoder's) come last, with the default function.
    """
    component, sampler = manifest.components[name], manifest.sampler
    default = component.default_function
    asked: dict[str, list[str]] = {}
    if name == "text_encoder":
        asked[manifest.text.rate if manifest.text is not None else "prompt"] = [default]
    elif name == "transformer":
        asked[sampler.once] = [default]
        asked.setdefault(sampler.each, []).extend(step.function for step in sampler.steps)
    elif name == "vae" and manifest.decoding is not None:
        for stage in manifest.decoding.stages:
            asked.setdefault(stage.rate, []).extend(piece.function for piece in stage.pieces)
    rates = [*asked, *(rate for rate in component.load_order if rate not in asked)]
    return {rate: list(dict.fromkeys(asked.get(rate, [default]))) for rate in rates}


def result(component: Component, source: str) -> tuple[BlockEntry, TensorSpec]:
    """The block and the port of a ``BLOCK.OUTPUT`` that there is."""
    return next((b, o) for b in component.blocks for o in b.outputs if f"{b.name}.{o.name}" == source)


def input_of(component: Component, name: str, rate: str) -> ComponentInput:
    """What a block of a rate takes as ``inputs.NAME``: the input of its own rate, if there are several."""
    named = [i for i in component.inputs if i.name == name]
    return next((i for i in named if i.rate == rate), named[0])


def rate_order(component: Component, rate: str) -> list[str]:
    """Names of a rate's blocks as they run."""
    return component.load_order.get(cast(Rate, rate), [])
