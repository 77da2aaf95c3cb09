"""Keep weights as small integers with scales, or as places in tables of few numbers.

The pass changes how weights are stored (see :mod:`toolchain.ir.affine`, :mod:`toolchain.ir.palette` and
:mod:`toolchain.ir.residual`), and, where it is asked to, makes linear layers round what comes in to eight bits
(:mod:`toolchain.ir.activations`); a target says at plan time what it cannot do so.
"""

from __future__ import annotations

import dataclasses
import difflib
import fnmatch
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator

from toolchain.errors import LoweringError
from toolchain.ir.activations import linear_layers, rounding_functions
from toolchain.ir.affine import Affine, Clip
from toolchain.ir.calibration import Calibration
from toolchain.ir.functions import grouped
from toolchain.ir.graph import Graph, compute_nodes
from toolchain.ir.palette import BITS, Palette
from toolchain.ir.pass_config import PassConfig
from toolchain.ir.passes import Pass
from toolchain.ir.residual import LowRank
from toolchain.ir.storage import FLOAT32, PLAIN, Narrow, Plain, Storage
from toolchain.ir.uses import WeightUse, weight_uses

Scheme = Literal["float", "float32", "float16", "int8", "int4", "palette"]
BLOCK = 32
"""Numbers that share a scale in int4, unless an option says otherwise."""
OPTIONS: dict[str, tuple[str, ...]] = {
    "float": (),
    "float32": (),
    "float16": (),
    "int8": ("block", "symmetric", "clip", "rank", "weighted", "compensate", "activations"),
    "int4": ("block", "symmetric", "clip", "rank", "weighted", "compensate"),
    "palette": ("bits", "group", "weighted"),
}
"""Which options a scheme has."""
CALIBRATED = ("clip: output", "weighted: true", "compensate: true", "activations")
"""Options that need a calibration."""


class ActivationsConfig(BaseModel):
    """Rounding to int8, with a fixed scale for each layer, each function, and each group of denoising steps."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)
    groups: int = Field(default=1, ge=1, le=1000, description="Stretches of steps that have scales of their own.")


def _activations(value: Any) -> Any:
    """``none`` is the same as nothing: how a rule says that layers are excepted."""
    if value == "none":
        return None
    if value is not None and not isinstance(value, Mapping | ActivationsConfig):
        raise ValueError("expected options, as {groups: 3}, or none")
    return value


class _OrNone:
    """Adds the word to the JSON Schema."""

    def __get_pydantic_json_schema__(self, core_schema: Any, handler: Any) -> dict[str, Any]:
        return {"anyOf": [handler(core_schema), {"const": "none"}]}


class SchemeConfig(PassConfig):
    """How weights are kept, and whether linear layers round what they multiply with them.

    ``float`` leaves them in the target's precision; ``float32`` and ``float16`` name a type. ``int8`` has a scale for
    each channel, ``int4`` one for each ``block`` of a channel's numbers. ``palette`` has a table of 2^``bits`` numbers
    for the whole weight, or for each ``group`` of channels. ``rank`` stands a product of two thin matrices beside the
    integers of a linear layer.
    """

    scheme: Scheme = Field(description="float (the target's precision), float32, float16, int8, int4 or palette.")
    block: int | None = Field(default=None, ge=16, description="Numbers that share a scale; int4 has 32 by default.")
    symmetric: bool | None = Field(default=None, description="Ranges with zero in their middle; true if absent.")
    clip: Clip | None = Field(
        default=None,
        description="How ranges are chosen: none (the largest number), error, half-quadratic, or output (calibrated).",
    )
    rank: int | None = Field(
        default=None, ge=1, description="Of a product of two thin matrices beside the integers; none if absent."
    )
    activations: Annotated[ActivationsConfig | None, BeforeValidator(_activations), _OrNone()] = Field(
        default=None, description="How linear layers round what comes in to int8; none: they do not, as if absent."
    )
    bits: int | None = Field(default=None, description="Of a palette: 1, 2, 3, 4, 6 or 8; 4 if absent.")
    group: int | None = Field(default=None, ge=1, description="Channels that share a palette; all if absent.")
    weighted: bool | None = Field(
        default=None, description="Find palettes, or a rank's matrices, by what comes into a layer (calibrated)."
    )
    compensate: bool | None = Field(
        default=None, description="Round columns one by one, each making up for those before it (calibrated)."
    )

    @model_validator(mode="after")
    def _fits(self) -> SchemeConfig:
        for option in ("block", "symmetric", "clip", "rank", "bits", "group", "weighted", "compensate", "activations"):
            if getattr(self, option) is not None and option not in OPTIONS[self.scheme]:
                own = ", ".join(OPTIONS[self.scheme]) or "none"
                raise ValueError(f"'{option}' is no option of the scheme {self.scheme}; it has {own}")
        if self.weighted and self.scheme != "palette" and self.rank is None:
            raise ValueError(
                f"'weighted' is for palettes and for a rank; {self.scheme} has 'clip: output' for its ranges"
            )
        if self.bits is not None and self.bits not in BITS:
            raise ValueError(f"bits: a palette has {', '.join(map(str, BITS))} bits, not {self.bits}")
        if self.block is not None and self.block & (self.block - 1):
            raise ValueError(f"block: expected a power of two from 16 on, got {self.block}")
        for option in ("block", "symmetric", "rank") if self.groups else ():
            if getattr(self, option) not in (None, True):
                raise ValueError(f"activations: they are multiplied with one scale a channel; leave out '{option}'")
        return self

    @property
    def groups(self) -> int | None:
        """Into how many groups steps are divided; None where activations are left alone."""
        return self.activations.groups if self.activations is not None else None

    @property
    def calibrated(self) -> str | None:
        """The option that needs a calibration, if there is one."""
        asked = (self.clip == "output", self.weighted, self.compensate, self.activations is not None)
        return next((option for option, is_asked in zip(CALIBRATED, asked, strict=True) if is_asked), None)

    def storage(self, plain: Storage) -> Storage:
        """What a weight that is kept as ``plain`` is kept as instead."""
        if self.scheme == "float":
            return plain
        if self.scheme in PLAIN:
            own = PLAIN[self.scheme]
            return own if plain != FLOAT32 or own == plain else Narrow(own.dtype)
        if self.scheme == "palette":
            return Palette(self.bits or 4, self.group, weighted=bool(self.weighted))
        bits, block = (8, self.block) if self.scheme == "int8" else (4, self.block or BLOCK)
        clip, symmetric = self.clip or "none", self.symmetric is not False
        affine = Affine(bits, block, symmetric, clip, compensate=bool(self.compensate))
        return LowRank(affine, self.rank, bool(self.weighted)) if self.rank else affine


class Rule(SchemeConfig):
    """Another scheme for the weights that ``match`` names."""

    match: str = Field(
        min_length=1,
        description="A pattern with * and ? over UNIT.KIND.WEIGHT, as 'pair.3.*.mlp.*', or over a weight's own name.",
    )


class QuantizeConfig(SchemeConfig):
    """A scheme for all weights but the delicate ones, and rules for those that a pattern names.

    Rules are looked at in order; the last that matches a weight wins, whatever the weight is.
    """

    calibration: Calibration | None = Field(
        default=None, description="Inputs that the model is run on, so that options can go by what comes into a layer."
    )
    rules: tuple[Rule, ...] = Field(default=(), description="Other schemes for weights that patterns name.")

    @model_validator(mode="after")
    def _calibrated(self) -> QuantizeConfig:
        needing = next((s for s in (self, *self.rules) if s.calibrated), None)
        if needing is not None and self.calibration is None:
            raise ValueError(
                f"'{needing.calibrated}' goes by what comes into a layer; write 'calibration: {{inputs: 8}}' beside "
                f"the pass's scheme"
            )
        if needing is None and self.calibration is not None:
            raise ValueError(f"calibration: nothing goes by it; remove it, or choose one of {', '.join(CALIBRATED)}")
        return self

    @model_validator(mode="before")
    @classmethod
    def _settled(cls, data: Any) -> Any:
        if isinstance(data, Mapping) and "budget" in data:
            raise ValueError(
                "a budget becomes rules when weights are read: build the recipe, or have 'sora-compile quantize' write "
                "it with rules; nothing else takes one"
            )
        return data

    @model_validator(mode="after")
    def _one_division(self) -> QuantizeConfig:
        if len(asked := {own for own in self.all_groups if own is not None}) > 1:
            raise ValueError(f"activations.groups: {min(asked)} and {max(asked)}; steps are divided in one way for all")
        return self

    @property
    def all_groups(self) -> tuple[int | None, ...]:
        """What the scheme of all and each rule say."""
        return (self.groups, *(rule.groups for rule in self.rules))


class Quantize(Pass):
    """Sets the storage of a graph's weights, and what linear layers do with what comes in.

    Left alone unless a rule names them: vectors (biases, norms), tables of modulation, small tensors, and leaves
    that the model calls delicate: embeddings of time, size and position, and the final projection.
    """

    name = "quantize"
    Config = QuantizeConfig
    config: QuantizeConfig

    @property
    def groups(self) -> int | None:
        return next((own for own in self.config.all_groups if own is not None), None)

    @property
    def calibration(self) -> Calibration | None:
        return self.config.calibration

    def requires(self, graph: Graph) -> None:
        if graph.blocks():
            raise LoweringError("the graph is partitioned already; put 'quantize' before 'partition'")
        if any(not isinstance(w.storage, Plain) for w in graph.weights.values()):
            raise LoweringError("its weights are quantized already; list the pass once, with rules")
        added = {grouped(f, k) for f in graph.functions for k in range(1, self.groups or 1)}
        if taken := added & graph.functions.keys():
            raise LoweringError(f"it has a function '{min(taken)}', which is what one for a group of steps is called")

    def idle(self, graph: Graph) -> Mapping[str, str]:
        found: dict[str, str] = {}
        uses = weight_uses(graph)
        matched = self._matched(uses)
        chosen = _chosen(uses, matched)
        for number, rule in enumerate(self.config.rules):
            if not matched[number]:
                found[f"rules[{number}]"] = _nothing_matches(number, rule.match, uses)
            elif number not in chosen.values():
                found[f"rules[{number}]"] = (
                    f"rules[{number}]: later rules decide about all that '{rule.match}' matches; the last rule that "
                    "matches wins, so put it after them or remove it"
                )
        asked = {self.config.scheme, *(rule.scheme for rule in self.config.rules)} - {"float"}
        if asked and all(self._scheme(number).scheme == "float" for number in chosen.values()):
            found["scheme"] = "no weight is quantized: all are delicate or small; name some by rules"
        if self.groups is not None:
            rates = _rates(graph, self._rounded(uses, chosen))
            if not rates:
                found["activations"] = "activations: there is no linear layer among what they are for"
            elif self.groups > 1 and "step" not in rates:
                found["activations"] = "activations.groups: nothing here changes from step to step; leave 'groups' out"
        if self.config.calibration is not None and all(self._scheme(n).calibrated is None for n in chosen.values()):
            found["calibration"] = "calibration: no weight is kept by an option that goes by it; remove it"
        return found

    def call(self, graph: Graph) -> Graph:
        weights, uses = dict(graph.weights), weight_uses(graph)
        chosen = _chosen(uses, self._matched(uses))
        for name, number in chosen.items():
            storage = self._scheme(number).storage(weights[name].storage)
            weights[name] = dataclasses.replace(weights[name], storage=storage)
        if self.groups is not None:
            functions, scales = rounding_functions(graph, self._rounded(uses, chosen), self.groups)
            graph = dataclasses.replace(graph, functions=functions)
            weights |= scales
        return dataclasses.replace(graph, weights=weights)

    def _rounded(self, uses: Mapping[str, WeightUse], chosen: Mapping[str, int]) -> set[str]:
        """The weights of the linear layers that round what comes in."""
        return {n for n, number in chosen.items() if uses[n].use == "linear" and self._scheme(number).groups}

    def _matched(self, uses: Mapping[str, WeightUse]) -> list[list[str]]:
        """The weights that each rule names."""
        return [[name for name, use in uses.items() if _matches(rule.match, name, use)] for rule in self.config.rules]

    def _scheme(self, number: int) -> SchemeConfig:
        return self.config if number < 0 else self.config.rules[number]


def _chosen(uses: Mapping[str, WeightUse], matched: Sequence[Sequence[str]]) -> dict[str, int]:
    """Weight → the rule that decides about it, or -1 for the scheme of all; others are left alone."""
    chosen = {name: -1 for name, use in uses.items() if not use.delicate}
    for number, names in enumerate(matched):
        chosen |= dict.fromkeys(names, number)
    return chosen


def _matches(pattern: str, name: str, use: WeightUse) -> bool:
    """Whether a rule names a weight. Vectors and tables of modulation must be named in full, not by a pattern."""
    if use.use == "other":
        return pattern in (use.address, name)
    return fnmatch.fnmatchcase(use.address, pattern) or fnmatch.fnmatchcase(name, pattern)


def _rates(graph: Graph, weights: set[str]) -> set[str]:
    """How often the linear layers run that have these weights."""
    base = graph.functions["base"]
    called = [n for n in compute_nodes(base) if n.op == "call_module"]
    return {n.meta["rate"] for n in called for path in linear_layers(base, n) if f"{path}.weight" in weights}


def _nothing_matches(number: int, pattern: str, uses: Mapping[str, WeightUse]) -> str:
    addresses = sorted({use.address for use in uses.values()})
    close = difflib.get_close_matches(pattern, addresses, n=1, cutoff=0.0)
    return f"rules[{number}].match '{pattern}' matches no weight; one is called '{close[0] if close else ''}'"
