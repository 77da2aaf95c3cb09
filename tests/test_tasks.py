"""Tasks and how they are handed out: dependencies, limits, and every way in which an executor can fail."""

from __future__ import annotations

import copyreg
import importlib
import os
import pickle
import pkgutil
import signal
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

import toolchain
from toolchain.build import parallel, tasks
from toolchain.build.admission import Admission
from toolchain.build.executors import OwnProcesses
from toolchain.build.parallel import ElsewhereError, Order, Parallel
from toolchain.build.tasks import Task, recipe_for_tasks, run_task
from toolchain.errors import LoweringError, ResourceError, SoraCompileError
from toolchain.formats.recipe import Recipe
from toolchain.system.events import Event, telling
from toolchain.system.store import NewEntry, Store

# --- a build of nothing ------------------------------------------------------------------------------

BLOCKS = {"first": "s", "second": "s", "third": "t", "fourth": "t", "fifth": "u"}
"""Names of blocks, and their structures."""


class FakeBuilder:
    """Makes empty entries; keys are names."""

    def __init__(self, store: Store, direct: bool = False, unbound: bool = False) -> None:
        self.store, self.direct, self.unbound = store, direct, unbound
        self.plan = SimpleNamespace(blocks=[SimpleNamespace(name=n, parameters=10) for n in BLOCKS])

    def template_key(self, block: Any) -> str:
        return f"template-{BLOCKS[block.name]}"

    def artifact_key(self, block: Any) -> str:
        return f"artifact-{block.name}"

    def template(self, block: Any) -> Any:
        meta = {"unbound": "no reason"} if self.unbound else {}
        return self.store.get_or_make("templates", self.template_key(block), lambda _: NewEntry(meta))

    def artifact(self, block: Any) -> Any:
        return self.store.get_or_make("artifacts", self.artifact_key(block), lambda _: NewEntry())


class Fake:
    """A build whose tasks are noted instead of run."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch, **options: bool) -> None:
        self.store = Store(folder / "store")
        self.builder = FakeBuilder(self.store, **options)
        self.begun: list[Task] = []
        self.done: list[tuple[str, str]] = []
        self.most = 0
        self.change: Callable[[Task], object] = lambda task: None
        self._running, self._lock = 0, threading.Lock()
        monkeypatch.setattr(parallel, "recipe_for_tasks", lambda recipe, base: "recipe")
        monkeypatch.setattr(parallel, "run_task", self.run)

    def run(self, task: Task) -> tuple[()]:
        with self._lock:
            self._running += 1
            self.most = max(self.most, self._running)
            self.begun.append(task)
        self.change(task)
        block = SimpleNamespace(name=task.block)
        if task.kind != "gate":
            self.builder.template(block) if task.kind == "template" else self.builder.artifact(block)
        with self._lock:
            self._running -= 1
            self.done.append((task.kind, task.block))
        return ()

    def order(self, name: str = "", **gates: str) -> Order:
        builders: Any = {"transformer": self.builder}
        recipe: Any = None
        return Order(recipe, Path(), builders, gates, name)

    def source(
        self, executor: Executor, admission: Admission | None = None, *orders: Order, **options: Any
    ) -> Parallel:
        return Parallel(orders or [self.order()], self.store, executor, admission or Admission(), **options)

    def all(self, source: Parallel) -> list[str]:
        builder: Any = self.builder
        return [source.artifact(builder, b).key for b in builder.plan.blocks]


@pytest.fixture
def fake(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Fake:
    return Fake(tmp_path, monkeypatch)


class Immediate(Executor):
    """Runs a task while it is handed over."""

    def submit(self, fn: Any, /, *args: Any, **kwargs: Any) -> Future[Any]:
        future: Future[Any] = Future()
        try:
            future.set_result(fn(*args, **kwargs))
        except BaseException as e:
            future.set_exception(e)
        return future


@pytest.fixture(params=["one thread", "four threads", "immediate"])
def executor(request: pytest.FixtureRequest) -> Iterator[Executor]:
    threads = {"one thread": 1, "four threads": 4}.get(request.param)
    with Immediate() if threads is None else ThreadPoolExecutor(threads) as executor:
        yield executor


KEYS = [f"artifact-{name}" for name in BLOCKS]


def test_templates_come_before_what_needs_them(fake: Fake, executor: Executor) -> None:
    with fake.source(executor) as source:
        assert fake.all(source) == KEYS
    assert sorted(b for kind, b in fake.done if kind == "artifact") == sorted(BLOCKS)
    for name, structure in BLOCKS.items():
        first = next(n for n, s in BLOCKS.items() if s == structure)
        assert fake.done.index(("template", first)) < fake.done.index(("artifact", name))
    assert len(fake.done) == len(BLOCKS) + len(set(BLOCKS.values()))


def test_what_is_in_the_store_is_not_built(fake: Fake, executor: Executor) -> None:
    blocks = fake.builder.plan.blocks
    fake.builder.artifact(blocks[0])
    fake.builder.template(blocks[2])
    with fake.source(executor) as source:
        assert fake.all(source) == KEYS
    assert ("artifact", "first") not in fake.done
    assert ("template", "third") not in fake.done


def test_many_tasks_on_one_stack(fake: Fake, monkeypatch: pytest.MonkeyPatch) -> None:
    """An executor that runs tasks at once nests no calls."""
    names = {f"block_{i}": f"s{i}" for i in range(600)}
    monkeypatch.setattr("test_tasks.BLOCKS", names)
    fake.builder = FakeBuilder(fake.store)
    with fake.source(Immediate()) as source:
        assert len(fake.all(source)) == 600


@pytest.mark.parametrize("limit", [1, 2, None])
def test_a_limit_of_tasks_at_once(fake: Fake, limit: int | None) -> None:
    started = threading.Barrier(3)

    def meet(task: Task) -> None:
        if task.kind == "template" and limit is None:
            started.wait(10)  # only if all three are handed over

    fake.change = meet
    with ThreadPoolExecutor(8) as executor, fake.source(executor, Admission(at_once=limit)) as source:
        fake.all(source)
    assert fake.most <= (limit or 8)


@pytest.mark.parametrize(("direct", "unbound"), [(True, False), (False, True), (False, False)])
def test_what_lowers_a_block_needs_more_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, direct: bool, unbound: bool
) -> None:
    fake = Fake(tmp_path, monkeypatch, direct=direct, unbound=unbound)
    with fake.source(Immediate()) as source:
        fake.all(source)
    sizes = {t.needed_bytes for t in fake.begun if t.kind == "artifact"}
    factor = parallel.LOWERING_FACTOR if direct or unbound else parallel.STAMPING_FACTOR
    lowering = parallel.needed_bytes(10, factor)
    assert sizes == {lowering}
    assert {t.kind for t in fake.begun} == ({"artifact"} if direct else {"artifact", "template"})


# --- failing -----------------------------------------------------------------------------------------


def test_an_error_reaches_who_waits_and_nothing_more_is_begun(fake: Fake, executor: Executor) -> None:
    def fail(task: Task) -> None:
        raise LoweringError(f"block '{task.block}': no such operator")

    fake.change = fail
    with pytest.raises(LoweringError, match="no such operator"), fake.source(executor, Admission(at_once=1)) as source:
        fake.all(source)
    assert len(fake.begun) == 1


def test_the_callers_executor_goes_on(fake: Fake) -> None:
    """What was not begun is cancelled there, what is not ours is left alone."""
    with ThreadPoolExecutor(1) as executor:
        theirs = executor.submit(threading.Event().wait, 0.3)
        with pytest.raises(KeyboardInterrupt), fake.source(executor):
            also_theirs = executor.submit(lambda: "theirs")
            raise KeyboardInterrupt
        theirs.result(10)
        assert also_theirs.result(10) == "theirs"
    assert fake.begun == []


def test_an_executor_that_was_shut_down(fake: Fake) -> None:
    executor = ThreadPoolExecutor(1)
    executor.shutdown()
    with pytest.raises(RuntimeError, match="after shutdown"), fake.source(executor) as source:
        fake.all(source)


def test_an_executor_that_is_shut_down_meanwhile(fake: Fake) -> None:
    executor, go = ThreadPoolExecutor(1), threading.Event()
    fake.change = lambda task: go.wait(10)
    with (
        pytest.raises(ResourceError, match=r"^transformer/\w+: the executor was shut down"),
        fake.source(executor) as s,
    ):
        executor.shutdown(wait=False, cancel_futures=True)
        go.set()
        fake.all(s)


def kill_myself(_: Task) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def test_a_killed_process_is_an_error_that_names_the_block(fake: Fake, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parallel, "run_task", kill_myself)
    says = r"^transformer/first: a process that built it was killed, as happens when memory is short; use fewer --jobs"
    events: list[Event] = []
    with (
        telling(events.append),
        pytest.raises(ResourceError, match=says),
        fake.source(OwnProcesses(1), Admission(at_once=1)) as source,
    ):
        fake.all(source)
    given, failed = (e for e in events if e.what.kind == "template")
    assert (given.event, failed.event, given.what) == ("given", "failed", failed.what)
    assert failed.error is not None and failed.error.startswith("transformer/first: a process that built it was killed")


def interrupt_myself(task: Task) -> None:
    os.kill(os.getpid(), signal.SIGINT)
    raise LoweringError(f"still here: {task.block}")


def test_our_processes_do_not_hear_interrupts(fake: Fake, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parallel, "run_task", interrupt_myself)
    with pytest.raises(LoweringError, match="still here"), fake.source(OwnProcesses(1), Admission(at_once=1)) as source:
        fake.all(source)


# --- several builds -----------------------------------------------------------------------------------


class Counted(toolchain.Listener):
    def __init__(self) -> None:
        self.said: list[tuple[int, int]] = []

    def lined_up(self, tasks: int, cached: int) -> None:
        self.said.append((tasks, cached))

    def task_done(self, done: int, tasks: int) -> None:
        self.said.append((done, tasks))


def test_what_several_builds_need_is_made_once(fake: Fake, executor: Executor) -> None:
    listener = Counted()
    fake.builder.artifact(fake.builder.plan.blocks[0])
    orders = (
        fake.order("a", transformer="same"),
        fake.order("b", transformer="same"),
        fake.order("c", transformer="own"),
    )
    with fake.source(executor, None, *orders, listener=listener) as source:
        assert fake.all(source) == KEYS
        source.gate("same")
        source.gate("own")
        source.gate(None)
    tasks_ = len(BLOCKS) - 1 + len(set(BLOCKS.values())) + 2
    assert sorted(listener.said, key=lambda s: s[1] == tasks_) == [
        (tasks_, 1),
        *((n + 1, tasks_) for n in range(tasks_)),
    ]
    assert len(fake.begun) == len({(t.kind, t.key) for t in fake.begun}) == tasks_
    gates = [i for i, (kind, _) in enumerate(fake.done) if kind == "gate"]
    assert gates == [tasks_ - 2, tasks_ - 1]  # when all artifacts are there


def test_going_on_when_a_task_fails(fake: Fake, executor: Executor) -> None:
    """What needs it fails of the same; everything else is made."""

    def fail(task: Task) -> None:
        if (task.kind, task.block) == ("template", "third"):
            raise LoweringError("no such operator")

    fake.change = fail
    builder: Any = fake.builder
    with fake.source(executor, None, fake.order("a", transformer="g"), keep_going=True) as source:
        for block in builder.plan.blocks:
            if BLOCKS[block.name] == "t":
                with pytest.raises(LoweringError, match="no such operator"):
                    source.artifact(builder, block)
            else:
                assert source.artifact(builder, block).key == f"artifact-{block.name}"
        with pytest.raises(LoweringError, match="no such operator"):
            source.gate("g")


def test_a_build_that_stops_because_another_failed(fake: Fake) -> None:
    other = FakeBuilder(fake.store)
    other.plan = SimpleNamespace(blocks=[SimpleNamespace(name="sixth", parameters=10)])
    builders: Any = {"vae": other}
    recipe: Any = None
    last = Order(recipe, Path(), builders, {}, "b")
    BLOCKS["sixth"] = "v"

    def fail(task: Task) -> None:
        if task.component == "vae":
            raise LoweringError("no such operator")
        threading.Event().wait(0.05)

    fake.change = fail
    try:
        with (
            ThreadPoolExecutor(1) as executor,
            pytest.raises(ElsewhereError) as caught,
            fake.source(executor, Admission(at_once=1), fake.order("a"), last) as source,
        ):
            fake.all(source)
    finally:
        del BLOCKS["sixth"]
    assert (caught.value.build, str(caught.value.error)) == ("b", "no such operator")


def test_a_task_that_needs_more_memory_than_there_is(fake: Fake) -> None:
    says = r"^transformer/\w+: needs about 0.9 GB of memory and may have 0.1 GB; give processes more, or cut smaller"
    with pytest.raises(ResourceError, match=says), fake.source(Immediate(), most_bytes=10**8):
        pass
    assert fake.begun == []


# --- errors between processes ------------------------------------------------------------------------


def all_errors(base: type[BaseException]) -> set[type[BaseException]]:
    return {base, *(e for sub in base.__subclasses__() for e in all_errors(sub))}


def test_every_error_survives_pickling() -> None:
    for module in pkgutil.walk_packages(toolchain.__path__, "toolchain."):
        importlib.import_module(module.name)
    errors = all_errors(SoraCompileError)
    assert len(errors) >= 7
    for error in errors:
        again = pickle.loads(pickle.dumps(error("what, where, what to do")))
        assert (type(again), str(again)) == (error, "what, where, what to do")


class UnreadableError(Exception):
    """Cannot be made from its message alone, as errors of some libraries."""

    def __init__(self, code: int, *, text: str) -> None:
        super().__init__(f"{code}: {text}")


@pytest.mark.parametrize(
    ("error", "seen"),
    [
        (UnreadableError(7, text="odd"), (RuntimeError, "UnreadableError: 7: odd")),
        (LoweringError("block"), (LoweringError, "block")),
    ],
)
def test_errors_that_cannot_be_handed_over(
    monkeypatch: pytest.MonkeyPatch, error: Exception, seen: tuple[type[Exception], str]
) -> None:
    def fail(_: Task) -> None:
        raise error

    monkeypatch.setattr(tasks, "_prepared", fail)
    monkeypatch.delitem(copyreg.dispatch_table, type(error), raising=False)  # Dask's libraries teach it, where loaded
    with pytest.raises(seen[0]) as caught:
        run_task(Task("", "/", "/", False, "transformer", "pair", "artifact", "", 0))
    assert (type(caught.value), str(caught.value)) == seen


def test_a_process_that_would_build_something_else(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    opened: list[str] = []

    def open_(recipe: str, base: str, store: str, direct: bool) -> Any:
        opened.append(recipe)
        builder: Any = FakeBuilder(Store(tmp_path))
        planned: Any = None
        return tasks.Opened(planned, {"transformer": builder})

    open_.cache_clear = lambda: None  # type: ignore[attr-defined]
    monkeypatch.setattr(tasks, "_opened", open_)
    fits = Task("{}", "/", str(tmp_path), False, "transformer", "first", "artifact", "artifact-first", 0)
    run_task(fits)
    assert opened == ["{}"]
    other = Task("{}", "/", str(tmp_path), False, "transformer", "first", "artifact", "another key", 0)
    with pytest.raises(
        ResourceError, match=r"^transformer/first: a process on '.*' would build something else.*same installation"
    ):
        run_task(other)
    assert opened == ["{}"] * 3  # it looked again, in case files have changed


def test_a_task_is_plain(recipe_data: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And its recipe finds its checkpoint wherever it is read."""
    (tmp_path / "checkpoint").mkdir()
    monkeypatch.chdir(tmp_path)
    text = recipe_for_tasks(Recipe.model_validate(recipe_data), Path())
    task = Task(text, str(tmp_path), "/store", False, "transformer", "pair_0", "template", "key", 1)
    assert pickle.loads(pickle.dumps(task)) == task
    assert Recipe.model_validate_json(task.recipe).transformer.checkpoint == str(tmp_path / "checkpoint")
    monkeypatch.chdir("/")
    assert recipe_for_tasks(Recipe.model_validate_json(text), Path()) == text
