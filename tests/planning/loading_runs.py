"""Runs for the tests of loading plans, and two ways to hold a plan that share no code with the planner."""

from __future__ import annotations

from itertools import combinations, pairwise

from hypothesis import strategies as st

from toolchain.planning.loading.events import Execute, Free, Load, LoadingPlan
from toolchain.planning.loading.run import Block, Call, Phase, Run
from toolchain.planning.loading.simulate import Timeline


@st.composite
def runs(draw: st.DrawFn, most_blocks: int = 4, most_calls: int = 9, most_times: int = 3) -> Run:
    """Small runs: unequal blocks, phases that repeat, activations, values that live on. Times are whole numbers."""
    count = draw(st.integers(1, most_blocks))
    seconds = st.integers(0, 12).map(float)
    blocks = tuple(Block(f"b{i}", draw(st.integers(1, 9)), draw(seconds)) for i in range(count))
    left, phases = most_calls, []
    for name in ("first", "second", "third")[: draw(st.integers(1, 3))]:
        times = draw(st.integers(1, most_times))
        if left // times < 1:
            break
        length = draw(st.integers(1, min(left // times, count + 1)))
        whose = st.one_of(st.just(None), st.integers(0, count - 1))
        calls = []
        for k in range(length):
            picked = draw(whose)
            block = blocks[(k if picked is None else picked) % count].name
            bytes_ = st.integers(0, 4)
            calls.append(Call(block, draw(st.sampled_from("fg")), draw(seconds), draw(bytes_), draw(bytes_)))
        phases.append(Phase(name, tuple(calls), times))
        left -= times * length
    return Run(blocks, tuple(phases))


def uniform(blocks: int, load_s: float, compute_s: float, times: int, weight_bytes: int = 10) -> Run:
    """A loop of equal blocks, without activations."""
    return Run(
        tuple(Block(f"b{i}", weight_bytes, load_s) for i in range(blocks)),
        (Phase("step", tuple(Call(f"b{i}", "base", compute_s) for i in range(blocks)), times),),
    )


def check(run: Run, plan: LoadingPlan, timeline: Timeline) -> None:
    """Replay what happened, moment by moment; fails unless everything was where it had to be and as the plan says."""
    calls = list(run.calls())
    events = list(plan.events())
    loads = [e.block for e in events if isinstance(e, Load)]
    assert [s.block for s in timeline.loads] == loads
    assert [(s.block, s.function) for s in timeline.runs] == [(c.block, c.function) for c in calls]
    for spans in (timeline.loads, timeline.runs):
        assert all(s.start_s <= s.end_s for s in spans)
        assert all(a.end_s <= b.start_s for a, b in pairwise(spans)), "one at a time, in order"
    # when each load's bytes are taken and given back, and that it is used in between
    load = run_ = -1
    taken: dict[str, float] = {}
    used: set[str] = set()
    weights: list[tuple[float, float, int]] = []
    for event in events:
        if isinstance(event, Load):
            load += 1
            assert event.block not in taken
            earliest = timeline.runs[run_].end_s if run_ >= 0 else 0.0
            assert timeline.loads[load].start_s >= earliest, "what was freed before it has to be free"
            taken[event.block] = timeline.loads[load].start_s
        elif isinstance(event, Execute):
            run_ += 1
            loaded = next(s for s in reversed(timeline.loads[: load + 1]) if s.block == event.block)
            assert event.block in taken and loaded.end_s <= timeline.runs[run_].start_s, "resident when it runs"
            used.add(event.block)
        else:
            assert isinstance(event, Free)
            assert event.block in used, "a load that nothing needed"
            used.discard(event.block)
            weights.append((taken.pop(event.block), timeline.runs[run_].end_s, run.by_name[event.block].weight_bytes))
    assert not taken, "what is loaded is freed in the end"
    # memory at every moment at which something begins, and in the middle between any two
    moments = sorted({s.start_s for s in (*timeline.loads, *timeline.runs)} | {s.end_s for s in timeline.runs})
    moments += [(a + b) / 2 for a, b in pairwise(moments)]
    for t in moments:
        total = sum(size for start, end, size in weights if start <= t < end)
        for i, span in enumerate(timeline.runs):
            until = timeline.runs[i + 1].start_s if i + 1 < len(calls) else span.end_s
            total += calls[i].live_bytes if span.start_s <= t < until else 0
            total += calls[i].activation_bytes if span.start_s <= t < span.end_s else 0
        assert total <= plan.budget_bytes
        assert total <= timeline.peak_bytes
        assert total == next((held for since, held in reversed(timeline.memory) if since <= t), 0)


def faster_plan_s(run: Run, budget: int, overlap_loss: float, than_s: float) -> float | None:
    """Time of a plan that takes less than ``than_s``, found by trying everything; None if there is none.

    That is every order of loads, and any choice of what to free after a call. What cannot end in time is left out, by
    what is yet to compute and to load at least.
    """
    calls = list(run.calls())
    live = [0, *(c.live_bytes for c in calls)]
    room = [max(live[i], c.live_bytes + c.activation_bytes) for i, c in enumerate(calls)]
    later = [{c.block for c in calls[i:]} for i in range(len(calls) + 1)]
    compute = [sum(c.compute_s for c in calls[i:]) for i in range(len(calls) + 1)]

    tried: set[object] = set()

    def go(
        i: int, ready: dict[str, float], unused: set[str], loader: float, computer: float, work: float
    ) -> float | None:
        # what was ready before the computer is as good as ready now; the same state need not be tried twice
        ready, loader = {b: max(t, computer) for b, t in ready.items()}, max(loader, computer)
        state = (i, frozenset(ready.items()), frozenset(unused), loader, computer, work)
        if state in tried:
            return None
        tried.add(state)
        missing = sum(run.by_name[b].load_s for b in later[i] - ready.keys())
        least = max(computer + compute[i], loader + missing)
        total = (1 - overlap_loss) * least + overlap_loss * (compute[0] + work + missing)
        if total >= than_s:
            return None
        if i == len(calls):
            return total
        used = room[i] + sum(run.by_name[b].weight_bytes for b in ready)
        if used > budget:
            return None
        call = calls[i]
        if call.block in ready:
            end = max(computer, ready[call.block]) + call.compute_s
            still = unused - {call.block}
            free = [b for b in ready if b not in still]
            for n in range(len(free) + 1):
                for freed in combinations(free, n):
                    left = {b: t for b, t in ready.items() if b not in freed}
                    found = go(i + 1, left, still, loader, end, work)
                    if found is not None:
                        return found
        for name in sorted(later[i] - ready.keys()):
            block = run.by_name[name]
            if used + block.weight_bytes <= budget:
                done = max(loader, computer) + block.load_s
                found = go(i, ready | {name: done}, unused | {name}, done, computer, work + block.load_s)
                if found is not None:
                    return found
        return None

    return go(0, {}, set(), 0.0, 0.0, 0.0)
