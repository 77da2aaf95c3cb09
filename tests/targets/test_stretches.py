"""Cutting files and filling them again, and weights as artifacts store them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from targets import stamping
from targets.stamping import Stretch, as_stored, copy_with, cut, raw
from toolchain.errors import LoweringError, ResourceError


@given(st.lists(st.tuples(st.binary(max_size=40), st.binary(max_size=90)), max_size=6), st.binary(max_size=50))
def test_what_was_cut_out_is_put_back(
    tmp_path_factory: pytest.TempPathFactory, parts: list[tuple[bytes, bytes]], end: bytes
) -> None:
    """Whatever lies between, before and after; empty stretches and ones side by side included."""
    folder = tmp_path_factory.mktemp("cut")
    whole = b"".join(between + content for between, content in parts) + end
    places, at = [], 0
    for between, content in parts:
        places.append((at + len(between), len(content)))
        at += len(between) + len(content)
    path = folder / "file"
    path.write_bytes(whole)
    cut(path, places[::-1])
    assert path.read_bytes() == b"".join(between for between, _ in parts) + end
    stretches = [
        Stretch(offset, size, lambda c=content: memoryview(c))  # type: ignore[misc]
        for (offset, size), (_, content) in zip(places, parts, strict=True)
    ]
    copy_with(path, folder / "again", stretches)
    assert (folder / "again").read_bytes() == whole


def test_what_the_disk_made_of_it_is_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_bytes(b"ab")
    write = stamping._write

    def lossy(out: object, content: memoryview | bytes) -> None:
        write(out, bytes(content).replace(b"7", b"8"))  # type: ignore[arg-type]

    monkeypatch.setattr(stamping, "_write", lossy)
    with pytest.raises(ResourceError, match="'out': what was read back from byte 1 on is not what was written"):
        copy_with(tmp_path / "file", tmp_path / "out", [Stretch(1, 3, lambda: memoryview(b"678"))])


@pytest.mark.parametrize("source", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("stored", [torch.float16, torch.float32])
def test_halves_are_stored_as_if_by_way_of_float32(source: torch.dtype, stored: torch.dtype) -> None:
    every = torch.from_numpy(np.arange(1 << 16, dtype=np.uint16)).view(
        source if source.itemsize == 2 else torch.float16
    )
    every = every[every.float().abs() < 65504].to(source)
    assert as_stored("w", every, stored) == raw(every.float().to(stored))


@pytest.mark.parametrize(
    ("number", "source", "stored", "says"),
    [
        (7e4, torch.float32, torch.float16, r"weight 'a.b' reaches 7e\+04, which float16 cannot hold; set precision"),
        (1e38, torch.bfloat16, torch.float16, r"weight 'a.b' reaches 9.97e\+37, which float16 cannot hold"),
        (float("nan"), torch.float32, torch.float32, r"weight 'a.b' has numbers that are infinite or none"),
        (float("-inf"), torch.float16, torch.float16, r"weight 'a.b' has numbers that are infinite or none"),
    ],
)
def test_numbers_that_cannot_be_stored(number: float, source: torch.dtype, stored: torch.dtype, says: str) -> None:
    weight = torch.zeros(100_000, dtype=source)
    assert len(as_stored("a.b", weight, stored)) == 100_000 * stored.itemsize
    weight[-1] = number
    with pytest.raises(LoweringError, match=says):
        as_stored("a.b", weight, stored)
