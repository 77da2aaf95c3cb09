"""What playing a video took, beside what was predicted, in words, as a table and as plain data."""

from __future__ import annotations

from typing import Any

from rich.table import Table

from toolchain.player.following import Figures
from toolchain.player.player import PlayedVideo
from toolchain.system.disk import readable_size
from toolchain.ui.loading import seconds


def played_json(video: PlayedVideo) -> dict[str, Any]:
    """The video's file, and both in figures."""
    predicted = None if video.predicted is None else video.predicted.to_data()
    return {"video": str(video.path), "played": video.played.to_data(), "predicted": predicted}


def played_text(played: Figures) -> str:
    """What it took, in a line."""
    again = f", {played.retries} of them tried twice" if played.retries else ""
    return (
        f"played in {seconds(played.total_s)}: {seconds(played.compute_s)} of computing, {seconds(played.stalls_s)} of "
        f"waiting for loads at {played.stalls} of {played.calls} calls; {played.loads} loads{again} of "
        f"{readable_size(played.loads_bytes)} took {seconds(played.load_s)}; at most "
        f"{readable_size(played.peak_bytes)} of {readable_size(played.budget_bytes)} held"
    )


def played_table(played: Figures, predicted: Figures) -> Table:
    """Prediction beside reality."""
    table = Table("", "predicted", "played", box=None)
    for column in table.columns[1:]:
        column.justify = "right"
    rows = [
        (name, seconds(getattr(predicted, key)), seconds(getattr(played, key)))
        for name, key in (
            ("time", "total_s"),
            ("computing", "compute_s"),
            ("waiting for loads", "stalls_s"),
            ("loading", "load_s"),
        )
    ]
    rows.append(("calls", str(predicted.calls), str(played.calls)))
    rows.append(("loads", str(predicted.loads), str(played.loads)))
    rows += [
        (name, readable_size(getattr(predicted, key)), readable_size(getattr(played, key)))
        for name, key in (("bytes loaded", "loads_bytes"), ("peak of memory", "peak_bytes"))
    ]
    for row in rows:
        table.add_row(*row)
    return table
