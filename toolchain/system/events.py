"""What a build does, told as it does it: each thing when it is begun and when it is done, failed, or there already.

Code that does something says so (:func:`doing`, or :meth:`toolchain.system.store.Store.get_or_make`) and knows nobody
who hears it; :func:`telling` says who does, for all that the body calls in this thread. A process that works for
another one hands over what it was told with its results.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import platform
import threading
import time
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, Literal

from toolchain.errors import CancelledError, interrupted
from toolchain.system.memory import peak_bytes

SCHEMA = 1
"""Of :meth:`Event.data`; a reader should skip keys, kinds and events that it does not know."""
Happened = Literal["given", "started", "cached", "done", "failed"]
Tell = Callable[["Event"], None]
_WALL = time.time() - time.perf_counter()
"""Makes a process's steady clock comparable with others'."""


@dataclass(frozen=True)
class What:
    """What is done: its kind (``template``, ``artifact``, ``gate``, …), and what it is about, as far as it is one."""

    kind: str
    component: str = ""
    block: str = ""
    build: str = ""


@dataclass(frozen=True)
class Event:
    """Something happened. Figures are of what is ``done`` or ``failed``."""

    event: Happened
    """``given`` to another process, which will say the rest when it has done it; ``cached``: was there already."""
    what: What
    time_s: float
    """Since the build was started."""
    process: str
    """``HOST:PID``."""
    key: str | None = None
    """What the store knows it by; of a checkpoint, its file."""
    seconds: float | None = None
    own_seconds: float | None = None
    """Without what was done within it and told of by itself."""
    cpu_seconds: float | None = None
    """Of all threads of the process meanwhile, and of what was done within it."""
    bytes_written: int | None = None
    """Into the store or the bundle."""
    peak_bytes: int | None = None
    """The most memory that the process had resident since it was started, at the end."""
    peak_grew_bytes: int | None = None
    """How much of that was added meanwhile; 0 if the process had had as much before."""
    error: str | None = None
    """In one line."""

    def data(self) -> dict[str, Any]:
        """As plain data, without what is not known or not about one."""
        flat = dataclasses.asdict(self)
        flat = {"event": flat.pop("event"), **flat.pop("what"), **flat}
        short = {k: round(v, 6) if isinstance(v, float) else v for k, v in flat.items()}
        return {k: v for k, v in short.items() if v not in (None, "")}


@dataclass
class Doing:
    """What is being done; whoever does it may say how much it wrote."""

    bytes_written: int | None = None


class _Watch:
    """Hears of what a thread does, and what others hand over."""

    def __init__(self, tell: Tell, start: float, cancelled: Callable[[], bool]) -> None:
        self._tell, self._start, self.cancelled = tell, start, cancelled
        self._lock = threading.Lock()
        self._keys: set[tuple[str, str]] = set()
        self.nested: list[float] = []
        """Seconds of what was done within each thing that is being done, outermost first."""

    def tell(self, event: Event) -> None:
        """Pass it on; what was made or found is not told to be found once more."""
        with self._lock:
            if event.key is not None and event.event in ("cached", "done"):
                place = event.what.kind, event.key
                if event.event == "cached" and place in self._keys:
                    return
                self._keys.add(place)
            self._tell(dataclasses.replace(event, time_s=event.time_s - self._start))


_watch: ContextVar[_Watch | None] = ContextVar("watch", default=None)


def _never() -> bool:
    return False


def _now() -> float:
    """Seconds since 1970, on a clock that never goes back within a process."""
    return time.perf_counter() + _WALL


@contextlib.contextmanager
def telling(tell: Tell, *, raw: bool = False, cancelled: Callable[[], bool] = _never) -> Iterator[None]:
    """Have ``tell`` hear of all that the body does in this thread; it must not raise.

    Args:
        raw: times are left as others can take them over (:func:`teller`), not counted from now.
        cancelled: whether nothing more is to be begun; see :func:`check_cancelled`.
    """
    token = _watch.set(_Watch(tell, 0.0 if raw else _now(), cancelled))
    try:
        yield
    finally:
        _watch.reset(token)


def teller() -> Tell:
    """What passes on the raw events of other threads and processes to who hears of this thread's."""
    watch = _watch.get()
    return watch.tell if watch is not None else lambda event: None


def happened(event: Happened, what: What, key: str | None = None, error: BaseException | None = None) -> Event:
    """A raw event, now and in this process."""
    return Event(event, what, _now(), process_name(), key, error=None if error is None else error_line(error))


def check_cancelled() -> None:
    """To be called now and then by what takes long.

    Raises:
        CancelledError: who hears of this thread wants it to end.
    """
    watch = _watch.get()
    if watch is not None and watch.cancelled():
        raise CancelledError("the build was cancelled")


@contextlib.contextmanager
def doing(what: What, key: str | None = None) -> Iterator[Doing]:
    """Tell that the body is begun, and what it took when it is done or fails.

    Raises:
        CancelledError: as :func:`check_cancelled`.
    """
    check_cancelled()
    watch, said = _watch.get(), Doing()
    if watch is None:
        yield said
        return
    watch.tell(happened("started", what, key))
    watch.nested.append(0.0)
    start, cpu, peak, error = _now(), time.process_time(), peak_bytes(), None
    try:
        yield said
    except BaseException as e:
        error = e
        raise
    finally:
        seconds, most = _now() - start, peak_bytes()
        own = seconds - watch.nested.pop()
        if watch.nested:
            watch.nested[-1] += seconds
        watch.tell(
            dataclasses.replace(
                happened("done" if error is None else "failed", what, key, error),
                seconds=seconds,
                own_seconds=own,
                cpu_seconds=time.process_time() - cpu,
                bytes_written=said.bytes_written,
                peak_bytes=most,
                peak_grew_bytes=most - peak,
            )
        )


def cached(what: What, key: str | None = None) -> None:
    """Tell that something is there already."""
    teller()(happened("cached", what, key))


def process_name() -> str:
    """``HOST:PID`` of this process."""
    return f"{platform.node()}:{os.getpid()}"


def error_line(error: BaseException) -> str:
    """An error in one line."""
    return "interrupted" if interrupted(error) else " ".join(str(error).split()) or type(error).__name__
