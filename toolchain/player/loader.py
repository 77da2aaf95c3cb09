"""Follows a loading plan: one thread loads blocks in the plan's order, the caller's thread runs them.

The rules are those of :mod:`toolchain.planning.loading.events`, so what is held never depends on how long anything
takes. A video may need fewer calls than its plan has (a dynamic leap): see :meth:`Loader.enter`.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from types import TracebackType

import torch

from toolchain.errors import BundleError, ResourceError, SoraCompileError
from toolchain.ir.target import Engine
from toolchain.planning.loading.events import LoadingPlan
from toolchain.planning.loading.jobs import LoadJob, jobs_of
from toolchain.planning.loading.run import Block, Run
from toolchain.player.following import Figures
from toolchain.player.trace import Record, Trace

Open = Callable[[str, str], Engine]
"""Loads a block (``COMPONENT/BLOCK``), ready to run a function."""

ATTEMPTS = 2
"""At a load: what fails once is tried again."""


class Loader:
    """Runs blocks when their calls come, and loads and frees as the plan says; has ended when its context has.

    Args:
        run: what is called in the whole video, and the bytes of all.
        open_block: called in the loader's thread, for one block after the other.
        trace: is told of loads, runs and bytes held.

    Raises:
        BundleError: the plan is not one for this run, or needs more than its budget.
    """

    def __init__(self, run: Run, plan: LoadingPlan, open_block: Open, trace: Trace) -> None:
        self._jobs = jobs_of(run, plan)
        self._budget = plan.budget_bytes
        if self._jobs.peak_bytes > self._budget:
            raise BundleError(
                f"loading plan: needs {self._jobs.peak_bytes / 1e6:.1f} MB, more than its budget of "
                f"{self._budget / 1e6:.1f} MB"
            )
        self._open, self._trace = open_block, trace
        self._thread = threading.Thread(target=self._work, name="loader", daemon=True)
        self._changed = threading.Condition()  # guards all below
        self._begun = self._loaded = 0  # loads, in the plan's order; those left out count as begun and done
        self._ran = 0  # calls, in the plan's order, with those that were left out
        self._left_out: set[int] = set()  # loads
        self._engines: dict[str, Engine] = {}
        self._error: BaseException | None = None
        self._closed = False
        self._began = 0.0
        self._held = self._live = self._peak = 0
        self._loads: list[Record] = []
        self._runs: list[Record] = []
        self._waits: list[float] = []
        self._loads_bytes = self._retries = 0

    def __enter__(self) -> Loader:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        """End the thread, once the load that it is at is done, and free all blocks."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        if self._thread.ident is not None:
            self._thread.join()
        self._engines.clear()

    def enter(self, component: str, *, alone: bool = False) -> None:
        """Go on with a component: calls of others that stand before its next one in the plan are left out.

        A call that is left out takes no time, but still waits for its block's load if that has begun; a load for such
        calls alone that has not begun is left out with them. So what is held stays within what the plan counts on.

        Args:
            alone: nothing after the component is going to be called, so nothing is loaded for it.

        Raises:
            BundleError: the plan has no more calls of it.
            SoraCompileError: a load failed.
        """
        runs = self._jobs.runs
        with self._changed:
            upto = self._ran
            while upto < len(runs) and not runs[upto].call.block.startswith(f"{component}/"):
                upto += 1
            if upto == len(runs):
                raise BundleError(f"loading plan: has no more calls of '{component}'")
            end = upto
            while end < len(runs) and (not alone or runs[end].call.block.startswith(f"{component}/")):
                end += 1
            if self._thread.ident is None:
                self._began = self._trace.now()
                self._thread.start()
            self._go_on(upto, end)

    def leave_out(self, blocks: Sequence[str]) -> None:
        """Leave out the next calls of the plan, which are of these blocks; as :meth:`enter` leaves out calls.

        Raises:
            BundleError: they are not the plan's next.
            SoraCompileError: a load failed.
        """
        with self._changed:
            upto = self._ran + len(blocks)
            planned = [run.call.block for run in self._jobs.runs[self._ran : upto]]
            if planned != list(blocks):
                raise BundleError(f"loading plan: the next calls are of {planned}, not of {list(blocks)}, to leave out")
            self._go_on(upto, len(self._jobs.runs))

    def _go_on(self, upto: int, end: int) -> None:
        """Leave out the calls before ``upto``, and loads that are for none from there to before ``end``."""
        self._left_out |= {
            i
            for i, load in enumerate(self._jobs.loads)
            if i >= self._begun and not any(upto <= use < end for use in load.uses)
        }
        self._changed.notify_all()
        while self._ran < upto:
            run = self._jobs.runs[self._ran]
            self._wait_for(run.after_loads)
            self._end_call(run.call.live_bytes, run.freed)

    def call(self, block: str, function: str, inputs: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Run the next call of the plan, which is this one, as soon as its block is loaded; then free what is due.

        Raises:
            BundleError: it is not the plan's next.
            SoraCompileError: a load failed, or the call itself.
        """
        with self._changed:
            run = self._jobs.runs[self._ran] if self._ran < len(self._jobs.runs) else None
            if run is None or (run.call.block, run.call.function) != (block, function):
                wanted = f"'{run.call.block}' ({run.call.function})" if run else "nothing more"
                raise BundleError(f"loading plan: the next call is {wanted}, but '{block}' ({function}) is to run")
            began = self._trace.now()
            waited = self._loaded < run.after_loads
            self._wait_for(run.after_loads)
            if waited:
                self._waits.append(self._trace.now() - began)
            self._hold(run.call.live_bytes - self._live + run.call.activation_bytes)
            self._live = run.call.live_bytes
            engine = self._engines[block]
        with self._trace.span("run", block, function) as record:
            results = engine(function, inputs)
        del engine  # or it would live on while the next block is loaded
        with self._changed:
            self._runs.append(record)
            self._hold(-run.call.activation_bytes)
            self._end_call(run.call.live_bytes, run.freed)
        return results

    def played(self) -> Figures:
        """What it took so far."""
        with self._changed:
            return Figures(
                total_s=self._runs[-1].end_s - self._began if self._runs else 0.0,
                compute_s=sum(r.seconds for r in self._runs),
                load_s=sum(r.seconds for r in self._loads),
                stalls_s=sum(self._waits),
                stalls=len(self._waits),
                calls=len(self._runs),
                loads=len(self._loads) - self._retries,
                retries=self._retries,
                loads_bytes=self._loads_bytes,
                peak_bytes=self._peak,
                budget_bytes=self._budget,
            )

    def _wait_for(self, loads: int) -> None:
        """Until so many loads are done; the error of one that failed is raised here, in the caller's thread."""
        self._changed.wait_for(lambda: self._error is not None or self._loaded >= loads)
        if self._error is not None:
            raise self._error

    def _end_call(self, live_bytes: int, freed: list[Block]) -> None:
        """Free what is due, and let loads begin that waited for this call."""
        self._live, change = live_bytes, live_bytes - self._live
        for block in freed:
            if self._engines.pop(block.name, None) is not None:  # else its load was left out
                change -= block.weight_bytes
        self._ran += 1
        if self._ran == len(self._jobs.runs):
            self._live, change = 0, change - self._live
        self._hold(change)
        self._changed.notify_all()

    def _hold(self, change: int) -> None:
        if change:
            self._held += change
            self._peak = max(self._peak, self._held)
            self._trace.hold(self._held)

    def _work(self) -> None:
        """What the thread does."""
        try:
            for index, load in enumerate(self._jobs.loads):
                function = self._begin(index, load)
                if self._closed:
                    return
                engine = None if function is None else self._load(load.block.name, function)
                with self._changed:
                    if engine is not None:
                        self._engines[load.block.name] = engine
                        self._loads_bytes += load.block.weight_bytes
                    self._loaded = index + 1
                    self._changed.notify_all()
                del engine  # or it would live on after it was freed
        except BaseException as e:  # whatever it is, the caller has to know
            with self._changed:
                self._error = e
                self._changed.notify_all()

    def _begin(self, index: int, load: LoadJob) -> str | None:
        """Wait until a load may begin; the function that its block is to run first, None if it is left out."""

        def due() -> bool:
            return self._closed or index in self._left_out or self._ran >= load.after_runs

        with self._changed:
            self._changed.wait_for(due)
            if self._closed:
                return None
            self._begun = index + 1
            if index in self._left_out:
                return None
            self._hold(load.block.weight_bytes)
            return next(self._jobs.runs[i].call.function for i in load.uses if i >= self._ran)

    def _load(self, block: str, function: str) -> Engine:
        """A block, loaded; tried again if that fails once.

        Raises:
            SoraCompileError: it failed again; names the block.
        """
        for left in reversed(range(ATTEMPTS)):
            with self._trace.span("load", block) as record:
                self._loads.append(record)
                try:
                    return self._open(block, function)
                except Exception as e:
                    if not left:
                        raise _named(block, e) from e
                    self._retries += 1
        raise AssertionError("unreachable")


def _named(block: str, error: Exception) -> Exception:
    """``error`` as one line that names the block, of its own kind where it is one of ours; a bug is left as it is."""
    if isinstance(error, SoraCompileError):
        return type(error)(f"'{block}' cannot be loaded, tried {ATTEMPTS} times: {error}")
    if isinstance(error, OSError | MemoryError):
        reason = "out of memory" if isinstance(error, MemoryError) else str(error)
        return ResourceError(f"'{block}' cannot be loaded, tried {ATTEMPTS} times: {reason}")
    return error
