"""What a search for schedules found: as a table, as plain data, and as a recipe file."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from toolchain.accuracy.golden_video import SAME_DB
from toolchain.build.tuning import CONFIDENCE, Tried, Tuned
from toolchain.formats.recipe import SamplerRecipe
from toolchain.formats.schedule import StaticLeap
from toolchain.planning.schedule_costs import schedule_name
from toolchain.system.disk import readable_size
from toolchain.ui.recipe_text import recipe_text


def tuned_json(tuned: Tuned) -> dict[str, Any]:
    """All that was found, as plain data."""
    return {
        "videos": [{"prompt": v.prompt, "seed": v.seed} for v in tuned.videos],
        "full": _json(tuned.full, tuned),
        "own": _json(tuned.own, tuned),
        "front": [_json(t, tuned) for t in tuned.front],
        "chosen": None if tuned.chosen is None else _json(tuned.chosen, tuned),
    }


def _json(tried: Tried, tuned: Tuned) -> dict[str, Any]:
    return {
        "schedule": schedule_name(tried.sampler),
        "steps": steps_text(tried.sampler),
        "seconds": tried.seconds,
        "speed_up": tuned.full.seconds / tried.seconds,
        "peak_bytes": tried.peak_bytes,
        "psnr_db": tried.psnr_db,
        "worst_psnr_db": tried.worst_db,
        "promised_psnr_db": tried.promised_db if math.isfinite(tried.promised_db) else None,
        "sampler": tried.sampler.model_dump(mode="json"),
    }


def steps_text(sampler: SamplerRecipe) -> str:
    """A letter a step: B both halves, C the conditional one, r and c the same with what is reused; a leap ends it.

    What a rule decides while a video is made is not in it.
    """
    calls = sampler.leap.after + 1 if isinstance(sampler.leap, StaticLeap) else sampler.steps
    reused = {i for own in sampler.reuse for i in own.steps or ()}
    alone = set(sampler.conditional_steps)
    return "".join(("rc" if i in reused else "BC")[i in alone] for i in range(calls))


def tuned_table(tuned: Tuned) -> RenderableType:
    """The front, the recipe's own schedule below it, and what was chosen, for people."""
    table = Table(title="Schedules, the full one first", title_justify="left")
    for column in ("", "schedule", "steps", "predicted, s", "speed-up", "peak", "dB", "worst", "promised"):
        table.add_column(column, justify="left" if column in ("", "schedule", "steps") else "right", no_wrap=True)
    rows = [("chosen" if t == tuned.chosen else "", t) for t in tuned.front]
    rows += [("recipe", tuned.own)] if tuned.own not in tuned.front else []
    for mark, t in rows:
        figures = f"{t.seconds:.4g}", f"{tuned.full.seconds / t.seconds:.2f}x", readable_size(t.peak_bytes)
        name, steps = schedule_name(t.sampler), steps_text(t.sampler)
        table.add_row(mark, Text(name), Text(steps), *figures, *map(_db, (t.psnr_db, t.worst_db, t.promised_db)))
    lines = [
        "B: both halves of guidance; C: the conditional one; r, c: the same, reusing blocks",
        f"dB: PSNR against the full schedule, mean and least of {len(tuned.videos)} videos in float32",
        f"promised: what the mean over other prompts like these is at least, with a confidence of {CONFIDENCE:.0%}",
    ]
    return Group(table, Text("\n".join(lines)))


def _db(value: float) -> str:
    return "same" if value == SAME_DB else f"{value:.2f}" if math.isfinite(value) else ""


def tuned_file(tuned: Tuned, base: Path, out: Path) -> str:
    """The text of a recipe file with the schedule that was chosen; arguments as for :func:`recipe_text`."""
    chosen = tuned.chosen
    assert chosen is not None, "there is a goal where a file is asked for"
    own = f"{tuned.full.seconds / chosen.seconds:.2f}x the full schedule's speed, {_db(chosen.psnr_db)} dB against it"
    own += f" ({_db(chosen.promised_db)} promised)" if math.isfinite(chosen.promised_db) else ""
    head = f"# Chosen by 'sora-compile tune': {chosen.seconds:.4g} s predicted, {own} on {len(tuned.videos)} videos"
    return "\n".join([head, recipe_text(tuned.recipe, base, out)])
