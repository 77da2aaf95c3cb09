"""What is done to a prompt before it is tokenized.

``web-captions``: the captions of Open-Sora and of the models before it were cleaned by a fixed list of rules, made for
captions scraped off the web and applied twice; a prompt has to look like them, down to the list's oddities. The rules
below are that list.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from html import unescape
from html.entities import html5
from html.parser import HTMLParser
from typing import Literal, NamedTuple
from urllib.parse import unquote_plus

Cleaning = Literal["web-captions", "none"]
"""Lists of cleaning rules, as manifests name them."""


def prepare_prompt(prompt: str, suffixes: Iterable[tuple[str, str]] = (), cleaning: Cleaning = "web-captions") -> str:
    """The text to tokenize: ``prompt`` with what captions said of the video appended, then cleaned.

    Args:
        prompt: as the user wrote it.
        suffixes: label and text; the text is appended unless the prompt has its label already.
        cleaning: ``web-captions``, or ``none``: as it is.
    """
    added = [text for label, text in suffixes if label not in prompt]
    whole = prompt + "".join(added)
    return clean_text(whole) if cleaning == "web-captions" else whole


def clean_text(text: str) -> str:
    """``text`` cleaned as the training captions were: twice, as the first pass uncovers work for the second."""
    return clean_once(clean_once(text))


class Rule(NamedTuple):
    """Every match of ``pattern`` becomes ``replacement``."""

    pattern: str
    replacement: str
    why: str


DOMAIN = r"[a-zA-Z0-9.\-]+\.(?:com|co|ru|net|org|edu|gov|it)[\w/-]*\b/?(?!@)"
FILE_TYPES = r"(?:png|jpg|jpeg|bmp|webp|eps|pdf|apk|mp4)"
DASHES = (
    r"\-\u058a\u05be\u1400\u1806\u2010-\u2015"
    r"\u2e17\u2e1a\u2e3a\u2e3b\u2e40\u301c\u3030\u30a0\ufe31\ufe32\ufe58\ufe63\uff0d"
)
ORNAMENTS = r"#\u00ae\u2022\u00a9\u2122&@\u00b7\u00ba\u00bd\u00be\u00bf\u00a1\u00a7~()\[\]{}|\\/*"

BEFORE_MARKUP = (
    Rule(r"<person>", "person", "datasets anonymise names to a tag; as markup it would vanish"),
    Rule(rf"\b(?:https?:(?:/{{1,3}}|[a-zA-Z0-9%])|{DOMAIN})", "", "links: the scheme alone, or a bare domain and path"),
    Rule(rf"\b(?:www:(?:/{{1,3}}|[a-zA-Z0-9%])|{DOMAIN})", "", "again with www, and domains that came bare"),
)

AFTER_MARKUP = (
    Rule(r"@\w+\b", "", "@nicknames"),
    Rule(r"[\u31c0-\u9fff]+", "", "Chinese characters, their strokes and enclosed forms; not kana, not hangul"),
    Rule(rf"[{DASHES}]+", "-", "dashes of all kinds, and runs of them"),
    Rule(r"[`\u00b4\u00ab\u00bb\u201c\u201d\u00a8]", '"', "double quotes of all kinds"),
    Rule(r"[\u2018\u2019]", "'", "single quotes of all kinds"),
    Rule(r"&quot;?", "", "quotes that were escaped twice"),
    Rule(r"&amp", "", "ampersands that were escaped twice"),
    Rule(r"\d{1,3}\.\d{1,3}\.\d{1,3}\.\d{1,3}", " ", "IP addresses"),
    Rule(r"\d:\d\d\s+$", "", "numbers of articles, times at the end"),
    Rule(r"\\n", " ", "line breaks that were escaped to a backslash and an n"),
    Rule(r"#\d{1,3}\b", "", "#123"),
    Rule(r"#\d{5,}\b", "", "#12345 and longer; four digits may be a year"),
    Rule(r"\b\d{6,}\b", "", "long numbers"),
    Rule(rf"\S+\.{FILE_TYPES}", "", "file names"),
    Rule(r"[\"']{2,}", '"', "runs of quotes"),
    Rule(r"\.{2,}", " ", "dots of ellipsis"),
    Rule(rf"[{ORNAMENTS}]+", " ", "ornaments: ***sale***, #sale, brackets, slashes"),
    Rule(r"\s+\.\s+", " ", "a full stop that stands alone"),
)

JOINTS = re.compile(r"[-_]")
MOST_JOINTS = 3
"""More hyphens and underscores than this join words that were apart: this-is-my-cute-cat."""

AFTER_REPAIR = (
    Rule(r"\b[a-zA-Z]{1,3}\d{3,15}\b", "", "article codes: jc6640"),
    Rule(r"\b[a-zA-Z]+\d+[a-zA-Z]+\b", "", "article codes: jc6640vc"),
    Rule(r"\b\d+[a-zA-Z]+\d+\b", "", "article codes: 6640vc231"),
    Rule(r"(?:worldwide\s+)?(?:free\s+)?shipping", "", "a shop's words"),
    Rule(r"(?:free\s)?download(?:\sfree)?", "", "a picture site's words"),
    Rule(r"\bclick\b\s(?:for|on)\s\w+", "", "a web page's words"),
    Rule(rf"\b{FILE_TYPES}(?:\simages?)?", "", "file types as words"),
    Rule(r"\bpage\s+\d+\b", "", "page numbers"),
    Rule(r"\b\d*[a-zA-Z]+\d+[a-zA-Z]+\d+[a-zA-Z\d]*\b", " ", "identifiers: j2d1a2a"),
    Rule(r"\b\d+\.?\d*[x\u0445\u00d7]\d+\.?\d*\b", "", "sizes, 1920x1080, with a latin x, a cyrillic one or a cross"),
    Rule(r"\b\s+:\s+", ": ", "space before a colon"),
    Rule(r"(\D[,./])\b", r"\1 ", "no space after a comma or full stop, unless in a number"),
    Rule(r"\s+", " ", "runs of space"),
    Rule(r"^[\"']([\w\W]+)[\"']$", r"\1", "quotes around it all"),
    Rule(r"^['_,\-:;]", "", "punctuation in front; one sign, and only where no space precedes it"),
    Rule(r"['_,\-:+]$", "", "punctuation at the end"),
    Rule(r"^\.\S+$", "", "a lone file type"),
)


def clean_once(text: str) -> str:
    """One pass of the cleaning."""
    text = unquote_plus(text).strip().lower()
    text = _apply(BEFORE_MARKUP, text)
    text = strip_markup(text)
    text = _apply(AFTER_MARKUP, text)
    if len(JOINTS.findall(text)) > MOST_JOINTS:
        text = JOINTS.sub(" ", text)
    text = repair(text)
    return _apply(AFTER_REPAIR, text).strip()


def _apply(rules: tuple[Rule, ...], text: str) -> str:
    for rule in rules:
        text = re.sub(rule.pattern, rule.replacement, text)
    return text


def repair(text: str) -> str:
    """Undo wrong decoding, ligatures and full-width letters, then escapes, up to two deep."""
    import ftfy  # here, not above: its tables take a while to load and only prompts need them

    return unescape(unescape(ftfy.fix_text(text))).strip()


def strip_markup(text: str) -> str:
    """What a browser would show of ``text``, and no tags; as it is if it is no markup that can be read."""
    parser = _ShownText()
    try:
        parser.feed(text)
        parser.close()
    except AssertionError:  # how the standard parser reports a declaration that it cannot read
        return text
    return "".join(parser.shown)


class _ShownText(HTMLParser):
    """Collects text outside comments and declarations and outside what no browser shows in line."""

    HIDING = ("script", "style", "template", "rt", "rp")

    def __init__(self) -> None:
        super().__init__(convert_charrefs=False)  # converting would join text across an unknown entity
        self.shown: list[str] = []
        self.open: list[str] = []

    def handle_starttag(self, tag: str, attrs: object) -> None:
        self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        if tag in self.open:  # what is open inside it ends with it
            del self.open[len(self.open) - 1 - self.open[::-1].index(tag) :]

    def handle_data(self, data: str) -> None:
        if not any(tag in self.HIDING for tag in self.open):
            self.shown.append(data)

    def handle_charref(self, name: str) -> None:
        self.handle_data(unescape(f"&#{name};"))

    def handle_entityref(self, name: str) -> None:
        self.handle_data(html5.get(f"{name};", f"&{name}"))

    def unknown_decl(self, data: str) -> None:
        if data.upper().startswith("CDATA["):
            self.shown.append(data[len("CDATA[") :])
