"""pydantic's validation errors as one line a user can act on."""

from __future__ import annotations

import difflib
from typing import Any, get_args

from pydantic import BaseModel, ValidationError


def explain(error: ValidationError, model: type[BaseModel], prefix: str = "") -> str:
    """One line: the key's path, what is wrong, and the key that was meant where one is close."""
    first, *more = error.errors()
    path = [p for p in first["loc"] if not str(p).startswith(("function-", "tagged-union"))]
    key = ".".join(str(p) for p in ([prefix] if prefix else []) + path) or "recipe"
    if first["type"] == "extra_forbidden":
        known = _keys_at(model, path[:-1])
        close = difflib.get_close_matches(str(path[-1]), known, n=1)
        hint = f"did you mean '{close[0]}'?" if close else f"known keys: {', '.join(known)}"
        text = f"{key}: unknown key; {hint}"
    elif not path and first["type"] == "value_error":
        text = _message(first)  # a check of several keys names them itself
    else:
        text = f"{key}: {_message(first)}"
    return text + (f" (and {len(more)} more problem{'s' if len(more) > 1 else ''})" if more else "")


def _message(error: Any) -> str:
    message = str(error["msg"]).removeprefix("Value error, ")
    if error["type"] in ("missing", "value_error"):
        return message[0].lower() + message[1:]
    given = error.get("input")
    shown = f", got {type(given).__name__} {given!r}" if isinstance(given, (str, int, float, bool, type(None))) else ""
    return message[0].lower() + message[1:] + shown


def _keys_at(model: type[BaseModel], path: list[Any]) -> list[str]:
    current: type[BaseModel] | None = model
    for part in path:
        field = current.model_fields.get(str(part)) if current is not None else None
        if field is None:
            continue  # an index or the tag of a union: the model stays
        current = _model_in(field.annotation)
    return sorted(current.model_fields) if current is not None else []


def _model_in(annotation: Any) -> type[BaseModel] | None:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    return next((m for a in get_args(annotation) if (m := _model_in(a)) is not None), None)
