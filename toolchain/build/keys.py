"""The digest of everything that decides a bundle's bytes."""

from __future__ import annotations

from typing import Any

from toolchain import plugins
from toolchain.formats.times import TimesFile
from toolchain.ir.pipeline_text import parse_pipeline
from toolchain.planning.resolve import ResolvedBuild, ResolvedComponent, find_tokenizer
from toolchain.system.code import code_digest
from toolchain.system.imports import defined_in
from toolchain.system.store import Store, digest, key_of
from toolchain.weights.digests import checkpoint_digest, tensor_digests


def build_key(build: ResolvedBuild, store: Store, direct: bool, measured: TimesFile | None = None) -> str:
    """Key of a whole bundle: the recipe, its checkpoints' content, the tools and the code that build it, and the
    device's profile or what was measured on it. The same of a build that was resolved lightly.

    Raises:
        RecipeError: the device is unknown.
    """
    parts: dict[str, Any] = {"recipe": build.recipe.model_dump(mode="json"), "direct": direct}
    parts["times"] = build.device.sha256 if measured is None else measured.times.sha256
    parts |= {name: _component(part, store) for name, part in build.components.items()}
    tokenizer = find_tokenizer(build)
    if tokenizer is not None:
        parts["tokenizer"] = digest(tokenizer)
    return key_of(parts)


def _component(part: ResolvedComponent, store: Store) -> dict[str, Any]:
    return {
        "config": dict(part.config),
        "location": part.checkpoint.location,
        "weights": checkpoint_digest(tensor_digests(part.checkpoint, store, part.name)),
        "tools": part.target.versions(),
        "code": code_digest(*bundle_modules(part), store=store),
    }


def bundle_modules(part: ResolvedComponent) -> list[str]:
    """Modules whose code decides what a component is in a bundle: ours, the family's, the target's, the passes'.

    Passes are not imported for it. The family's own partition is among them even if the recipe has another: whether
    one of its passes partitions is only known of those that are imported.
    """
    ((partition, _),) = parse_pipeline(part.family.default_partition(part.name))
    listed = [(spec.name, f"{part.name}.passes.{i}") for i, spec in enumerate(part.recipe.passes)]
    passes = {_pass_module(name, key) for name, key in (*listed, (partition, f"{part.name}.passes"))}
    return sorted({"toolchain.build.compile", type(part.family).__module__, type(part.target).__module__, *passes})


def _pass_module(name: str, key: str) -> str:
    """The module that defines a pass."""
    entry = plugins.registered(plugins.PASSES, name, "pass", key)
    return defined_in(entry.module, entry.attr) or str(entry.load().__module__)
