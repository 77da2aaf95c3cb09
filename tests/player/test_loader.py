"""The loader by itself: plans that are followed with engines that are none."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Mapping
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.planning.loading_runs import runs
from toolchain.errors import BundleError, LoweringError, ResourceError, SoraCompileError
from toolchain.planning.loading.events import Execute, Free, Load, LoadingPlan, Section
from toolchain.planning.loading.planner import plan_loading
from toolchain.planning.loading.run import Block, Call, Phase, Run
from toolchain.planning.loading.simulate import Span, Timeline
from toolchain.planning.loading.unrolled import unroll
from toolchain.player.loader import Loader
from toolchain.player.trace import Trace

NOTHING: Mapping[str, torch.Tensor] = {}


class Storage:
    """Where fake engines come from: which are open and what was asked; each way takes ``load_s`` and ``run_s``."""

    def __init__(self, load_s: float = 0.0, run_s: float = 0.0, failures: Mapping[str, list[Exception]] | None = None):
        self.load_s, self.run_s = load_s, run_s
        self.failures = {k: list(v) for k, v in (failures or {}).items()}
        self.opened: list[tuple[str, str]] = []
        self.alive: set[str] = set()
        self.opening = threading.Lock()

    def open(self, block: str, function: str) -> FakeEngine:
        assert self.opening.acquire(blocking=False), "two loads at once"
        try:
            assert threading.current_thread() is not threading.main_thread()
            time.sleep(self.load_s)
            if self.failures.get(block):
                raise self.failures[block].pop(0)
            assert block not in self.alive, "freed before it is loaded again"
            self.opened.append((block, function))
            return FakeEngine(block, self)
        finally:
            self.opening.release()


class FakeEngine:
    """Alive until nothing refers to it any more."""

    def __init__(self, block: str, storage: Storage) -> None:
        self.block, self.storage = block, storage
        storage.alive.add(block)

    def __call__(self, function: str, inputs: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        time.sleep(self.storage.run_s)
        return dict(inputs)

    def __del__(self) -> None:
        self.storage.alive.discard(self.block)


def small(steps: int = 3, blocks: int = 7) -> Run:
    """A text encoder, steps of a transformer, a decoder: more blocks than are planned exactly, which takes long.

    A block has ten bytes of weights and two of activations; one lives between calls.
    """
    names = ["text/t", *(f"net/b{i}" for i in range(blocks)), "vae/v0", "vae/v1"]
    step = tuple(Call(f"net/b{i}", "base", 1.0, 2, 1) for i in range(blocks))
    return Run(
        tuple(Block(n, 10, 1.0) for n in names),
        (
            Phase("text", (Call("text/t", "base", 1.0, 2, 1),)),
            Phase("step", step, steps),
            Phase("decode", (Call("vae/v0", "base", 1.0, 2, 1), Call("vae/v1", "base", 1.0, 2, 1)), 2),
        ),
    )


@pytest.fixture(autouse=True)
def no_thread_is_left() -> Iterator[None]:
    before = threading.active_count()
    yield
    assert threading.active_count() == before


def follow(loader: Loader, run: Run) -> None:
    with loader:
        component = ""
        for call in run.calls():
            if call.block.partition("/")[0] != component:
                component = call.block.partition("/")[0]
                loader.enter(component)
            loader.call(call.block, call.function, NOTHING)


def timeline(trace: Trace) -> Timeline:
    """What was recorded as the simulator would give it. A load's bytes are taken before its span begins."""

    def spans(category: str) -> tuple[Span, ...]:
        found = [r for r in trace.records if r.category == category]
        return tuple(Span(r.category, r.block, r.start_s, r.end_s, r.function) for r in found)

    return Timeline(spans("load"), spans("run"), tuple(trace.memory), max(b for _, b in trace.memory))


# --- order and memory --------------------------------------------------------------------------------


@pytest.mark.parametrize("budget", [13, 23, 37, 110])
@pytest.mark.parametrize(("load_s", "run_s"), [(0.0, 0.0), (0.004, 0.0), (0.0, 0.004), (0.003, 0.002)])
def test_a_plan_is_followed_however_long_things_take(budget: int, load_s: float, run_s: float) -> None:
    run, storage, trace = small(), Storage(load_s, run_s), Trace()
    plan = plan_loading(run, budget).plan
    loader = Loader(run, plan, storage.open, trace)
    follow(loader, run)
    assert [b for b, _ in storage.opened] == [e.block for e in plan.events() if isinstance(e, Load)]
    assert storage.alive == set()
    held = timeline(trace)
    assert held.peak_bytes <= budget
    assert held.memory[-1][1] == 0
    obeys(run, plan, held)
    played = loader.played()
    assert played.peak_bytes == held.peak_bytes
    assert (played.calls, played.loads, played.retries) == (len(held.runs), len(held.loads), 0)
    assert played.loads_bytes == 10 * len(held.loads)
    assert played.total_s >= max(played.compute_s, played.stalls_s)
    assert played.compute_s == sum(s.end_s - s.start_s for s in held.runs)


def obeys(run: Run, plan: LoadingPlan, played: Timeline) -> None:
    """One at a time and in order; each load after the calls that it has to wait for, each call after its load."""
    loads, calls = iter(played.loads), iter(played.runs)
    for spans in (played.loads, played.runs):
        assert all(a.end_s <= b.start_s for a, b in pairwise(spans))
    ended, loaded = 0.0, dict[str, float]()
    for event in plan.events():
        if isinstance(event, Load):
            span = next(loads)
            assert span.start_s >= ended
            loaded[event.block] = span.end_s
        elif isinstance(event, Execute):
            span = next(calls)
            assert (span.block, span.function) == (event.block, event.function)
            assert span.start_s >= loaded[event.block]
            ended = span.end_s
    assert next(loads, None) is next(calls, None) is None


@settings(max_examples=60, deadline=None)
@given(runs(), st.integers(0, 40), st.data())
def test_any_plan_is_followed(run: Run, more: int, data: st.DataObject) -> None:
    run = Run(
        tuple(Block(f"c/{b.name}", b.weight_bytes, b.load_s) for b in run.blocks),
        tuple(
            Phase(
                p.name,
                tuple(Call(f"c/{c.block}", c.function, 0, c.activation_bytes, c.live_bytes) for c in p.calls),
                p.times,
            )
            for p in run.phases
        ),
    )
    plan = plan_loading(run, max(1, unroll(run).least_budget) + more).plan
    pause = data.draw(st.sampled_from([0.0, 0.0003]))
    trace = Trace()
    storage = Storage(pause, data.draw(st.sampled_from([0.0, 0.0003])))
    follow(Loader(run, plan, storage.open, trace), run)
    obeys(run, plan, timeline(trace))
    assert max(b for _, b in trace.memory) <= plan.budget_bytes
    assert storage.alive == set()


def test_loads_and_runs_are_at_the_same_time() -> None:
    run, storage, trace = small(steps=5), Storage(0.02, 0.02), Trace()
    loader = Loader(run, plan_loading(run, 25).plan, storage.open, trace)
    follow(loader, run)
    played = loader.played()
    assert played.load_s > 0.4
    assert played.total_s < 0.75 * (played.load_s + played.compute_s)
    assert played.stalls >= 1
    assert played.stalls_s >= 0.02  # nothing hides the first load


def test_a_block_is_made_ready_for_the_function_that_runs_first() -> None:
    run = Run(
        (Block("c/a", 1, 1.0),),
        (Phase("merged", (Call("c/a", "merged", 1.0),)), Phase("steps", (Call("c/a", "base", 1.0),), 2)),
    )
    storage = Storage()
    follow(Loader(run, plan_loading(run, 1).plan, storage.open, Trace()), run)
    assert storage.opened == [("c/a", "merged")]


# --- failures ----------------------------------------------------------------------------------------


def test_a_load_that_fails_once_is_tried_again() -> None:
    run, storage, trace = small(), Storage(failures={"net/b2": [OSError(5, "Input/output error")]}), Trace()
    loader = Loader(run, plan_loading(run, 110).plan, storage.open, trace)
    follow(loader, run)
    played = loader.played()
    assert (played.retries, played.loads) == (1, 10)
    assert played.peak_bytes <= 110


@pytest.mark.parametrize(
    ("error", "kind", "said"),
    [
        (OSError(5, "Input/output error", "b2.pte"), ResourceError, r"Input/output error: 'b2.pte'"),
        (LoweringError("'b2.pte' is no program"), LoweringError, "'b2.pte' is no program"),
        (MemoryError(), ResourceError, "out of memory"),
    ],
)
def test_a_load_that_fails_twice_is_one_line(error: Exception, kind: type[SoraCompileError], said: str) -> None:
    run, storage = small(), Storage(failures={"net/b2": [error, error]})
    with pytest.raises(kind, match=rf"^'net/b2' cannot be loaded, tried 2 times: .*{said}"):
        follow(Loader(run, plan_loading(run, 30).plan, storage.open, Trace()), run)
    assert [b for b, _ in storage.opened][-1] != "net/b2"


def test_a_bug_in_the_loader_reaches_the_caller() -> None:
    run, storage = small(), Storage(failures={"net/b0": [KeyError("x"), KeyError("x")]})
    with pytest.raises(KeyError):
        follow(Loader(run, plan_loading(run, 30).plan, storage.open, Trace()), run)


def test_an_interrupt_waits_for_no_more_than_the_load_that_goes_on() -> None:
    run, storage = small(steps=50), Storage(load_s=0.05)
    loader = Loader(run, plan_loading(run, 13).plan, storage.open, Trace())
    with pytest.raises(KeyboardInterrupt), loader:
        loader.enter("text")
        loader.call("text/t", "base", NOTHING)
        began = time.monotonic()
        raise KeyboardInterrupt
    assert time.monotonic() - began < 0.5
    assert len(storage.opened) <= 2
    assert storage.alive == set()


def test_a_call_that_fails_ends_the_thread() -> None:
    def broken(block: str, function: str) -> Callable[..., dict[str, torch.Tensor]]:
        def run(function: str, inputs: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
            raise LoweringError("failed when run")

        return run

    run = small()
    with pytest.raises(LoweringError, match="failed when run"):
        follow(Loader(run, plan_loading(run, 110).plan, broken, Trace()), run)


def test_another_call_than_the_plans_is_refused() -> None:
    run = small()
    with Loader(run, plan_loading(run, 110).plan, Storage().open, Trace()) as loader:
        loader.enter("text")
        with pytest.raises(BundleError, match=r"the next call is 'text/t' \(base\), but 'net/b0' \(base\) is to run"):
            loader.call("net/b0", "base", NOTHING)
        loader.enter("vae")
        with pytest.raises(BundleError, match="has no more calls of 'text'"):
            loader.enter("text")


def test_a_plan_over_its_budget_is_refused() -> None:
    run = Run(
        (Block("c/a", 10, 1.0), Block("c/b", 10, 1.0)), (Phase("p", (Call("c/a", "f", 1.0), Call("c/b", "f", 1.0))),)
    )
    events = (Load("c/a"), Load("c/b"), Execute("c/a", "f"), Free("c/a"), Execute("c/b", "f"), Free("c/b"))
    with pytest.raises(BundleError, match="more than its budget"):
        Loader(run, LoadingPlan(19, (Section(1, events),)), Storage().open, Trace())
    Loader(run, LoadingPlan(20, (Section(1, events),)), Storage().open, Trace())


# --- calls that are left out -------------------------------------------------------------------------


def decode(loader: Loader, run: Run) -> None:
    """The last calls of :func:`small`."""
    loader.enter("vae")
    for call in run.phases[-1].calls * 2:
        loader.call(call.block, call.function, NOTHING)


def stayed_within(budget: int, trace: Trace) -> None:
    assert max(b for _, b in trace.memory) <= budget
    assert trace.memory[-1][1] == 0


@pytest.mark.parametrize("budget", [13, 23, 33, 43, 110])
@pytest.mark.parametrize("steps", range(4))
@pytest.mark.parametrize("load_s", [0.0, 0.003])
def test_steps_that_are_left_out(budget: int, steps: int, load_s: float) -> None:
    """As a dynamic leap does: the decoder comes sooner than planned."""
    run, storage, trace = small(steps=4), Storage(load_s), Trace()
    plan = plan_loading(run, budget).plan
    loader = Loader(run, plan, storage.open, trace)
    calls = [c for c in run.calls() if c.block.startswith("net/")][: 7 * steps]
    with loader:
        loader.enter("text")
        loader.call("text/t", "base", NOTHING)
        if calls:
            loader.enter("net")
        for call in calls:
            loader.call(call.block, call.function, NOTHING)
        decode(loader, run)
    assert storage.alive == set()
    stayed_within(budget, trace)
    played = loader.played()
    assert played.calls == 1 + 7 * steps + 4
    assert played.loads == len(storage.opened) <= sum(isinstance(e, Load) for e in plan.events())


@pytest.mark.parametrize("budget", [13, 23, 33, 43, 110])
@pytest.mark.parametrize("left_out", [{1}, {1, 2}, {2, 3}, {1, 3}, {0, 1, 2, 3}], ids=str)
@pytest.mark.parametrize("load_s", [0.0, 0.003])
def test_blocks_of_steps_that_are_left_out(budget: int, left_out: set[int], load_s: float) -> None:
    """As a rule does that looks at each step: all but the first and the last block."""
    run, storage, trace = small(steps=4), Storage(load_s), Trace()
    plan = plan_loading(run, budget).plan
    loader = Loader(run, plan, storage.open, trace)
    with loader:
        loader.enter("text")
        loader.call("text/t", "base", NOTHING)
        loader.enter("net")
        for step in range(4):
            loader.call("net/b0", "base", NOTHING)
            if step in left_out:
                loader.leave_out([f"net/b{i}" for i in range(1, 6)])
            else:
                for i in range(1, 6):
                    loader.call(f"net/b{i}", "base", NOTHING)
            loader.call("net/b6", "base", NOTHING)
        decode(loader, run)
    assert storage.alive == set()
    stayed_within(budget, trace)
    played = loader.played()
    assert played.calls == 1 + 7 * 4 - 5 * len(left_out) + 4
    planned = sum(isinstance(e, Load) for e in plan.events())
    assert played.loads == len(storage.opened) <= planned
    if budget == 13:
        assert played.loads < planned, "loads for these alone that have not begun are left out"


def test_other_calls_than_the_plans_are_not_left_out() -> None:
    run = small()
    with Loader(run, plan_loading(run, 110).plan, Storage().open, Trace()) as loader:
        loader.enter("net")
        with pytest.raises(BundleError, match=r"the next calls are of \['net/b0'\], not of \['net/b1'\], to leave out"):
            loader.leave_out(["net/b1"])


def test_loads_for_calls_that_are_left_out_are_left_out() -> None:
    run, storage = small(steps=6), Storage()
    loader = Loader(run, plan_loading(run, 13).plan, storage.open, Trace())
    with loader:
        loader.enter("vae")  # decoding alone
        for call in run.phases[-1].calls * 2:
            loader.call(call.block, call.function, NOTHING)
    assert {b for b, _ in storage.opened} == {"vae/v0", "vae/v1"}


def test_a_stage_by_itself_loads_nothing_for_the_next() -> None:
    run, storage = small(steps=6), Storage()
    with Loader(run, plan_loading(run, 110).plan, storage.open, Trace()) as loader:
        loader.enter("net", alone=True)
        for call in run.phases[1].calls * 6:
            loader.call(call.block, call.function, NOTHING)
    assert [b for b, _ in storage.opened] == [f"net/b{i}" for i in range(7)]
