"""What a build took, for who asks: written to files as it happens, and as a summary at the end."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from toolchain.build.event_file import EventFile
from toolchain.build.spent import Record
from toolchain.system.disk import readable_size
from toolchain.system.files import check_file, whole_file

if TYPE_CHECKING:
    from rich.console import RenderableType

    from toolchain.listener import Listener
    from toolchain.ui.console import Console


class Watched:
    """What is kept of a build; ``listeners`` are to be told of its events."""

    def __init__(self, listeners: list[Listener], record: Record | None) -> None:
        self.listeners, self._record = listeners, record

    def summary_json(self) -> dict[str, Any]:
        """What the answer has besides with ``-v``."""
        return {} if self._record is None else {"spent": self._record.to_data()}

    def say(self, console: Console) -> None:
        """The summary, with ``-v``."""
        if self._record is not None:
            console.note(summary_table(self._record))


@contextlib.contextmanager
def watched(console: Console, events: Path | None, trace: Path | None) -> Iterator[Watched]:
    """Write the events of the body's build to the files that are asked for, also if it fails.

    Raises:
        SoraCompileError: one of them could not be written, before anything is done.
    """
    with contextlib.ExitStack() as stack:
        listeners: list[Listener] = []
        if trace is not None:
            check_file("--trace", trace)
        if events is not None:
            file = stack.enter_context(EventFile(events))
            stack.callback(lambda: _warn(console, events, file))
            listeners.append(file)
        record = Record() if console.verbose or trace is not None else None
        if record is not None:
            listeners.append(record)
        if trace is not None and record is not None:
            stack.callback(_write_trace, console, trace, record)
        yield Watched(listeners, record if console.verbose else None)


def _warn(console: Console, path: Path, file: EventFile) -> None:
    if file.lost is not None:
        console.warn(f"--events {path}: events are missing at its end: {file.lost}")


def _write_trace(console: Console, path: Path, record: Record) -> None:
    from toolchain.errors import ResourceError

    try:
        with whole_file(path, "--trace") as partial:
            record.trace().write(partial, {"seconds": record.seconds})
    except ResourceError as e:  # what was built is there nevertheless
        console.warn(str(e))


def summary_table(record: Record) -> RenderableType:
    """Where time and memory went, by kind and component; and the tasks that took most."""
    from rich.console import Group
    from rich.table import Table

    data = record.to_data()
    table = Table(box=None, pad_edge=False)
    for heading in ("", "", "count", "cached", "seconds", "share", "peak of memory", "written"):
        table.add_column(heading, justify="right" if heading else "left")
    for row in data["spent"]:
        share, peak, written = row["share"], row["peak_bytes"], row["bytes_written"]
        table.add_row(
            row["kind"],
            row["component"] or "",
            str(row["count"]),
            str(row["cached"] or ""),
            f"{row['seconds']:.2f}",
            "" if share is None else f"{share:.1%}",
            readable_size(peak) if peak else "",
            readable_size(written) if written else "",
        )
    dearest = [f"  {e['own_seconds']:.2f} s  {_name(e)}" for e in data["dearest"]]
    return Group(f"{data['seconds']:.2f} s, of which", table, *(["dearest:", *dearest] if dearest else []))


def _name(event: dict[str, Any]) -> str:
    return " ".join([event["kind"], "/".join(event[k] for k in ("component", "block") if k in event)]).rstrip()
