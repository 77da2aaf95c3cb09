"""The digest of everything that decides a bundle's bytes."""

from __future__ import annotations

from typing import Any

from toolchain.build.artifacts import code_modules
from toolchain.formats.times import TimesFile
from toolchain.planning.resolve import ResolvedBuild, ResolvedComponent, find_tokenizer
from toolchain.system.code import code_digest
from toolchain.system.store import Store, digest, key_of
from toolchain.weights.digests import checkpoint_digest, tensor_digests


def build_key(build: ResolvedBuild, store: Store, direct: bool, measured: TimesFile | None = None) -> str:
    """Key of a whole bundle: the recipe, its checkpoints' content, the tools and the code that build it, and the
    device's profile or what was measured on it.

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
        "weights": checkpoint_digest(tensor_digests(part.checkpoint, store)),
        "tools": part.target.versions(),
        "code": code_digest("toolchain.build.compile", *code_modules(part)),
    }
