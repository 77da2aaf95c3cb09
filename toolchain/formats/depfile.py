"""Depfiles: what a file was made from, as Make and Ninja read it."""

from __future__ import annotations

import re
from collections.abc import Iterable

from toolchain.errors import RecipeError


def depfile_text(target: str, inputs: Iterable[str]) -> str:
    """One rule, ``target: inputs``, an input a line.

    Raises:
        RecipeError: a path has a line break, or a tab, which a depfile cannot express.
    """
    return f"{_escaped(target)}:" + "".join(f" \\\n  {_escaped(path)}" for path in inputs) + "\n"


def _escaped(path: str) -> str:
    """A path as both understand it: Make's escapes, of which Ninja takes these."""
    if re.search(r"[\t\r\n]", path):
        raise RecipeError(
            f"--depfile: {path!r} has a tab or a line break in it, which depfiles cannot express; rename it"
        )
    doubled = re.sub(r"(\\*) ", r"\1\1\\ ", path)
    return re.sub(r"([#:])", r"\\\1", doubled).replace("$", "$$")
