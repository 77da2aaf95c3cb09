"""A bundle, made: every block built and executed, and what a device has to know written."""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Iterator, Mapping
from concurrent.futures import Executor
from dataclasses import dataclass
from pathlib import Path

from toolchain.build import entries
from toolchain.build.artifacts import Builder
from toolchain.build.cluster import admitted
from toolchain.build.compile import UNCHANGED, up_to_date
from toolchain.build.executors import Ways, executor_of
from toolchain.build.gate import ComponentGate
from toolchain.build.gating import gate_key
from toolchain.build.keys import build_key
from toolchain.build.parallel import Order, Parallel, Serial, artifact_source
from toolchain.build.pinning import copy_tokenizer, pin, pinned_recipe
from toolchain.build.placing import labels_of, place_artifact, place_goldens
from toolchain.build.quantizing import settle_budgets
from toolchain.build.tables import component_tables, write_tables
from toolchain.build.tasks import builders
from toolchain.errors import AccuracyError, ResourceError
from toolchain.formats import manifest as m
from toolchain.formats.bundle import RECIPE_FILE, Bundle, describe_file, staging
from toolchain.formats.recipe import Recipe
from toolchain.formats.times import TimesFile
from toolchain.listener import Listener
from toolchain.planning.budgets import budgets_of
from toolchain.planning.plan import Plan, plan_resolved
from toolchain.planning.resolve import resolve
from toolchain.system.disk import FULL_ERRORS, readable_size
from toolchain.system.events import What, doing
from toolchain.system.store import NewEntry, Store
from toolchain.weights.checkpoint import match

GOLDENS = "goldens"


@dataclass(frozen=True)
class Draft:
    """A build of which everything is known and nothing is done."""

    out: Path
    direct: bool
    key: str
    planned: Plan
    builders: Mapping[str, Builder]
    gates: Mapping[str, str]
    """Keys of the components' passages through the gate; none without a gate."""

    def order(self, name: str = "") -> Order:
        """What it asks other processes for."""
        return Order(self.planned.recipe, self.planned.resolved.base, self.builders, self.gates, name)


def make_bundle(
    recipe: Recipe,
    out: Path,
    base: Path,
    store: Store,
    listener: Listener,
    direct: bool,
    ways: Ways,
    executor: Executor | str | None,
    measured: TimesFile | None,
) -> Bundle:
    """Build ``out``; arguments and errors are those of :func:`toolchain.build.compile.compile_recipe`."""
    with executor_of(executor, ways.jobs) as runner, admitted(runner, [recipe], store):
        found = draft(recipe, out, base, store, listener, direct, ways, runner, measured)
        if isinstance(found, Bundle):
            listener.remark(UNCHANGED)
            return found
        with (
            disk_full_explained(found.planned, store, out),
            artifact_source([found.order()], store, ways, runner, listener) as source,
        ):
            bundle = finish(found, source, store, listener)
    store.evict()
    return bundle


def draft(
    recipe: Recipe,
    out: Path,
    base: Path,
    store: Store,
    listener: Listener,
    direct: bool,
    ways: Ways,
    executor: Executor | None,
    measured: TimesFile | None = None,
) -> Draft | Bundle:
    """Plan a build and refuse what cannot be; the bundle itself if it is there and up to date.

    Raises:
        SoraCompileError: the recipe cannot be built; says why.
    """
    if budgets_of(recipe):
        with doing(What("budget")):
            recipe = settle_budgets(recipe, base, store, listener, jobs=ways.jobs, executor=executor)
    with doing(What("plan")):
        build = resolve(recipe, base, checkpoints=True)
        key = build_key(build, store, direct, measured)
        done = up_to_date(out, key, store)
        if done is not None:
            return done
        planned = plan_resolved(build, listener, measured)
        planned.check_loading()
        for name, part in planned.components.items():
            match(part.resolved.checkpoint, part.definition.expected, name, part.definition.aliases)
    gated = recipe.gate.mode != "none" and not ways.serial(executor)
    with disk_full_explained(planned, store, out):
        made = builders(planned, store, direct, listener)
        gates = {name: gate_key(planned, builder) for name, builder in made.items()} if gated else {}
    return Draft(out, direct, key, planned, made, gates)


def finish(found: Draft, artifacts: Serial | Parallel, store: Store, listener: Listener) -> Bundle:
    """Make the bundle of a build, from artifacts that this process or others make.

    Raises:
        SoraCompileError: a block cannot be lowered, or does not pass the gate.
        ElsewhereError: as :meth:`toolchain.build.parallel.Parallel.artifact`.
    """
    planned, build, out = found.planned, found.planned.resolved, found.out
    with staging(out) as folder:
        pins = {name: pin(part.checkpoint, part.recipe, store) for name, part in build.components.items()}
        tokenizer = copy_tokenizer(build, folder)
        with disk_full_explained(planned, store, out):
            components = {name: _component(found, name, artifacts, folder, listener) for name in found.builders}
        (folder / RECIPE_FILE).write_text(pinned_recipe(planned, pins).to_yaml(), encoding="utf-8")
        manifest = entries.manifest(planned, components, tokenizer, describe_file(folder / RECIPE_FILE, folder))
        manifest = _with_golden_video(manifest, planned, folder, listener)
        text = entries.manifest_text(manifest)
        (folder / m.FILE_NAME).write_text(text, encoding="utf-8")
    bundle = Bundle(out, manifest)
    try:
        for file in bundle.files():
            store.remember(out / file.path, file.sha256)
        store.get_or_make("builds", found.key, lambda _: NewEntry({"manifest": text}))
    except (OSError, ResourceError) as e:
        listener.remark(f"the bundle is whole, but the next build will not know it ({e})")
    return bundle


@contextlib.contextmanager
def disk_full_explained(planned: Plan, store: Store, out: Path) -> Iterator[None]:
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


def _component(found: Draft, name: str, artifacts: Serial | Parallel, folder: Path, listener: Listener) -> m.Component:
    planned, builder = found.planned, found.builders[name]
    plan = builder.plan
    (folder / name).mkdir(exist_ok=True)
    tables = component_tables(plan)
    tables_file = write_tables(tables, folder / name / "tables.safetensors", folder)
    listener.start(name, [b.name for b in plan.blocks])
    gate = None if planned.recipe.gate.mode == "none" else ComponentGate(builder, planned, tables, listener)
    described = []
    for pair in plan.pairs:
        block = pair.lowered
        listener.working(name, block.name, "build")
        artifact = artifacts.artifact(builder, block)
        if artifact.meta.get("unbound"):
            listener.remark(f"block '{block.name}' and its like are lowered one by one: {artifact.meta['unbound']}")
        passed = None
        if gate is not None:
            _wait_for_gate(artifacts, found.gates.get(name), listener)
            passed = gate.hold(pair, artifact)
        with doing(What("bundle", name, block.name)) as said:
            place, labels = folder / name / f"{block.name}{plan.target.suffix}", labels_of(planned, name, block)
            files = place_artifact(artifact, place, folder, plan.target, labels)
            goldens = place_goldens(passed, folder / GOLDENS / name / f"{block.name}.safetensors", folder)
            said.bytes_written = sum(f.bytes for f in (*files, *([goldens] if goldens else ())))
        listener.finished(name, block.name, None if passed is None else passed.accuracy)
        functions = tuple(artifact.meta["functions"])
        described.append(
            entries.block(block, files, functions, passed, goldens, plan.target, name, plan.memory[block.name])
        )
    return entries.component(plan, described, tables_file, tables)


def _wait_for_gate(artifacts: Serial | Parallel, key: str | None, listener: Listener) -> None:
    """Wait until another process has executed a component, if one does; its results are then in the store."""
    try:
        artifacts.gate(key)
    except AccuracyError as e:
        for text in getattr(e, "__notes__", ()):
            listener.remark(text)
        raise


def _with_golden_video(manifest: m.Manifest, planned: Plan, folder: Path, listener: Listener) -> m.Manifest:
    """Hold a whole video against the eager pipeline's, if the recipe asks for it."""
    asked = planned.recipe.gate.golden
    if asked is None or manifest.gate.mode in ("none", "interface"):
        return manifest
    from toolchain.accuracy.golden_video import make

    with doing(What("video")) as said:
        golden = make(manifest, planned, folder, listener)
        said.bytes_written = golden.file.bytes
    return manifest.model_copy(update={"golden": golden})
