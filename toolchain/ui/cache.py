"""The store as a table for people and as plain data for machines."""

from __future__ import annotations

from typing import Any

from rich.console import RenderableType
from rich.text import Text

from toolchain.system.disk import readable_size
from toolchain.system.store import Store


def cache_json(store: Store, action: str) -> dict[str, Any]:
    """Show, verify or clear the store; what there is, or was."""
    kinds: dict[str, dict[str, int]] = {}
    damaged = []
    for entry in store.entries():
        found = kinds.setdefault(entry.kind, {"entries": 0, "bytes": 0})
        found["entries"] += 1
        found["bytes"] += entry.bytes
        if action == "verify" and not entry.intact(thorough=True):
            damaged.append(f"{entry.kind}/{entry.key}")
            store.remove(entry)
    data: dict[str, Any] = {"location": str(store.root), "limit_bytes": store.limit_bytes, "kinds": kinds}
    if action == "verify":
        data["damaged"] = damaged
    if action == "clear":
        data["removed_bytes"] = store.clear()
    return data


def cache_table(data: dict[str, Any]) -> RenderableType:
    """The store for people."""
    total = sum(k["bytes"] for k in data["kinds"].values())
    lines = [f"{data['location']}: {readable_size(total)} of at most {readable_size(data['limit_bytes'])}"]
    lines += [f"  {kind}: {k['entries']}, {readable_size(k['bytes'])}" for kind, k in data["kinds"].items()]
    if "damaged" in data:
        lines.append(f"{len(data['damaged'])} damaged entries removed" if data["damaged"] else "all entries are whole")
    if "removed_bytes" in data:
        lines.append(f"cleared: {readable_size(data['removed_bytes'])}")
    return Text("\n".join(lines))
