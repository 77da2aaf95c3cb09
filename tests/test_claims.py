"""Half-made work: left alone while its maker lives, wherever that is, and removed when it has ended."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from toolchain.system.claims import LOCK_SUFFIX, UNTOUCHED_SECONDS, claimed_folder, remove_abandoned

HOLD = """
import sys, time
from pathlib import Path
from toolchain.system.claims import claimed_folder
with claimed_folder(Path(sys.argv[1]), sys.argv[2]) as folder:
    (folder / "half").write_text("made")
    print(folder, flush=True)
    time.sleep(120)
"""
DEAD_PID = 999999999
"""Nobody's on this machine: what the id of another host's process looks like."""


@pytest.fixture
def holder(tmp_path: Path) -> Iterator[tuple[subprocess.Popen[str], Path]]:
    """Another process, and the folder that it claims; by the folder's name it is dead."""
    arguments = [sys.executable, "-c", HOLD, str(tmp_path), f"work-{DEAD_PID}-"]
    with subprocess.Popen(arguments, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        yield process, Path(process.stdout.readline().strip())
        process.kill()


def age(path: Path) -> None:
    """Make everything in a folder look as old as if it was abandoned; times of status cannot be set."""
    for p in (path, *path.rglob("*")):
        os.utime(p, (1, 1))


def test_a_claim_leaves_nothing(tmp_path: Path) -> None:
    with claimed_folder(tmp_path, "a-") as folder:
        (folder / "file").write_text("x")
        assert folder.name.startswith("a-")
        assert folder.stat().st_mode & 0o777 == 0o755
        assert len(list(tmp_path.iterdir())) == 2
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("place", ["/proc", "nowhere"])
def test_where_nothing_can_be_written(tmp_path: Path, place: str) -> None:
    with pytest.raises(OSError), claimed_folder(tmp_path / place, "a-"):
        raise AssertionError


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_nor_after_an_error(tmp_path: Path, error: type[BaseException]) -> None:
    with pytest.raises(error), claimed_folder(tmp_path, "a-"):
        raise error
    assert list(tmp_path.iterdir()) == []


def test_what_is_renamed_away_stays(tmp_path: Path) -> None:
    with claimed_folder(tmp_path, "a-") as folder:
        (folder / "file").write_text("x")
        folder.rename(tmp_path / "whole")
    assert [p.relative_to(tmp_path).as_posix() for p in tmp_path.rglob("*")] == ["whole", "whole/file"]


def test_a_living_process_is_left_alone_whatever_its_id_says(
    tmp_path: Path, holder: tuple[subprocess.Popen[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    process, folder = holder
    age(folder)
    monkeypatch.setattr("toolchain.system.claims.UNTOUCHED_SECONDS", -1.0)  # age is no argument against a held lock
    remove_abandoned(tmp_path, "work-")
    assert (folder / "half").read_text() == "made"
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert len(list(tmp_path.iterdir())) == 2
    remove_abandoned(tmp_path, "other-")
    assert len(list(tmp_path.iterdir())) == 2
    remove_abandoned(tmp_path, "work-")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_that_python_hears_leaves_nothing(tmp_path: Path, number: int) -> None:
    script = "import signal\nsignal.signal(signal.SIGINT, signal.default_int_handler)\n"
    script += "signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))\n"
    arguments = [sys.executable, "-c", HOLD.replace("import sys, time\n", f"import sys, time\n{script}", 1)]
    with subprocess.Popen([*arguments, str(tmp_path), "a-"], stdout=-1, stderr=-1, text=True) as process:
        assert process.stdout is not None and process.stdout.readline()
        process.send_signal(number)
        process.communicate(timeout=30)
    assert list(tmp_path.iterdir()) == []


def test_our_own_claims_are_left_alone(tmp_path: Path) -> None:
    with claimed_folder(tmp_path, "a-") as folder:
        remove_abandoned(tmp_path, "a-")
        sweeper = threading.Thread(target=remove_abandoned, args=(tmp_path, ""))
        sweeper.start()
        sweeper.join()
        assert folder.is_dir()


def test_folders_of_earlier_versions(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """They have no lock: only time can tell."""
    folder = tmp_path / f"{os.getpid()}-xyz"
    (folder / "deep").mkdir(parents=True)
    age(folder)
    remove_abandoned(tmp_path, "")
    assert folder.is_dir()  # it was renamed or made just now, whatever the times in it say
    now = time.time()
    monkeypatch.setattr("toolchain.system.claims.time.time", lambda: now + UNTOUCHED_SECONDS - 60)
    remove_abandoned(tmp_path, "")
    assert folder.is_dir()
    monkeypatch.setattr("toolchain.system.claims.time.time", lambda: now + UNTOUCHED_SECONDS + 60)
    remove_abandoned(tmp_path, "")
    assert not folder.exists()


def test_a_lock_without_a_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A young one may be of a claim that is just being made."""
    lock = tmp_path / f"a-1{LOCK_SUFFIX}"
    lock.touch()
    remove_abandoned(tmp_path, "a-")
    assert lock.exists()
    now = time.time()
    monkeypatch.setattr("toolchain.system.claims.time.time", lambda: now + UNTOUCHED_SECONDS + 60)
    remove_abandoned(tmp_path, "a-")
    assert not lock.exists()


def test_files_and_links_are_nobodys_claims(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("toolchain.system.claims.UNTOUCHED_SECONDS", -1.0)
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "a-link").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "a-file").write_text("x")
    remove_abandoned(tmp_path, "a-")
    assert len(list(tmp_path.iterdir())) == 3


def test_no_folder_at_all(tmp_path: Path) -> None:
    remove_abandoned(tmp_path / "nowhere", "")


SWEEP = """
import sys
from pathlib import Path
from toolchain.system.claims import claimed_folder, remove_abandoned
for _ in range(40):
    remove_abandoned(Path(sys.argv[1]), "a-")
    with claimed_folder(Path(sys.argv[1]), "a-") as folder:
        (folder / "file").write_text("x")
        remove_abandoned(Path(sys.argv[1]), "a-")
        assert (folder / "file").read_text() == "x"
"""


def test_many_sweep_and_claim_at_once(tmp_path: Path) -> None:
    """Processes and threads, over folders that were abandoned; nobody fails, nothing of anybody's is lost or left."""
    for n in range(50):
        (tmp_path / f"a-{n}" / "deep").mkdir(parents=True)
        (tmp_path / f"a-{n}{LOCK_SUFFIX}").touch()
    processes = [subprocess.Popen([sys.executable, "-c", SWEEP, str(tmp_path)]) for _ in range(3)]
    with ThreadPoolExecutor(3) as threads:
        for done in [threads.submit(remove_abandoned, tmp_path, "a-") for _ in range(60)]:
            done.result()
    assert [p.wait(timeout=120) for p in processes] == [0, 0, 0]
    remove_abandoned(tmp_path, "a-")
    assert list(tmp_path.iterdir()) == []
