"""What a process elsewhere is asked before it is given work, and what is said of one that does not fit."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from toolchain.build import cluster, executors, workers
from toolchain.build.executors import Ways, executor_of
from toolchain.build.tasks import Task
from toolchain.build.workers import Expected, differences, run_if_fit
from toolchain.errors import RecipeError, ResourceError
from toolchain.formats.recipe import Recipe


@pytest.fixture
def wanted(recipe_data: dict[str, Any], tmp_path: Path) -> Expected:
    return workers.expected([Recipe.model_validate(recipe_data)], tmp_path, tmp_path)


def test_a_process_that_has_all(wanted: Expected, tmp_path: Path) -> None:
    assert differences(wanted, "mine") == []
    assert (tmp_path / "mine").read_text() == wanted.token
    assert {"sora-compile", "Python", "torch", "onnx"} <= dict(wanted.versions).keys()
    assert "targets.onnx" in wanted.modules and "passes.token_merge" in wanted.modules


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda w: {"versions": (("torch", "1.0"), *w.versions[3:])}, "has torch {torch}, not 1.0"),
        (lambda w: {"versions": (("martian", "3"),)}, "has martian not at all, not 3"),
        (lambda w: {"code": "0"}, "has sora-compile or a plug-in of the same version with other code"),
        (
            lambda w: {"modules": ("no_such_plugin",)},
            "cannot load what builds need (ModuleNotFoundError: no",
        ),
        (lambda w: {"targets": ("martian",)}, "cannot load what builds need (RecipeError: target: no target"),
        (lambda w: {"folder": f"{w.folder}/none"}, "does not see the store '{store}' (No such file or directory)"),
        (lambda w: {"token": "another"}, "sees another store at '{store}'"),
    ],
)
def test_what_differs(wanted: Expected, change: Callable[[Expected], dict[str, Any]], says: str) -> None:
    found = differences(dataclasses.replace(wanted, **change(wanted)), "mine")
    assert len(found) == 1
    assert found[0].startswith(says.format(torch=dict(wanted.versions)["torch"], store=wanted.store))


def test_a_store_that_cannot_be_written(wanted: Expected) -> None:
    (said,) = differences(wanted, "no/such/folder")
    assert said == f"cannot write to the store '{wanted.store}' (No such file or directory)"


def test_a_process_is_asked_once(wanted: Expected, tmp_path: Path) -> None:
    """It may have come after the others were asked; then its first task asks."""
    assert run_if_fit(wanted, "here", abs, -1) == 1
    (tmp_path / workers.TOKEN_FILE).unlink()
    assert run_if_fit(wanted, "here", abs, -2) == 2
    other = dataclasses.replace(wanted, token="another")
    with pytest.raises(ResourceError, match=r"^worker 'here' does not see the store .*; give every worker the same"):
        run_if_fit(other, "here", abs, -1)


@pytest.mark.parametrize(
    ("asked", "jobs", "says"),
    [
        ("dusk://here:1", 1, "--executor dusk://here:1: expected 'local' or 'dask://HOST:PORT'"),
        ("dask://", 1, "--executor dask://: expected 'local' or"),
        ("dask://here:1", 2, "--jobs 2: counts processes of our own; leave it out with --executor dask://here:1"),
    ],
)
def test_executors_that_there_are_not(asked: str, jobs: int, says: str) -> None:
    with pytest.raises(RecipeError) as caught, executor_of(asked, jobs):
        pass
    assert str(caught.value).startswith(says)


def test_no_scheduler_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cluster, "CONNECT_SECONDS", 1)
    says = r"^--executor dask://127.0.0.1:9: no scheduler answers there; start one"
    with pytest.raises(ResourceError, match=says), executor_of("dask://127.0.0.1:9", 1):
        pass


def test_memory_is_for_several_processes() -> None:
    for ways, executor in ((Ways(1, memory_bytes=1), None), (Ways(2, memory_bytes=1), "dask://here:1")):
        with pytest.raises(RecipeError, match=r"^--memory: is for the processes of --jobs 2 and more"):
            ways.check(executor)
    Ways(2, memory_bytes=1).check(executors.LOCAL)


class FakeClient:
    """A cluster without processes: what a client is asked, and what it answers."""

    def __init__(self, workers: dict[str, Any], answer: Any = None, error: Any = None) -> None:
        self.workers, self.answer, self.error = workers, answer, error

    def scheduler_info(self, **_: Any) -> Any:
        return {"workers": self.workers}

    def run(self, *_: Any, **__: Any) -> Any:
        return dict.fromkeys(self.workers, self.answer)

    def submit(self, *_: Any, **__: Any) -> Any:
        theirs = SimpleNamespace(status="error", exception=lambda: self.error, release=lambda: None)
        theirs.add_done_callback = lambda call: call(theirs)
        return theirs


@pytest.mark.parametrize(
    ("workers", "answer", "says"),
    [
        ({}, None, r"^--executor dask://x: the cluster has no workers; start some"),
        ({"tcp://a": {"nthreads": 4}}, None, r"^worker 'tcp://a' has 4 threads, and converters bear one"),
        ({"tcp://a": {"nthreads": 1}}, ModuleNotFoundError("toolchain"), r"cannot load sora-compile \(ModuleNotFound"),
        ({"tcp://a": {"nthreads": 1}}, ("f", ["has torch 1, not 2"]), r"^worker 'tcp://a' has torch 1, not 2; give"),
        ({"tcp://a": {"nthreads": 1}}, ("f", []), r"wrote to the store what is not seen here; give every worker"),
    ],
)
def test_workers_that_cannot_be_given_work(
    recipe_data: dict[str, Any], tmp_path: Path, workers: Any, answer: Any, says: str
) -> None:
    from toolchain.system.store import Store

    found = cluster.Cluster(FakeClient(workers, answer), "dask://x")
    recipe = Recipe.model_validate(recipe_data)
    with pytest.raises(ResourceError, match=says), found.admitted([recipe], Store(tmp_path)):
        pass


def test_workers_that_died(wanted: Expected) -> None:
    from distributed import KilledWorker

    last: Any = SimpleNamespace(address="tcp://a:1")
    found = cluster.Cluster(FakeClient({}, error=KilledWorker("key", last, 3)), "dask://x")
    found._expected = wanted
    task = Task("{}", "/", "/", False, "vae", "decoder", "artifact", "key", 0)
    future: Future[Any] = found.submit(abs, task)
    with pytest.raises(ResourceError, match=r"^vae/decoder: 4 workers died of it, the last was 'tcp://a:1', as"):
        future.result(10)


@pytest.mark.parametrize(("limits", "most"), [((1, 5), 5), ((1, 0), None)])
def test_the_memory_of_workers(limits: tuple[int, ...], most: int | None) -> None:
    workers = {f"tcp://{i}": {"memory_limit": limit} for i, limit in enumerate(limits)}
    assert cluster.Cluster(FakeClient(workers), "dask://x").most_bytes == most
