"""Every link of the documentation leads somewhere: to a file, and to a heading in it."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from documents import FENCE, ROOT, documents, name_of

LINK = re.compile(r"\]\(([^)\s]+)\)")
MADE = ROOT / "docs/reference"
"""Pages that are made when the site is built, which holds links to them."""


@pytest.mark.parametrize("path", documents(), ids=name_of)
def test_links(path: Path) -> None:
    text = re.sub(r"`[^`\n]*`", "", FENCE.sub("", path.read_text(encoding="utf-8")))
    broken = [link for link in LINK.findall(text) if not _leads(path, link)]
    assert not broken, f"{name_of(path)}: {broken}"


def _leads(path: Path, link: str) -> bool:
    if re.match(r"(https?|mailto):", link):
        return True
    place, _, anchor = link.partition("#")
    target = (path.parent / place).resolve() if place else path
    if MADE in target.parents or target == ROOT / "docs/changelog.md":
        return True
    return target.exists() and (not anchor or anchor in _anchors(target))


def _anchors(path: Path) -> set[str]:
    """What headings are called in links, by GitHub's rule, as the site's are."""
    headings = re.findall(r"^#{1,6} +(.+?) *$", FENCE.sub("", path.read_text(encoding="utf-8")), re.MULTILINE)
    plain = (re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading) for heading in headings)
    return {re.sub(r"[^\w\- ]", "", heading).strip().lower().replace(" ", "-") for heading in plain}


def test_a_broken_link_is_found(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("# One `two`, three\n\n```sh\n# Not this\n```\n")
    assert _leads(page, "#one-two-three") and _leads(page, "page.md#one-two-three")
    assert not _leads(page, "#not-this") and not _leads(page, "other.md")
