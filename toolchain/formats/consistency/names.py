"""Names that have to be of one thing alone, and whole to be found again."""

from __future__ import annotations

from collections.abc import Iterable


def check_names(where: str, names: Iterable[str], forbidden: str = "") -> None:
    """Refuse a name that is there twice, is empty, or has a character that separates names.

    Raises:
        ValueError: says which.
    """
    seen: set[str] = set()
    for name in names:
        if name in seen:
            raise ValueError(f"{where}: '{name}' is there twice")
        if not name or not name.isprintable() or any(c in name for c in forbidden):
            raise ValueError(f"{where}: {name!r} is no name")
        seen.add(name)
