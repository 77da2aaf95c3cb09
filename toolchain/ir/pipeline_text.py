"""A pipeline of passes as text, and back: ``token-merge{where=self_attention} partition{max_bytes=200MB}``.

Passes stand between spaces. Options follow their pass in braces, as ``key=value`` with spaces or commas between
them. A value is what YAML writes in one line: a number, ``true``, ``null``, a word, a text in quotes, a list
``[a, b]`` or a mapping ``{a: b}``, in which lists and mappings may stand again.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any, NoReturn

import yaml

_NAME = re.compile(r"\w[\w.-]*")
_KEY = re.compile(r"[^\s=,{}\[\]\"':]+")
_PLAIN = re.compile(r"(?:[^\s,\[\]{}:]|:(?=[^\s,\[\]{}]))+")
_WORD = re.compile(r"\w[\w.+/-]*")
_QUOTED = re.compile(r"\"(?:[^\"\\]|\\.)*\"|'(?:[^']|'')*'", re.DOTALL)
_FLOAT = re.compile(r"[-+]?(?:[0-9]+\.?[0-9]*|\.[0-9]+)[eE][-+]?[0-9]+")
_INDICATORS = tuple("#&*!|>%@`")
_SPACE = re.compile(r"\s*")


def parse_pipeline(text: str) -> tuple[tuple[str, dict[str, Any]], ...]:
    """The passes that ``text`` names, in order, each with its options.

    Raises:
        ValueError: in one line, at which column the text is wrong and what was expected there.
    """
    return _Reader(text).pipeline()


def pipeline_text(passes: Iterable[tuple[str, Mapping[str, Any]]]) -> str:
    """Passes and their options as text; :func:`parse_pipeline` gives the same again.

    Options are what JSON has: numbers, texts, booleans, None, lists and mappings of these.

    Raises:
        ValueError: a pass's name is not of letters, digits, ``_``, ``-`` and ``.``.
        TypeError: an option is something that JSON does not have.
    """
    return " ".join(_pass_text(name, options) for name, options in passes)


def _pass_text(name: str, options: Mapping[str, Any]) -> str:
    if not _NAME.fullmatch(name):
        raise ValueError(f"'{name}' is no name of a pass; expected letters, digits, '_', '-' and '.'")
    shown = " ".join(f"{_key_text(k)}={_value_text(v)}" for k, v in options.items())
    return f"{name}{{{shown}}}" if shown else name


def _key_text(key: str) -> str:
    return key if _WORD.fullmatch(key) else _quoted(key)


def _value_text(value: Any) -> str:
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    if isinstance(value, float):
        shown = repr(value)
        return {"inf": ".inf", "-inf": "-.inf", "nan": ".nan"}.get(shown, shown)
    if isinstance(value, int):
        return str(value)
    if isinstance(value, str):
        return value if _WORD.fullmatch(value) and _scalar(value) == value else _quoted(value)
    if isinstance(value, (list, tuple)):
        return f"[{', '.join(map(_value_text, value))}]"
    if isinstance(value, Mapping):
        return f"{{{', '.join(f'{_value_text(k)}: {_value_text(v)}' for k, v in value.items())}}}"
    raise TypeError(f"an option cannot be a {type(value).__name__} ({value!r})")


def _quoted(text: str) -> str:
    """In double quotes, with everything that YAML does not take as it is written as its number."""
    return f'"{"".join(map(_escaped, text))}"'


def _escaped(character: str) -> str:
    if character in '"\\':
        return "\\" + character
    if character.isprintable():
        return character
    number = ord(character)
    return f"\\x{number:02x}" if number < 0x100 else f"\\u{number:04x}" if number < 0x10000 else f"\\U{number:08x}"


def _scalar(word: str) -> Any:
    """What YAML takes a word without quotes for, and ``1e-3`` for a number, as recipes do."""
    if _FLOAT.fullmatch(word):
        return float(word)
    loader = yaml.SafeLoader("")
    tag = loader.resolve(yaml.ScalarNode, word, (True, False))  # type: ignore[no-untyped-call]
    if tag in ("tag:yaml.org,2002:merge", "tag:yaml.org,2002:value"):  # '<<' and '=' mean something in a block only
        return word
    return loader.construct_object(yaml.ScalarNode(tag, word))


class _Reader:
    """Reads one text from its beginning to its end; ``at`` is how far it is."""

    def __init__(self, text: str) -> None:
        self.text, self.at = text, 0

    def pipeline(self) -> tuple[tuple[str, dict[str, Any]], ...]:
        found: list[tuple[str, dict[str, Any]]] = []
        self._space()
        while self.at < len(self.text):
            name = self._match(_NAME) or self._refuse("a pass's name")
            found.append((name, self._options() if self._take("{") else {}))
            if not self._space() and self.at < len(self.text):
                self._refuse(f"a space after '{name}'" + ("" if self.text[self.at - 1] == "}" else ", or its options"))
        return tuple(found)

    def _options(self) -> dict[str, Any]:
        options: dict[str, Any] = {}
        self._space()
        while not self._take("}"):
            start = self.at
            key = str(self._text_in_quotes()) if self._next() in ('"', "'") else self._match(_KEY)
            if not key and self.at == start:
                self._refuse("an option's name or '}'")
            assert key is not None
            self._new(key, options, start)
            if not self._take("="):
                self._refuse(f"'=' and a value after '{key}'")
            options[key] = self._value("a value")
            spaced = self._space()
            if self._take(","):
                self._space()
            elif not spaced and self._next() != "}":
                self._refuse("a space, ',' or '}'")
        return options

    def _value(self, expected: str) -> Any:
        if self._take("["):
            return self._list()
        if self._take("{"):
            return self._mapping()
        if self._next() in ('"', "'"):
            return self._text_in_quotes()
        start = self.at
        word = self._match(_PLAIN)
        if word is None:
            self._refuse(expected)
        if word.startswith(_INDICATORS):
            self.at = start
            self._refuse(f"{expected}; put a text that begins with '{word[0]}' in quotes")
        try:
            return _scalar(word)
        except (ValueError, yaml.YAMLError):  # as a date with a 13th month
            self.at = start
            self._refuse(f"{expected}; put a text such as '{word}' in quotes")

    def _list(self) -> list[Any]:
        values: list[Any] = []
        self._space()
        while not self._take("]"):
            values.append(self._value("a value or ']'"))
            self._separator("]")
        return values

    def _mapping(self) -> dict[Any, Any]:
        values: dict[Any, Any] = {}
        self._space()
        while not self._take("}"):
            start = self.at
            if self._next() in ("[", "{"):
                self._refuse("a key or '}'")
            key = self._value("a key or '}'")
            self._new(key, values, start)
            if not self._take(":"):
                self._refuse(f"': ' and a value after '{key}'")
            self._space()
            values[key] = self._value("a value")
            self._separator("}")
        return values

    def _separator(self, end: str) -> None:
        self._space()
        if self._take(","):
            self._space()
        elif self._next() != end:
            self._refuse(f"',' or '{end}'")

    def _text_in_quotes(self) -> str:
        start = self.at
        quoted = self._match(_QUOTED)
        if quoted is None:
            self._refuse("a text that ends with the quote that it begins with")
        try:
            return str(yaml.safe_load(quoted))
        except yaml.YAMLError:
            self.at = start
            self._refuse("a text in quotes as YAML writes it")

    def _new(self, key: Any, known: Mapping[Any, Any], start: int) -> None:
        if key in known:
            self.at = start
            self._refuse(f"another key, '{key}' is given twice")

    def _space(self) -> str:
        return self._match(_SPACE) or ""

    def _next(self) -> str:
        return self.text[self.at : self.at + 1]

    def _take(self, character: str) -> bool:
        found = self._next() == character
        self.at += found
        return found

    def _match(self, pattern: re.Pattern[str]) -> str | None:
        found = pattern.match(self.text, self.at)
        if found is None:
            return None
        self.at = found.end()
        return found[0]

    def _refuse(self, expected: str) -> NoReturn:
        before = self.text[: self.at]
        line, column = before.count("\n") + 1, self.at - before.rfind("\n")
        place = f"line {line}, column {column}" if "\n" in self.text.strip() else f"column {column}"
        found = f"'{self._next()}'" if self._next().strip() else "a space" if self._next() else "the end"
        raise ValueError(f"{place}: expected {expected}, got {found}")
