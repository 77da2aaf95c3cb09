"""The protocol of a target: what turns a block into an artifact, and runs it."""

from __future__ import annotations

import abc
import functools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, ClassVar, Protocol, runtime_checkable

from pydantic import BaseModel, ConfigDict

from toolchain import plugins
from toolchain.errors import LoweringError, ResourceError
from toolchain.ir.dtypes import DTYPES, DType
from toolchain.ir.memory import Effect, Peak, peak
from toolchain.ir.storage import PLAIN, Storage
from toolchain.ir.weights import quantized

if TYPE_CHECKING:
    import torch

    from toolchain.ir.blocks import Block, Port
    from toolchain.ir.labels import Labels
    from toolchain.ir.leaves import LegalForm
    from toolchain.ir.operators import Operator, OperatorGraph, Value
    from toolchain.ir.unique_weights import UniqueWeights
    from toolchain.ir.uses import Use

STEP = "__"
"""Between the name of a step of a block's graph and an operator's, in the names of an artifact's values."""


PRECISION = "What weights are stored and computed in, where nothing else is asked for."
"""Describes the option of that name in a target's own ``Config``."""


class TargetConfig(BaseModel):
    """Base of a target's options. ``precision`` is what weights are stored and computed in."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)
    precision: Any = "float32"


class EngineUnavailableError(ResourceError):
    """This machine cannot execute artifacts of the target; says why and where it can be done."""


class UnsupportedStorageError(Exception):
    """A target cannot keep a weight as it is asked to; says what it can, for such a weight."""


class Engine(Protocol):
    """An artifact, loaded: call a function with tensors by port name, get tensors by port name."""

    def __call__(self, function: str, inputs: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]: ...


@dataclass(frozen=True)
class OpValue:
    """One output of an operator, as an engine's ``trace`` met it.

    ``dtype`` is what the artifact declares; ``inputs`` are the names of the values that the operator was given,
    constants included.
    """

    name: str
    op: str
    dtype: str
    value: torch.Tensor
    inputs: tuple[str, ...]


@runtime_checkable
class PreparingEngine(Engine, Protocol):
    """An engine that loads functions one by one: ``prepare`` does what the first call of one would do besides."""

    def prepare(self, function: str) -> None: ...


class TracingEngine(Engine, Protocol):
    """An engine that can show what every operator gives."""

    def trace(self, function: str, inputs: Mapping[str, torch.Tensor]) -> Iterator[OpValue]: ...


@dataclass(frozen=True)
class Artifact:
    """What ``lower`` or ``stamp`` wrote: a file or, for packages, a folder at ``path``, holding ``functions``.

    ``digests`` are the sha256 of its files as far as they are known already, by path.
    """

    path: Path
    functions: tuple[str, ...]
    digests: Mapping[Path, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Template:
    """A lowered structure without weights: an artifact out of which they were cut, and where each of them lay.

    ``slots`` is the target's own, in plain data as JSON has it; ``stamp`` reads it. ``constants`` describes what
    looks like a weight and is none: it must be the same whatever the weights, or the template is refused.
    """

    artifact: Artifact
    slots: Any
    constants: Any = None


class UnboundTemplateError(Exception):
    """A template's weights cannot all be found, each in one place; the structure is lowered block by block."""


class Target(abc.ABC):
    """Lowers blocks to one kind of artifact.

    A target imports its converter only inside its methods, so that ``sora-compile plan`` and the player
    never pay for it; and torch too, so that neither does a build of which nothing has changed.
    """

    name: ClassVar[str]
    suffix: ClassVar[str]
    Config: ClassVar[type[TargetConfig]]

    def __init__(self, config: TargetConfig | None = None) -> None:
        self.config = config if config is not None else self.Config()

    @property
    def precision(self) -> str:
        return str(self.config.precision)

    @property
    def storage(self) -> Storage:
        """How weights are kept unless a pass says otherwise: plainly, in the precision.

        Raises:
            LoweringError: the target's precision is no number format that weights can be kept in.
        """
        if self.precision not in PLAIN:
            raise LoweringError(f"target '{self.name}': precision '{self.precision}' is none of {', '.join(PLAIN)}")
        return PLAIN[self.precision]

    def keep(self, asked: Storage, use: Use) -> Storage:
        """How the artifact keeps a weight that a pass wants kept as ``asked``: the same, with scales of its own type.

        It must decode to what the artifact computes with. What the target cannot is refused, never kept as
        something else.

        Args:
            use: what the weight is used as.

        Raises:
            UnsupportedStorageError: it cannot; says what it takes.
        """
        if asked != self.storage:
            raise UnsupportedStorageError(f"it takes {self.storage}")
        return asked

    @property
    def int8_inputs_refusal(self) -> str | None:
        """Why no linear layer can round what comes in with a fixed scale; None for a target where it can.

        Such a layer is a :class:`toolchain.ir.activations.RoundedLinear`, over an int8 weight with a scale a channel.
        """
        return "it has no products of int8 numbers with fixed scales"

    def arithmetic(self, block: Block) -> str:
        """The precision that a block's artifact computes in, by which the gate's limit is chosen."""
        return self.precision

    def port_dtype(self, port: HasDtype) -> DType:
        """What an artifact takes or gives for a port; see :func:`port_dtype`."""
        return port_dtype(port, self.precision)

    @property
    def whole(self) -> Mapping[Callable[..., Any], str]:
        """Functions of legal forms for which the target has one operator, and how that is called."""
        return MappingProxyType({})

    def operators(self, block: Block, function: str) -> OperatorGraph:
        """The operators of a function of ``block``, as :meth:`peak` takes them."""
        from toolchain.ir.operators import operator_graph

        return operator_graph(block, function, self.whole)

    def peak(self, block: Block, graph: OperatorGraph) -> Peak:
        """The most bytes that a function of ``block`` holds while it runs, without the stored weights.

        As what :meth:`effect` says of each of its operators; a runtime that plans otherwise says so here.

        Args:
            graph: the function's, as :meth:`operators` gives it.
        """
        return peak(graph, self.value_bytes, lambda operator: self.effect(operator, block))

    def moved_bytes(self, block: Block, graph: OperatorGraph) -> int:
        """Bytes that a function of ``block`` reads from and writes to memory: its weights once, as they are stored,
        and all that its operators read and give beside them, views left out."""
        own = [o for o in graph.operators if not self.effect(o, block).view]
        values = (v for o in own for v in (*(r for r in o.reads if r.weight is None), *o.gives))
        return block.weight_bytes + sum(self.value_bytes(v) for v in values)

    def effect(self, operator: Operator, block: Block) -> Effect:
        """What an operator does to memory: views are torch's, and a weight that is no plain numbers is expanded.

        The expanded weight, in the precision, is held while the operator runs. A fused attention keeps no scores.
        """
        return Effect(view=operator.is_view, scratch=self.expanded_bytes(operator, block))

    def expanded_bytes(self, operator: Operator, block: Block) -> int:
        """Bytes of the weights that ``operator`` reads and that are stored as no plain numbers, in the precision."""
        read = {v.weight for v in operator.reads if v.weight is not None} if not operator.is_view else set()
        kept = quantized({name: block.weights[name] for name in read if name in block.weights})
        return sum(w.parameters for w in kept.values()) * DTYPES[self.precision].bytes

    def value_bytes(self, value: Value | Port) -> int:
        """Bytes of a port as the artifact has it, or of a value in between: in the precision, truths in a byte."""
        import torch

        one = 1 if value.dtype == torch.bool else self.port_dtype(value).bytes
        return math.prod(value.shape) * one

    @property
    def forms(self) -> tuple[LegalForm, ...]:
        """Legal forms that the target needs leaves to have, in the order in which they are applied."""
        return ()

    @abc.abstractmethod
    def lower(self, block: Block, weights: Mapping[str, torch.Tensor], out: Path) -> Artifact:
        """Lower all functions of ``block`` with ``weights`` (float32, by the block's names) into ``out``.

        Raises:
            LoweringError: names the block, the function and, where known, the operator.
        """

    @abc.abstractmethod
    def bind(self, artifact: Artifact, weights: Mapping[str, torch.Tensor]) -> Template:
        """Find every stored part in an artifact that was lowered with unique weights, and cut it out.

        Args:
            weights: the parts by key (:class:`toolchain.ir.stored.StoredParts`): plain weights by their names.

        Raises:
            UnboundTemplateError: a weight is not found, or what is found is ambiguous.
        """

    @abc.abstractmethod
    def stamp(self, template: Template, weights: Mapping[str, torch.Tensor], out: Path) -> Artifact:
        """Write the template's artifact with ``weights``: byte for byte what ``lower`` gives for them.

        ``weights`` are the parts by key, as for :meth:`bind`. Plain ones are of any floating dtype. They are taken one
        after the other, so that ``weights`` may read each from disk when it is asked for, and what was written is
        compared with each.

        (Where ``lower`` simplifies degenerate weights, such as a bias of zeros, the template's structure is
        kept: the numbers are the same, the bytes are not.)

        Raises:
            LoweringError: a weight is not finite, or not in the target's precision; names it.
        """

    @abc.abstractmethod
    def check(self, path: Path, block: Block) -> None:
        """Load an artifact back and hold its functions and ports against the block's.

        Raises:
            LoweringError: names what differs.
        """

    def label(self, path: Path, labels: Labels) -> tuple[Path, ...]:
        """Write facts for people into an artifact that is about to be put into a bundle, as far as it has a place.

        What is executed must stay the same, byte for byte. A file is replaced, not changed: others may share its bytes.

        Returns:
            The files that were changed.
        """
        return ()

    @abc.abstractmethod
    def engine(self, path: Path, inputs: Sequence[Port], outputs: Sequence[Port]) -> Engine:
        """Load an artifact for execution on this machine.

        Raises:
            EngineUnavailableError: this machine cannot.
            ResourceError: what the engine needs is not installed.
        """

    @abc.abstractmethod
    def versions(self) -> dict[str, str]:
        """Versions of the tools that decide an artifact's bytes.

        Raises:
            ResourceError: one is not installed.
        """


def find_target(name: str, options: dict[str, Any], key: str = "target") -> Target:
    """The target called ``name`` with its options.

    Raises:
        RecipeError: there is no such target, or its options are wrong.
    """
    target: Target = plugins.configured(plugins.find(plugins.TARGETS, name, "target", key), options, key)
    return target


class HasDtype(Protocol):
    """A block's port, or a component's input."""

    @property
    def dtype(self) -> torch.dtype: ...

    @property
    def exact(self) -> bool: ...


def port_dtype(port: HasDtype, precision: str) -> DType:
    """What an artifact of a precision takes or gives for a port: exact ones stay float32, integers are int32."""
    if not port.dtype.is_floating_point:
        return DTYPES["int32"]
    return DTYPES["float32" if port.exact else precision]


def unique_weights(block: Block, seed: int = 0) -> UniqueWeights:
    """Random weights of a block, of which no two are equal."""
    from toolchain.ir.unique_weights import UniqueWeights

    return UniqueWeights(block.weights, seed)


def package_versions(*names: str, extra: str = "") -> dict[str, str]:
    """Installed versions of distributions, for :meth:`Target.versions`.

    Args:
        extra: what brings them, as pip takes it: ``sora-compile[onnx]``.

    Raises:
        ResourceError: one is not installed; says how to install it.
    """
    from importlib.metadata import PackageNotFoundError

    try:
        return {name: _version(name) for name in names}
    except PackageNotFoundError as e:
        raise ResourceError(f"the package '{e.name}' is needed: pip install '{extra or e.name}'") from e


@functools.cache  # looked up in folders, and asked for whenever a player loads a block
def _version(name: str) -> str:
    from importlib.metadata import version

    return version(name)


def distinct_functions(block: Block) -> tuple[str, ...]:
    """The block's functions without those that compute what ``base`` does (nothing merged, no scales of their own)."""
    from toolchain.ir.graph_text import function_text, leaves_text

    texts = {n: (function_text(gm, ""), leaves_text(gm)) for n, gm in block.functions.items()}
    return tuple(n for n, text in texts.items() if n == "base" or text != texts["base"])
