"""The content-addressed store of what builds make: templates, artifacts and gate results.

An entry's key is a digest of everything that decides its content. Entries are built in a folder of their own and
renamed into place, so one that is there is whole; each is built by one process at a time, and used by many. What
was altered since is found by its digest, and built again.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from toolchain.errors import ResourceError
from toolchain.system.claims import claimed_folder, remove_abandoned
from toolchain.system.disk import full_disk_named
from toolchain.system.events import What, cached, doing

ENTRY_FILE = "entry.json"
DATA, SCRATCH = "data", "scratch"
KINDS = ("templates", "artifacts", "gates", "builds", "sweeps", "calibrations", "tunings", "imports")
SMALL_BYTES = 16_000_000
"""Entries up to this size are read whole before they are used: templates, gate results."""
DEFAULT_LIMIT_BYTES = 40_000_000_000
LOCATION_VARIABLE, LIMIT_VARIABLE = "SORA_COMPILE_CACHE", "SORA_COMPILE_CACHE_LIMIT"


def default_location() -> Path:
    """``$SORA_COMPILE_CACHE``, or ``sora-compile`` in the user's cache folder."""
    if own := os.environ.get(LOCATION_VARIABLE):
        return Path(own)
    usual = Path.home() / ("Library/Caches" if sys.platform == "darwin" else ".cache")
    return Path(os.environ.get("XDG_CACHE_HOME") or usual) / "sora-compile"


def key_of(parts: Mapping[str, Any]) -> str:
    """The digest of everything that decides an entry's content: plain data."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def digest(path: Path) -> str:
    """sha256 of a file, in hex."""
    with path.open("rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()


@dataclass(frozen=True)
class StoredFile:
    """A file of an entry: its path within the entry, size and digest, and when it was last known to be so."""

    path: str
    bytes: int
    sha256: str
    mtime_ns: int


@dataclass(frozen=True)
class Entry:
    """A whole entry. ``meta`` is what its maker said of it."""

    kind: str
    key: str
    folder: Path
    files: tuple[StoredFile, ...]
    meta: Mapping[str, Any]

    @property
    def data(self) -> Path:
        """The folder that holds what was made."""
        return self.folder / DATA

    @property
    def bytes(self) -> int:
        return sum(f.bytes for f in self.files)

    def intact(self, thorough: bool = False) -> bool:
        """Whether every file is what was stored; in large entries, those whose time is the same are trusted.

        Args:
            thorough: read them all.
        """
        thorough = thorough or self.bytes <= SMALL_BYTES
        for file in self.files:
            try:
                stat = (self.data / file.path).stat()
                if stat.st_size != file.bytes:
                    return False
                if (thorough or stat.st_mtime_ns != file.mtime_ns) and digest(self.data / file.path) != file.sha256:
                    return False
            except OSError:
                return False
        return True


@dataclass(frozen=True)
class NewEntry:
    """What a maker says of the entry that it made.

    ``digests`` are the sha256 of files that it knows, by path; the store reads the others again.
    """

    meta: Mapping[str, Any] = field(default_factory=dict)
    digests: Mapping[Path, str] = field(default_factory=dict)


class Store:
    """A folder of entries.

    Args:
        root: the folder; made when first written to.
        limit_bytes: what :meth:`evict` leaves at most.
    """

    def __init__(self, root: Path | None = None, limit_bytes: int | None = None) -> None:
        self.root = Path(os.path.abspath(root or default_location()))
        own = os.environ.get(LIMIT_VARIABLE)
        self.limit_bytes = limit_bytes if limit_bytes is not None else (_limit(own) if own else DEFAULT_LIMIT_BYTES)

    def get(self, kind: str, key: str) -> Entry | None:
        """An entry that is there and intact; marks it as used. A damaged one is removed."""
        entry, folder = self.peek(kind, key), self._folder(kind, key)
        if entry is not None:
            with contextlib.suppress(OSError):
                os.utime(folder / ENTRY_FILE)
        elif folder.exists():
            _remove(folder)
        return entry

    def peek(self, kind: str, key: str) -> Entry | None:
        """An entry that is there and intact; the store stays as it is."""
        entry = _read(self._folder(kind, key), kind, key)
        return entry if entry is not None and entry.intact() else None

    def get_or_make(self, kind: str, key: str, make: Callable[[Path], NewEntry], what: What | None = None) -> Entry:
        """The entry, made now if need be: ``make`` fills the folder that it is given.

        Two processes that want the same entry make it once.

        Args:
            what: who hears of this thread's doings is told of it as this.

        Raises:
            ResourceError: the store cannot be written.
        """
        entry = self.get(kind, key)
        if entry is None:
            with self._locked(kind, key):
                entry = self.get(kind, key)
                if entry is None:
                    return self._make_told(kind, key, make, what)
        if what is not None:
            cached(what, key)
        return entry

    def _make_told(self, kind: str, key: str, make: Callable[[Path], NewEntry], what: What | None) -> Entry:
        if what is None:
            return self._make(kind, key, make)
        with doing(what, key) as said:
            entry = self._make(kind, key, make)
            said.bytes_written = entry.bytes
            return entry

    def _make(self, kind: str, key: str, make: Callable[[Path], NewEntry]) -> Entry:
        with self.scratch() as scratch:
            data = scratch / DATA
            data.mkdir()
            new = make(data)
            meta = dict(new.meta)
            files = []
            for path in sorted(p for p in data.rglob("*") if p.is_file()):
                stat = path.stat()
                relative = path.relative_to(data).as_posix()
                files.append(
                    StoredFile(relative, stat.st_size, new.digests.get(path) or digest(path), stat.st_mtime_ns)
                )
            text = json.dumps({"files": [f.__dict__ for f in files], "meta": meta}, indent=1)
            (scratch / ENTRY_FILE).write_text(text, encoding="utf-8")
            folder = self._folder(kind, key)
            folder.parent.mkdir(parents=True, exist_ok=True)
            scratch.rename(folder)
        return Entry(kind, key, folder, tuple(files), meta)

    def entries(self) -> Iterator[Entry]:
        """All entries that can be read, intact or not."""
        for kind in KINDS:
            for file in sorted((self.root / kind).glob(f"*/*/{ENTRY_FILE}")):
                entry = _read(file.parent, kind, file.parent.name)
                if entry is not None:
                    yield entry

    def evict(self, limit_bytes: int | None = None) -> int:
        """Remove what was not used for the longest time until the rest fits; returns the bytes removed.

        What another process is making or has just taken is left alone.
        """
        limit = self.limit_bytes if limit_bytes is None else limit_bytes
        used = []
        for entry in self.entries():
            with contextlib.suppress(OSError):
                used.append(((entry.folder / ENTRY_FILE).stat().st_mtime_ns, entry))
        excess = sum(e.bytes for _, e in used) - limit
        removed = 0
        for _, entry in sorted(used, key=lambda pair: pair[0]):
            if removed >= excess:
                break
            with contextlib.suppress(_BusyError), self._locked(entry.kind, entry.key, wait=False):
                _remove(entry.folder)
                removed += entry.bytes
        return removed

    def remove(self, entry: Entry) -> None:
        """Remove an entry."""
        _remove(entry.folder)

    def clear(self) -> int:
        """Remove everything but what others are making just now; returns the bytes removed."""
        removed = sum(e.bytes for e in self.entries())
        for folder in (*KINDS, "digests", "locks"):
            shutil.rmtree(self.root / folder, ignore_errors=True)
        self.remove_abandoned()
        return removed

    def remove_abandoned(self) -> None:
        """Remove what killed processes were making, here or on another machine that shares the store."""
        remove_abandoned(self.root / SCRATCH, "")

    # --- digests of other files, remembered while size and time stay the same ----------------------------

    def remembered(self, path: Path, compute: Callable[[], Any], what: What | None = None, aspect: str = "") -> Any:
        """``compute()`` of a file's content, as plain data; from memory if the file is what it was then.

        Args:
            what: as for :meth:`get_or_make`.
            aspect: which of several things it is that are remembered of this file.
        """
        stamp = _stamp(path)
        value = self.recalled(path, aspect)
        if value is not None:
            if what is not None:
                cached(what, str(path.absolute()))
        else:
            with contextlib.nullcontext() if what is None else doing(what, str(path.absolute())):
                value = compute()
            if _stamp(path) == stamp:
                self.remember(path, value, aspect)
        return value

    def recalled(self, path: Path, aspect: str = "") -> Any:
        """What is remembered of a file; None if it is not what it was then, or nothing is."""
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
            known = json.loads(self._memory(path, aspect).read_text(encoding="utf-8"))
            if known["stamp"] == _stamp(path):
                return known["value"]
        return None

    def remember(self, path: Path, value: Any, aspect: str = "") -> None:
        """Remember what is known of a file as it is now."""
        place = self._memory(path, aspect)
        with self._errors():
            for parent in (place.parent, self.root / SCRATCH):
                parent.mkdir(parents=True, exist_ok=True)
            with claimed_folder(self.root / SCRATCH, "") as scratch:
                part = scratch / place.name
                part.write_text(json.dumps({"stamp": _stamp(path), "value": value}), encoding="utf-8")
                part.replace(place)

    def _memory(self, path: Path, aspect: str) -> Path:
        """The file that says what is remembered of another."""
        name = os.fsencode(os.path.realpath(path)) + (f"\0{aspect}".encode() if aspect else b"")
        return self.root / "digests" / f"{hashlib.sha256(name).hexdigest()}.json"

    def _folder(self, kind: str, key: str) -> Path:
        return self.root / kind / key[:2] / key

    @contextlib.contextmanager
    def _locked(self, kind: str, key: str, wait: bool = True) -> Iterator[None]:
        from filelock import FileLock, Timeout

        with self._errors():
            (self.root / "locks").mkdir(parents=True, exist_ok=True)
        lock = FileLock(self.root / "locks" / f"{kind}-{key}.lock", timeout=-1 if wait else 0)
        try:
            lock.acquire()
        except Timeout as e:
            raise _BusyError from e
        try:
            yield
        finally:
            lock.release()

    @contextlib.contextmanager
    def scratch(self) -> Iterator[Path]:
        """A new folder that nobody else touches, removed afterwards.

        Raises:
            OSError: ``ENOSPC`` if the disk is full when the body fails, whatever it raised.
            ResourceError: the store cannot be written.
        """
        with contextlib.ExitStack() as claim:
            with self._errors():
                (self.root / SCRATCH).mkdir(parents=True, exist_ok=True)
                self.remove_abandoned()
                scratch = claim.enter_context(claimed_folder(self.root / SCRATCH, ""))
            with full_disk_named(scratch.parent):
                yield scratch

    @contextlib.contextmanager
    def _errors(self) -> Iterator[None]:
        try:
            yield
        except OSError as e:
            raise ResourceError(
                f"cache '{self.root}' cannot be written: {e.strerror}; set {LOCATION_VARIABLE} to another folder"
            ) from e


class _BusyError(Exception):
    """Another process holds an entry's lock."""


def clone_or_copy(source: Path, destination: Path) -> None:
    """Give ``destination`` the content of ``source`` as cheaply as the file system can.

    A copy-on-write clone, else a hard link, else a copy.
    """
    destination.parent.mkdir(parents=True, exist_ok=True)
    if _clone(source, destination):
        return
    try:
        os.link(source, destination)
    except OSError:
        shutil.copyfile(source, destination)


def _clone(source: Path, destination: Path) -> bool:
    if not sys.platform.startswith("linux"):
        return False
    import fcntl

    ficlone = 0x40049409  # of linux/fs.h
    try:
        with source.open("rb") as a, destination.open("wb") as b:
            fcntl.ioctl(b.fileno(), ficlone, a.fileno())
    except OSError:
        destination.unlink(missing_ok=True)
        return False
    return True


def _remove(folder: Path) -> None:
    """Remove an entry: its description first, so that no half of it is taken for whole."""
    with contextlib.suppress(OSError):
        (folder / ENTRY_FILE).unlink()
    shutil.rmtree(folder, ignore_errors=True)


def _read(folder: Path, kind: str, key: str) -> Entry | None:
    try:
        data = json.loads((folder / ENTRY_FILE).read_text(encoding="utf-8"))
        files = tuple(StoredFile(**f) for f in data["files"])
        return Entry(kind, key, folder, files, data["meta"])
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _stamp(path: Path) -> list[int]:
    stat = path.stat()
    return [stat.st_size, stat.st_mtime_ns, stat.st_ino]


def _limit(text: str) -> int:
    from pydantic import TypeAdapter, ValidationError

    from toolchain.validation import Bytes

    try:
        return int(TypeAdapter(Bytes).validate_python(text))
    except ValidationError as e:
        raise ResourceError(f"{LIMIT_VARIABLE}={text}: expected a size, as 20GB") from e
