"""Many builds at once: each as it would be alone, what they share made once, and one that fails spoils no other."""

from __future__ import annotations

import json
import os
import shutil
import signal
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from safetensors.torch import load_file, save_file
from support import contents, write_project

import toolchain
from toolchain.build.cluster import admitted
from toolchain.build.executors import executor_of
from toolchain.build.spent import Record
from toolchain.errors import AccuracyError, RecipeError
from toolchain.formats.matrix import load_matrix
from toolchain.system.events import process_name
from toolchain.system.store import Store

pytestmark = pytest.mark.slow

CHEAP = {"transformer.passes": ["partition"], "sampler.merged_steps": 0}
"""One function, which takes the least time."""


def counts(store: Store) -> Counter[str]:
    return Counter(e.kind for e in store.entries())


def alone(matrix: Path, out: str, folder: Path, store: Store) -> toolchain.Bundle:
    """One build of a matrix, by itself and in this process."""
    build = next(b for b in load_matrix(matrix, CHEAP) if b.name.endswith(out))
    return toolchain.compile_recipe(build.recipe, folder, base=build.base, store=store)


@pytest.fixture(scope="module")
def project(one_pair: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A recipe and three checkpoints of one model."""
    project = write_project(tmp_path_factory.mktemp("matrix") / "project", one_pair)
    weights = load_file(project / "checkpoint/model.safetensors")
    for name, factor in (("second", 1.01), ("third", 0.99)):
        shutil.copytree(project / "checkpoint", project / name)
        save_file({k: v * factor for k, v in weights.items()}, project / name / "model.safetensors")
    return project


def matrix_of(project: Path, out: Path, **axes: Any) -> Path:
    data = {"recipes": ["recipe.yaml"], "axes": axes, "out": "-".join([f"{out}/b", *(f"{{{a}}}" for a in axes)])}
    path = out / "matrix.yaml"
    path.write_text(yaml.safe_dump(data | {"recipes": [str(project / "recipe.yaml")]}, sort_keys=False))
    return path


CHECKPOINTS = {n: {"transformer.checkpoint": n} for n in ("checkpoint", "second", "third")}


# --- in one process ----------------------------------------------------------------------------------


def test_one_that_fails(run_cli: Any, project: Path, tmp_path: Path) -> None:
    """Without --keep-going nothing after it is made; with it the others are, and the exit code is its own."""
    gates = {"strict": {"gate.max_relative_error": {"float32": 1e-12}}, "usual": {}}
    matrix = matrix_of(project, tmp_path, gate=gates)
    store = Store(tmp_path / "cache")
    says = rf"^{tmp_path}/b-strict: transformer: block '\w+'"
    with pytest.raises(AccuracyError, match=says):
        toolchain.build_all(matrix, store=store, changes=CHEAP)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["cache", "matrix.yaml"]
    text = matrix.read_text() + "\n"
    recipe = yaml.safe_load((project / "recipe.yaml").read_text())
    recipe["transformer"] |= {"passes": ["partition"], "checkpoint": str(project / "checkpoint")}
    recipe["sampler"]["merged_steps"] = 0
    (tmp_path / "cheap.yaml").write_text(yaml.safe_dump(recipe))
    matrix.write_text(text.replace(str(project / "recipe.yaml"), "cheap.yaml"))
    env = {"SORA_COMPILE_CACHE": str(store.root)}
    ran = run_cli("build-all", matrix, "--keep-going", "--json", cwd=tmp_path, env=env)
    answer = json.loads(ran.out)
    assert (ran.code, answer["exit_code"]) == (5, 5)
    failed, made = answer["builds"]
    assert failed["error"].startswith(f"{tmp_path}/b-strict: transformer: block '")
    assert f"failed: {failed['error']}" in ran.err
    assert (made["bundle"], made["target"], made["choices"]["gate"]) == (f"{tmp_path}/b-usual", "onnx", "usual")
    assert not (tmp_path / "b-strict").exists()
    toolchain.load_bundle(tmp_path / "b-usual").check_files()


def test_a_mistake_in_any_is_said_before_anything_is_built(run_cli: Any, project: Path, tmp_path: Path) -> None:
    matrix = matrix_of(project, tmp_path, checkpoint=CHECKPOINTS | {"fourth": {"transformer.checkpoint": "none"}})
    ran = run_cli("build-all", matrix, cwd=tmp_path, env={"SORA_COMPILE_CACHE": str(tmp_path / "cache")})
    assert ran.code == 3
    assert ran.err.startswith(f"sora-compile: {tmp_path}/b-fourth: checkpoint 'none' does not exist: looked for")
    assert {e.kind for e in Store(tmp_path / "cache").entries()} <= {"imports"}
    matrix = matrix_of(project, tmp_path, device={"phone": {"device": "iphone-15-prow"}})
    with pytest.raises(RecipeError, match=rf"^{tmp_path}/b-phone: unknown device 'iphone-15-prow'; near ones are iph"):
        toolchain.build_all(matrix, store=Store(tmp_path / "cache"))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["cache", "matrix.yaml"]


# --- on a cluster ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def cluster() -> Iterator[Any]:
    """A scheduler and two workers, processes of this machine, as somebody else's."""
    from distributed import LocalCluster

    options: Any = {"n_workers": 2, "threads_per_worker": 1, "processes": True, "dashboard_address": None}
    with LocalCluster(**options) as cluster:
        yield cluster


def address(cluster: Any) -> str:
    return f"dask://{cluster.scheduler_address.removeprefix('tcp://')}"


class Killer(Record):
    """Kills one of a cluster's processes when some tasks are done."""

    def __init__(self, cluster: Any, after: int) -> None:
        super().__init__()
        self.tasks, self.cached, self.killed = 0, 0, 0
        self._after = after
        self._process = next(iter(cluster.workers.values())).process.pid

    def lined_up(self, tasks: int, cached: int) -> None:
        self.tasks, self.cached = tasks, cached

    def task_done(self, done: int, tasks: int) -> None:
        if done == self._after:
            os.kill(self._process, signal.SIGKILL)
            self.killed += 1


def test_a_matrix_on_a_cluster(cluster: Any, project: Path, tmp_path: Path) -> None:
    """One of two workers is killed halfway. Templates are lowered once, and every bundle is what it is alone."""
    targets = {"onnx": {"target": "onnx"}, "coreml": {"target": "coreml", "gate.mode": "none"}}
    matrix = matrix_of(project, tmp_path, checkpoint=CHECKPOINTS, target=targets)
    store, killer = Store(tmp_path / "store"), Killer(cluster, 4)
    outcomes = toolchain.build_all(matrix, executor=address(cluster), store=store, changes=CHEAP, listener=killer)
    names = [o.name.removeprefix(f"{tmp_path}/b-") for o in outcomes]
    assert names == [f"{c}-{t}" for c in CHECKPOINTS for t in targets]
    # four blocks of four structures, twice; three checkpoints of each; one gate for each checkpoint's ONNX
    assert (killer.tasks, killer.cached, killer.killed) == (8 + 24 + 3, 0, 1)
    assert (counts(store)["templates"], counts(store)["artifacts"]) == (8, 24)
    # whoever is killed may leave an empty lock, which is removed when it is old
    assert [p.name for p in (store.root / "scratch").iterdir() if p.suffix != ".lock"] == []
    told = [e for e in killer.ended if e.what.kind in ("template", "artifact")]
    assert len({e.key for e in told}) == 8 + 24
    assert process_name() not in {e.process for e in told}
    own = Store(tmp_path / "own")
    for name in ("third-onnx", "second-coreml"):
        alone(matrix, name, tmp_path / f"alone-{name}", own)
        assert contents(tmp_path / f"alone-{name}") == contents(tmp_path / f"b-{name}")


def test_a_task_that_is_cancelled(cluster: Any, project: Path, tmp_path: Path) -> None:
    """What was not begun is not done, and the cluster goes on."""
    recipe = toolchain.load_recipe(project / "recipe.yaml")
    with executor_of(address(cluster), 1) as runner, admitted(runner, [recipe], Store(tmp_path)):
        assert runner is not None
        running = [runner.submit(time.sleep, 1) for _ in range(2)]
        waiting = [runner.submit(Path.touch, tmp_path / f"done-{i}") for i in range(8)]
        assert all(future.cancel() for future in waiting)
        assert [future.result(30) for future in running] == [None, None]
        assert runner.submit(abs, -1).result(30) == 1
    assert not list(tmp_path.glob("done-*"))
    with executor_of(address(cluster), 1) as runner, admitted(runner, [recipe], Store(tmp_path)):
        assert runner is not None and runner.submit(abs, -2).result(30) == 2
