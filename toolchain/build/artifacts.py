"""Block → artifact, through the store: a template once for each structure, then a stamp for each block.

Lowering never sees the user's weights: a template is built with unique random ones, and each block's tensors are
written into a copy of it. So a changed checkpoint lowers nothing.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from toolchain.errors import LoweringError
from toolchain.ir.blocks import Block
from toolchain.ir.target import Artifact, Template, UnboundTemplateError, distinct_functions, unique_weights
from toolchain.planning.plan import Lowering
from toolchain.system.code import code_digest
from toolchain.system.memory import release
from toolchain.system.store import Entry, NewEntry, Store, key_of
from toolchain.weights.block_weights import BlockWeights
from toolchain.weights.checkpoint import Checkpoint
from toolchain.weights.digests import block_digest

NAME = "artifact"
FAMILY_MODULE = "toolchain.models.family"
"""What builds the components of a model, and leads to the code of all of them."""
BINDING_SEEDS = (0, 1, 2)
"""Random weights that happen to be found elsewhere in an artifact are drawn again."""


@dataclass(frozen=True)
class Source:
    """Where a component's weights come from."""

    checkpoint: Checkpoint
    digests: Mapping[str, str]
    """Of every tensor, by the checkpoint's own names."""


class Builder:
    """Builds a component's artifacts.

    Args:
        direct: lower every block by itself, which is the reference for stamping.
    """

    def __init__(self, lowering: Lowering, source: Source, store: Store, direct: bool) -> None:
        self.lowering, self.source, self.store, self.direct = lowering, source, store, direct

    @functools.cached_property
    def _tools(self) -> dict[str, Any]:
        target = self.lowering.target
        return {
            "target": target.name,
            "config": target.config.model_dump(mode="json"),
            "tools": target.versions(),
            "code": code_digest(*code_modules(self.lowering)),
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
        template = self._skeleton(block, folder, NAME, seed)
        if template.constants:
            twin = self._skeleton(block, folder, "twin", seed + len(BINDING_SEEDS))
            _discard(twin.artifact.path)
            if twin.constants != template.constants:
                raise UnboundTemplateError("a constant depends on the weights")
        return template

    def _skeleton(self, block: Block, folder: Path, name: str, seed: int) -> Template:
        target, weights = self.lowering.target, unique_weights(block, seed)
        artifact = target.lower(block, weights, folder / f"{name}{target.suffix}")
        release()
        target.check(artifact.path, block)
        template = target.bind(artifact, weights)
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
        target = self.lowering.target
        out = folder / f"{NAME}{target.suffix}"
        entry = None if self.direct else self.template(block)
        if entry is None or "unbound" in entry.meta:
            artifact = target.lower(block, dict(self.weights(block)), out)
            target.check(artifact.path, block)
        else:
            lowered = Artifact(entry.data / out.name, tuple(entry.meta["functions"]))
            weights = BlockWeights(block, self.source.checkpoint, self.lowering.definition.aliases, halves=True)
            try:
                artifact = target.stamp(Template(lowered, entry.meta["slots"]), weights, out)
            except LoweringError as e:
                raise LoweringError(f"block '{block.name}': {e}") from e
        unbound = None if entry is None else entry.meta.get("unbound")
        return NewEntry({"functions": list(artifact.functions), "unbound": unbound}, artifact.digests)

    def weights(self, block: Block) -> BlockWeights:
        """A block's weights, read when asked for."""
        return BlockWeights(block, self.source.checkpoint, self.lowering.definition.aliases)

    def weights_digest(self, block: Block) -> str:
        """The digest of a block's weights."""
        return block_digest(block, self.source.digests, self.lowering.definition.aliases)


def _structure(block: Block) -> dict[str, Any]:
    return {"text": block.structure(), "functions": list(distinct_functions(block))}


def _discard(path: Path) -> None:
    import shutil

    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink()


def code_modules(lowering: Lowering) -> list[str]:
    """Modules whose code decides what a component's artifacts are: ours, its target's and its passes'."""
    plugins = {type(plugin).__module__ for plugin in (lowering.target, *lowering.passes)}
    return sorted({"toolchain.build.artifacts", FAMILY_MODULE, *plugins})
