"""The pages for devices: what their structs read stands in the manifest's schema, under these names."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from toolchain.formats.manifest import FORMAT_VERSION, Manifest

DOCS = Path(__file__).parents[2] / "docs" / "device"
SCHEMA = Manifest.model_json_schema()
UNIONS = {  # one struct reads what the schema has several entries for
    "EventData": ("LoadData", "RunData", "FreeData"),
    "Leap": ("StaticLeap", "DynamicLeap"),
}
STRUCTS = {
    "ios.md": re.compile(r"^struct (\w+): Decodable \{(.*?)\}$", re.MULTILINE | re.DOTALL),
    "android.md": re.compile(r"@Serializable data class (\w+)\((.*?)\)$", re.MULTILINE | re.DOTALL),
}
PROPERTY = re.compile(r"\b(?:let|val) (\w+): ([^;,\n}=]+(?:<[^\n]*?>+)?)")


def entries(name: str) -> list[dict[str, Any]]:
    """The schema's entries that a struct stands for."""
    if name == "Manifest":
        return [SCHEMA]
    if name == "Feed":
        mapping = SCHEMA["$defs"]["ComponentInput"]["properties"]["feed"]["discriminator"]["mapping"]
        return [SCHEMA["$defs"][reference.rpartition("/")[2]] for reference in mapping.values()]
    return [SCHEMA["$defs"][own] for own in UNIONS.get(name, (name,))]


def structs(page: str) -> Iterator[tuple[str, dict[str, str]]]:
    for found in STRUCTS[page].finditer((DOCS / page).read_text()):
        text = re.sub(r"//.*", "", found[2])
        yield found[1], {key: kind.strip() for key, kind in PROPERTY.findall(text)}


@pytest.mark.parametrize("page", STRUCTS)
def test_structs_read_what_the_manifest_has(page: str) -> None:
    read = dict(structs(page))
    assert {
        "Manifest",
        "Component",
        "BlockEntry",
        "SamplerEntry",
        "StepEntry",
        "PlanData",
        "Feed",
        "Leap",
    } <= read.keys()
    for name, keys in read.items():
        own = entries(name)
        assert keys, name
        for key, kind in keys.items():
            having = [entry["properties"][key] for entry in own if key in entry["properties"]]
            assert having, f"{name}.{key} is no key of the manifest"
            nullable = len(having) < len(own) or any({"type": "null"} in h.get("anyOf", ()) for h in having)
            assert "?" in kind or not nullable, f"{name}.{key} may be absent or null, and is read as {kind}"


@pytest.mark.parametrize("page", STRUCTS)
def test_pages_read_the_same_keys_and_the_current_format(page: str) -> None:
    first = {name: keys.keys() for name, keys in structs("ios.md")}
    assert {name: keys.keys() for name, keys in structs(page)} == first
    assert re.search(rf"format_version == {FORMAT_VERSION}\b", (DOCS / page).read_text())
    assert "neither compiled nor run on a device" in (DOCS / page).read_text()
