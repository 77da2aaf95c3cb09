"""Garbage is looked for when there may be enough of it."""

from __future__ import annotations

import gc
import sys
import weakref
from collections.abc import Iterator

import numpy as np
import pytest

from toolchain.system.memory import GROWN_BYTES, free_bytes, release, return_large_allocations

pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="elsewhere it is always looked for")


class Holder:
    """An object in a cycle, so that only the collector frees it."""

    def __init__(self, bytes_: int) -> None:
        self.data = np.ones(bytes_, np.uint8)
        self.itself = self


@pytest.fixture(autouse=True)
def by_hand() -> Iterator[None]:
    gc.collect()
    gc.disable()
    yield
    gc.enable()


def test_large_garbage_is_freed() -> None:
    return_large_allocations()
    release()
    for _ in range(2):  # the second time from another level
        gone = weakref.ref(Holder(2 * GROWN_BYTES))
        release()
        assert gone() is None


def test_no_time_is_spent_on_small_garbage() -> None:
    held = np.ones(2 * GROWN_BYTES, np.uint8)
    release()
    kept = weakref.ref(Holder(1000))
    release()
    assert kept() is not None
    del held


def test_growth_is_counted_from_the_least_since() -> None:
    held = np.ones(4 * GROWN_BYTES, np.uint8)
    release()
    del held
    release()
    gone = weakref.ref(Holder(2 * GROWN_BYTES))
    release()
    assert gone() is None


def test_what_is_free_is_known() -> None:
    assert 1e8 < free_bytes() < 1e14
