"""A bundle's bill of materials: CycloneDX 1.6 for machine learning, as JSON, from its manifest and recipe.

The same manifest gives the same bytes: there is no time in it, and its serial number comes from the manifest's digest.
"""

from __future__ import annotations

import json
import uuid
from collections import Counter
from collections.abc import Mapping
from typing import Any

from toolchain.errors import RecipeError
from toolchain.formats.bundle import Bundle
from toolchain.formats.manifest import FILE_NAME, BlockEntry, Component, File
from toolchain.formats.yaml_text import read_yaml
from toolchain.system.store import digest

SCHEMA = "http://cyclonedx.org/schema/bom-1.6.schema.json"
MODEL = "machine-learning-model"


def bill_of_materials(bundle: Bundle, licenses: Mapping[str, str] | None = None) -> str:
    """The bundle's components with their files, digests, measured accuracy and what they were made with, as JSON text.

    Args:
        licenses: SPDX expressions by component, beside those that the bundle's recipe states.

    Raises:
        RecipeError: the bundle has no such component.
    """
    licenses = all_licenses(bundle, licenses or {})
    m = bundle.manifest
    sha256 = digest(bundle.path / FILE_NAME)
    others = [m.recipe, *([m.text.tokenizer] if m.text else []), *([m.golden.file] if m.golden else [])]
    base = {"type": MODEL, "bom-ref": "base", "name": m.model}
    data = {
        "$schema": SCHEMA,
        "bomFormat": "CycloneDX",
        "specVersion": "1.6",
        "serialNumber": f"urn:uuid:{uuid.uuid5(uuid.NAMESPACE_URL, f'sha256:{sha256}')}",
        "version": 1,
        "metadata": {
            "tools": {"components": [{"type": "application", "name": n, "version": v} for n, v in m.tools.items()]},
            "component": {
                "type": MODEL,
                "bom-ref": "bundle",
                "name": m.name,
                "hashes": _hashes(sha256),
                "pedigree": {"ancestors": [base]},
                "properties": _properties({"target": m.target.name, "gate": m.gate.mode}),
            },
        },
        "components": [
            *(_model(name, own, m.model, licenses.get(name)) for name, own in m.components.items()),
            *_files(others),
        ],
        "dependencies": [{"ref": "bundle", "dependsOn": [f"component/{name}" for name in m.components]}],
    }
    return json.dumps(data, indent=1, ensure_ascii=False) + "\n"


def all_licenses(bundle: Bundle, licenses: Mapping[str, str]) -> dict[str, str]:
    """The checkpoints' licences by component: ``licenses``, and for the others what the bundle's recipe states.

    Raises:
        RecipeError: the bundle has no such component, or its recipe cannot be read.
    """
    if unknown := sorted(licenses.keys() - bundle.manifest.components.keys()):
        have = ", ".join(bundle.manifest.components)
        raise RecipeError(f"--license {unknown[0]}: the bundle has no such component, only {have}")
    recipe = read_yaml(bundle.path / bundle.manifest.recipe.path)
    parts = {name: recipe.get(name) for name in bundle.manifest.components} if isinstance(recipe, dict) else {}
    stated = {name: part.get("license") for name, part in parts.items() if isinstance(part, dict)}
    return {name: text for name, text in stated.items() if isinstance(text, str)} | dict(licenses)


def component_files(component: Component) -> list[File]:
    """The files of a component, each once, goldens included."""
    tables = [component.tables_file] if component.tables_file is not None else []
    blocks = [f for b in component.blocks for f in (*b.files, *([b.goldens] if b.goldens is not None else []))]
    return list({f.path: f for f in (*tables, *blocks)}.values())


def stored_bytes(component: Component) -> dict[str, int]:
    """Bytes of a component's weights by how they are stored."""
    stored: Counter[str] = Counter()
    for block in component.blocks:
        stored.update(block.weight_bytes)
    return dict(sorted(stored.items()))


def _model(name: str, component: Component, model: str, license_: str | None) -> dict[str, Any]:
    facts = {
        "precision": component.precision,
        "passes": component.passes,
        "parameters": str(sum(b.parameters for b in component.blocks)),
        **{f"weight_bytes:{storage}": str(size) for storage, size in stored_bytes(component).items()},
    }
    metrics = [metric for block in component.blocks for metric in _metrics(block)]
    card: dict[str, Any] = {"modelParameters": {"architectureFamily": model, "modelArchitecture": name}}
    if metrics:
        card["quantitativeAnalysis"] = {"performanceMetrics": metrics}
    return {
        "type": MODEL,
        "bom-ref": f"component/{name}",
        "name": name,
        **({"licenses": [{"expression": license_}]} if license_ else {}),
        "components": _files(component_files(component)),
        "modelCard": card,
        "properties": _properties({key: value for key, value in facts.items() if value}),
    }


def _metrics(block: BlockEntry) -> list[dict[str, str]]:
    """What the gate measured, of every function."""
    kinds = {"relative error": block.accuracy or {}, "relative error of quantization": block.quantization or {}}
    return [
        {"type": kind, "value": f"{own.relative_error:.3g}", "slice": f"{block.name}, {function}"}
        for kind, measured in kinds.items()
        for function, own in measured.items()
    ]


def _files(files: list[File]) -> list[dict[str, Any]]:
    return [
        {"type": "file", "bom-ref": f"file/{f.path}", "name": f.path, "hashes": _hashes(f.sha256)}
        | {"properties": _properties({"bytes": str(f.bytes)})}
        for f in files
    ]


def _hashes(sha256: str) -> list[dict[str, str]]:
    return [{"alg": "SHA-256", "content": sha256}]


def _properties(values: Mapping[str, str]) -> list[dict[str, str]]:
    return [{"name": f"sora-compile:{key}", "value": value} for key, value in values.items()]
