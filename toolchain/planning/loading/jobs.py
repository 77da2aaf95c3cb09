"""A plan's events as what each of two threads has to do: loads, calls, and what each of them waits for."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

from toolchain.errors import BundleError
from toolchain.planning.loading.events import Execute, Free, Load, LoadingPlan
from toolchain.planning.loading.run import Block, Call, Run


@dataclass(frozen=True)
class LoadJob:
    """A load, how many calls have to be done before it starts, and the calls that it is for, by their places."""

    block: Block
    after_runs: int
    uses: list[int] = field(default_factory=list)


@dataclass(frozen=True)
class RunJob:
    """A call, how many loads have to be done before it starts, and what is freed when it has ended."""

    call: Call
    after_loads: int
    freed: list[Block] = field(default_factory=list)


@dataclass(frozen=True)
class Jobs:
    """What the loader does and what the computer does, each in order."""

    loads: tuple[LoadJob, ...]
    runs: tuple[RunJob, ...]

    @property
    def peak_bytes(self) -> int:
        """The most bytes held, however long anything takes: all that may be loaded by then counts at every call."""
        peak = live = weights = loaded = 0
        for i, run in enumerate(self.runs):
            while loaded < len(self.loads) and self.loads[loaded].after_runs <= i:
                weights += self.loads[loaded].block.weight_bytes
                loaded += 1
            call = run.call
            peak = max(peak, weights + max(live, call.live_bytes + call.activation_bytes))
            live = call.live_bytes
            weights -= sum(b.weight_bytes for b in run.freed)
        return peak


def jobs_of(run: Run, plan: LoadingPlan) -> Jobs:
    """What following ``plan``'s events means for ``run``.

    Raises:
        BundleError: the plan is not one for this run; names the event. A plan over its budget is none of these:
            :attr:`Jobs.peak_bytes` says so.
    """
    loads: list[LoadJob] = []
    runs: list[RunJob] = []
    held: dict[str, int] = {}  # block → loads that have to be done before it runs
    unused: set[str] = set()
    calls: Iterator[Call] = run.calls()
    for place, event in enumerate(plan.events()):
        where = f"loading plan: event {place}"
        if isinstance(event, Load):
            if event.block not in run.by_name or event.block in held:
                why = "is loaded already" if event.block in held else "is no block"
                raise BundleError(f"{where}: loads '{event.block}', which {why}")
            loads.append(LoadJob(run.by_name[event.block], len(runs)))
            held[event.block] = len(loads)
            unused.add(event.block)
        elif isinstance(event, Free):
            if event.block not in held or event.block in unused:
                why = "has not run since it was loaded" if event.block in held else "is not loaded"
                raise BundleError(f"{where}: frees '{event.block}', which {why}")
            del held[event.block]
            runs[-1].freed.append(run.by_name[event.block])
        else:
            call = _called(event, next(calls, None), held, where)
            loads[held[call.block] - 1].uses.append(len(runs))
            runs.append(RunJob(call, held[call.block]))
            unused.discard(call.block)
    if next(calls, None) is not None:
        raise BundleError(f"loading plan: ends after {len(runs)} calls, but the run has more")
    if unused:
        raise BundleError(f"loading plan: loads '{min(unused)}' at its end, which does not run any more")
    return Jobs(tuple(loads), tuple(runs))


def _called(event: Execute, call: Call | None, held: dict[str, int], where: str) -> Call:
    """The call that ``event`` is, which has to be the run's next."""
    asked = f"'{event.block}' ({event.function})"
    if call is None:
        raise BundleError(f"{where}: runs {asked}, but the run has ended")
    if (event.block, event.function) != (call.block, call.function):
        raise BundleError(f"{where}: runs {asked}, but the next call is '{call.block}' ({call.function})")
    if event.block not in held:
        raise BundleError(f"{where}: runs {asked}, which is not loaded")
    return call
