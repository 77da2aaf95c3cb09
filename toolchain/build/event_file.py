"""A build's events as a file of JSON lines, there as they happen."""

from __future__ import annotations

import contextlib
import datetime
import json
import time
from pathlib import Path
from types import TracebackType
from typing import IO

from toolchain.errors import RecipeError, ResourceError
from toolchain.listener import Listener
from toolchain.system.events import SCHEMA, Event
from toolchain.system.files import check_file
from toolchain.version import VERSION


class EventFile(Listener):
    """Writes each event as a line. The first line says the schema, our version, and when the build was started.

    A file that cannot be written any more, as when its disk is full, costs the rest of the events and not the build.

    Args:
        path: a regular file, which is written over.
        option: what the user gave it with.

    Raises:
        RecipeError: a folder or a special file stands there.
        ResourceError: it cannot be written.
    """

    def __init__(self, path: Path, option: str = "--events") -> None:
        check_file(option, path)
        if (path.exists() and not path.is_file()) or path.name == "-":
            raise RecipeError(f"{option} {path}: expected the name of a file; a pipe or a device is none")
        try:
            self._file: IO[str] | None = path.open("w", encoding="utf-8")
        except OSError as e:
            raise ResourceError(f"{option} {path}: cannot be written: {e.strerror}") from e
        self._begun = False
        self.lost: str | None = None
        """Why events are missing at the end; None if none are."""

    def __enter__(self) -> EventFile:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._close()

    def event(self, event: Event) -> None:
        if self._file is None:
            return
        try:
            if not self._begun:
                self._begun = True
                start = datetime.datetime.fromtimestamp(time.time() - event.time_s, datetime.UTC)
                said = {"schema": SCHEMA, "sora_compile": VERSION, "started_at": start.isoformat()}
                self._file.write(json.dumps(said) + "\n")
            self._file.write(json.dumps(event.data(), ensure_ascii=False) + "\n")
            self._file.flush()
        except OSError as e:
            self.lost = e.strerror or str(e)
            self._close()

    def _close(self) -> None:
        file, self._file = self._file, None
        if file is not None:
            with contextlib.suppress(OSError):  # what a full disk did not take is tried once more
                file.close()
