"""Facts and timelines as Vega-Lite specifications (plain data).

Texts of a manifest only ever become values of data and of domains, never names of fields or expressions.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any

from toolchain.system.disk import readable_size
from toolchain.ui.report.facts import ComponentFacts, ErrorOf, Facts
from toolchain.ui.report.look import ON_PAGE, ON_PAPER, Look, config
from toolchain.ui.report.timeline import Timeline

Spec = dict[str, Any]
SCHEMA = "https://vega.github.io/schema/vega-lite/v6.json"
"""Names the language's version; nothing fetches it."""
ROW, LANE = 22, 34
"""Heights in pixels of a block's row and of a lane."""
SHAPES = ("circle", "square", "diamond", "triangle-up")
NEAR_BUDGET = 4.0
"""A budget is drawn if it is at most so many times the peak: farther off it would flatten the curve."""


def report_charts(facts: Facts, timelines: Sequence[Timeline]) -> dict[str, Spec]:
    """All charts of a page, by the id of their place in it."""
    found: dict[str, Spec] = {}
    if timelines:
        found |= {
            "chart-timeline": on_page(timeline_chart(timelines, facts, ON_PAGE) | _window(timelines)),
            "chart-memory": on_page(memory_chart(timelines, ON_PAGE) | _window(timelines)),
        }
    found["chart-sampler"] = on_page(sampler_chart(facts, ON_PAGE))
    for number, component in enumerate(facts.components):
        found[f"chart-bytes-{number}"] = on_page(bytes_chart(component, facts, ON_PAGE))
        if any(b.errors for b in component.blocks):
            found[f"chart-errors-{number}"] = on_page(errors_chart(component, facts, ON_PAGE))
    return found


def on_page(chart: Spec) -> Spec:
    """A chart as wide as its place in the page."""
    sized = {"width": "container", "autosize": {"type": "fit-x", "contains": "padding"}}
    return {"$schema": SCHEMA, **chart, **sized, "config": config(ON_PAGE)}


def on_paper(timelines: Sequence[Timeline], facts: Facts) -> Spec:
    """The timeline alone, light, for a picture."""
    charts = [timeline_chart(timelines, facts, ON_PAPER), memory_chart(timelines, ON_PAPER)]
    title = f"{facts.name}: loads and runs on {facts.target}"
    return {
        "$schema": SCHEMA,
        "title": title,
        **_window(timelines),
        "vconcat": [{**c, "width": 860} for c in charts],
        "resolve": {"scale": {"color": "independent"}},
        "padding": 12,
        "config": config(ON_PAPER) | {"background": "white"},
    }


# --- the timeline ------------------------------------------------------------------------------------


def timeline_chart(timelines: Sequence[Timeline], facts: Facts, look: Look) -> Spec:
    """Intervals by lane, one timeline's lanes below another's, coloured by component."""
    rows = [_row(t, lane, timelines) for t in timelines for lane in t.lanes]
    values = [
        {
            "row": _row(t, lane, timelines),
            "component": i.component,
            "what": i.block if i.function is None else f"{i.block}, {i.function}",
            "start": round(i.start_s, 6),
            "end": round(i.end_s, 6),
            "took": f"{(i.end_s - i.start_s) * 1e3:.2f} ms",
        }
        for t in timelines
        for lane, intervals in t.lanes.items()
        for i in intervals
    ]
    return {
        "description": "When blocks are loaded and run, by lane, coloured by component",
        "height": LANE * len(rows),
        "data": {"values": values},
        "mark": {"type": "bar", "clip": True, "height": {"band": 0.8}},
        "encoding": {
            "y": {
                "field": "row",
                "type": "nominal",
                "sort": rows,
                "title": None,
                "axis": _axis(timelines, domain=False),
            },
            "x": _time("start"),
            "x2": {"field": "end"},
            "color": _colours("component", [c.name for c in facts.components], look),
            "tooltip": [
                {"field": "row", "title": "lane"},
                {"field": "component"},
                {"field": "what", "title": "block"},
                {"field": "start", "title": "from, s", "format": ".4f"},
                {"field": "took", "title": "took"},
            ],
        },
    }


def memory_chart(timelines: Sequence[Timeline], look: Look) -> Spec:
    """Memory over time, one line for each timeline, against the budget."""
    peak = max(t.peak_bytes for t in timelines)
    unit, name = next((u, n) for u, n in ((1e9, "GB"), (1e6, "MB"), (1e3, "kB"), (1.0, "bytes")) if peak >= u or u == 1)
    values = [
        {"title": t.title, "time": round(time, 6), "memory": count / unit, "bytes": readable_size(count)}
        for t in timelines
        for time, count in (*t.memory, (t.end_s, t.memory[-1][1] if t.memory else 0))
    ]
    titles = [t.title for t in timelines]
    line: Spec = {
        "data": {"values": values},
        "mark": {
            "type": "area" if len(timelines) == 1 else "line",
            "interpolate": "step-after",
            "clip": True,
            **({"line": {"strokeWidth": 1.5}, "fillOpacity": 0.18} if len(timelines) == 1 else {"strokeWidth": 2}),
        },
        "encoding": {
            "x": _time("time"),
            "y": {
                "field": "memory",
                "type": "quantitative",
                "title": None,
                "stack": None,
                "axis": _axis(timelines, tickCount=4, labelExpr=f"datum.label + ' {name}'"),
            },
            "color": _colours("title", titles, look, legend=len(timelines) > 1),
            "tooltip": [
                {"field": "title", "title": "timeline"},
                {"field": "time", "title": "from, s", "format": ".4f"},
                {"field": "bytes", "title": "memory"},
            ],
        },
    }
    layers = [line]
    budgets = {t.budget_bytes for t in timelines if t.budget_bytes is not None}
    for budget in sorted(b for b in budgets if b <= NEAR_BUDGET * max(peak, 1)):
        datum: Spec = {"y": {"datum": budget / unit}}
        layers += [
            {
                "mark": {"type": "rule", "color": look.alarm, "strokeDash": [6, 4], "strokeWidth": 1.5},
                "encoding": datum,
            },
            {
                "mark": {"type": "text", "align": "left", "baseline": "bottom", "dx": 4, "dy": -3, "color": look.alarm},
                "encoding": datum | {"x": {"value": 0}, "text": {"value": f"budget {readable_size(budget)}"}},
            },
        ]
    return {
        "description": "Memory over time, against the budget",
        "height": 130,
        "layer": layers,
    }


def _row(timeline: Timeline, lane: str, timelines: Sequence[Timeline]) -> str:
    return lane if len(timelines) == 1 else f"{timeline.title}: {lane}"


def _window(timelines: Sequence[Timeline]) -> Spec:
    """The part of the time that is shown, in seconds; the page's buttons change it."""
    end = max(t.end_s for t in timelines) or 1.0
    return {"params": [{"name": "shown_from", "value": 0}, {"name": "shown_to", "value": end}]}


def _time(field: str) -> Spec:
    scale = {"domainMin": {"expr": "shown_from"}, "domainMax": {"expr": "shown_to"}, "nice": False, "zero": False}
    axis = {"labelFlush": False}
    return {"field": field, "type": "quantitative", "title": "seconds", "scale": scale, "axis": axis}


def _axis(timelines: Sequence[Timeline], **options: Any) -> Spec:
    """The vertical axis, of one width in charts that stand below one another, so that their times do, too."""
    longest = max(len(_row(t, lane, timelines)) for t in timelines for lane in t.lanes)
    extent = max(60, 14 + 6 * longest)
    return {
        "minExtent": extent,
        "maxExtent": extent,
        "labelLimit": extent,
        "ticks": False,
        "labelPadding": 6,
        **options,
    }


# --- the sampler -------------------------------------------------------------------------------------


def sampler_chart(facts: Facts, look: Look) -> Spec:
    """Timestep over call; merged, base and the leap told apart by colour and by shape."""
    steps = facts.sampler.steps
    values = [
        {
            "call": number,
            "timestep": step.timestep,
            "after": step.timestep - step.dt * facts.sampler.time_scale,
            "what": ", ".join(
                [step.function, *(["reuse"] if step.reuse is not None else []), *(["leap"] if step.leap else [])]
            ),
        }
        for number, step in enumerate(steps, 1)
        if math.isfinite(step.timestep) and math.isfinite(step.dt)
    ]
    kinds = list(dict.fromkeys(str(v["what"]) for v in values))
    return {
        "description": "Timestep of every call of the denoiser; a stem ends at the timestep that the call leads to",
        "height": 220,
        "data": {"values": values},
        "encoding": {
            "x": {
                "field": "call",
                "type": "quantitative",
                "title": "call of the denoiser",
                "scale": {"domain": [0.5, len(steps) + 0.5], "nice": False, "zero": False},
                "axis": {"tickMinStep": 1, "grid": False},
            },
            "y": {"field": "timestep", "type": "quantitative", "title": "timestep"},
            "color": _colours("what", kinds, look),
            "shape": {
                "field": "what",
                "type": "nominal",
                "scale": {"domain": kinds, "range": _cycle(SHAPES, kinds)},
            },
            "tooltip": [
                {"field": "call"},
                {"field": "timestep", "format": ".2f"},
                {"field": "after", "title": "leads to", "format": ".2f"},
                {"field": "what", "title": "function"},
            ],
        },
        "layer": [
            {"mark": {"type": "rule", "strokeWidth": 2, "opacity": 0.45}, "encoding": {"y2": {"field": "after"}}},
            {"mark": {"type": "point", "filled": True, "size": 64, "opacity": 1}},
        ],
    }


# --- blocks ------------------------------------------------------------------------------------------


def bytes_chart(component: ComponentFacts, facts: Facts, look: Look) -> Spec:
    """Bytes of the weights of a component's blocks, in load order, stacked by how they are stored.

    All components' charts have the same scale.
    """
    largest = max((b.all_weight_bytes for b in facts.blocks()), default=0)
    unit, name = next((u, n) for u, n in ((1e6, "MB"), (1e3, "kB"), (1.0, "bytes")) if largest >= u or u == 1)
    values = [
        {"block": b.name, "scheme": scheme, "size": count / unit, "bytes": readable_size(count)}
        for b in component.blocks
        for scheme, count in b.weight_bytes.items()
    ]
    return {
        "description": f"Bytes of the weights of each block of {component.name}, by how they are stored",
        "height": ROW * len(component.blocks),
        "data": {"values": values},
        "mark": {"type": "bar", "height": {"band": 0.72}, "cornerRadiusEnd": 2},
        "encoding": {
            "y": _blocks(component),
            "x": {
                "field": "size",
                "type": "quantitative",
                "title": f"weights, {name}",
                "scale": {"domain": [0, largest / unit or 1]},
                "axis": {"tickCount": 5},
            },
            "color": _colours("scheme", facts.schemes, look, legend=len(facts.schemes) > 1),
            "order": {"field": "scheme"},
            "tooltip": [{"field": "block"}, {"field": "scheme", "title": "stored as"}, {"field": "bytes"}],
        },
    }


def errors_chart(component: ComponentFacts, facts: Facts, look: Look) -> Spec:
    """Relative error of a component's blocks, function by function, with the limits that they were held against.

    Logarithmic; all components' charts have the same scale. No error at all stands at its left end; what is NaN or
    infinite is in the tables alone.
    """
    kinds: list[ErrorOf] = ["lowering", "quantization"]
    every = [e for b in facts.blocks() for e in b.errors if e.finite]
    low, high = _decades([x for e in every for x in (e.accuracy.relative_error, e.accuracy.limit)])
    functions = list(dict.fromkeys(f for b in component.blocks for f in b.functions))
    values = [
        {
            "block": b.name,
            "of": e.of,
            "function": e.function,
            "error": max(e.accuracy.relative_error, low),
            "limit": min(max(e.accuracy.limit, low), high),
            "figure": f"{e.accuracy.relative_error:.3g}" if e.accuracy.relative_error else "0 (no difference)",
            "allowed": f"{e.accuracy.limit:.3g}",
        }
        for b in component.blocks
        for e in b.errors
        if e.finite
    ]
    scale = {"type": "log", "domain": [low, high], "nice": False}
    axis = {"format": ".0e", "values": [10.0**n for n in range(round(math.log10(low)), round(math.log10(high)) + 1)]}
    shapes: Spec = {
        "field": "function",
        "type": "nominal",
        "scale": {"domain": functions, "range": _cycle(SHAPES, functions)},
        **({} if len(functions) > 1 else {"legend": None}),
    }
    shown = [k for k in kinds if any(e.of == k for e in every)]
    colour = _colours("of", shown, look, legend=len(shown) > 1)
    return {
        "description": f"Relative error of each block of {component.name}, with its limit",
        "height": ROW * len(component.blocks),
        "data": {"values": values},
        "encoding": {
            "y": _blocks(component),
            "x": {"field": "error", "type": "quantitative", "title": "relative error", "scale": scale, "axis": axis},
            "color": colour,
            "tooltip": [
                {"field": "block"},
                {"field": "function"},
                {"field": "of", "title": "error of"},
                {"field": "figure", "title": "relative error"},
                {"field": "allowed", "title": "limit"},
            ],
        },
        "layer": [
            {"mark": {"type": "rule", "strokeWidth": 2, "opacity": 0.35}, "encoding": {"x2": {"datum": low}}},
            {
                "mark": {"type": "tick", "thickness": 2, "size": 12, "opacity": 0.8},
                "encoding": {"x": {"field": "limit", "type": "quantitative", "scale": scale}},
            },
            {
                "mark": {"type": "point", "filled": True, "size": 60, "opacity": 1},
                "encoding": {"shape": shapes},
            },
        ],
    }


def _blocks(component: ComponentFacts) -> Spec:
    order = [b.name for b in component.blocks]
    axis = {"labelLimit": 130, "ticks": False, "domain": False, "labelPadding": 6}
    return {"field": "block", "type": "nominal", "sort": order, "title": None, "axis": axis}


def _decades(values: Iterable[float]) -> tuple[float, float]:
    """Powers of ten around all that is over zero, with room for a zero below."""
    logs = [math.log10(v) for v in values if v > 0 and math.isfinite(v)]
    low, high = (math.floor(min(logs)) - 1, math.ceil(max(logs))) if logs else (-8, 0)
    return 10.0**low, 10.0 ** max(high, low + 1)


def _colours(field: str, domain: Sequence[str], look: Look, *, legend: bool = True) -> Spec:
    scale = {"domain": list(domain), "range": _cycle(look.series, domain)}
    shown = {"columns": 3 if all(len(d) < 14 for d in domain) else 2} if legend else None
    return {"field": field, "type": "nominal", "scale": scale, "legend": shown}


def _cycle(values: Sequence[str], domain: Sequence[str]) -> list[str]:
    return [values[n % len(values)] for n in range(len(domain))]
