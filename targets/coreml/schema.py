"""Reading a package's model description, without importing coremltools, which takes seconds and 500 MB."""

from __future__ import annotations

import importlib
import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

DATA = "Data"
MODEL = Path("Data/com.apple.CoreML/model.mlmodel")
"""Where coremltools puts the model description in a package."""
_SCHEMA = "targets.coreml._schema"


def schema(name: str) -> Any:
    """A module of coremltools' protobuf classes, such as ``Model_pb2``, without the rest of coremltools."""
    if _SCHEMA not in sys.modules:
        found = importlib.util.find_spec("coremltools")
        assert found is not None and found.submodule_search_locations, "coremltools is installed with this package"
        package = ModuleType(_SCHEMA)
        package.__path__ = [str(Path(p) / "proto") for p in found.submodule_search_locations]
        sys.modules[_SCHEMA] = package
    return importlib.import_module(f"{_SCHEMA}.{name}")


def read_model(package: Path) -> tuple[Any, Path]:
    """The model description (a ``Model`` message) of an ``.mlpackage``, and the folder that it lies in.

    Raises:
        FileNotFoundError: there is no package.
        Exception: of any kind, JSON's and protobuf's among them: it is damaged.
    """
    manifest = json.loads((package / "Manifest.json").read_text(encoding="utf-8"))
    entry = manifest["itemInfoEntries"][manifest["rootModelIdentifier"]]
    path = package / DATA / entry["path"]
    if not path.resolve().is_relative_to(package.resolve()):
        raise ValueError(f"'{entry['path']}' is outside the package")
    model = schema("Model_pb2").Model()
    model.ParseFromString(path.read_bytes())
    return model, path.parent
