"""The site: it builds without a warning, loads nothing from elsewhere, and says something of every key."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from documents import ROOT

from toolchain.formats.device import Device
from toolchain.formats.matrix import Matrix
from toolchain.formats.recipe import Recipe


@pytest.mark.slow
def test_the_site_builds(tmp_path: Path) -> None:
    ran = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path / "site")],
        cwd=ROOT,
        env={**os.environ, "NO_MKDOCS_2_WARNING": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    said = ran.stdout + ran.stderr
    assert ran.returncode == 0 and "WARNING" not in said, said
    pages = {p.relative_to(tmp_path / "site").as_posix(): p.read_text("utf-8") for p in tmp_path.rglob("*.html")}
    for name, key in (("recipe", "memory_budget"), ("manifest", "load_order"), ("passes", "layers_per_block")):
        assert f"<code>{key}</code>" in pages[f"reference/{name}.html"], name
    assert "--keep-going" in pages["reference/cli.html"]
    for name, page in pages.items():
        loaded = re.findall(r"<(?:script|img|source)[^>]* src=\"?(?:https?:)?//|<link[^>]*stylesheet[^>]*//", page)
        assert not loaded, name
        assert not re.search(r"<p>[^<]*\n(?:- |\d+\. |\|)", page), f"{name}: a list that was not read as one"
        assert "|---" not in page and "```" not in page, f"{name}: a table or a block that was not read as one"


@pytest.mark.parametrize("model", [Recipe, Matrix, Device], ids=lambda m: str(m.__name__))
def test_every_key_of_what_users_write_is_described(model: Any) -> None:
    schema = model.model_json_schema()
    parts = {model.__name__: schema, **schema.get("$defs", {})}
    silent = [
        f"{name}.{key}"
        for name, part in parts.items()
        for key, own in part.get("properties", {}).items()
        if "description" not in own and "const" not in own and not _referred(own, parts)
    ]
    assert not silent


def _referred(schema: dict[str, Any], parts: dict[str, Any]) -> bool:
    """Whether it takes an object that says itself what it is."""
    inner = [own["$ref"] for own in schema.get("anyOf", [schema]) if "$ref" in own]
    return len(inner) == 1 and "description" in parts[inner[0].rpartition("/")[2]]
