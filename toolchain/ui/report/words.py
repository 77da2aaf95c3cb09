"""What a page says in words: the figures at its head, notes beside charts, sums of a timeline."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from toolchain.formats.manifest import GateMode
from toolchain.formats.schedule import StaticLeap
from toolchain.system.disk import readable_size
from toolchain.ui.phrases import merged_calls, tiled
from toolchain.ui.report.facts import ErrorOf, Facts, Measured
from toolchain.ui.report.timeline import COMPUTE, LOADER, Timeline

GATES: Mapping[GateMode, tuple[str, str]] = {
    "release": ("release", "every function of each artifact was executed on all inputs"),
    "every": ("every", "each artifact was executed; all functions of one of each structure"),
    "structure": ("structure", "one artifact of each structure was executed, the others' weights were compared"),
    "none": ("none", "nothing was executed, as asked for"),
    "interface": ("interface", "artifacts were read back; nothing was executed"),
}


@dataclass(frozen=True)
class Card:
    """One of the figures at a page's head."""

    label: str
    value: str
    note: str = ""


def cards(facts: Facts) -> list[Card]:
    """The figures at a page's head, what matters most first."""
    tiles = [Card("Tiles of a frame", str(count), what) for count, what in tiled(facts.stages)]
    return [*_sizes(facts), *_calls(facts), *tiles, *_proof(facts)]


def _sizes(facts: Facts) -> list[Card]:
    blocks = list(facts.blocks())
    cut = f"{len(blocks)} blocks of {len({b.structure for b in blocks})} structures"
    budget = facts.memory_budget_bytes
    size = [] if facts.built is None else [Card("Size on disk", readable_size(facts.built.bytes), cut)]
    return [
        *size,
        Card("Weights", readable_size(facts.weight_bytes), "" if facts.built else cut),
        Card(
            "Memory budget",
            "none" if budget is None else readable_size(budget),
            f"for weights and activations; {_loads(facts)}",
        ),
        *_predicted(facts),
    ]


def _loads(facts: Facts) -> str:
    """How many blocks a video loads, and how many of them more than once."""
    loaded = [b.loads for b in facts.blocks() if b.loads]
    again = sum(n > 1 for n in loaded)
    return f"{again} of {len(loaded)} blocks are loaded more than once"


def _predicted(facts: Facts) -> list[Card]:
    p, made = facts.loading.prediction, facts.loading.made_from
    if p is None or made is None:
        return []
    source = "by the profile" if made.times.kind == "device" else "by times measured on"
    return [
        Card("Predicted time", seconds(p.total_s), f"{source} {made.times.name}; {seconds(p.stalls_s)} wait for loads"),
        Card("Predicted peak of memory", readable_size(p.peak_bytes), f"{readable_size(p.loads_bytes)} are loaded"),
    ]


def _calls(facts: Facts) -> list[Card]:
    steps = facts.sampler.steps
    merged = merged_calls(steps)
    said = [f"{merged} with merged tokens"]
    if reusing := sum(s.reuse is not None for s in steps):
        said.append(f"{reusing} that leave out blocks")
    if halves := sum(s.guidance == "conditional" for s in steps):
        said.append(f"{halves} without the unconditional half")
    if facts.sampler.rule is not None:
        said.append("a rule leaves out more")
    return [Card("Calls of the denoiser", str(len(steps)), "; ".join([*said, _leap(facts)]))]


def _leap(facts: Facts) -> str:
    leap = facts.sampler.leap
    if leap is None:
        return "no leap"
    return f"leap after {leap.after}" if isinstance(leap, StaticLeap) else "fewer, where the dynamic leap says so"


def _proof(facts: Facts) -> list[Card]:
    if facts.built is None:
        return []
    mode, what = GATES[facts.built.gate.mode]
    errors: tuple[tuple[str, ErrorOf], ...] = (
        ("Largest error of lowering", "lowering"),
        ("Largest error of quantization", "quantization"),
    )
    found = [Card("Gate passed" if mode in ("release", "every", "structure") else "Gate", mode, what)]
    for label, of in errors:
        worst = facts.worst(of)
        if worst is not None:
            name, e = worst
            found.append(Card(label, figure(e.accuracy.relative_error), f"relative; {name}, {e.function}"))
    if facts.built.golden is not None:
        golden = facts.built.golden
        found.append(Card("Golden video, PSNR", decibels(golden.psnr_db), f"at least {decibels(golden.limit_db)}"))
    return found


def sampler_note(facts: Facts) -> str:
    """The sampler in a sentence or two."""
    s = facts.sampler
    words = f"Rectified flow, guidance {s.guidance:g}, {len(s.steps)} calls of the denoiser; {_leap(facts)}."
    if s.leap is not None and not isinstance(s.leap, StaticLeap):
        words += " The chart shows the whole schedule; the rule ends it earlier."
    return words


def blocks_note(facts: Facts) -> str:
    """What the errors of blocks are measured against."""
    if facts.built is None:
        return (
            "Blocks stand in the order in which they are loaded. Nothing has been lowered yet, so there are no errors."
        )
    words = "Blocks stand in the order in which they are loaded. "
    if not any(b.errors for b in facts.blocks()):
        return words + "No block has figures of its accuracy: with this gate, none were measured for this checkpoint."
    words += "Error of lowering: the artifact against eager float32 on the weights that it stores."
    if any(b.errors_of("quantization") for b in facts.blocks()):
        words += " Error of quantization: eager float32 on these weights against eager float32 on the checkpoint's."
    return words


def memory_note(timelines: Sequence[Timeline]) -> str:
    """What the memory curve shows, and how its peaks stand to the budget."""
    words = [f"{t.title}: {t.memory_of}, peak {readable_size(t.peak_bytes)}" for t in timelines]
    budgets = [t.budget_bytes for t in timelines if t.budget_bytes is not None]
    if not budgets:
        return "; ".join(words) + "; no budget was set"
    shares = [f"{t.peak_bytes / t.budget_bytes:.0%} of the budget" if t.budget_bytes else "" for t in timelines]
    return "; ".join(f"{w}, {s}" if s else w for w, s in zip(words, shares, strict=True)) + (
        f" of {readable_size(budgets[0])}"
    )


# --- sums of a timeline ------------------------------------------------------------------------------


@dataclass(frozen=True)
class Row:
    """A block's loads and runs, all together."""

    name: str
    loads: int
    loading_s: float
    runs: int
    running_s: float
    share: float


@dataclass(frozen=True)
class Totals:
    """A timeline as a table."""

    title: str
    end_s: float
    busy: tuple[tuple[str, float], ...]
    peak_bytes: int
    memory_of: str
    rows: tuple[Row, ...]


def totals(timeline: Timeline) -> Totals:
    """A timeline's loads and runs by block, in the order in which blocks come first."""
    sums: dict[str, list[float]] = {}
    lanes = [(lane, i) for lane in (LOADER, COMPUTE) for i in timeline.lanes.get(lane, ())]
    for lane, i in sorted(lanes, key=lambda found: found[1].start_s):
        each = sums.setdefault(f"{i.component}/{i.block}", [0, 0.0, 0, 0.0])
        at = 0 if lane == LOADER else 2
        each[at] += 1
        each[at + 1] += i.end_s - i.start_s
    end = timeline.end_s or 1.0
    return Totals(
        timeline.title,
        timeline.end_s,
        tuple((lane, timeline.busy_s(lane)) for lane in timeline.lanes),
        timeline.peak_bytes,
        timeline.memory_of,
        tuple(
            Row(name, int(loads), loading, int(runs), running, (loading + running) / end)
            for name, (loads, loading, runs, running) in sums.items()
        ),
    )


def stretches(timelines: Sequence[Timeline]) -> list[tuple[str, float, float]]:
    """For each component, from when until when anything of it is loaded or run, in seconds."""
    found: dict[str, tuple[float, float]] = {}
    for i in (i for t in timelines for lane in t.lanes.values() for i in lane):
        start, end = found.get(i.component, (i.start_s, i.end_s))
        found[i.component] = min(start, i.start_s), max(end, i.end_s)
    return [(name, *span) for name, span in sorted(found.items(), key=lambda kv: kv[1])]


# --- figures -----------------------------------------------------------------------------------------


def figure(value: float) -> str:
    """An error."""
    return f"{value:.2g}" if value - value == 0 else "NaN or infinite"


def decibels(value: float) -> str:
    return f"{value:.1f} dB"


def seconds(value: float) -> str:
    return f"{value:.2f} s" if value >= 1 else f"{value * 1e3:.2f} ms"


def count(value: int) -> str:
    return f"{value:,}"


def percent(value: float) -> str:
    return f"{value:.1%}"


def over(measured: Measured) -> bool:
    """Whether an error is over its limit, or no number."""
    return not measured.accuracy.relative_error <= measured.accuracy.limit
