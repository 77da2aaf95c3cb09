"""What a process has one of: the folder of temporary files, and the streams that converters write to."""

from __future__ import annotations

import copy
import errno
import importlib
import logging
import os
import sys
import tempfile
import threading
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import coremltools as ct
import pytest
import torch
from coremltools.converters.mil import Builder
from coremltools.converters.mil.mil import Program
from coremltools.converters.mil.mil.block import InvalidBlockStateError
from coremltools.converters.mil.mil.passes.pass_pipeline import PassPipelineManager
from coremltools.converters.mil.mil.passes.pass_registry import PASS_REGISTRY
from torch import fx

from targets.coreml import CoreMLConfig, CoreMLTarget
from targets.coreml.validation import validated_at_the_ends
from targets.streams import quiet
from targets.unused import unused_left_out
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


def test_a_disk_with_less_room_than_is_written_next_is_full(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A writer that fails in the middle of a large weight leaves room behind."""
    free = 200_000_000
    monkeypatch.setattr("toolchain.system.disk.shutil.disk_usage", lambda _: SimpleNamespace(free=free))
    with pytest.raises(OSError) as caught, full_disk_named(tmp_path, next_bytes=free + 1):
        raise RuntimeError("unknown error")
    assert caught.value.errno == errno.ENOSPC
    with pytest.raises(RuntimeError, match="unknown error"), full_disk_named(tmp_path, next_bytes=free):
        raise RuntimeError("unknown error")


def test_a_full_disk_while_core_ml_converts(
    cut_small: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its writer says nothing of disks, and its files are gone, and the disk has room, once it has failed."""
    coreml = importlib.import_module("targets.coreml.lower")
    seen: list[bool] = []

    def fail(*_: object, **__: object) -> None:
        raise RuntimeError("[MIL FileWriter]: Unknown error occurred while writing data to the file.")

    def full(folder: Path, *_: Path, room: int) -> bool:
        assert room >= block.weight_bytes
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


# --- what torch does for every graph -----------------------------------------------------------------


def test_code_of_a_graph_is_made_when_it_is_asked_for() -> None:
    def double(x: torch.Tensor) -> torch.Tensor:
        return x * 2

    other: list[fx.GraphModule] = []
    with unused_left_out():
        made = fx.symbolic_trace(double)
        called, copied = fx.symbolic_trace(double), copy.deepcopy(made)
        thread = threading.Thread(target=lambda: other.append(fx.symbolic_trace(double)))
        thread.start()
        thread.join()
        assert "_code" not in made.__dict__
        assert "_code" in other[0].__dict__  # another thread's graphs are as ever
    for module in (called, copied, other[0]):
        assert module(torch.ones(1)).item() == 2
    assert "x * 2" in made.code
    assert "x * 2" in str(made)
    made.graph.output_node().args = (next(iter(made.graph.nodes)),)
    made.recompile()
    assert made(torch.ones(1)).item() == 1


def test_a_pass_that_breaks_a_program_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    @Builder.program(input_specs=[Builder.TensorSpec(shape=(2,))])  # type: ignore[untyped-decorator]
    def program(x: Any) -> Any:
        return Builder.relu(x=x)

    def break_it(broken: Any) -> None:
        relu = broken.functions["main"].find_ops(op_type="relu")[0]
        relu.outputs[0]._child_ops.append(relu)

    noop = type(PASS_REGISTRY["common::noop_elimination"])
    monkeypatch.setattr(noop, "apply", lambda self, broken: break_it(broken))
    passes = ct.PassPipeline(["common::noop_elimination", "common::add_conv_transpose_output_shape"])
    validate = Program.validate
    with validated_at_the_ends(), pytest.raises(InvalidBlockStateError):
        PassPipelineManager.apply_pipeline(program, passes)
    assert Program.validate is validate
