"""Bundles that are described as real ones are, but whose artifacts hold no program: they take seconds to make."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from toolchain.build import entries as describe
from toolchain.build.tables import component_tables, write_tables
from toolchain.formats.bundle import describe_file
from toolchain.formats.recipe_file import parse_recipe
from toolchain.ir.target import distinct_functions
from toolchain.planning.plan import plan_resolved
from toolchain.planning.resolve import resolve


def hollow_bundle(data: dict[str, Any], source: Path, folder: Path) -> Path:
    """A recipe's bundle with a few bytes for every artifact."""
    planned = plan_resolved(resolve(parse_recipe(data), source, checkpoints=True))
    folder.mkdir()
    (folder / "recipe.yaml").write_text("hollow")
    shutil.copy(source / "text_encoder/spiece.model", folder)
    components = {}
    for name, part in planned.components.items():
        entries = []
        for block in part.blocks:
            path = folder / name / f"{block.name}{part.target.suffix}"
            path.parent.mkdir(exist_ok=True)
            path.write_bytes(f"not a program, but {block.name}".encode())
            files = [describe_file(path, folder)]
            memory = part.memory[block.name]
            entries.append(
                describe.block(block, files, distinct_functions(block), None, None, part.target, name, memory)
            )
        tables = component_tables(part)
        file = write_tables(tables, folder / name / "tables.safetensors", folder)
        components[name] = describe.component(part, entries, file, tables)
    files = [describe_file(folder / name, folder) for name in ("spiece.model", "recipe.yaml")]
    manifest = describe.manifest(planned, components, *files)
    (folder / "manifest.json").write_text(describe.manifest_text(manifest))
    return folder
