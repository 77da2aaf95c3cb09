"""Troubleshooting: every message that the page quotes is one that the program has."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
QUOTED = re.compile(r"^- `([^`]+)`", re.MULTILINE)
GAP = "…"


def templates() -> Iterator[str]:
    """Every text in the code, with a gap for each value that is put into it."""
    for folder in ("toolchain", "passes", "targets"):
        for file in (ROOT / folder).rglob("*.py"):
            for node in ast.walk(ast.parse(file.read_text())):
                if isinstance(node, ast.JoinedStr):
                    yield "".join(str(p.value) if isinstance(p, ast.Constant) else GAP for p in node.values)
                elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                    yield node.value


@pytest.fixture(scope="module")
def known() -> str:
    return "\n".join(" ".join(t.split()) for t in templates())


def test_quoted_messages_occur_in_the_code(known: str) -> None:
    quoted = QUOTED.findall((ROOT / "docs" / "troubleshooting.md").read_text())
    assert len(quoted) >= 40
    for message in quoted:
        assert sum(map(len, fragments(message))) >= 8, message
    invented = [m for m in quoted if not re.search("[^\n]*".join(map(re.escape, fragments(m))), known)]
    assert not invented, f"no messages of the program's: {invented}"


def fragments(message: str) -> list[str]:
    """What stands between gaps, but for signs alone."""
    return [f for f in message.split(GAP) if f.strip(" .;:,'()")]
