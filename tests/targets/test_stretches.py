"""Cutting files and filling them again, and weights as artifacts store them."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from targets import stamping
from targets.stamping import PIECE_BYTES, Stretch, copy_with, cut, raw, stored_pieces
from toolchain.errors import LoweringError, ResourceError


def floats(numbers: list[int]) -> bytes:
    return np.array(numbers, np.float32).tobytes()


def stretch(offset: int, content: bytes, digest: Any = None) -> Stretch:
    weight = torch.frombuffer(bytearray(content), dtype=torch.float32) if content else torch.empty(0)
    return Stretch(offset, len(content), "w", torch.float32, lambda: weight, digest)


def as_stored(name: str, weight: torch.Tensor, dtype: torch.dtype) -> bytes:
    return b"".join(bytes(p) for p in stored_pieces(name, weight, dtype, stamping._Ring(3)))


@given(
    st.lists(st.tuples(st.binary(max_size=40), st.lists(st.integers(0, 255), max_size=30).map(floats)), max_size=6),
    st.binary(max_size=50),
)
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
    stretches = [stretch(offset, content) for (offset, _), (_, content) in zip(places, parts, strict=True)]
    assert copy_with(path, folder / "again", stretches) == hashlib.sha256(whole).hexdigest()
    assert (folder / "again").read_bytes() == whole


def test_what_the_disk_made_of_it_is_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_bytes(b"ab")
    write = stamping._write

    def lossy(out: object, content: memoryview | bytes) -> None:
        write(out, bytes(content).replace(b"7", b"8"))  # type: ignore[arg-type]

    monkeypatch.setattr(stamping, "_write", lossy)
    with pytest.raises(ResourceError, match="'out': what was read back from byte 1 on is not what was written"):
        copy_with(tmp_path / "file", tmp_path / "out", [stretch(1, b"6785")])


@pytest.mark.parametrize("source", [torch.float32, torch.bfloat16])
def test_weights_of_many_pieces(tmp_path: Path, source: torch.dtype) -> None:
    weight = torch.randn(3 * PIECE_BYTES // 4 + 5).to(source)
    (tmp_path / "file").write_bytes(b"<>")
    digest = hashlib.sha256()
    copy_with(
        tmp_path / "file",
        tmp_path / "out",
        [Stretch(1, 4 * weight.numel(), "w", torch.float32, lambda: weight, digest)],
    )
    stored = bytes(raw(weight.float()))
    assert (tmp_path / "out").read_bytes() == b"<" + stored + b">"
    assert digest.digest() == hashlib.sha256(stored).digest()


def test_weights_of_another_size(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(ValueError, match="8 bytes for a place of 4 in 'file'"):
        copy_with(tmp_path / "file", tmp_path / "out", [Stretch(0, 4, "w", torch.float32, lambda: torch.zeros(2))])


@pytest.mark.parametrize("source", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("stored", [torch.float16, torch.float32])
def test_halves_are_stored_as_if_by_way_of_float32(source: torch.dtype, stored: torch.dtype) -> None:
    every = torch.from_numpy(np.arange(1 << 16, dtype=np.uint16)).view(
        source if source.itemsize == 2 else torch.float16
    )
    every = every[every.float().abs() < 65504].to(source)
    assert as_stored("w", every, stored) == bytes(raw(every.float().to(stored)))


@pytest.mark.parametrize(
    ("number", "source", "stored", "says"),
    [
        (7e4, torch.float32, torch.float16, r"weight 'a.b' reaches 7e\+04, which float16 cannot hold$"),
        (1e38, torch.bfloat16, torch.float16, r"weight 'a.b' reaches 9.97e\+37, which float16 cannot hold"),
        (float("nan"), torch.float32, torch.float32, r"weight 'a.b' has numbers that are NaN or infinite"),
        (float("-inf"), torch.float16, torch.float16, r"weight 'a.b' has numbers that are NaN or infinite"),
    ],
)
def test_numbers_that_cannot_be_stored(number: float, source: torch.dtype, stored: torch.dtype, says: str) -> None:
    weight = torch.zeros(100_000, dtype=source)
    assert len(as_stored("a.b", weight, stored)) == 100_000 * stored.itemsize
    weight[-1] = number
    with pytest.raises(LoweringError, match=says):
        as_stored("a.b", weight, stored)
