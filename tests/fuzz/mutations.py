"""Files that are nearly right: a good file's bytes with a few edits, most of them where headers are."""

from __future__ import annotations

from collections.abc import Callable

from hypothesis import strategies as st

HEADER = 512
NUMBERS = (0, 1, 0x7F, 0x80, 0xFF, 0x7FFF, 0xFFFF, 2**31 - 1, 2**31, 2**32 - 1, 2**53, 2**63 - 1, 2**64 - 1)
TOKENS = (
    *(
        b"[" * 3000,
        b"{" * 3000,
        b"9" * 5000,
        b"1e999",
        b"-1",
        b"null",
        b".nan",
        b".inf",
        b"0x",
        b"1:99:99",
        b"2024-99-99",
    ),
    *(
        b"&a [*a]",
        b"*a",
        b"<<: 3",
        b"? [a]",
        b"!!python/object/apply:os.system [x]",
        b"!!int x",
        b"!!binary _",
        b"../" * 9,
    ),
    *(b"/etc/passwd", b"\0", b"\xff\xfe", b'"', b"}", b"\n", b": ", b"- ", b"18446744073709551616"),
)
Edit = Callable[[bytes], bytes]


def mutated(seed: bytes) -> st.SearchStrategy[bytes]:
    """``seed`` after one edit to eight."""
    return st.lists(_edits(len(seed)), min_size=1, max_size=8).map(lambda edits: _applied(seed, edits))


def _applied(data: bytes, edits: list[Edit]) -> bytes:
    for edit in edits:
        data = edit(data)
    return data


def _edits(size: int) -> st.SearchStrategy[Edit]:
    near, anywhere = st.integers(0, min(size, HEADER)), st.integers(0, size)
    at = st.one_of(near, near, anywhere)
    widths = st.sampled_from((1, 2, 4, 8))
    numbers = st.builds(
        lambda n, width: (n % 256**width).to_bytes(width, "little"),
        st.one_of(st.sampled_from(NUMBERS), anywhere),
        widths,
    )
    pieces = st.one_of(numbers, st.sampled_from(TOKENS), st.binary(min_size=1, max_size=16))
    return st.one_of(
        st.builds(lambda i, piece: lambda d: d[:i] + piece + d[i + len(piece) :], at, pieces),
        st.builds(lambda i, piece: lambda d: d[:i] + piece + d[i:], at, pieces),
        st.builds(lambda i, n: lambda d: d[:i] + d[i + n :], at, st.integers(1, 64)),
        st.builds(lambda i, n: lambda d: d[: i + n] + d[i:], at, st.integers(1, 64)),
        st.builds(
            lambda i, bit: lambda d: d[:i] + bytes([d[i] ^ 1 << bit]) + d[i + 1 :] if i < len(d) else d,
            at,
            st.integers(0, 7),
        ),
        st.builds(lambda i: lambda d: d[:i], anywhere),
    )
