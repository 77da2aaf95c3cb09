"""The reference of files and options, from the JSON Schemas of the models that read them."""

from __future__ import annotations

import json
from typing import Any

from markdown_text import cell, prose, table

Schema = dict[str, Any]
TYPES = {
    "string": "text",
    "integer": "whole number",
    "number": "number",
    "boolean": "`true` or `false`",
    "null": "`null`",
    "array": "list",
    "object": "mapping",
}


def schema_pages() -> dict[str, str]:
    """Pages by their path in the site: recipe, matrix, device profile, manifest, and options of passes and targets."""
    from toolchain import plugins
    from toolchain.formats.budget import Budget
    from toolchain.formats.device import Device
    from toolchain.formats.manifest import Manifest
    from toolchain.formats.matrix import Matrix
    from toolchain.formats.recipe import Recipe

    files = {"recipe": Recipe, "matrix": Matrix, "device": Device, "manifest": Manifest}
    pages = {f"reference/{name}.md": _page(INTRODUCTIONS[name], [model]) for name, model in files.items()}
    for name, group in (("passes", plugins.PASSES), ("targets", plugins.TARGETS)):
        classes = [plugins.find(group, own, name, name) for own in SHIPPED[name]]
        more = {"budget of quantize": Budget} if name == "passes" else {}
        models = [*(c.Config for c in classes), *more.values()]
        pages[f"reference/{name}.md"] = _page(INTRODUCTIONS[name], models, (*SHIPPED[name], *more))
    return pages


SHIPPED = {
    "passes": ("token-merge", "guidance-split", "quantize", "partition"),
    "targets": ("coreml", "executorch", "onnx"),
}
INTRODUCTIONS = {
    "recipe": """# Recipe

Every key of a recipe. [The recipe](../recipe.md) explains them; `sora-compile schema recipe` prints this as JSON
Schema, for editors.
""",
    "matrix": """# Matrix of builds

Every key of a file that `sora-compile build-all` takes. [Building again](../building.md#many-builds) has an example;
`sora-compile schema matrix` prints this as JSON Schema.
""",
    "device": """# Device profile

Every key of a profile, which the recipe's `device` names. Bytes and seconds are plain numbers.
[Planning](../planning.md) says what is made of them; `sora-compile devices` lists those that are shipped.
""",
    "manifest": """# Manifest

Every key of `manifest.json`. [The manifest](../manifest.md) says what a player does with them, and what is promised of
the format; `sora-compile schema manifest` prints this as JSON Schema.
""",
    "passes": """# Options of passes

Every option of the passes that are shipped. [Passes](../passes.md) says what they do.
""",
    "targets": """# Options of targets

Every option of the targets that are shipped. [Targets](../targets.md) says what they write.
""",
}


def _page(introduction: str, models: list[Any], names: tuple[str, ...] = ()) -> str:
    """Keys of models, and after them the objects that they are made of, each once."""
    schemas = [model.model_json_schema() for model in models]
    parts: dict[str, Schema] = {}
    for schema in schemas:
        parts |= schema.get("$defs", {})
    tops = [_section(n or s["title"], s, parts) for n, s in zip(names or [""] * len(schemas), schemas, strict=True)]
    listed = {s["title"] for s in schemas}
    inner = [_section(n, s, parts) for n, s in parts.items() if n not in listed and "properties" in s]
    return introduction + "".join([*tops, *inner])


def _section(name: str, schema: Schema, parts: dict[str, Schema]) -> str:
    text = f"\n## {name}\n\n"
    if "description" in schema:
        text += prose(schema["description"]) + "\n\n"
    needed = schema.get("required", ())
    keys = {key: own for key, own in schema["properties"].items() if key != "version" or "const" in own}
    rows = [_row(key, own, key in needed, parts) for key, own in keys.items()]
    return text + table(("key", "type", "default", "meaning"), rows) if rows else f"\n## {name}\n\nIt has no options.\n"


def _row(key: str, schema: Schema, needed: bool, parts: dict[str, Schema]) -> tuple[str, str, str, str]:
    return f"`{key}`", _type(schema).replace("|", "\\|"), _default(schema, needed), _meaning(schema, parts)


def _meaning(schema: Schema, parts: dict[str, Schema]) -> str:
    """What the key itself says, or else the first line of the one object that it takes, alone or in a list."""
    if "description" in schema:
        return cell(schema["description"])
    held = [schema.get("items"), schema.get("additionalProperties"), *schema.get("anyOf", [schema])]
    inner = [own for own in held if isinstance(own, dict) and "$ref" in own]
    own = parts[_target(inner[0])].get("description", "") if len(inner) == 1 else ""
    return cell(own.partition("\n\n")[0])


def _target(schema: Schema) -> str:
    return str(schema["$ref"]).rpartition("/")[2]


def _default(schema: Schema, needed: bool) -> str:
    if needed:
        return "required"
    default = schema.get("default")
    if isinstance(default, dict) and "$ref" in schema:
        return "its defaults"
    if default is None:
        return "" if "default" not in schema else "none"
    return f"`{json.dumps(default, ensure_ascii=False)}`".replace("|", "\\|")


def _type(schema: Schema) -> str:
    """What may stand there, in words."""
    if "$ref" in schema:
        name = _target(schema)
        return f"[{name}](#{name.lower()})"
    if "const" in schema:
        return f"`{json.dumps(schema['const'])}`"
    if "enum" in schema:
        return " or ".join(f"`{json.dumps(value)}`" for value in schema["enum"])
    for several in ("anyOf", "oneOf"):
        if several in schema:
            return " or ".join(dict.fromkeys(_type(own) for own in schema[several]))
    kind = schema.get("type", "anything")
    if isinstance(kind, list):
        return " or ".join(_type(schema | {"type": own}) for own in kind)
    if kind == "array" and "items" in schema:
        return f"list of {_grouped(schema['items'])}{_limits(schema)}"
    values = schema.get("additionalProperties")
    if kind == "object" and isinstance(values, dict):
        return f"mapping of names to {_grouped(values)}"
    return TYPES.get(kind, kind) + _limits(schema)


def _grouped(schema: Schema) -> str:
    text = _type(schema)
    return f"({text})" if " or " in text and "enum" not in schema else text


def _limits(schema: Schema) -> str:
    """Bounds, such as `` (1 or more)``."""
    said = []
    low, high = schema.get("minimum"), schema.get("maximum")
    if low is not None and high is not None:
        said.append(f"{low} to {high}")
    elif low is not None:
        said.append(f"{low} or more")
    elif high is not None:
        said.append(f"at most {high}")
    for key, words in (("exclusiveMinimum", "more than"), ("exclusiveMaximum", "less than")):
        if key in schema:
            said.append(f"{words} {schema[key]}")
    if schema.get("minLength") or (schema.get("minItems") == 1):
        said.append("not empty")
    elif "minItems" in schema:
        said.append(f"{schema['minItems']} of them")
    if "pattern" in schema:
        said.append(f"matching `{schema['pattern']}`")
    return f" ({', '.join(said)})" if said else ""
