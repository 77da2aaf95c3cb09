"""Markdown of docstrings and tables."""

from __future__ import annotations

import html
import inspect
import re
from collections.abc import Iterable, Sequence


def prose(docstring: str) -> str:
    """A docstring as Markdown: literals and references as code, everything else as it stands."""
    text = re.sub(r":\w+:`~?(?:[\w.]*\.)?(\w+)`", r"`\1`", inspect.cleandoc(docstring)).replace("``", "`")
    parts = text.split("`")
    return "`".join(part if i % 2 else html.escape(part, quote=False) for i, part in enumerate(parts))


def cell(docstring: str) -> str:
    """The same in one line, for a table."""
    return " ".join(prose(docstring).split()).replace("|", "\\|")


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table; its cells are Markdown already."""
    lines = [head, ["---"] * len(head), *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)
