"""Admission: never more than fits, except one that fits nowhere and is alone; and everyone has a turn."""

from __future__ import annotations

from dataclasses import dataclass

from hypothesis import given
from hypothesis import strategies as st

from toolchain.build.admission import LOWERING_FACTOR, PROCESS_BYTES, STAMPING_FACTOR, Admission, needed_bytes


@dataclass(frozen=True)
class Wish:
    number: int
    needed_bytes: int


@given(
    needs=st.lists(st.integers(0, 100), max_size=30),
    free_bytes=st.none() | st.integers(0, 120),
    at_once=st.none() | st.integers(1, 5),
    data=st.data(),
)
def test_all_are_admitted_and_never_too_many(
    needs: list[int], free_bytes: int | None, at_once: int | None, data: st.DataObject
) -> None:
    """Whatever the order in which those that run end."""
    admission = Admission(free_bytes, at_once)
    waiting = [Wish(i, n) for i, n in enumerate(needs)]
    running: list[Wish] = []
    admitted: list[Wish] = []
    while waiting or running:
        while (wish := admission.next(waiting)) is not None:
            waiting.remove(wish)
            running.append(wish)
            admitted.append(wish)
            assert at_once is None or len(running) <= at_once
            assert free_bytes is None or sum(w.needed_bytes for w in running) <= free_bytes or len(running) == 1
        assert running  # or nothing would ever go on
        ended = data.draw(st.sampled_from(running))
        running.remove(ended)
        admission.ended(ended)
    assert sorted(w.number for w in admitted) == list(range(len(needs)))


def test_no_limits() -> None:
    admission = Admission()
    wishes = [Wish(i, 10**12) for i in range(5)]
    assert [admission.next(wishes[i:]) for i in range(5)] == wishes


def test_what_is_too_large_waits_until_it_is_alone() -> None:
    admission = Admission(10)
    small, large = Wish(0, 4), Wish(1, 100)
    assert admission.next([small, large]) == small
    assert admission.next([large]) is None
    admission.ended(small)
    assert admission.next([large]) == large
    assert admission.next([small]) is None


def test_a_smaller_one_goes_first_if_it_fits() -> None:
    admission = Admission(10)
    assert admission.next([Wish(0, 6)]) is not None
    assert admission.next([Wish(1, 6), Wish(2, 4)]) == Wish(2, 4)


def test_what_a_block_needs() -> None:
    assert needed_bytes(0, LOWERING_FACTOR) == PROCESS_BYTES
    more = needed_bytes(100, LOWERING_FACTOR) - needed_bytes(100, STAMPING_FACTOR)
    assert more == 400 * (LOWERING_FACTOR - STAMPING_FACTOR)
