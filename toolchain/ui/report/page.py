"""Facts, timelines and a video as one HTML page that loads nothing from anywhere."""

from __future__ import annotations

import base64
import functools
import hashlib
import importlib
from collections.abc import Callable, Sequence
from importlib import resources
from typing import Any

from toolchain.errors import ResourceError
from toolchain.system.disk import readable_size
from toolchain.ui.loading import loads_text
from toolchain.ui.phrases import by_storage, runs
from toolchain.ui.report import words
from toolchain.ui.report.charts import on_paper, report_charts
from toolchain.ui.report.facts import Facts
from toolchain.ui.report.timeline import Timeline
from toolchain.ui.report.video import Clip
from toolchain.version import VERSION

TEMPLATE = "template"
VEGA_LITE = "6.4"
"""The version that specifications are written for, of those that the converter ships."""
PNG_SCALE = 2.0


def require(module: str) -> Any:
    """A module of the extra ``report``.

    Raises:
        ResourceError: it is not installed.
    """
    try:
        return importlib.import_module(module)
    except ImportError as e:
        raise ResourceError(f"a report needs '{module}': pip install 'sora-compile[report]'") from e


def render(facts: Facts, timelines: Sequence[Timeline] = (), clip: Clip | None = None) -> str:
    """The page as text.

    Every text of a manifest, a recipe or a trace is untrusted. The template escapes all; and the page's policy lets no
    script run but those whose digests it names, and nothing be fetched.

    Raises:
        ResourceError: the extra ``report`` is not installed.
    """
    jinja2 = require("jinja2")
    environment = jinja2.Environment(
        loader=jinja2.FunctionLoader(_read),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    filters: dict[str, Callable[..., str]] = {
        "size": readable_size,
        "figure": words.figure,
        "decibels": words.decibels,
        "seconds": words.seconds,
        "count": words.count,
        "percent": words.percent,
        "stored": by_storage,
        "runs": runs,
        "loads": loads_text,
    }
    environment.filters |= filters
    environment.tests["over"] = words.over
    library, script = _library(), _read("page.js")
    trusted = require("markupsafe").Markup
    text: str = environment.get_template("page.html.jinja").render(
        facts=facts,
        g=facts.geometry,
        golden=facts.built.golden if facts.built else None,
        clip=clip,
        timelines=timelines,
        charts=report_charts(facts, timelines),
        quantized=any(b.errors_of("quantization") for b in facts.blocks()),
        cards=words.cards(facts),
        totals=[words.totals(t) for t in timelines],
        stretches=words.stretches(timelines),
        sampler_note=words.sampler_note(facts),
        blocks_note=words.blocks_note(facts),
        memory_note=words.memory_note(timelines),
        sections=_sections(facts, clip),
        policy=_policy(library, script),
        css=trusted(_read("page.css")),
        library=trusted(library),
        script=trusted(script),
        licences=_read("licences.txt"),
        version=VERSION,
    )
    return text


def picture(facts: Facts, timelines: Sequence[Timeline]) -> bytes:
    """The timeline alone as a PNG.

    Raises:
        ResourceError: the extra ``report`` is not installed.
    """
    png: bytes = require("vl_convert").vegalite_to_png(on_paper(timelines, facts), VEGA_LITE, scale=PNG_SCALE)
    return png


def _sections(facts: Facts, clip: Clip | None) -> list[tuple[str, str]]:
    """Ids and titles of the page's parts."""
    video = [("video", "Golden video")] if clip else []
    rest = [("timeline", "Loads and runs"), ("sampler", "Sampler"), ("blocks", "Blocks"), ("provenance", "Provenance")]
    return [("overview", "Overview"), *video, *rest]


def _policy(*scripts: str) -> str:
    """A Content-Security-Policy: these scripts, styles and data within the page, and no other thing from anywhere."""
    digests = (base64.b64encode(hashlib.sha256(s.encode()).digest()).decode() for s in scripts)
    allowed = " ".join(f"'sha256-{d}'" for d in digests)
    return (
        f"default-src 'none'; script-src {allowed}; style-src 'unsafe-inline'; img-src data:; media-src data:; "
        "base-uri 'none'; form-action 'none'"
    )


def _read(name: str) -> str:
    return (resources.files("toolchain.ui.report") / TEMPLATE / name).read_text(encoding="utf-8")


@functools.cache
def _library() -> str:
    """Vega, Vega-Lite and Vega-Embed as one script, which defines ``vegaEmbed``; they ship inside of vl-convert."""
    script: str = require("vl_convert").javascript_bundle("window.vegaEmbed = vegaEmbed;", VEGA_LITE)
    if "</script" in script.lower() or "<!--" in script or "\r" in script:
        raise ResourceError(
            "the chart library that vl-convert ships cannot be put into a page; install another version"
        )
    return script
