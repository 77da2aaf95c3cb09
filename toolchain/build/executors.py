"""What runs the tasks of a build: processes of our own, a caller's executor, or a cluster that is there already.

Converters are neither thread- nor fork-safe, so an executor of our own has processes, and spawns them.
"""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Iterator
from concurrent.futures import Executor, ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context

from toolchain.errors import RecipeError

LOCAL, DASK = "local", "dask://"


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
    """Spawned processes that only the first process interrupts."""

    def __init__(self, jobs: int) -> None:
        super().__init__(jobs, get_context("spawn"), initializer=_ignore_interrupts)

    def kill(self) -> None:
        """End the processes at once, whatever they do."""
        for process in list((self._processes or {}).values()):
            process.kill()
        self.shutdown(wait=True, cancel_futures=True)


def _ignore_interrupts() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the first process hears it and stops this one


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
