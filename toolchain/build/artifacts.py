"""Block → artifact, through the store: a template once for each structure, then a stamp for each block.

Lowering never sees the user's weights: a template is built with unique random ones, and each block's tensors are
written into a copy of it. So a changed checkpoint lowers nothing.
"""

from __future__ import annotations

import functools
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from toolchain.errors import LoweringError, PrecisionError
from toolchain.ir.blocks import Block
from toolchain.ir.stored import StoredParts
from toolchain.ir.target import Artifact, Template, UnboundTemplateError, distinct_functions, unique_weights
from toolchain.planning.plan import ComponentPlan
from toolchain.planning.resolve import ResolvedComponent
from toolchain.system.code import code_digest
from toolchain.system.memory import release
from toolchain.system.store import Entry, NewEntry, Store, key_of
from toolchain.weights.block_weights import BlockWeights
from toolchain.weights.digests import block_digest

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
    """

    def __init__(self, plan: ComponentPlan, digests: Mapping[str, str], store: Store, direct: bool) -> None:
        self.plan, self.store, self.direct = plan, store, direct
        self._digests, self._aliases = digests, plan.definition.aliases

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
        return key_of(self._tools | {"structure": _structure(block)})

    def artifact_key(self, block: Block) -> str:
        """Key of a block's artifact."""
        template, weights = self.template_key(block), self.weights_digest(block)
        return key_of({"template": template, "weights": weights, "direct": self.direct})

    def template(self, block: Block) -> Entry:
        """The template of a block's structure, lowered and bound now if it is not in the store.

        Raises:
            LoweringError: as :meth:`toolchain.ir.target.Target.lower` and :meth:`~toolchain.ir.target.Target.check`.
        """
        return self.store.get_or_make("templates", self.template_key(block), lambda folder: self._lower(block, folder))

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
        return self.store.get_or_make("artifacts", self.artifact_key(block), lambda folder: self._build(block, folder))

    def _build(self, block: Block, folder: Path) -> NewEntry:
        target = self.plan.target
        out = folder / f"{ARTIFACT_STEM}{target.suffix}"
        entry = None if self.direct else self.template(block)
        if entry is None or "unbound" in entry.meta:
            artifact = target.lower(block, dict(self.weights(block)), out)
            target.check(artifact.path, block)
        else:
            lowered = Artifact(entry.data / out.name, tuple(entry.meta["functions"]))
            weights = BlockWeights(block, self.plan.resolved.checkpoint, self._aliases, halves=True)
            try:
                parts = StoredParts(block.weights, weights)
                artifact = target.stamp(Template(lowered, entry.meta["slots"]), parts, out)
            except LoweringError as e:
                hint = f"; set {self.plan.name}.precision: float32" if isinstance(e, PrecisionError) else ""
                raise LoweringError(f"block '{block.name}': {e}{hint}") from e
        unbound = None if entry is None else entry.meta.get("unbound")
        return NewEntry({"functions": list(artifact.functions), "unbound": unbound}, artifact.digests)

    def weights(self, block: Block, stored: Block | None = None) -> BlockWeights:
        """A block's weights, read when asked for; what the artifact of ``stored``, the same block, keeps of them."""
        kept = None if stored is None else stored.weights
        return BlockWeights(block, self.plan.resolved.checkpoint, self._aliases, stored=kept)

    def weights_digest(self, block: Block) -> str:
        """The digest of a block's weights."""
        return block_digest(block, self._digests, self._aliases)


def _structure(block: Block) -> dict[str, Any]:
    return {"text": block.structure(), "functions": list(distinct_functions(block))}


def _discard(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink()


def code_modules(part: ResolvedComponent) -> list[str]:
    """Modules whose code decides what a component's artifacts are: ours, the family's, the target's, the passes'."""
    plugins = {type(plugin).__module__ for plugin in (part.family, part.target, *part.passes)}
    return sorted({"toolchain.build.artifacts", *plugins})
