"""Whoever runs the tasks of a build, the bundle is the same."""

from __future__ import annotations

import contextlib
import hashlib
import os
import shutil
from collections.abc import Iterator
from concurrent.futures import Executor, ProcessPoolExecutor, ThreadPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file
from support import CHEAP, write_project

import toolchain
from toolchain.build.admission import Admission
from toolchain.build.parallel import Order, Parallel
from toolchain.build.tasks import builders
from toolchain.errors import LoweringError
from toolchain.formats.recipe_file import load_recipe
from toolchain.planning.plan import plan_resolved
from toolchain.planning.resolve import resolve
from toolchain.system.store import Store

pytestmark = pytest.mark.slow


def contents(folder: Path) -> dict[str, str]:
    files = sorted(p for p in folder.rglob("*") if p.is_file())
    return {p.relative_to(folder).as_posix(): hashlib.sha256(p.read_bytes()).hexdigest() for p in files}


def compile_(project: Path, out: Path, store: Store, *changes: str, **options: Any) -> toolchain.Bundle:
    recipe = load_recipe(project / "recipe.yaml", [*CHEAP, *changes])
    return toolchain.compile_recipe(recipe, out, base=options.pop("base", project), store=store, **options)


@contextlib.contextmanager
def one_process(**options: Any) -> Iterator[Executor]:
    """A caller's executor, whose only process has another working folder."""
    with ProcessPoolExecutor(1, get_context("spawn"), initializer=os.chdir, initargs=("/",)) as executor:
        yield executor


@pytest.fixture(scope="module")
def serial(one_pair: Any, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A project and its bundle, built in this process."""
    folder = tmp_path_factory.mktemp("serial")
    project = write_project(folder / "project", one_pair)
    compile_(project, folder / "bundle", Store(folder / "store"))
    return project, folder / "bundle"


def test_a_process_elsewhere(serial: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is told everything by paths that do not depend on where it is."""
    project, bundle = serial
    shutil.copytree(project, tmp_path / "project")
    monkeypatch.chdir(tmp_path / "project")
    with one_process() as executor:
        for base in (".", "nowhere"):  # of the second, the checkpoint is found in the working folder
            compile_(Path(), Path("b") / base, Store(Path("store")), base=Path(base), executor=executor)
            assert contents(Path("b") / base) == contents(bundle)
            shutil.rmtree("store")
    assert sorted(p.name for p in Path().iterdir()) == ["b", "checkpoint", "recipe.yaml"]


def test_a_thread(serial: tuple[Path, Path], tmp_path: Path) -> None:
    project, bundle = serial
    store = Store(tmp_path / "store")
    with ThreadPoolExecutor(1) as executor:
        compile_(project, tmp_path / "bundle", store, executor=executor, tasks_at_once=2)
        assert executor.submit(lambda: "still open").result() == "still open"
    assert contents(tmp_path / "bundle") == contents(bundle)
    assert list((store.root / "scratch").iterdir()) == []
    assert sorted(p.name for p in tmp_path.iterdir()) == ["bundle", "store"]


def test_two_builds_in_one_process(serial: tuple[Path, Path], tmp_path: Path) -> None:
    """Their tasks take turns there, and each is built with its own recipe and weights."""
    project, _ = serial
    other = tmp_path / "other"
    shutil.copytree(project, other)
    weights = load_file(other / "checkpoint/model.safetensors")
    save_file({k: v * 1.01 for k, v in weights.items()}, other / "checkpoint/model.safetensors")
    changes = {project: [], other: ["video.height=48", "video.width=32"]}
    recipes = {b: load_recipe(b / "recipe.yaml", [*CHEAP, *c]) for b, c in changes.items()}
    planned = {b: plan_resolved(resolve(r, b, checkpoints=True)) for b, r in recipes.items()}
    stores = {project: Store(tmp_path / "a"), other: Store(tmp_path / "b")}
    alone = Store(tmp_path / "alone")
    with one_process() as executor, contextlib.ExitStack() as stack:
        sources = {}
        for base, store in stores.items():
            own = builders(planned[base], store, False)
            source = Parallel([Order(recipes[base], base, own)], store, executor, Admission(at_once=1))
            sources[base] = own["transformer"], stack.enter_context(source)
        for number in range(len(planned[project].components["transformer"].blocks)):
            for base, (builder, source) in sources.items():
                block = planned[base].components["transformer"].blocks[number]
                entry = source.artifact(builder, block)
                expected = builders(planned[base], alone, False)["transformer"].artifact(block)
                assert (entry.key, entry.meta) == (expected.key, expected.meta)
                assert [(f.path, f.sha256) for f in entry.files] == [(f.path, f.sha256) for f in expected.files]


def test_weights_that_change_between_two_builds(serial: tuple[Path, Path], tmp_path: Path) -> None:
    """What the process remembers of the first build is not taken for the second, though the recipe is the same."""
    project = tmp_path / "project"
    shutil.copytree(serial[0], project)
    store, path = Store(tmp_path / "store"), project / "checkpoint/model.safetensors"
    with one_process() as executor:
        compile_(project, tmp_path / "one", store, executor=executor)
        shutil.copytree(store.root / "templates", tmp_path / "other/templates")
        weights = load_file(path)
        path.unlink()
        save_file({k: v * 1.01 for k, v in weights.items()}, path)
        compile_(project, tmp_path / "two", store, executor=executor)
    compile_(project, tmp_path / "alone", Store(tmp_path / "other"))
    assert contents(tmp_path / "two") == contents(tmp_path / "alone") != contents(tmp_path / "one")


def break_onnx() -> None:
    """In a process of an executor: nothing can be lowered."""
    from targets.onnx import OnnxTarget

    def lower(self: Any, block: Any, weights: Any, out: Any) -> Any:
        raise LoweringError(f"block '{block.name}': broken")

    OnnxTarget.lower = lower  # type: ignore[method-assign]


def test_an_error_in_another_process(serial: tuple[Path, Path], tmp_path: Path) -> None:
    """It is what it would be in this one; nothing is left, and the executor goes on."""
    with ProcessPoolExecutor(1, get_context("spawn"), initializer=break_onnx) as executor:
        with pytest.raises(LoweringError, match=r"^block '\w+': broken$"):
            compile_(serial[0], tmp_path / "bundle", Store(tmp_path / "store"), executor=executor, tasks_at_once=1)
        assert executor.submit(abs, -1).result() == 1
    assert sorted(p.name for p in tmp_path.iterdir()) == ["store"]
    assert list((tmp_path / "store" / "scratch").iterdir()) == []
