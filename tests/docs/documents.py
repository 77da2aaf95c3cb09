"""The documentation as tests read it: files, fenced blocks, and command lines."""

from __future__ import annotations

import re
import shlex
import textwrap
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
FENCE = re.compile(r"^( *)(`{3,})(.*)\n((?:.*\n)*?) *\2[ \t]*$", re.MULTILINE)
INDENTED = re.compile(r"^ {4,}((?:[A-Z_]+=\S+ )*sora-compile .*)$", re.MULTILINE)
COMMENT = re.compile(r"(^|\s)#\s.*$", re.MULTILINE)


@dataclass(frozen=True)
class Block:
    """A fenced block: in which file, what stands behind the fence, and the lines in it."""

    file: str
    info: str
    text: str


@dataclass(frozen=True)
class Command:
    """A line with ``sora-compile``: in which file, and its words, that one first."""

    file: str
    words: tuple[str, ...]

    def __str__(self) -> str:
        return f"{self.file}: {shlex.join(self.words)}"


def documents() -> list[Path]:
    """What people read, as paths."""
    return [*sorted(ROOT.glob("*.md")), *sorted(ROOT.glob("docs/**/*.md"))]


def name_of(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def blocks(path: Path, language: str) -> list[Block]:
    """The fenced blocks of a language, in order."""
    found = FENCE.finditer(path.read_text(encoding="utf-8"))
    fences = (Block(name_of(path), m[3].strip(), textwrap.dedent(m[4])) for m in found)
    return [b for b in fences if b.info.split()[:1] == [language]]


def commands(path: Path) -> list[Command]:
    """Every command line of a file, of blocks for a shell first, then of indented lines."""
    indented = "\n".join(INDENTED.findall(FENCE.sub("", path.read_text(encoding="utf-8"))))
    texts = [*(b.text for b in blocks(path, "sh")), indented]
    return [Command(name_of(path), words) for text in texts for words in _lines(text)]


def _lines(text: str) -> Iterator[tuple[str, ...]]:
    """The words of each call, without variables before it and pipes behind it."""
    for line in COMMENT.sub("", text.replace("\\\n", " ")).splitlines():
        lexer = shlex.shlex(line, posix=True, punctuation_chars=True)
        lexer.commenters, lexer.whitespace_split = "", True
        call: list[str] = []
        for word in [*lexer, ";"]:
            if set(word) <= set("();<>|&"):
                if call[:1] == ["sora-compile"]:
                    yield tuple(call)
                call = []
            elif call or not re.match(r"[A-Z_]+=", word):
                call.append(word)
