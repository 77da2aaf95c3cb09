"""An executor whose processes are the workers of a Dask cluster that is there already, and stays.

Dask gives the task of a worker that died to another one, a few times (``distributed.scheduler.allowed-failures``).
"""

from __future__ import annotations

import contextlib
import functools
import logging
import re
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import CancelledError, Executor, Future
from pathlib import Path
from typing import Any

from toolchain.build.workers import Expected, differences, expected, run_if_fit, unfit
from toolchain.errors import ResourceError
from toolchain.formats.recipe import Recipe
from toolchain.system.store import Store

CONNECT_SECONDS = 10


@contextlib.contextmanager
def connected(address: str) -> Iterator[Cluster]:
    """The cluster whose scheduler has the address ``dask://HOST:PORT``.

    Raises:
        ResourceError: Dask is not installed, or no scheduler answers there.
    """
    try:
        from distributed import Client
    except ImportError as e:
        raise ResourceError(f"--executor {address}: needs Dask; pip install 'sora-compile[dask]'") from e
    place = f"tcp://{address.removeprefix('dask://')}"
    logging.getLogger("distributed").setLevel(logging.CRITICAL)  # what matters is raised here, as one line
    try:
        client = Client(place, timeout=CONNECT_SECONDS, set_as_default=False)
    except (OSError, ValueError) as e:  # asyncio's timeout is an OSError
        raise ResourceError(f"--executor {address}: no scheduler answers there; start one ('dask scheduler')") from e
    with client:
        yield Cluster(client, address)


class Cluster(Executor):
    """Runs tasks on the workers of a cluster. Give it work only within :meth:`admitted`."""

    def __init__(self, client: Any, address: str) -> None:
        self._client, self._address = client, address
        self._expected: Expected | None = None

    @contextlib.contextmanager
    def admitted(self, recipes: Iterable[Recipe], store: Store) -> Iterator[None]:
        """Ask every worker, once, whether it can do what builds of ``recipes`` need; those that come later when they
        get their first task.

        Raises:
            ResourceError: there is no worker, or one that cannot; names it and what differs.
        """
        with store.scratch() as folder:
            self._expected = expected(recipes, store.root, folder)
            workers = self._workers()
            for worker, facts in workers.items():
                if facts["nthreads"] != 1:
                    raise unfit(
                        worker,
                        [f"has {facts['nthreads']} threads, and converters bear one (--nthreads 1 --nworkers N)"],
                    )
            answers = self._client.run(_answer, self._expected, on_error="return", workers=list(workers))
            for worker, answer in answers.items():
                self._check(worker, answer, folder)
            yield

    def _check(self, worker: str, answer: Any, folder: Path) -> None:
        if isinstance(answer, BaseException):
            raise unfit(
                worker, [f"cannot load sora-compile ({type(answer).__name__}: {' '.join(str(answer).split())})"]
            )
        file, found = answer
        if found:
            raise unfit(worker, found)
        if not (folder / file).is_file():
            raise unfit(worker, ["wrote to the store what is not seen here"])

    def _workers(self) -> dict[str, Any]:
        workers: dict[str, Any] = self._client.scheduler_info(n_workers=-1)["workers"]
        if not workers:
            raise ResourceError(f"--executor {self._address}: the cluster has no workers; start some: 'dask worker'")
        return workers

    @property
    def most_bytes(self) -> int | None:
        """The memory of the worker that may have most; None if one of them has no limit."""
        limits = [facts["memory_limit"] for facts in self._workers().values()]
        return max(limits) if all(limits) else None

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        """Have a worker run ``fn``.

        What its future raises is as of :class:`concurrent.futures.Executor`; besides it a ``ResourceError`` if the
        workers that ran it died, or the scheduler is lost.
        """
        if self._expected is None:
            raise RuntimeError("no worker was asked yet")
        theirs = self._client.submit(_run, self._expected, functools.partial(fn, **kwargs), args, pure=False)
        ours: Future[Any] = Future()
        ours.add_done_callback(lambda f: theirs.cancel() if f.cancelled() else None)
        theirs.add_done_callback(lambda _: self._hand_over(theirs, ours, args))
        return ours

    def _hand_over(self, theirs: Any, ours: Future[Any], args: tuple[Any, ...]) -> None:
        if not ours.set_running_or_notify_cancel():
            return
        try:
            if theirs.status == "cancelled":
                raise CancelledError
            error = theirs.exception()
            if error is None:
                ours.set_result(theirs.result())
            else:
                ours.set_exception(self._explained(error, args))
        except CancelledError:
            lost = f"--executor {self._address}: the scheduler was lost, or cancelled the task; what is done is kept"
            ours.set_exception(ResourceError(lost))
        except Exception as e:
            ours.set_exception(e)
        finally:
            theirs.release()

    def _explained(self, error: BaseException, args: tuple[Any, ...]) -> BaseException:
        from distributed import KilledWorker

        if isinstance(error, KilledWorker):
            what = next((task.what for task in args if hasattr(task, "what")), "a task")
            return ResourceError(
                f"{what}: {error.allowed_failures + 1} workers died of it, the last was "
                f"'{error.last_worker.address}', as happens when memory is short; give workers more, or cut smaller "
                "blocks (partition: {max_bytes: …})"
            )
        return error


def admitted(
    executor: Executor | None, recipes: Iterable[Recipe], store: Store
) -> contextlib.AbstractContextManager[None]:
    """As :meth:`Cluster.admitted`; any other executor's processes are not asked."""
    return executor.admitted(recipes, store) if isinstance(executor, Cluster) else contextlib.nullcontext()


def _answer(wanted: Expected, dask_worker: Any = None) -> tuple[str, list[str]]:
    """A worker's answer: the file that it wrote into the store, and what it has otherwise.

    Args:
        dask_worker: the worker itself, which Dask gives to an argument of this name.
    """
    file = re.sub(r"\W+", "-", dask_worker.address)
    return file, differences(wanted, file)


def _run(wanted: Expected, function: Callable[..., Any], args: tuple[Any, ...]) -> Any:
    from distributed import get_worker

    worker = get_worker()
    with _unwatched(worker):
        return run_if_fit(wanted, str(worker.address), function, *args)


@contextlib.contextmanager
def _unwatched(worker: Any) -> Iterator[None]:
    """Keep a worker's profiler from walking this thread's stack: torch.export fails now and then where one does, for
    the frames hold on to tensors that it counts the references of.
    """
    thread = threading.get_ident()
    with worker.active_threads_lock:
        task = worker.active_threads.pop(thread)
    try:
        yield
    finally:
        with worker.active_threads_lock:
            worker.active_threads[thread] = task
