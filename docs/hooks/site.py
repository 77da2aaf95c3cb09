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
DOCS, CHANGELOG = Path("docs"), Path("CHANGELOG.md")
SOURCES = "source/"
"""Where the site has files of the repository that pages link to."""
LINK = re.compile(r"(?<=\]\()([^)#\s]+)(?=[)#])")


def on_files(files: Any, config: Any) -> None:
    """Add the reference, the changelog, and a page for everything outside ``docs`` that a page links to."""
    made = {"reference/cli.md": command_page(), **schema_pages()}
    waiting = [(file.src_uri, file.content_string) for file in files.documentation_pages()]
    if (ROOT / CHANGELOG).is_file():
        made[_site_name(CHANGELOG)] = _source_page(CHANGELOG)
        waiting.append((_site_name(CHANGELOG), _source_page(CHANGELOG)))
    while waiting:
        page, text = waiting.pop()
        for path in filter(None, (_named(page, link) for link in LINK.findall(text))):
            name = _site_name(path)
            if DOCS not in path.parents and name not in made:
                made[name] = _source_page(path)
                waiting += [(name, made[name])] if path.suffix == ".md" else []
    for name, text in made.items():
        files.append(File.generated(config, name, content=text))


def on_page_markdown(markdown: str, page: Any, config: Any, files: Any) -> str:
    """Point links that leave ``docs``, or that stand outside it, to where the site has what they name."""
    here = page.file.src_uri

    def point(found: re.Match[str]) -> str:
        path = _named(here, found[1])
        return found[1] if path is None else posixpath.relpath(_site_name(path), posixpath.dirname(here))

    return LINK.sub(point, markdown)


def _named(page: str, link: str) -> Path | None:
    """What a page's link names, from the repository's root; None for what is not in the repository."""
    if "://" in link or link.startswith("mailto:"):
        return None
    path = Path(posixpath.normpath(posixpath.join(_home(page).parent.as_posix(), link)))
    return path if ".." not in path.parts and (ROOT / path).exists() else None


def _home(page: str) -> Path:
    """Where a page's text is, from the repository's root."""
    if page == _site_name(CHANGELOG):
        return CHANGELOG
    return Path(page.removeprefix(SOURCES)) if page.startswith(SOURCES) else DOCS / page


def _site_name(path: Path) -> str:
    """Where the site has a file of the repository."""
    if path == CHANGELOG:
        return "changelog.md"
    if DOCS in path.parents:
        return path.relative_to(DOCS).as_posix()
    return SOURCES + path.as_posix() + ("" if path.suffix == ".md" else ".md")


def _source_page(path: Path) -> str:
    """A file's text, or that of all files of a folder."""
    whole = ROOT / path
    if path.suffix == ".md":
        return whole.read_text(encoding="utf-8")
    inner = sorted(p for p in whole.rglob("*") if p.is_file() and "__pycache__" not in p.parts)
    kinds = {".py": "python", ".yaml": "yaml", ".yml": "yaml", ".toml": "toml"}
    text = f"# `{path.as_posix()}`\n"
    for file in [whole] if whole.is_file() else [p for p in inner if p.suffix in {*kinds, ".md"}]:
        name = file.relative_to(ROOT).as_posix()
        text += f"\n`{name}`:\n\n````{kinds.get(file.suffix, 'text')}\n{file.read_text(encoding='utf-8')}````\n"
    return text
