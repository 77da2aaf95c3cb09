"""The store as it is, for whoever only wants to know what is in it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from toolchain.system.events import What
from toolchain.system.store import Entry, NewEntry, Store


class ReadOnlyStore(Store):
    """A store that nothing is written to: entries are not marked as used, nothing more is remembered."""

    def get(self, kind: str, key: str) -> Entry | None:
        return self.peek(kind, key)

    def get_or_make(self, kind: str, key: str, make: Callable[[Path], NewEntry], what: What | None = None) -> Entry:
        """The entry.

        Raises:
            RuntimeError: there is none; to be asked for only what is there.
        """
        entry = self.get(kind, key)
        if entry is None:
            raise RuntimeError(f"{kind}/{key}: not in the store, and not to be made")
        return entry

    def remember(self, path: Path, value: Any, aspect: str = "") -> None:
        pass
