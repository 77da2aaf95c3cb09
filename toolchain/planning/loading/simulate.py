"""Discrete-event simulation of a loading plan: one loader, one computer, at work at the same time.

While both work, each may be slower than alone: with ``overlap_loss`` λ, 0 … 1, each makes 1 / (1 + λ) of its progress,
so that a second of loading hidden behind computing still costs λ seconds (α of On-device Sora, see
:mod:`toolchain.planning.loading.paper`). In the plane of work done by the one and by the other the way is the same
for every λ; with T at λ = 0 and S all loads and calls one after the other, the total is (1 - λ) · T + λ · S.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from toolchain.planning.loading.events import LoadingPlan
from toolchain.planning.loading.jobs import Jobs, jobs_of
from toolchain.planning.loading.run import Run


@dataclass(frozen=True)
class Span:
    """One load, or one call: ``function`` and ``call``, its place in the run, are of calls alone."""

    kind: Literal["load", "run"]
    block: str
    start_s: float
    end_s: float
    function: str | None = None
    call: int | None = None


@dataclass(frozen=True)
class Timeline:
    """What a plan leads to."""

    loads: tuple[Span, ...]
    runs: tuple[Span, ...]
    memory: tuple[tuple[float, int], ...]
    """``(from when, bytes)``: weights loaded or being loaded, activations, and values that live between calls."""
    peak_bytes: int

    @property
    def total_s(self) -> float:
        return self.runs[-1].end_s

    @property
    def stalls_s(self) -> tuple[float, ...]:
        """By call, how long the computer waited before it."""
        ends = (0.0, *(r.end_s for r in self.runs))
        return tuple(r.start_s - end for r, end in zip(self.runs, ends, strict=False))


def simulate(run: Run, plan: LoadingPlan, overlap_loss: float = 0.0) -> Timeline:
    """Follow ``plan``'s events with the times of ``run``.

    Raises:
        BundleError: the plan is not one for this run; names the event. A plan over its budget is none of these: the
            timeline's peak says so.
        ValueError: ``overlap_loss`` is not within 0 … 1.
    """
    if not 0 <= overlap_loss <= 1:
        raise ValueError(f"overlap_loss is {overlap_loss}; it has to be within 0 … 1")
    return _Simulation(jobs_of(run, plan), 1 + overlap_loss).timeline()


class _Simulation:
    def __init__(self, jobs: Jobs, slower: float) -> None:
        self.loads, self.runs, self.slower = jobs.loads, jobs.runs, slower
        self.now, self.bytes, self.peak = 0.0, 0, 0
        self.memory: list[tuple[float, int]] = []
        self.load_spans: list[Span] = []
        self.run_spans: list[Span] = []

    def timeline(self) -> Timeline:
        loading = running = math.inf  # seconds of work that are left; infinite when idle
        load_start = run_start = 0.0
        while len(self.run_spans) < len(self.runs):
            loads_done, runs_done = len(self.load_spans), len(self.run_spans)
            if loading == math.inf and loads_done < len(self.loads) and self.loads[loads_done].after_runs <= runs_done:
                loading, load_start = self.loads[loads_done].block.load_s, self.now
                self._hold(self.loads[loads_done].block.weight_bytes)
            if running == math.inf and self.runs[runs_done].after_loads <= loads_done:
                call = self.runs[runs_done].call
                running, run_start = call.compute_s, self.now
                before = self.runs[runs_done - 1].call.live_bytes if runs_done else 0
                self._hold(call.live_bytes - before + call.activation_bytes)
            work = min(loading, running)
            self.now += work * (self.slower if max(loading, running) < math.inf else 1.0)
            loading, running = loading - work, running - work
            if running == 0:
                self._end_run(run_start)
                running = math.inf
            if loading == 0:
                self.load_spans.append(Span("load", self.loads[loads_done].block.name, load_start, self.now))
                loading = math.inf
        return Timeline(tuple(self.load_spans), tuple(self.run_spans), tuple(self.memory), self.peak)

    def _end_run(self, start_s: float) -> None:
        index = len(self.run_spans)
        run = self.runs[index]
        self.run_spans.append(Span("run", run.call.block, start_s, self.now, run.call.function, index))
        last = run.call.live_bytes if index == len(self.runs) - 1 else 0
        self._hold(-sum(b.weight_bytes for b in run.freed) - run.call.activation_bytes - last)

    def _hold(self, bytes_: int) -> None:
        self.bytes += bytes_
        self.peak = max(self.peak, self.bytes)
        if self.memory and self.memory[-1][0] == self.now:
            self.memory.pop()
        self.memory.append((self.now, self.bytes))
