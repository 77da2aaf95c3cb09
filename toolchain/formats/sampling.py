"""The sampler in a manifest: every step, and the ranges of blocks that steps reuse."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Literal

from pydantic import Field, model_validator

from toolchain.errors import RecipeError
from toolchain.formats.calls import Rate
from toolchain.formats.loading import Entry
from toolchain.formats.reuse import Accumulated, Difference, check_reuse, computes
from toolchain.formats.schedule import Guidance, Leap, StaticLeap, Step
from toolchain.ir.dtypes import DTYPES

if TYPE_CHECKING:
    from toolchain.formats.manifest import BlockEntry, Component


class StepEntry(Entry):
    """One call of the denoiser: at ``timestep``, with ``function``; then z += velocity · ``dt``.

    ``guidance`` says which halves go in. ``reuse`` names a range of blocks that are left out.
    """

    timestep: float = Field(description="From ``time_scale`` (noise) down to 0 (video).")
    dt: float = Field(description="What the velocity is multiplied with.")
    function: str = Field(description="The function that is asked for.")
    leap: bool = Field(description="Whether it leaps to the end.")
    guidance: Guidance = Field(description="Both halves, or the conditional one alone.")
    reuse: str | None = Field(description="The range that is left out; null: none.")


class RangeEntry(Entry):
    """Blocks that run one after the other, which one stream goes into, and comes out of in the same shape.

    A step that computes them gives the residual ``output - input``; a step that reuses them makes ``output`` of its
    own ``input`` and the residual of the last step that computed them. It is kept in the type of ``output``.
    """

    blocks: list[str] = Field(min_length=1, description="In the order in which they run.")
    input: str = Field(description="What goes in: BLOCK.OUTPUT.")
    output: str = Field(description="What comes out: BLOCK.OUTPUT.")
    bytes: int = Field(ge=0, description="The most that is kept of it between steps.")


class RuleEntry(Accumulated):
    """A rule that chooses, while a video is made, the steps that reuse a range.

    In the manifest's plan they compute it; a step that leaves it out makes none of its blocks' calls.
    """

    range: str = Field(description="The range that it leaves out.")
    observes: str = Field(description="What the rule observes: BLOCK.OUTPUT, of a block before the range.")
    bytes: int = Field(ge=0, description="Of what it observes, which is kept from step to step.")


class SamplerEntry(Entry):
    """Rectified flow. The velocity is the first half of the prediction's channels.

    The batch is the conditional half, then the unconditional one; v = u + guidance · (c - u). At a step whose guidance
    is ``conditional`` the batch is the conditional half alone; v = c if ``difference`` is ``none``, and
    c + (guidance - 1) · d if it is ``last``, with d = c - u of the last step with both halves.
    ``steps`` is the whole plan with a static leap taken; with a dynamic rule it is the plan without the
    leap, which the rule takes when it says so: then dt is timestep / ``time_scale``.
    """

    kind: Literal["rectified-flow"] = "rectified-flow"
    noise: Literal["philox4x32-10"] = Field(
        default="philox4x32-10", description="Initial latents: Philox counter, Box-Muller; see docs/manifest.md."
    )
    once: Rate = Field(default="prompt", description="Rate of the blocks that run before the first step.")
    each: Rate = Field(default="step", description="Rate of the blocks that run at every step.")
    time_scale: int = Field(default=1000, ge=1, description="The timestep that is pure noise.")
    guidance: float = Field(description="Scale of classifier-free guidance.")
    difference: Difference = Field(description="What stands for c - u at a conditional step.")
    leap: Leap | None = Field(description="The leap's rule; null: no leap.")
    ranges: dict[str, RangeEntry] = Field(description="What steps reuse, by name.")
    rule: RuleEntry | None = Field(description="What chooses the steps that reuse; null: the steps say it.")
    steps: list[StepEntry] = Field(description="Every call of the denoiser, in order.")

    def plan(self) -> tuple[Step, ...]:
        """The calls of the denoiser."""
        return tuple(
            Step(i, s.timestep, s.dt, s.function, s.leap, s.guidance, s.reuse) for i, s in enumerate(self.steps)
        )

    @model_validator(mode="after")
    def _leap_agrees(self) -> SamplerEntry:
        leaps = [i for i, step in enumerate(self.steps) if step.leap]
        expected = [self.leap.after] if isinstance(self.leap, StaticLeap) else []
        if leaps != expected or (leaps and leaps[0] != len(self.steps) - 1):
            raise ValueError(f"steps leap at {leaps}, but the leap's rule says {expected}")
        return self

    @model_validator(mode="after")
    def _reuse_agrees(self) -> SamplerEntry:
        reused = {step.reuse for step in self.steps if step.reuse is not None}
        if unknown := reused - self.ranges.keys():
            raise ValueError(f"a step reuses '{min(unknown)}', which is no range")
        if self.rule is not None:
            if reused or self.rule.range not in self.ranges:
                raise ValueError(f"rule: it chooses the steps of '{self.rule.range}', and there must be no other")
            reused.add(self.rule.range)
        if idle := self.ranges.keys() - reused:
            raise ValueError(f"ranges: no step reuses '{min(idle)}'")
        try:
            if self.rule is not None:
                self.rule.check(self.steps)
            check_reuse(self.steps, {name: own.blocks for name, own in self.ranges.items()}, self.difference)
        except RecipeError as e:
            raise ValueError(str(e)) from e
        if self.difference != "none" and all(s.guidance == "both" for s in self.steps):
            raise ValueError(f"difference is '{self.difference}', but no step is conditional")
        return self


def check_ranges(sampler: SamplerEntry, component: Component) -> None:
    """Hold the sampler's ranges against the denoiser's blocks.

    Raises:
        ValueError: one is none; says why.
    """
    order = component.load_order.get(sampler.each, [])
    blocks = {b.name: b for b in component.blocks}
    for name, own in sampler.ranges.items():
        where = f"sampler.ranges.{name}"
        first = order.index(own.blocks[0]) if own.blocks[0] in order else len(order)
        if order[first : first + len(own.blocks)] != own.blocks:
            raise ValueError(f"{where}: blocks do not follow one another in load_order.{sampler.each}")
        before = {f"{b}.{o.name}" for b in order[:first] for o in blocks[b].outputs}
        if own.input not in before or own.input not in {i.source for i in blocks[own.blocks[0]].inputs}:
            raise ValueError(f"{where}: input '{own.input}' does not go from an earlier block into the first one")
        inside = {f"{b}.{o.name}" for b in own.blocks for o in blocks[b].outputs}
        outside = {i.source for b in component.blocks if b.name not in own.blocks for i in b.inputs}
        leaving = inside & (outside | {o.source for o in component.outputs})
        if leaving != {own.output}:
            raise ValueError(f"{where}: what leaves its blocks is {sorted(leaving)}, not '{own.output}' alone")
        ranges = {n: r.blocks for n, r in sampler.ranges.items()}
        functions = [s.function for s in sampler.steps if computes(s, name, ranges)]
        shapes = [[_port(component, blocks, source, f) for source in (own.input, own.output)] for f in functions]
        if any(goes_in != comes_out for goes_in, comes_out in shapes):
            raise ValueError(f"{where}: input and output differ in their shape or type")
        expected = max(_bytes(*comes_out) for _, comes_out in shapes)
        if own.bytes != expected:
            raise ValueError(f"{where}: bytes are {own.bytes}, but what is kept has {expected}")
        if sampler.rule is not None:
            observed = sampler.rule.observes
            if observed not in before:
                raise ValueError(f"sampler.rule: '{observed}' comes out of no block of a step before the range")
            expected = max(_bytes(*_port(component, blocks, observed, f)) for f in functions)
            if sampler.rule.bytes != expected:
                raise ValueError(f"sampler.rule: bytes are {sampler.rule.bytes}, but what it observes has {expected}")


def _bytes(shape: list[int], dtype: str) -> int:
    return math.prod(shape) * DTYPES[dtype].bytes


def check_conditional(sampler: SamplerEntry, component: Component) -> None:
    """Hold conditional steps against the denoiser's functions: latents go in at half of the batch, and nowhere else.

    Raises:
        ValueError: names the step.
    """
    latents = {f"inputs.{i.name}": i.shape[0] for i in component.inputs if i.feed.kind == "latents"}
    own = [b for b in component.blocks if b.rate == sampler.each]
    for i, step in enumerate(sampler.steps):
        for block in own:
            if step.guidance == "conditional" and step.function not in block.functions:
                raise ValueError(f"sampler.steps.{i}: block '{block.name}' lacks '{step.function}'")
            for port in block.inputs:
                if port.source in latents:
                    shape = block.other_shapes.get(step.function, {}).get(port.name, port.shape)
                    halves = shape[0] * (2 if step.guidance == "conditional" else 1)
                    if halves != latents[port.source]:
                        raise ValueError(
                            f"sampler.steps.{i}: '{step.function}' of block '{block.name}' takes latents "
                            f"{list(shape)}, which is not what guidance '{step.guidance}' gives it"
                        )


def _port(component: Component, blocks: dict[str, BlockEntry], source: str, function: str) -> tuple[list[int], str]:
    """Shape and type of what a block gives when ``function`` is asked for."""
    name, _, port = source.partition(".")
    block = blocks[name]
    spec = next(o for o in block.outputs if o.name == port)
    return block.other_shapes.get(component.own_function(block, function), {}).get(port, spec.shape), spec.dtype
