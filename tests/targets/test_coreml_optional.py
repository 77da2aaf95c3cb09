"""What coremltools is kept from importing, and nobody else."""

from __future__ import annotations

import sys
from types import ModuleType
from unittest.mock import patch

import pytest

from targets.coreml.optional import UNUSED, hide_unused


@pytest.mark.parametrize("name", UNUSED)
@patch.dict(sys.modules)  # what is imported here is no package: nobody else may find it
def test_only_coremltools_is_kept_from_it(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    hide_unused()
    for loaded in [m for m in sys.modules if m.partition(".")[0] == name]:
        monkeypatch.delitem(sys.modules, loaded)
    for statement in (f"import {name}", f"import {name}.part", f"from {name}.part import x"):
        with pytest.raises(ModuleNotFoundError, match=f"'{name}' is not used with coremltools here"):
            exec(statement, {"__name__": "coremltools._deps"})
    found = ModuleType(name)
    monkeypatch.setattr(sys, "meta_path", [sys.meta_path[0], Found(found)])
    whole: dict[str, object] = {"__name__": "somebody"}
    exec(f"import {name}", whole)
    assert whole[name] is found


class Found:
    """Finds a package whether it is installed or not."""

    def __init__(self, module: ModuleType) -> None:
        self._module = module

    def find_spec(self, name: str, path: object, target: object = None) -> object:
        from importlib.machinery import ModuleSpec

        return ModuleSpec(name, self)  # type: ignore[arg-type]

    def create_module(self, spec: object) -> ModuleType:
        return self._module

    def exec_module(self, module: ModuleType) -> None:
        pass


def test_it_is_done_once() -> None:
    hide_unused()
    before = list(sys.meta_path)
    hide_unused()
    assert sys.meta_path == before
