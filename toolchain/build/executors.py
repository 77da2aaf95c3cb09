"""What runs the tasks of a build: processes of our own, a caller's executor, or a cluster that is there already.

Converters are neither thread- nor fork-safe, so an executor of our own has processes, and spawns them.
"""

from __future__ import annotations

import contextlib
import os
import signal
import threading
import time
from collections.abc import Iterator
from concurrent.futures import Executor, ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context, util
from multiprocessing.connection import Connection

from toolchain.errors import RecipeError

LOCAL, DASK = "local", "dask://"
ENDING_SECONDS = 2.0
"""How long processes have to end by themselves before they are killed."""


@dataclass(frozen=True)
class Ways:
    """How many tasks of a build run at once: see :func:`toolchain.build.compile.compile_recipe`."""

    jobs: int = 1
    tasks_at_once: int | None = None
    memory_bytes: int | None = None

    def check(self, executor: Executor | str | None) -> None:
        """Refuse what means nothing.

        Raises:
            RecipeError: says which.
        """
        if self.jobs < 1:
            raise RecipeError(f"--jobs {self.jobs}: must be at least 1")
        if self.tasks_at_once is not None and self.tasks_at_once < 1:
            raise RecipeError(f"tasks_at_once {self.tasks_at_once}: must be at least 1")
        if self.memory_bytes is not None and (self.jobs == 1 or executor not in (None, LOCAL)):
            raise RecipeError("--memory: is for the processes of --jobs 2 and more; leave it out")

    def serial(self, executor: Executor | None) -> bool:
        """Whether this process does everything."""
        return executor is None and self.jobs == 1


class OwnProcesses(ProcessPoolExecutor):
    """Spawned processes that only the first process ends, and that end with it, however it ends.

    Each reads from a pipe that nothing is written to: its other end is the first process's alone.
    """

    def __init__(self, jobs: int) -> None:
        context = get_context("spawn")
        theirs, self._alive = context.Pipe(duplex=False)
        super().__init__(jobs, context, initializer=_end_with_first, initargs=(theirs,))

    def kill(self) -> None:
        """End the processes at once, whatever they do."""
        processes = list((self._processes or {}).values())
        self._alive.close()
        deadline = time.monotonic() + ENDING_SECONDS
        for process in processes:
            process.join(max(0.0, deadline - time.monotonic()))
            process.kill()
        self.shutdown(wait=True, cancel_futures=True)


def _end_with_first(first: Connection) -> None:
    """Have this process end when the first one closes its end of the pipe, and for no signal that is sent to all."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    threading.Thread(target=_end_after, args=(first,), daemon=True).start()


def _end_after(first: Connection) -> None:
    with contextlib.suppress(EOFError, OSError):
        first.recv_bytes()
    util._run_finalizers(0)  # type: ignore[attr-defined]  # or Python warns of semaphores that libraries have made
    os._exit(1)


@contextlib.contextmanager
def executor_of(asked: Executor | str | None, jobs: int) -> Iterator[Executor | None]:
    """The executor that a user asks for; None for this process and ``jobs`` of our own.

    Args:
        asked: an executor, which is not shut down; ``local``; or ``dask://HOST:PORT``, the address of a scheduler,
            which goes on afterwards.

    Raises:
        RecipeError: it is none of these.
        ResourceError: no scheduler answers there.
    """
    if asked is None or asked == LOCAL:
        yield None
    elif not isinstance(asked, str):
        yield asked
    elif asked.startswith(DASK) and asked != DASK:
        if jobs != 1:
            raise RecipeError(f"--jobs {jobs}: counts processes of our own; leave it out with --executor {asked}")
        from toolchain.build.cluster import connected

        with connected(asked) as cluster:
            yield cluster
    else:
        raise RecipeError(f"--executor {asked}: expected '{LOCAL}' or '{DASK}HOST:PORT'")
