"""What a process has one of: the folder of temporary files, and the streams that converters write to."""

from __future__ import annotations

import errno
import importlib
import logging
import os
import sys
import tempfile
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from targets.coreml import CoreMLConfig, CoreMLTarget
from targets.streams import quiet
from toolchain.errors import LoweringError
from toolchain.system.disk import full_disk_named, readable_size
from toolchain.system.temporary import temporary_files_in

# --- temporary files ---------------------------------------------------------------------------------


def test_temporary_files_go_there_and_nowhere_else_later(tmp_path: Path) -> None:
    before = tempfile.gettempdir()
    with pytest.raises(ValueError), temporary_files_in(tmp_path):
        assert tempfile.gettempdir() == str(tmp_path)
        raise ValueError
    assert tempfile.gettempdir() == before


def test_the_outermost_decides(tmp_path: Path) -> None:
    before = tempfile.gettempdir()
    with temporary_files_in(tmp_path):
        with temporary_files_in(tmp_path / "inner"):
            assert tempfile.gettempdir() == str(tmp_path)
        assert tempfile.gettempdir() == str(tmp_path)
    assert tempfile.gettempdir() == before


def test_no_folder_goes_while_another_thread_uses_it(tmp_path: Path) -> None:
    """The first to come leaves last, and only then may remove it."""
    before, entered, leave = tempfile.gettempdir(), threading.Event(), threading.Event()
    order: list[str] = []

    def other() -> None:
        with temporary_files_in(tmp_path / "theirs"):
            entered.set()
            leave.wait(10)
            assert tempfile.gettempdir() == str(tmp_path)
            order.append("other")

    thread = threading.Thread(target=other)
    with temporary_files_in(tmp_path):
        thread.start()
        assert entered.wait(10)
        threading.Timer(0.2, leave.set).start()
    order.append("first")
    assert order == ["other", "first"]
    assert tempfile.gettempdir() == before
    thread.join()


# --- streams -----------------------------------------------------------------------------------------


def shout(text: str) -> None:
    os.write(1, f"{text} from C\n".encode())
    print(f"{text} from Python", file=sys.stderr, flush=True)


def test_quiet(capfd: pytest.CaptureFixture[str]) -> None:
    with quiet() as said:
        shout("hidden")
        assert said() == "hidden from C\nhidden from Python\n"
        shout("more")
        assert said().splitlines()[2:] == ["more from C", "more from Python"]
    shout("seen")
    assert capfd.readouterr() == ("seen from C\n", "seen from Python\n")


def test_quiet_within_quiet(capfd: pytest.CaptureFixture[str]) -> None:
    with quiet() as outer:
        shout("one")
        with pytest.raises(ValueError), quiet() as inner:
            shout("two")
            assert inner() == "two from C\ntwo from Python\n"
            raise ValueError
        shout("three")
        assert [line.split()[0] for line in outer().splitlines()] == ["one"] * 2 + ["two"] * 2 + ["three"] * 2
        assert logging.root.manager.disable == logging.WARNING
    assert logging.root.manager.disable == 0
    shout("seen")
    assert capfd.readouterr() == ("seen from C\n", "seen from Python\n")


def test_two_threads_are_quiet_in_turn(capfd: pytest.CaptureFixture[str]) -> None:
    wrong: list[str] = []

    def work(name: str) -> None:
        for _ in range(50):
            with quiet() as said:
                shout(name)
                if said() != f"{name} from C\n{name} from Python\n":
                    wrong.append(said())

    threads = [threading.Thread(target=work, args=(n,)) for n in ("a", "b", "c")]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert wrong == []
    shout("seen")
    assert capfd.readouterr() == ("seen from C\n", "seen from Python\n")


def test_what_says_so_is_quiet_beside_others(capfd: pytest.CaptureFixture[str]) -> None:
    """As a load beside a run: neither waits, and the streams are back when both have ended, in whatever order."""
    both = threading.Barrier(2, timeout=10)

    def other() -> None:
        with quiet(alone=False) as said:
            both.wait()
            shout("other")
            assert "other from C" in said()
            both.wait()

    thread = threading.Thread(target=other)
    thread.start()
    with quiet(alone=False):
        both.wait()
        shout("hidden")
    shout("hidden too")
    both.wait()
    thread.join()
    shout("seen")
    assert capfd.readouterr() == ("seen from C\n", "seen from Python\n")


# --- full disks --------------------------------------------------------------------------------------


def test_a_full_disk_is_named_whoever_wrapped_it(tmp_path: Path) -> None:
    with pytest.raises(OSError) as caught, full_disk_named(tmp_path):
        try:
            raise OSError(errno.ENOSPC, "No space left on device")
        except OSError as e:
            raise LoweringError("the converter cannot") from e
    assert caught.value.errno == errno.ENOSPC


def test_a_full_disk_is_named_if_nothing_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("toolchain.system.disk.FULL_BYTES", 1 << 62)
    with pytest.raises(OSError) as caught, full_disk_named(tmp_path):
        raise RuntimeError("unknown error")
    assert caught.value.errno == errno.ENOSPC


def test_a_full_disk_while_core_ml_converts(
    cut_small: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its writer says nothing of disks, and its files are gone, and the disk has room, once it has failed."""
    coreml = importlib.import_module("targets.coreml.lower")
    seen: list[bool] = []

    def fail(*_: object, **__: object) -> None:
        raise RuntimeError("[MIL FileWriter]: Unknown error occurred while writing data to the file.")

    def full(folder: Path, *_: Path) -> bool:
        seen.append(any(folder.iterdir()))
        return True

    cut = cut_small(CoreMLTarget(CoreMLConfig(precision="float32")).forms)
    block = cut.block("caption")
    monkeypatch.setattr(coreml.ct, "convert", fail)
    monkeypatch.setattr("toolchain.system.disk._full", full)
    with pytest.raises(OSError) as caught:
        coreml.lower(block, cut.weights(block), tmp_path / "caption.mlpackage", "float32")
    assert caught.value.errno == errno.ENOSPC
    assert seen == [True]
    assert list(tmp_path.iterdir()) == []


def test_other_errors_are_as_they_were(tmp_path: Path) -> None:
    with pytest.raises(LoweringError, match="no such operator"), full_disk_named(tmp_path):
        raise LoweringError("no such operator")
    with pytest.raises(FileNotFoundError), full_disk_named(tmp_path):
        raise FileNotFoundError


@pytest.mark.parametrize(
    ("count", "text"), [(0, "0 B"), (999, "999 B"), (1500, "1.5 kB"), (85.1e6, "85.1 MB"), (2.5e10, "25.00 GB")]
)
def test_readable_size(count: float, text: str) -> None:
    assert readable_size(count) == text
