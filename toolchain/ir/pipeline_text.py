"""A pipeline of passes as text: ``token-merge{where=self_attention} partition{max_bytes=200MB}``.

Names are separated by space; options stand in braces as ``key=value``, separated by space or commas. A value is a
YAML flow value: a word, a number, a quoted text, ``[a, b]`` or ``{a: b}``, nested at will.
What :func:`pipeline_text` writes, :func:`parse_pipeline` reads back.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from typing import Any

import yaml

from toolchain.errors import RecipeError
from toolchain.ir.yaml_text import UniqueKeyLoader

Options = dict[str, Any]
NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]*")
KEY = re.compile(r"([A-Za-z_][A-Za-z0-9_]*)\s*=\s*")
WORD = re.compile(r"[A-Za-z_][\w.*/+-]*")
CLOSING = {"[": "]", "{": "}"}
BETWEEN = re.compile(r"[\s,]*")


def pipeline_text(passes: Iterable[tuple[str, Mapping[str, Any]]]) -> str:
    """Names and options as text."""
    return " ".join(name + (f"{{{_options_text(options)}}}" if options else "") for name, options in passes)


def _options_text(options: Mapping[str, Any]) -> str:
    return " ".join(f"{key}={_value_text(value)}" for key, value in options.items())


def _value_text(value: Any) -> str:
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{_value_text(k)}: {_value_text(v)}" for k, v in value.items()) + "}"
    if isinstance(value, (list, tuple)):
        return "[" + ", ".join(_value_text(v) for v in value) + "]"
    if isinstance(value, str) and (_is_size(value) or WORD.fullmatch(value)) and _parsed(value) == value:
        return value
    return "".join(c if c.isprintable() else f"\\U{ord(c):08x}" for c in json.dumps(value, ensure_ascii=False))


def _is_size(value: str) -> bool:
    """``200MB``: a number with a unit is a word too."""
    return re.fullmatch(r"\d+(\.\d+)?[A-Za-z]+", value) is not None


def parse_pipeline(text: str) -> tuple[tuple[str, Options], ...]:
    """Names and options of a pipeline.

    Raises:
        RecipeError: the text is no pipeline; says what was expected at which column.
    """
    passes: list[tuple[str, Options]] = []
    at = _skip(text, 0)
    while at < len(text):
        name = NAME.match(text, at)
        if name is None:
            raise _error(text, at, "expected a pass's name")
        at, options = name.end(), {}
        if text[at : at + 1] == "{":
            end = _end(text, at)
            options = _options(text, at + 1, end)
            at = end + 1
        if at < len(text) and not text[at].isspace() and text[at] != ",":
            raise _error(text, at, "expected a space between passes")
        passes.append((name.group(), options))
        at = _skip(text, at)
    return tuple(passes)


def _options(text: str, at: int, end: int) -> Options:
    options: Options = {}
    at = _skip(text, at)
    while at < end:
        key = KEY.match(text, at, end)
        if key is None:
            raise _error(text, at, "expected key=value")
        if key[1] in options:
            raise _error(text, at, f"option '{key[1]}' is given twice")
        stop = _value_end(text, key.end(), end)
        if stop == key.end():
            raise _error(text, stop, f"expected a value for '{key[1]}'")
        try:
            options[key[1]] = _parsed(text[key.end() : stop])
        except yaml.YAMLError as e:
            raise _error(text, key.end(), f"the value of '{key[1]}' is not YAML") from e
        at = _skip(text, stop)
    return options


def _parsed(text: str) -> Any:
    return yaml.load(text, Loader=UniqueKeyLoader)


def _skip(text: str, at: int) -> int:
    """Past spaces and commas."""
    between = BETWEEN.match(text, at)
    return at if between is None else between.end()


def _value_end(text: str, at: int, end: int) -> int:
    """Where a value ends: at a space or comma that is in no brackets and no quotes."""
    while at < end and not text[at].isspace() and text[at] != ",":
        at = _end(text, at) + 1 if text[at] in "[{\"'" else at + 1
    return at


def _end(text: str, start: int) -> int:
    """Where the bracket or quote at ``start`` is closed."""
    opening = text[start]
    if opening in "\"'":
        at = start + 1
        while at < len(text) and text[at] != opening:
            at += 2 if text[at] == "\\" and opening == '"' else 1
    else:
        at = start + 1
        while at < len(text) and text[at] != CLOSING[opening]:
            at = _end(text, at) + 1 if text[at] in "[{\"'" else at + 1
    if at >= len(text):
        raise _error(text, start, f"'{opening}' is never closed")
    return at


def _error(text: str, at: int, expected: str) -> RecipeError:
    shown = text[at : at + 20]
    return RecipeError(f"column {at + 1}: {expected}" + (f", not '{shown}'" if shown else ""))
