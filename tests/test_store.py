"""The store: whole entries only, made once, found damaged by their digest, evicted by last use."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from toolchain.errors import ResourceError
from toolchain.system.store import Entry, NewEntry, Store, clone_or_copy, key_of

KEY = key_of({"what": 1})


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path / "store")


def fill(folder: Path, content: bytes = b"weights") -> NewEntry:
    (folder / "deep").mkdir()
    (folder / "deep" / "file.bin").write_bytes(content)
    return NewEntry({"functions": ["base"]})


def never(_: Path) -> NewEntry:
    raise AssertionError("made again")


def test_an_entry_is_made_once(store: Store) -> None:
    assert store.get("artifacts", KEY) is None
    made = store.get_or_make("artifacts", KEY, fill)
    again = store.get_or_make("artifacts", KEY, never)
    assert made == again
    assert (again.data / "deep/file.bin").read_bytes() == b"weights"
    assert again.meta == {"functions": ["base"]}
    assert again.bytes == 7


def test_what_fails_leaves_nothing(store: Store) -> None:
    def fails(folder: Path) -> NewEntry:
        fill(folder)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        store.get_or_make("artifacts", KEY, fails)
    assert store.get("artifacts", KEY) is None
    assert list((store.root / "scratch").iterdir()) == []


@pytest.mark.parametrize("bit", [0, 3, 55])
def test_a_flipped_bit_is_found(store: Store, bit: int) -> None:
    entry = store.get_or_make("artifacts", KEY, fill)
    file = entry.data / "deep/file.bin"
    content = bytearray(file.read_bytes())
    content[bit // 8] ^= 1 << bit % 8
    time.sleep(0.01)
    file.write_bytes(content)
    assert store.get("artifacts", KEY) is None
    assert (store.get_or_make("artifacts", KEY, fill).data / "deep/file.bin").read_bytes() == b"weights"


def test_a_thorough_look_does_not_trust_times(store: Store) -> None:
    entry = store.get_or_make("artifacts", KEY, fill)
    file = entry.data / "deep/file.bin"
    stat = file.stat()
    file.write_bytes(b"Weights")
    os.utime(file, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert not entry.intact(thorough=True)


@pytest.mark.parametrize("damage", ["missing", "shorter", "no description", "noise"])
def test_damage_of_other_kinds(store: Store, damage: str) -> None:
    entry = store.get_or_make("artifacts", KEY, fill)
    file = entry.data / "deep/file.bin"
    if damage == "missing":
        file.unlink()
    elif damage == "shorter":
        file.write_bytes(b"w")
    elif damage == "no description":
        (entry.folder / "entry.json").unlink()
    else:
        (entry.folder / "entry.json").write_bytes(b"\xff{")
    assert store.get("artifacts", KEY) is None
    assert store.get_or_make("artifacts", KEY, fill).intact(thorough=True)


def test_a_touched_file_that_is_the_same_is_kept(store: Store) -> None:
    entry = store.get_or_make("artifacts", KEY, fill)
    os.utime(entry.data / "deep/file.bin", (1, 1))
    store.get_or_make("artifacts", KEY, never)


def test_threads_make_it_once(store: Store) -> None:
    made: list[int] = []

    def slowly(folder: Path) -> NewEntry:
        made.append(1)
        time.sleep(0.2)
        return fill(folder)

    threads = [threading.Thread(target=store.get_or_make, args=("artifacts", KEY, slowly)) for _ in range(4)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert made == [1]


PROCESS = """
import sys, time
from pathlib import Path
from toolchain.system.store import NewEntry, Store
def make(folder):
    with Path(sys.argv[2]).open("a") as f:
        f.write("made\\n")
    time.sleep(0.3)
    (folder / "f").write_text("x" * 1000)
    return NewEntry()
Store(Path(sys.argv[1])).get_or_make("artifacts", "ab" * 32, make)
"""


def test_digests_that_the_maker_knows_are_taken(store: Store) -> None:
    def make(folder: Path) -> NewEntry:
        for name in ("known", "read"):
            (folder / name).write_bytes(b"x")
        return NewEntry(digests={folder / "known": "0" * 64})

    entry = store.get_or_make("artifacts", KEY, make)
    assert {f.path: f.sha256 for f in entry.files} == {"known": "0" * 64, "read": hashlib.sha256(b"x").hexdigest()}


def test_processes_make_it_once(tmp_path: Path) -> None:
    arguments = [sys.executable, "-c", PROCESS, str(tmp_path / "store"), str(tmp_path / "log")]
    running = [subprocess.Popen(arguments) for _ in range(3)]
    assert [p.wait(timeout=60) for p in running] == [0, 0, 0]
    assert (tmp_path / "log").read_text() == "made\n"


def test_a_killed_maker_is_cleaned_up(tmp_path: Path) -> None:
    arguments = [sys.executable, "-c", PROCESS.replace("0.3", "60"), str(tmp_path / "store"), str(tmp_path / "log")]
    process = subprocess.Popen(arguments)
    while not (tmp_path / "log").exists():
        time.sleep(0.02)
    process.kill()
    process.wait()
    store = Store(tmp_path / "store")
    assert len(list((store.root / "scratch").iterdir())) == 2  # its folder, and the lock that it held
    store.get_or_make("artifacts", "ab" * 32, fill)
    assert list((store.root / "scratch").iterdir()) == []


def test_the_least_recently_used_go_first(store: Store) -> None:
    keys = [key_of({"n": n}) for n in range(4)]
    for n, key in enumerate(keys):
        entry = store.get_or_make("artifacts", key, lambda f: fill(f, b"x" * 100))
        os.utime(entry.folder / "entry.json", (1000 + n, 1000 + n))
    store.get("artifacts", keys[0])  # used now
    assert store.evict(250) == 200
    assert [store.get("artifacts", k) is not None for k in keys] == [True, False, False, True]


def test_what_is_being_made_is_not_evicted(store: Store) -> None:
    store.get_or_make("artifacts", KEY, fill)
    with store._locked("artifacts", KEY):
        assert Store(store.root).evict(0) == 0
    assert store.evict(0) == 7


def test_clear(store: Store) -> None:
    store.get_or_make("artifacts", KEY, fill)
    assert store.clear() == 7
    assert list(store.entries()) == []


def test_what_is_being_made_survives_clearing(store: Store) -> None:
    def make(folder: Path) -> NewEntry:
        Store(store.root).clear()
        return fill(folder)

    assert store.get_or_make("artifacts", KEY, make).intact(thorough=True)


def test_a_store_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    store = Store(tmp_path / "file" / "store")
    with pytest.raises(ResourceError, match="cannot be written: Not a directory; set SORA_COMPILE_CACHE"):
        store.get_or_make("artifacts", KEY, fill)


def test_location_and_limit(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("SORA_COMPILE_CACHE", str(tmp_path / "own"))
    monkeypatch.setenv("SORA_COMPILE_CACHE_LIMIT", "2GB")
    assert (Store().root, Store().limit_bytes) == (tmp_path / "own", 2_000_000_000)
    monkeypatch.setenv("SORA_COMPILE_CACHE_LIMIT", "much")
    with pytest.raises(ResourceError, match="SORA_COMPILE_CACHE_LIMIT=much: expected a size, as 20GB"):
        Store()
    monkeypatch.delenv("SORA_COMPILE_CACHE")
    monkeypatch.delenv("SORA_COMPILE_CACHE_LIMIT")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert Store().root == tmp_path / "xdg" / "sora-compile"


def test_what_is_remembered_of_a_file(store: Store, tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_text("one")
    assert store.remembered(file, lambda: "first") == "first"
    assert store.remembered(file, lambda: "second") == "first"
    time.sleep(0.01)
    file.write_text("two")
    assert store.remembered(file, lambda: "second") == "second"


def test_placing_leaves_the_source(store: Store, tmp_path: Path) -> None:
    entry: Entry = store.get_or_make("artifacts", KEY, fill)
    clone_or_copy(entry.data / "deep/file.bin", tmp_path / "out" / "file.bin")
    assert (tmp_path / "out/file.bin").read_bytes() == b"weights"
    store.clear()
    assert (tmp_path / "out/file.bin").read_bytes() == b"weights"
