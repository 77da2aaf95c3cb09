"""Registering a test's own families, passes and targets, as an installed package would."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path


def registered(folder: Path, name: str, groups: Mapping[str, Mapping[str, str]]) -> Path:
    """A folder for ``sys.path`` in which a distribution registers entry points: group → name → ``module:object``."""
    info = folder / f"{name}-1.0.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
    lines = [f"[{group}]\n" + "".join(f"{k} = {v}\n" for k, v in names.items()) for group, names in groups.items()]
    (info / "entry_points.txt").write_text("\n".join(lines))
    return folder
