"""A manifest held against itself: what it says twice agrees, and no size in it is larger than what it describes.

A manifest is a file that a stranger may have written. Its fields' types are checked when it is read
(:mod:`toolchain.formats.manifest`); what its parts say of one another is checked here, before anything is allocated or
opened. Everything works on the manifest alone, so no file of the bundle is needed. docs/security.md has the list.
"""

from __future__ import annotations

from toolchain.formats.consistency.blocks import check_blocks
from toolchain.formats.consistency.decoding import check_decoding
from toolchain.formats.consistency.files import check_paths
from toolchain.formats.consistency.inputs import check_feeds
from toolchain.formats.consistency.loading import check_loading
from toolchain.formats.consistency.numbers import check_numbers
from toolchain.formats.consistency.sampling import check_sampling
from toolchain.formats.consistency.wiring import check_wiring
from toolchain.formats.manifest import Manifest


def check_manifest(manifest: Manifest) -> None:
    """Refuse a manifest that contradicts itself.

    Raises:
        ValueError: in one line: the key, what it says, and what it disagrees with.
    """
    check_numbers(manifest)
    check_paths(manifest)
    check_blocks(manifest)
    check_wiring(manifest)
    check_feeds(manifest)
    check_sampling(manifest)
    check_decoding(manifest)
    check_loading(manifest)
