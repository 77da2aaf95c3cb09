"""What a report says about a bundle or a plan, as plain data; nothing here draws."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import yaml

from toolchain.build.entries import bytes_by_storage, sampler
from toolchain.errors import BundleError
from toolchain.formats.bundle import Bundle
from toolchain.formats.loading import Loading, loads_of
from toolchain.formats.manifest import Accuracy, BlockEntry, Component, File, Gate, Geometry, GoldenVideo, Stage
from toolchain.formats.sampling import SamplerEntry
from toolchain.formats.yaml_text import load_yaml
from toolchain.ir.blocks import Block
from toolchain.ir.target import distinct_functions
from toolchain.planning.plan import ComponentPlan, Plan
from toolchain.planning.video import decoding_stages

ErrorOf = Literal["lowering", "quantization"]


@dataclass(frozen=True)
class Measured:
    """An error of a function of a block: of the artifact (``lowering``), or of its weights (``quantization``)."""

    of: ErrorOf
    function: str
    accuracy: Accuracy

    @property
    def finite(self) -> bool:
        return math.isfinite(self.accuracy.relative_error)


@dataclass(frozen=True)
class BlockFacts:
    """A block. ``file_bytes`` is known of a built one alone, ``errors`` of one that was executed."""

    name: str
    rate: str
    functions: tuple[str, ...]
    parameters: int
    weight_bytes: Mapping[str, int]
    structure: str
    loads: int
    """How often it is loaded for a video."""
    file_bytes: int | None = None
    errors: tuple[Measured, ...] = ()

    @property
    def all_weight_bytes(self) -> int:
        return sum(self.weight_bytes.values())

    def errors_of(self, of: ErrorOf) -> list[Measured]:
        return [e for e in self.errors if e.of == of]


@dataclass(frozen=True)
class ComponentFacts:
    """A component, its blocks in the order in which they are loaded."""

    name: str
    precision: str
    passes: str
    blocks: tuple[BlockFacts, ...]

    @property
    def weight_bytes(self) -> dict[str, int]:
        """Bytes of its weights by how they are stored."""
        found: dict[str, int] = {}
        for scheme, count in (item for b in self.blocks for item in b.weight_bytes.items()):
            found[scheme] = found.get(scheme, 0) + count
        return found

    @property
    def parameters(self) -> int:
        return sum(b.parameters for b in self.blocks)

    @property
    def file_bytes(self) -> int | None:
        known = [b.file_bytes for b in self.blocks if b.file_bytes is not None]
        return sum(known) if known else None


@dataclass(frozen=True)
class Checkpoint:
    """Where a component's weights are from, and the digest of local ones; a remote location has its commit."""

    component: str
    location: str
    sha256: str | None


@dataclass(frozen=True)
class Built:
    """What only a build knows."""

    format_version: int
    gate: Gate
    golden: GoldenVideo | None
    tools: Mapping[str, str]
    files: tuple[File, ...]

    @property
    def bytes(self) -> int:
        return sum(f.bytes for f in self.files)


@dataclass(frozen=True)
class Facts:
    """A bundle, or a plan (``built`` is None), for people."""

    name: str
    model: str
    target: str
    target_options: Mapping[str, Any]
    geometry: Geometry
    memory_budget_bytes: int | None
    sampler: SamplerEntry
    stages: tuple[Stage, ...]
    components: tuple[ComponentFacts, ...]
    loading: Loading
    checkpoints: tuple[Checkpoint, ...]
    recipe: str
    built: Built | None

    @property
    def schemes(self) -> list[str]:
        """How weights are stored, those with the most bytes first."""
        total: dict[str, int] = {}
        for scheme, count in (item for c in self.components for item in c.weight_bytes.items()):
            total[scheme] = total.get(scheme, 0) + count
        return sorted(total, key=lambda s: (-total[s], s))

    @property
    def weight_bytes(self) -> int:
        return sum(b.all_weight_bytes for b in self.blocks())

    def blocks(self) -> Iterator[BlockFacts]:
        for component in self.components:
            yield from component.blocks

    def worst(self, of: ErrorOf) -> tuple[str, Measured] | None:
        """The largest error of a kind, and the block that has it as ``COMPONENT/BLOCK``; NaN is the largest."""
        every = [(f"{c.name}/{b.name}", e) for c in self.components for b in c.blocks for e in b.errors_of(of)]
        return max(every, key=lambda e: e[1].accuracy.relative_error if e[1].finite else math.inf, default=None)


def bundle_facts(bundle: Bundle) -> Facts:
    """A bundle's facts. All its files are read and held against their digests first.

    Raises:
        BundleError: a file is missing or altered.
    """
    bundle.check_files()
    m = bundle.manifest
    recipe = _text(bundle, m.recipe)
    return Facts(
        name=m.name,
        model=m.model,
        target=m.target.name,
        target_options=m.target.options,
        geometry=m.geometry,
        memory_budget_bytes=m.memory_budget_bytes,
        sampler=m.sampler,
        stages=tuple(m.decoding.stages) if m.decoding else (),
        components=tuple(_built_component(name, c, loads_of(m.loading.plan)) for name, c in m.components.items()),
        loading=m.loading,
        checkpoints=tuple(_checkpoints(recipe, list(m.components))),
        recipe=recipe,
        built=Built(m.format_version, m.gate, m.golden, m.tools, tuple(bundle.files())),
    )


def _text(bundle: Bundle, file: File) -> str:
    try:
        return (bundle.path / file.path).read_text(encoding="utf-8")
    except UnicodeDecodeError as e:
        raise BundleError(f"'{bundle.path}': '{file.path}' is not text; build the bundle again") from e


def _checkpoints(recipe: str, components: Sequence[str]) -> Iterator[Checkpoint]:
    """Checkpoints as a bundle's recipe pins them. It is read as plain data: its model family need not be installed."""
    try:
        data = load_yaml(recipe)
    except yaml.YAMLError:
        return  # the recipe is shown as it is
    for name in components:
        part = data.get(name) if isinstance(data, dict) else None
        adapters = part.get("loras") if isinstance(part, dict) else None
        for of, found in ((name, part), *((f"{name}, LoRA", a) for a in adapters or () if isinstance(adapters, list))):
            if isinstance(found, dict) and "checkpoint" in found:
                digest = found.get("sha256")
                yield Checkpoint(of, str(found["checkpoint"]), None if digest is None else str(digest))


def _built_component(name: str, component: Component, loads: Mapping[str, int]) -> ComponentFacts:
    blocks = {b.name: b for b in component.blocks}
    order = [blocks[name] for names in component.load_order.values() for name in names]
    facts = tuple(_built_block(b, loads.get(f"{name}/{b.name}", 0)) for b in order)
    return ComponentFacts(name, component.precision, component.passes, facts)


def _built_block(block: BlockEntry, loads: int) -> BlockFacts:
    measured: list[tuple[ErrorOf, Mapping[str, Accuracy] | None]] = [
        ("lowering", block.accuracy),
        ("quantization", block.quantization),
    ]
    return BlockFacts(
        name=block.name,
        rate=block.rate,
        functions=tuple(block.functions),
        parameters=block.parameters,
        weight_bytes=block.weight_bytes,
        structure=block.structure,
        loads=loads,
        file_bytes=sum(f.bytes for f in block.files),
        errors=tuple(Measured(of, f, a) for of, found in measured for f, a in (found or {}).items()),
    )


def plan_facts(planned: Plan) -> Facts:
    """A plan's facts: what a bundle has, without what only a build knows."""
    recipe, build = planned.recipe, planned.resolved
    text = recipe.to_yaml()
    loading = planned.loading.entry()
    return Facts(
        name=recipe.name,
        model=recipe.model,
        target=planned.target.name,
        target_options=planned.target.config.model_dump(mode="json"),
        geometry=build.family.geometry(recipe, build.configs),
        memory_budget_bytes=build.memory_budget,
        sampler=sampler(recipe, planned.sampling),
        stages=tuple(decoding_stages(build)),
        components=tuple(_planned_component(c, loads_of(loading.plan)) for c in planned.components.values()),
        loading=loading,
        checkpoints=tuple(_checkpoints(text, list(planned.components))),
        recipe=text,
        built=None,
    )


def _planned_component(plan: ComponentPlan, loads: Mapping[str, int]) -> ComponentFacts:
    rates = list(dict.fromkeys(b.rate for b in plan.blocks))
    order = sorted(plan.blocks, key=lambda b: rates.index(b.rate))  # stable: within a rate as they run
    facts = tuple(_planned_block(b, loads.get(f"{plan.name}/{b.name}", 0)) for b in order)
    return ComponentFacts(plan.name, plan.target.precision, str(plan.passes), facts)


def _planned_block(block: Block, loads: int) -> BlockFacts:
    return BlockFacts(
        name=block.name,
        rate=block.rate,
        functions=tuple(distinct_functions(block)),
        parameters=block.parameters,
        weight_bytes=bytes_by_storage([block]),
        structure=block.structure(),
        loads=loads,
    )
