"""A bundle, made: every block built and executed, and what a device has to know written."""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Iterator
from concurrent.futures import Executor
from pathlib import Path

from toolchain.build import entries
from toolchain.build.artifacts import Builder
from toolchain.build.gate import ComponentGate
from toolchain.build.parallel import Parallel, Serial, artifact_source
from toolchain.build.pinning import copy_tokenizer, pin, pinned_recipe
from toolchain.build.placing import place_artifact, place_goldens
from toolchain.build.tables import component_tables, write_tables
from toolchain.build.tasks import builders
from toolchain.errors import ResourceError
from toolchain.formats import manifest as m
from toolchain.formats.bundle import RECIPE_FILE, Bundle, describe_file, staging
from toolchain.formats.times import TimesFile
from toolchain.listener import Listener
from toolchain.planning.plan import Plan, plan_resolved
from toolchain.planning.resolve import ResolvedBuild
from toolchain.system.disk import FULL_ERRORS, readable_size
from toolchain.system.store import NewEntry, Store
from toolchain.weights.checkpoint import match

GOLDENS = "goldens"


def make_bundle(
    build: ResolvedBuild,
    out: Path,
    key: str,
    store: Store,
    listener: Listener,
    *,
    direct: bool,
    measured: TimesFile | None,
    jobs: int,
    executor: Executor | None,
    tasks_at_once: int | None,
) -> Bundle:
    """Build ``out``, and remember it as what the build of ``key`` made.

    Args:
        build: resolved as a whole.
        key: as :func:`toolchain.build.keys.build_key` gives it.
        measured: times to plan loading with, instead of those of the device's profile.

    Raises:
        SoraCompileError: as :func:`toolchain.build.compile.compile_recipe`.
    """
    with staging(out) as folder:
        planned = plan_resolved(build, listener, measured)
        planned.check_loading()
        for name, part in planned.components.items():
            match(part.resolved.checkpoint, part.definition.expected, name, part.definition.aliases)
        pins = {name: pin(part.checkpoint, part.recipe.sha256, store) for name, part in build.components.items()}
        tokenizer = copy_tokenizer(build, folder)
        with _disk_full_explained(planned, store, out):
            made = builders(planned, store, direct, listener)
            with artifact_source(build.recipe, build.base, made, store, jobs, executor, tasks_at_once) as artifacts:
                components = {name: _component(planned, made[name], artifacts, folder, listener) for name in made}
        (folder / RECIPE_FILE).write_text(pinned_recipe(planned, pins).to_yaml(), encoding="utf-8")
        manifest = entries.manifest(planned, components, tokenizer, describe_file(folder / RECIPE_FILE, folder))
        manifest = _with_golden_video(manifest, planned, folder, listener)
        text = entries.manifest_text(manifest)
        (folder / m.FILE_NAME).write_text(text, encoding="utf-8")
    bundle = Bundle(out, manifest)
    try:
        for file in bundle.files():
            store.remember(out / file.path, file.sha256)
        store.get_or_make("builds", key, lambda _: NewEntry({"manifest": text}))
    except (OSError, ResourceError) as e:
        listener.remark(f"the bundle is whole, but the next build will not know it ({e})")
    store.evict()
    return bundle


@contextlib.contextmanager
def _disk_full_explained(planned: Plan, store: Store, out: Path) -> Iterator[None]:
    """Turn a full disk into an error that says which one, and how much a build needs.

    Raises:
        ResourceError: the disk of the bundle or of the store is full.
    """
    try:
        yield
    except OSError as e:
        if e.errno not in FULL_ERRORS:
            raise
        needed = sum(c.weight_bytes for c in planned.components.values())
        free = {str(p): shutil.disk_usage(p).free for p in (out.absolute().parent, store.root)}
        shown = ", ".join(f"{readable_size(bytes_)} free in '{place}'" for place, bytes_ in free.items())
        raise ResourceError(
            f"-o {out}: the disk is full ({shown}); the bundle has about {readable_size(needed)}, and the cache "
            "needs room for it and the largest block; what is done is kept, run again when there is room"
        ) from e


def _component(
    planned: Plan, builder: Builder, artifacts: Serial | Parallel, folder: Path, listener: Listener
) -> m.Component:
    plan, name = builder.plan, builder.plan.name
    (folder / name).mkdir(exist_ok=True)
    tables = component_tables(plan)
    tables_file = write_tables(tables, folder / name / "tables.safetensors", folder)
    listener.start(name, [b.name for b in plan.blocks])
    gate = None if planned.recipe.gate.mode == "none" else ComponentGate(builder, planned, tables, listener)
    described = []
    for pair in plan.pairs:
        block = pair.lowered
        listener.working(name, block.name, "build")
        artifact = artifacts.artifact(name, block)
        if artifact.meta.get("unbound"):
            listener.remark(f"block '{block.name}' and its like are lowered one by one: {artifact.meta['unbound']}")
        passed = None if gate is None else gate.hold(pair, artifact)
        files = place_artifact(artifact, folder / name / f"{block.name}{plan.target.suffix}", folder)
        goldens = place_goldens(passed, folder / GOLDENS / name / f"{block.name}.safetensors", folder)
        listener.finished(name, block.name, None if passed is None else passed.accuracy)
        functions = tuple(artifact.meta["functions"])
        described.append(
            entries.block(block, files, functions, passed, goldens, plan.target, name, plan.memory[block.name])
        )
    return entries.component(plan, described, tables_file, tables)


def _with_golden_video(manifest: m.Manifest, planned: Plan, folder: Path, listener: Listener) -> m.Manifest:
    """Hold a whole video against the eager pipeline's, if the recipe asks for it."""
    asked = planned.recipe.gate.golden
    if asked is None or manifest.gate.mode in ("none", "interface"):
        return manifest
    from toolchain.accuracy.golden_video import make

    return manifest.model_copy(update={"golden": make(manifest, planned, folder, listener)})
