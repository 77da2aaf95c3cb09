"""A checkpoint, or an adapter, as a table for people and as plain data for machines: what its files hold."""

from __future__ import annotations

import math
from collections import Counter
from typing import Any

from rich.console import RenderableType
from rich.table import Table

from toolchain.system.disk import readable_size
from toolchain.weights.checkpoint import Checkpoint


def checkpoint_json(checkpoint: Checkpoint) -> dict[str, Any]:
    """What a checkpoint holds, as plain data; its tensors are not read.

    Raises:
        CheckpointError: its files are damaged, or hold several state_dicts of which none was chosen.
    """
    infos = checkpoint.infos()
    types = Counter(str(info.dtype).removeprefix("torch.") for info in infos.values())
    return {
        "checkpoint": checkpoint.location,
        "files": {str(path): path.stat().st_size for path in checkpoint.files()},
        "state_dict": checkpoint.chosen or None,
        "prefix_left_out": checkpoint.wrapper() or None,
        "types": dict(sorted(types.items())),
        "parameters": sum(math.prod(info.shape) for info in infos.values()),
        "tensors": {name: list(info.shape) for name, info in sorted(infos.items())},
    }


def checkpoint_table(facts: dict[str, Any]) -> RenderableType:
    """The same for people; tensors are counted by what their names begin with."""
    table = Table(title=facts["checkpoint"], title_justify="left", show_header=False)
    for path, size in facts["files"].items():
        table.add_row("file", f"{path}, {readable_size(size)}")
    if facts["state_dict"]:
        table.add_row("state_dict", facts["state_dict"])
    if facts["prefix_left_out"]:
        table.add_row("prefix of all names, left out", facts["prefix_left_out"])
    table.add_row("tensors", ", ".join(f"{count:,} {dtype}" for dtype, count in facts["types"].items()))
    table.add_row("parameters", f"{facts['parameters']:,}")
    firsts = Counter(name.split(".")[0] for name in facts["tensors"])
    table.add_row("names begin with", ", ".join(f"{first} ({count})" for first, count in firsts.items()))
    return table
