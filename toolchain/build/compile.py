"""Recipe → bundle: build every block, execute it, write what a device has to know."""

from __future__ import annotations

import contextlib
import functools
import shutil
from collections.abc import Iterator, Mapping
from concurrent.futures import Executor
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from toolchain.build import entries as describe
from toolchain.build.artifacts import FAMILY_MODULE, NAME, Builder
from toolchain.build.gate import ComponentGate, Passed
from toolchain.build.parallel import Parallel, Serial, artifact_source
from toolchain.build.tasks import builders
from toolchain.errors import CheckpointError, RecipeError, ResourceError, SoraCompileError
from toolchain.formats import manifest as m
from toolchain.formats.bundle import RECIPE_FILE, Bundle, describe_file, load_bundle, prepare, staging
from toolchain.formats.recipe import Recipe, TextEncoderRecipe
from toolchain.ir.blocks import table_nodes
from toolchain.ir.graph import Graph
from toolchain.listener import Listener
from toolchain.planning.plan import Plan, configuration, load_passes, plan
from toolchain.plugins import find_target
from toolchain.system.code import code_digest
from toolchain.system.disk import FULL_ERRORS, readable_size
from toolchain.system.memory import return_large_allocations
from toolchain.system.store import Entry, NewEntry, Store, clone_or_copy, digest, key_of
from toolchain.weights.checkpoint import Checkpoint, match, open_checkpoint
from toolchain.weights.digests import checkpoint_digest, tensor_digests

TOKENIZER_FILE = "spiece.model"
GOLDENS = "goldens"


def compile_recipe(
    recipe: Recipe,
    out: str | Path,
    *,
    base: str | Path | None = None,
    listener: Listener | None = None,
    direct: bool = False,
    jobs: int = 1,
    executor: Executor | None = None,
    tasks_at_once: int | None = None,
    store: Store | None = None,
) -> Bundle:
    """Build ``recipe`` into the bundle ``out``.

    What was built before is taken from the store: a build that was stopped goes on where it was, and one of which
    nothing has changed is not repeated.

    Args:
        out: the bundle's folder. It appears whole or not at all; an older bundle there is replaced.
        base: folder that relative checkpoint paths are looked for in first.
        listener: is told of progress.
        direct: lower every block by itself instead of stamping those that share a structure.
        jobs: how many processes build at once, as far as the free memory allows.
        executor: runs the tasks of the build (:func:`toolchain.build.tasks.run_task`) instead of processes of our
            own, so that ``jobs`` means nothing. It may have processes anywhere, on machines that share the store, the
            checkpoints and this installation by the same paths. An executor of threads must have a single one. It is
            not shut down.
        tasks_at_once: how many tasks are handed to ``executor`` before others are done; all that can be done if None.
        store: where templates, artifacts and gate results are kept; the user's cache folder if None.

    Raises:
        SoraCompileError: says what, where and what to do; ``exit_code`` is the command's.
    """
    base, listener, store = Path(base or "."), listener or Listener(), store or Store()
    return_large_allocations()
    if jobs < 1:
        raise RecipeError(f"--jobs {jobs}: must be at least 1")
    if tasks_at_once is not None and tasks_at_once < 1:
        raise RecipeError(f"tasks_at_once {tasks_at_once}: must be at least 1")
    out = Path(out)
    prepare(out)
    checkpoints = {n: open_checkpoint(part.checkpoint, base) for n, part in recipe.components().items()}
    key = _build_key(recipe, base, checkpoints, store, direct)
    done = up_to_date(out, key, store)
    if done is not None:
        listener.remark("nothing has changed since this bundle was built")
        return done
    with staging(out) as folder:
        planned = plan(recipe, base=base, listener=listener)
        for name, lowering in planned.components.items():
            match(checkpoints[name], lowering.definition.expected, name, lowering.definition.aliases)
        pins = {n: pin(checkpoints[n], part.sha256, store) for n, part in recipe.components().items()}
        tokenizer = _copy_tokenizer(recipe, checkpoints, base, folder)
        with _told_what_is_needed(planned, store, out):
            built = builders(planned, base, store, direct)
            with artifact_source(recipe, base, built, store, jobs, executor, tasks_at_once) as artifacts:
                components = {n: _component(planned, n, b, artifacts, folder, listener) for n, b in built.items()}
        (folder / RECIPE_FILE).write_text(resolve(planned, checkpoints, pins).to_yaml(), encoding="utf-8")
        manifest = describe.manifest(planned, components, tokenizer, describe_file(folder / RECIPE_FILE, folder))
        manifest = _with_golden_video(manifest, planned, base, folder, listener)
        text = describe.manifest_text(manifest)
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


def _build_key(recipe: Recipe, base: Path, checkpoints: Mapping[str, Checkpoint], store: Store, direct: bool) -> str:
    """Digest of everything that decides a bundle's bytes."""
    parts: dict[str, Any] = {"recipe": recipe.model_dump(mode="json"), "direct": direct}
    for name, part in recipe.components().items():
        target = find_target(recipe.target.name, recipe.target.options)
        plugins = {type(plugin).__module__ for plugin in (target, *load_passes(recipe, name))}
        parts[name] = {
            "config": dict(configuration(name, part, base)),
            "location": checkpoints[name].location,
            "weights": checkpoint_digest(tensor_digests(checkpoints[name], store)),
            "tools": target.versions(),
            "code": code_digest("toolchain.build.compile", FAMILY_MODULE, *sorted(plugins)),
        }
    if recipe.text_encoder is not None:
        parts["tokenizer"] = digest(find_tokenizer(recipe.text_encoder, checkpoints["text_encoder"], base))
    return key_of(parts)


def up_to_date(out: Path, key: str, store: Store) -> Bundle | None:
    """The bundle at ``out`` if it is what the build of ``key`` made, byte for byte."""
    built = store.get("builds", key)
    if built is None:
        return None
    try:
        if (out / m.FILE_NAME).read_text(encoding="utf-8") != built.meta["manifest"]:
            return None
        bundle = load_bundle(out)
        for file in bundle.files():
            path = out / file.path
            if store.remembered(path, functools.partial(digest, path)) != file.sha256:
                return None
    except (OSError, UnicodeDecodeError, SoraCompileError):
        return None
    return bundle


@contextlib.contextmanager
def _told_what_is_needed(planned: Plan, store: Store, out: Path) -> Iterator[None]:
    """Turn a full disk into an error that says which one, and how much a build needs.

    Raises:
        ResourceError: the disk of the bundle or of the store is full.
    """
    try:
        yield
    except OSError as e:
        if e.errno not in FULL_ERRORS:
            raise
        needed = sum(c.parameters * c.bytes_per_weight for c in planned.components.values())
        free = {str(p): shutil.disk_usage(p).free for p in (out.absolute().parent, store.root)}
        shown = ", ".join(f"{readable_size(bytes_)} free in '{place_}'" for place_, bytes_ in free.items())
        raise ResourceError(
            f"-o {out}: the disk is full ({shown}); the bundle has about {readable_size(needed)}, and the cache "
            "needs room for it and the largest block; what is done is kept, run again when there is room"
        ) from e


def pin(checkpoint: Checkpoint, expected: str | None, store: Store) -> str | None:
    """What pins a checkpoint besides its location: the digest of a local one; a remote one has its commit.

    Raises:
        CheckpointError: the recipe expects other content.
    """
    if checkpoint.location.startswith("hf://"):
        return None
    found = checkpoint_digest(tensor_digests(checkpoint, store))
    if expected not in (None, found):
        raise CheckpointError(
            f"checkpoint '{checkpoint.location}' has sha256 {found}, the recipe expects {expected}; "
            "use the checkpoint that the recipe was made for, or remove its sha256"
        )
    return found


def resolve(planned: Plan, checkpoints: Mapping[str, Checkpoint], pins: Mapping[str, str | None]) -> Recipe:
    """The recipe with nothing left open: configurations written out, checkpoints pinned, passes as they ran."""
    data = planned.recipe.model_dump(mode="json")
    for name, lowering in planned.components.items():
        data[name] |= {
            "checkpoint": checkpoints[name].location,
            "sha256": pins[name],
            "config": describe.plain(lowering.definition.config),
            "precision": lowering.target.precision,
            "passes": [{p.name: p.config.model_dump(mode="json", exclude_none=True)} for p in lowering.passes],
        }
    data["target"] = {"name": planned.target.name, **planned.target.config.model_dump(mode="json")}
    return Recipe.model_validate(data)


def _copy_tokenizer(recipe: Recipe, checkpoints: Mapping[str, Checkpoint], base: Path, folder: Path) -> m.File | None:
    part = recipe.text_encoder
    if part is None:
        return None
    source = find_tokenizer(part, checkpoints["text_encoder"], base)
    place = folder / "text_encoder" / TOKENIZER_FILE
    place.parent.mkdir()
    shutil.copyfile(source, place)
    return describe_file(place, folder)


def find_tokenizer(part: TextEncoderRecipe, checkpoint: Checkpoint, base: Path) -> Path:
    """The sentencepiece model: beside the weights, or a path of its own.

    Raises:
        CheckpointError: there is none.
    """
    beside = checkpoint.beside(part.tokenizer)
    for path in (beside, base / part.tokenizer, Path(part.tokenizer)):
        if path is not None and path.is_file():
            return path
    raise CheckpointError(
        f"text_encoder.tokenizer: '{part.tokenizer}' is neither beside '{checkpoint.location}' nor a file; "
        "give the path of the sentencepiece model"
    )


def evaluate_tables(graph: Graph, checkpoint: Checkpoint) -> dict[str, torch.Tensor]:
    """Values that depend on no input (positions, the null prompt), computed with the checkpoint's numbers."""
    gm = graph.functions["base"]
    values: dict[Any, Any] = {}

    def value(node: Any) -> Any:
        if node in values:
            return values[node]
        if node.op == "get_attr":
            values[node] = checkpoint.tensor(graph.weights[str(node.target)].tensor).float()
            return values[node]
        args, kwargs = torch.fx.node.map_arg((node.args, node.kwargs), value)
        if node.op == "call_module":
            prefix = f"{node.target}."
            own = {k.removeprefix(prefix): graph.weights[k] for k in graph.weights_at(str(node.target))}
            state = {k: s.of(checkpoint.tensor(s.tensor)).float() for k, s in own.items()}
            module = gm.get_submodule(str(node.target))
            values[node] = torch.func.functional_call(module, state, tuple(args), dict(kwargs))
        else:
            values[node] = node.target(*args, **kwargs)
        return values[node]

    with torch.no_grad():
        return {name: value(node).float().contiguous() for name, node in table_nodes(graph).items()}


def _component(
    planned: Plan,
    name: str,
    builder: Builder,
    artifacts: Serial | Parallel,
    folder: Path,
    listener: Listener,
) -> m.Component:
    lowering, mode = planned.components[name], planned.recipe.gate.mode
    (folder / name).mkdir(exist_ok=True)
    tables: dict[str, torch.Tensor] = {}
    for graph in lowering.graphs:
        tables |= evaluate_tables(graph, builder.source.checkpoint)
    tables_file = _write_tables(tables, folder / name / "tables.safetensors", folder)
    listener.start(name, [b.name for b in lowering.blocks])
    gate = None if mode == "none" else ComponentGate(builder, planned.recipe, tables, listener)
    entries = []
    for block in lowering.blocks:
        listener.working(name, block.name, "build")
        artifact = artifacts.artifact(name, block)
        if artifact.meta.get("unbound"):
            listener.remark(f"block '{block.name}' and its like are lowered one by one: {artifact.meta['unbound']}")
        passed = None
        if gate is not None and gate.needs(block, artifact):
            listener.working(name, block.name, "execute")
            passed = gate.hold(block, artifact)
        files = _place_artifact(artifact, folder / name / f"{block.name}{lowering.target.suffix}", folder)
        goldens = _place_goldens(passed, folder / GOLDENS / name / f"{block.name}.safetensors", folder)
        listener.finished(name, block.name, None if passed is None else passed.accuracy)
        functions = tuple(artifact.meta["functions"])
        entries.append(describe.block(block, files, functions, passed, goldens, lowering.target, name))
    return describe.component(lowering, entries, tables_file, tables)


def _write_tables(tables: Mapping[str, torch.Tensor], path: Path, folder: Path) -> m.File | None:
    if not tables:
        return None
    save_file(dict(tables), path)
    path.chmod(0o644)  # safetensors writes files that only their owner can read
    return describe_file(path, folder)


def _place_artifact(artifact: Entry, out: Path, folder: Path) -> list[m.File]:
    """Put an artifact's files where they belong in the bundle."""
    files = []
    for file in artifact.files:
        path = Path(f"{out}{file.path.removeprefix(NAME + out.suffix)}")
        clone_or_copy(artifact.data / file.path, path)
        files.append(m.File(path=path.relative_to(folder).as_posix(), bytes=file.bytes, sha256=file.sha256))
    return sorted(files, key=lambda f: f.path)


def _place_goldens(passed: Passed | None, path: Path, folder: Path) -> m.File | None:
    if passed is None:
        return None
    clone_or_copy(passed.goldens, path)
    return describe_file(path, folder)


def _with_golden_video(manifest: m.Manifest, planned: Plan, base: Path, folder: Path, listener: Listener) -> m.Manifest:
    """Hold a whole video against the eager pipeline's, if the recipe asks for it."""
    asked = planned.recipe.gate.golden
    if asked is None or manifest.gate.mode in ("none", "interface"):
        return manifest
    from toolchain.accuracy.golden_video import make

    return manifest.model_copy(update={"golden": make(manifest, planned.recipe, base, folder, listener)})
