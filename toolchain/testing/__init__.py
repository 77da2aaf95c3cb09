"""For tests of a project that ships a bundle.

from toolchain.testing import assert_bundle

def test_bundle():
    assert_bundle("build/my-bundle")
"""

from __future__ import annotations

from pathlib import Path

from toolchain.accuracy.verify import Verification, verify
from toolchain.errors import SoraCompileError


def assert_bundle(bundle: str | Path, *, goldens_of: str | Path | None = None) -> Verification:
    """Hold a bundle against its goldens, or against those of another bundle: yesterday's, that was good.

    Args:
        goldens_of: a bundle whose blocks, functions and shapes are the same.

    Raises:
        AssertionError: the bundle is damaged, or a block's numbers are off; says which and by how much.
    """
    try:
        found = verify(bundle, goldens_of=goldens_of)
        found.require()
    except SoraCompileError as e:
        raise AssertionError(str(e)) from e
    return found
