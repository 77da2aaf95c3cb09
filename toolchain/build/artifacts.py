"""Block → artifact, through the store: a template once for each structure, then a stamp for each block.

Lowering never sees the user's weights: a template is built with unique random ones, and each block's tensors are
written into a copy of it. So a changed checkpoint lowers nothing.
"""

from __future__ import annotations

import dataclasses
import functools
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from toolchain.build.calibration import ComponentCalibration
from toolchain.errors import LoweringError, PrecisionError
from toolchain.ir.activations import ScaleSource
from toolchain.ir.blocks import Block
from toolchain.ir.storage import Need
from toolchain.ir.stored import StoredParts, scale
from toolchain.ir.target import Artifact, Template, UnboundTemplateError, distinct_functions, unique_weights
from toolchain.ir.weights import Weight
from toolchain.planning.plan import ComponentPlan
from toolchain.planning.resolve import ResolvedComponent
from toolchain.system.code import code_digest
from toolchain.system.events import What
from toolchain.system.memory import release
from toolchain.system.store import Entry, NewEntry, Store, key_of
from toolchain.weights.block_digests import block_digest
from toolchain.weights.block_weights import BlockWeights

ARTIFACT_STEM = "artifact"
"""How an artifact is called in its entry of the store, without the target's suffix."""
BINDING_SEEDS = (0, 1, 2)
"""Random weights that happen to be found elsewhere in an artifact are drawn again."""


class Builder:
    """Builds a component's artifacts.

    Args:
        plan: of a build that was resolved with its checkpoints.
        digests: of every tensor, by the checkpoint's own names.
        direct: lower every block by itself, which is the reference for stamping.
        calibrate: measures the component's activations, or takes them from the store.
    """

    def __init__(
        self,
        plan: ComponentPlan,
        digests: Mapping[str, str],
        store: Store,
        direct: bool,
        calibrate: Callable[[], ComponentCalibration] | None = None,
    ) -> None:
        self.plan, self.store, self.direct = plan, store, direct
        self.digests, self._aliases, self._calibrate = digests, plan.definition.aliases, calibrate

    @functools.cached_property
    def calibrated(self) -> ComponentCalibration | None:
        """What is known of the component's activations, measured now if need be; None if no pass asks for it."""
        if self._calibrate is None or self.plan.passes.calibration is None:
            return None
        return self._calibrate()

    @functools.cached_property
    def _tools(self) -> dict[str, Any]:
        target = self.plan.target
        return {
            "target": target.name,
            "config": target.config.model_dump(mode="json"),
            "tools": target.versions(),
            "code": code_digest(*code_modules(self.plan.resolved)),
        }

    def template_key(self, block: Block) -> str:
        """Key of the template of a block's structure."""
        return key_of(self._tools | {"structure": _structure(uncalibrated(block))})

    def artifact_key(self, block: Block) -> str:
        """Key of a block's artifact."""
        template, weights = self.template_key(block), self.weights_digest(block)
        # a template says which parts there are, not how their numbers are found
        return key_of({"template": template, "weights": weights, "stored": block.quantized, "direct": self.direct})

    def template(self, block: Block) -> Entry:
        """The template of a block's structure, lowered and bound now if it is not in the store.

        Raises:
            LoweringError: as :meth:`toolchain.ir.target.Target.lower` and :meth:`~toolchain.ir.target.Target.check`.
        """
        make = functools.partial(self._lower, uncalibrated(block))
        return self.store.get_or_make("templates", self.template_key(block), make, self._told("template", block))

    def _lower(self, block: Block, folder: Path) -> NewEntry:
        for seed in BINDING_SEEDS:
            try:
                template = self._bound(block, folder, seed)
            except UnboundTemplateError as e:
                reason = str(e)
                for path in folder.iterdir():
                    _discard(path)
            else:
                return NewEntry({"functions": list(template.artifact.functions), "slots": template.slots})
        return NewEntry({"unbound": reason})

    def _bound(self, block: Block, folder: Path, seed: int) -> Template:
        """Lower with random weights and find them; where constants stand beside them, prove that they are such."""
        template = self._skeleton(block, folder, ARTIFACT_STEM, seed)
        if template.constants:
            twin = self._skeleton(block, folder, "twin", seed + len(BINDING_SEEDS))
            _discard(twin.artifact.path)
            if twin.constants != template.constants:
                raise UnboundTemplateError("a constant depends on the weights")
        return template

    def _skeleton(self, block: Block, folder: Path, name: str, seed: int) -> Template:
        target, weights = self.plan.target, unique_weights(block, seed)
        artifact = target.lower(block, weights, folder / f"{name}{target.suffix}")
        release()
        target.check(artifact.path, block)
        template = target.bind(artifact, StoredParts(block.weights, weights))
        del weights
        release()
        return template

    def artifact(self, block: Block) -> Entry:
        """The artifact of a block.

        Raises:
            LoweringError: as :meth:`template`.
        """
        make = functools.partial(self._build, block)
        return self.store.get_or_make("artifacts", self.artifact_key(block), make, self._told("artifact", block))

    def _told(self, kind: str, block: Block) -> What:
        return What(kind, self.plan.name, block.name)

    def _build(self, block: Block, folder: Path) -> NewEntry:
        target = self.plan.target
        out = folder / f"{ARTIFACT_STEM}{target.suffix}"
        entry = None if self.direct else self.template(block)
        if entry is None or "unbound" in entry.meta:
            artifact = target.lower(block, dict(self._stored_from(block)), out)
            target.check(artifact.path, block)
        else:
            lowered = Artifact(entry.data / out.name, tuple(entry.meta["functions"]))
            try:
                parts = StoredParts(block.weights, self._stored_from(block, halves=True))
                artifact = target.stamp(Template(lowered, entry.meta["slots"]), parts, out)
            except LoweringError as e:
                hint = f"; set {self.plan.name}.precision: float32" if isinstance(e, PrecisionError) else ""
                raise LoweringError(f"block '{block.name}': {e}{hint}") from e
        unbound = None if entry is None else entry.meta.get("unbound")
        return NewEntry({"functions": list(artifact.functions), "unbound": unbound}, artifact.digests)

    def weights(self, block: Block, stored: Block | None = None) -> BlockWeights:
        """A block's weights, read when asked for; what the artifact of ``stored``, the same block, keeps of them."""
        if stored is None:
            return BlockWeights(block, self.plan.resolved.checkpoint, self._aliases)
        kept, found = stored.weights, self.calibrated
        return BlockWeights(block, self.plan.resolved.checkpoint, self._aliases, stored=kept, calibrated=found)

    def _stored_from(self, block: Block, halves: bool = False) -> BlockWeights:
        """A block's weights, and the statistics that they are encoded with."""
        checkpoint, found = self.plan.resolved.checkpoint, self.calibrated
        return BlockWeights(block, checkpoint, self._aliases, halves=halves, calibrated=found)

    def weights_digest(self, block: Block) -> str:
        """The digest of a block's weights, and of the statistics that they are encoded with.

        Raises:
            LoweringError: nothing was measured for a weight that needs it; names it.
        """
        return block_digest(block, self.digests, self._aliases, self._statistics_digest, self._scale)

    def _scale(self, source: ScaleSource) -> float:
        return float(scale(f"{self.plan.name}: '{', '.join(source.layer.tensors)}'", source, self.calibrated))

    def _statistics_digest(self, weight: Weight, need: Need) -> str:
        try:
            if self.calibrated is None:
                raise LoweringError("there is none")
            return self.calibrated.digest(weight.source, need)
        except LoweringError as e:
            names = ", ".join(weight.source.tensors)
            raise LoweringError(f"{self.plan.name}: '{names}' as {weight.storage} needs a calibration: {e}") from e


def _structure(block: Block) -> dict[str, Any]:
    return {"text": block.structure(), "functions": list(distinct_functions(block))}


def uncalibrated(block: Block) -> Block:
    """A block whose artifact has the same parts in the same places, and which needs weights alone to be lowered."""
    kept = {n: dataclasses.replace(w, storage=w.storage.uncalibrated) for n, w in block.weights.items()}
    return dataclasses.replace(block, weights=kept)


def _discard(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink()


def code_modules(part: ResolvedComponent) -> list[str]:
    """Modules whose code decides what a component's artifacts are: ours, the family's, the target's, the passes'."""
    plugins = {type(plugin).__module__ for plugin in (part.family, part.target, *part.passes)}
    return sorted({"toolchain.build.artifacts", *plugins})
