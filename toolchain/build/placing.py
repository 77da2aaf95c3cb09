"""Putting what the store holds where it belongs in a bundle."""

from __future__ import annotations

from pathlib import Path

from toolchain.build.artifacts import ARTIFACT_STEM
from toolchain.build.gate import Passed
from toolchain.formats.bundle import describe_file
from toolchain.formats.manifest import File
from toolchain.ir.blocks import Block
from toolchain.ir.labels import Labels
from toolchain.ir.target import Target
from toolchain.planning.plan import Plan
from toolchain.system.store import Entry, clone_or_copy
from toolchain.weights.checkpoint import HUB


def place_artifact(artifact: Entry, out: Path, folder: Path, target: Target, labels: Labels) -> list[File]:
    """An artifact's files at ``out``, a file or a package, in the bundle ``folder``, with ``labels``."""
    files = {}
    for file in artifact.files:
        path = Path(f"{out}{file.path.removeprefix(ARTIFACT_STEM + out.suffix)}")
        clone_or_copy(artifact.data / file.path, path)
        files[path] = File(path=path.relative_to(folder).as_posix(), bytes=file.bytes, sha256=file.sha256)
    files |= {path: describe_file(path, folder) for path in target.label(out, labels)}
    return sorted(files.values(), key=lambda f: f.path)


def labels_of(planned: Plan, component: str, block: Block) -> Labels:
    """What a block's artifact says of itself."""
    part = planned.resolved.components[component]
    places = [layer.location for layer in part.checkpoint.layers()]
    return Labels(
        planned.recipe.model,
        component,
        block.name,
        block.sources,
        block.results,
        part.recipe.license,
        " + ".join(places) if all(place.startswith(HUB) for place in places) else None,
    )


def place_goldens(passed: Passed | None, path: Path, folder: Path) -> File | None:
    """The goldens of a block that was executed, if it has any."""
    if passed is None or passed.goldens is None:
        return None
    clone_or_copy(passed.goldens, path)
    return describe_file(path, folder)
