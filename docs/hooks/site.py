"""The hook of the site: pages that are made from the code, and links to files that lie outside ``docs``."""

from __future__ import annotations

import posixpath
import re
from pathlib import Path
from typing import Any

from command_reference import command_page
from mkdocs.structure.files import File
from schema_reference import schema_pages

ROOT = Path(__file__).parents[2]
SOURCES = "source/"
"""Where the site has files of the repository that pages link to."""
LINK = re.compile(r"(?<=\]\()([^)#\s]+)(?=[)#])")


def on_files(files: Any, config: Any) -> None:
    """Add the reference, the changelog, and a page for everything outside ``docs`` that a page links to."""
    made = {"reference/cli.md": command_page(), **schema_pages()}
    if (changelog := ROOT / "CHANGELOG.md").is_file():
        made.setdefault("changelog.md", changelog.read_text(encoding="utf-8").replace("](docs/", "]("))
    for file in files.documentation_pages():
        for link in LINK.findall(file.content_string):
            if (path := _outside(file.src_uri, link)) is not None:
                made[_source_name(path)] = _source_page(path)
    for name, text in made.items():
        if name not in files.src_uris:
            files.append(File.generated(config, name, content=text))


def on_page_markdown(markdown: str, page: Any, config: Any, files: Any) -> str:
    """Point links that leave ``docs`` to the pages that stand for what they name."""

    def point(found: re.Match[str]) -> str:
        path = _outside(page.file.src_uri, found[1])
        return found[1] if path is None else posixpath.relpath(_source_name(path), posixpath.dirname(page.file.src_uri))

    return LINK.sub(point, markdown)


def _outside(page: str, link: str) -> Path | None:
    """What a link of a page names, from the repository's root, if it is there and not in ``docs``."""
    if "://" in link or link.startswith("mailto:"):
        return None
    path = posixpath.normpath(posixpath.join("docs", posixpath.dirname(page), link))
    there = not path.startswith(("docs/", "..")) and (ROOT / path).exists()
    return Path(path) if there else None


def _source_name(path: Path) -> str:
    return f"{SOURCES}{path.as_posix()}.md".replace(".md.md", ".md")


def _source_page(path: Path) -> str:
    """A file's text, or that of all files of a folder."""
    whole = ROOT / path
    if path.suffix == ".md":
        return whole.read_text(encoding="utf-8")
    inner = sorted(p for p in whole.rglob("*") if p.is_file() and "__pycache__" not in p.parts)
    kinds = {".py": "python", ".yaml": "yaml", ".toml": "toml"}
    text = f"# `{path.as_posix()}`\n"
    for file in [whole] if whole.is_file() else [p for p in inner if p.suffix in {*kinds, ".md"}]:
        name = file.relative_to(ROOT).as_posix()
        text += f"\n`{name}`:\n\n````{kinds.get(file.suffix, 'text')}\n{file.read_text(encoding='utf-8')}````\n"
    return text
