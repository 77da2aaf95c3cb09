"""pydantic's validation errors as one line a user can act on, and the types that recipes are written with."""

from __future__ import annotations

import difflib
from typing import Annotated, Any, get_args, get_origin

from pydantic import (
    BaseModel,
    BeforeValidator,
    ByteSize,
    Field,
    PlainSerializer,
    TypeAdapter,
    ValidationError,
    WithJsonSchema,
)

from toolchain.errors import RecipeError

_UNITS = {
    f"{prefix}{unit}": base**i for base, unit in ((1000, "B"), (1024, "iB")) for i, prefix in enumerate("KMGTP", 1)
}


def _bytes(value: Any) -> Any:
    return int(TypeAdapter(ByteSize).validate_python(value)) if isinstance(value, str) else value


def shortest_size(size: int) -> int | str:
    """A size as people write it, ``200MB``, where that is exact and shorter; else the number of bytes itself."""
    found: int | str = size
    for unit, factor in _UNITS.items():
        text = f"{size / factor:.6f}".rstrip("0").rstrip(".") + unit
        if len(text) < len(str(found)) and not text.startswith("0") and _bytes(text) == size:
            found = text
    return found


Bytes = Annotated[
    int,
    BeforeValidator(_bytes),
    Field(ge=1),
    PlainSerializer(shortest_size, when_used="json"),
    WithJsonSchema({"type": ["string", "integer"]}),
]
"""A size: a number of bytes, or text such as ``200MB``. JSON has the shortest of the two."""


def read_bytes(text: str, option: str) -> int:
    """A size that a user gave to ``option``.

    Raises:
        RecipeError: it is none.
    """
    try:
        return TypeAdapter(Bytes).validate_python(text)
    except ValidationError as e:
        raise RecipeError(f"{option} {text}: expected a size such as 2.5GB") from e


def explain(error: ValidationError, model: type[BaseModel], prefix: str = "") -> str:
    """One line: the key's path, what is wrong, and the key that was meant where one is close.

    A misspelt key comes before the missing one that it was meant to be.
    """
    first, *more = _by_importance(error)
    path, parent = _written_path(model, list(first["loc"]))
    key = ".".join(str(p) for p in ([prefix] if prefix else []) + path)
    if first["type"] == "extra_forbidden":
        known = sorted(parent.model_fields) if parent is not None else []
        close = difflib.get_close_matches(str(path[-1]), known, n=1)
        hint = f"did you mean '{close[0]}'?" if close else f"known keys: {', '.join(known)}"
        text = f"{key}: unknown key; {hint}"
    elif key:
        text = f"{key}: {_message(first)}"
    else:
        text = _message(first)  # a check of several keys names them itself
    return text + (f" (and {len(more)} more problem{'s' if len(more) > 1 else ''})" if more else "")


def explained_key(error: ValidationError, model: type[BaseModel]) -> list[str]:
    """The path of the key that :func:`explain` is about; empty where it is about several."""
    path, _ = _written_path(model, list(_by_importance(error)[0]["loc"]))
    return [str(part) for part in path]


def _by_importance(error: ValidationError) -> list[Any]:
    return sorted(error.errors(), key=lambda e: e["type"] != "extra_forbidden")


def _message(error: Any) -> str:
    message = str(error["msg"]).removeprefix("Value error, ")
    if error["type"] in ("missing", "value_error"):
        return message[0].lower() + message[1:]
    given = error.get("input")
    shown = f", got {type(given).__name__} {given!r}" if isinstance(given, (str, int, float, bool, type(None))) else ""
    return message[0].lower() + message[1:] + shown


def _written_path(model: type[BaseModel], parts: list[Any]) -> tuple[list[Any], type[BaseModel] | None]:
    """A location as the user wrote it, without the tags of unions, and the model that its last part is in."""
    written: list[Any] = []
    current: type[BaseModel] | None = model
    for i, part in enumerate(parts):
        last = i == len(parts) - 1
        if current is not None and isinstance(part, str) and part not in current.model_fields and not last:
            continue  # pydantic's tag of a union's member, or the name of a validator
        written.append(part)
        if not last and current is not None and isinstance(part, str):
            current = _model_in(current.model_fields[part].annotation)
    return written, current


def _model_in(annotation: Any) -> type[BaseModel] | None:
    """The first model in a field's type; None if there is none."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    return next((m for a in get_args(annotation) if (m := _model_in(a)) is not None), None)


def type_within(annotation: Any, key: str) -> Any:
    """The type of the value that a key has in mappings of a type; None where nothing is known of it."""
    model = _model_in(annotation)
    if model is not None:
        return model.model_fields[key].annotation if key in model.model_fields else None
    mapping = next((a for a in (annotation, *get_args(annotation)) if get_origin(a) is dict), None)
    return Any if annotation is Any else get_args(mapping)[1] if mapping is not None else None


def takes_none(annotation: Any) -> bool:
    """Whether null is a value of a type."""
    return annotation is Any or type(None) in get_args(annotation)
