"""Make a saved package's bytes a function of its content.

A conversion writes its date, random identifiers and protobuf maps in hash order. None of it is read by
Core ML; all of it would make equal builds differ.
"""

from __future__ import annotations

import json
import shutil
import uuid
from pathlib import Path

import coremltools as ct

from targets.coreml.schema import MODEL

_NAMESPACE = uuid.UUID("6f1d3ba4-3c3c-5d4e-9d39-7a0b8b8b0c55")


def canonicalise(package: Path) -> None:
    """Rewrite ``package``'s model and manifest in canonical form; weights are canonical already."""
    spec = ct.utils.load_spec(str(package))
    user = spec.description.metadata.userDefined
    for key in [k for k in user if k == "com.github.apple.coremltools.conversion_date"]:
        del user[key]
    (package / MODEL).write_bytes(spec.SerializeToString(deterministic=True))
    manifest = json.loads((package / "Manifest.json").read_text())
    renamed = {
        old: str(uuid.uuid5(_NAMESPACE, entry["path"])).upper() for old, entry in manifest["itemInfoEntries"].items()
    }
    manifest["itemInfoEntries"] = {renamed[k]: v for k, v in manifest["itemInfoEntries"].items()}
    manifest["rootModelIdentifier"] = renamed[manifest["rootModelIdentifier"]]
    (package / "Manifest.json").write_text(json.dumps(manifest, indent=4, sort_keys=True) + "\n")
    for path in package.rglob("*"):  # some were temporary files, which only their owner can read
        path.chmod(0o755 if path.is_dir() else 0o644)
    known = {"Manifest.json", "Data"}
    for extra in package.iterdir():  # debug maps of the converter
        if extra.name not in known:
            shutil.rmtree(extra) if extra.is_dir() else extra.unlink()
