"""How a recipe names passes: as one text, or as a list of names, texts and mappings."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, WithJsonSchema, model_serializer

from toolchain.ir.pipeline_text import parse_pipeline


class Named(BaseModel):
    """A pass or target by name, with options: ``partition``, or ``partition: {max_bytes: 200MB}``."""

    model_config = ConfigDict(frozen=True, strict=True)
    name: str
    options: dict[str, Any] = Field(default_factory=dict)

    @model_serializer
    def _short(self) -> str | dict[str, Any]:
        return {self.name: self.options} if self.options else self.name


def _named(value: Any) -> Any:
    if isinstance(value, str):
        passes = parse_pipeline(value)
        if len(passes) != 1:
            raise ValueError(f"expected one pass in an item of the list, got {len(passes)}; or one text for all passes")
        return Named(name=passes[0][0], options=passes[0][1])
    if isinstance(value, dict) and len(value) == 1:
        name, options = next(iter(value.items()))
        if isinstance(name, str) and isinstance(options, dict | None):
            return Named(name=name, options=options or {})
    if isinstance(value, Named):
        return value
    raise ValueError("expected a name, or a name with options such as 'partition: {max_bytes: 200MB}'")


def _listed(value: Any) -> Any:
    return [Named(name=n, options=o) for n, o in parse_pipeline(value)] if isinstance(value, str) else value


class _OrOneText:
    """Adds the text to the JSON Schema of the list."""

    def __get_pydantic_json_schema__(self, core_schema: Any, handler: Any) -> dict[str, Any]:
        return {**handler(core_schema), "type": ["array", "string"]}


PassSpec = Annotated[
    Named,
    BeforeValidator(_named),
    WithJsonSchema({"anyOf": [{"type": "string"}, {"type": "object", "minProperties": 1, "maxProperties": 1}]}),
]
PassSpecs = Annotated[list[PassSpec], BeforeValidator(_listed), _OrOneText()]
"""Passes in order; the one text is what :mod:`toolchain.ir.pipeline_text` reads."""
