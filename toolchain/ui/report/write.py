"""Reports as files, which appear whole or not at all."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from pathlib import Path

from toolchain.errors import RecipeError
from toolchain.formats.bundle import Bundle
from toolchain.planning.plan import Plan
from toolchain.system.files import check_file, whole_file
from toolchain.ui.report.facts import Facts, bundle_facts, plan_facts
from toolchain.ui.report.page import picture, render, require
from toolchain.ui.report.timeline import Timeline, predicted_timeline, trace_timelines
from toolchain.ui.report.video import golden_clip

PACKAGES = ("jinja2", "vl_convert")


def write_bundle_report(bundle: Bundle, out: Path, *, trace: Path | None = None, png: Path | None = None) -> None:
    """Write a page about a bundle.

    Args:
        out: the page's file.
        trace: what ``play --trace`` wrote: shown is what was played, beside what was predicted of the same plan.
        png: also write the timeline alone as this picture.

    Raises:
        SoraCompileError: the bundle is damaged, the trace is another bundle's, or a file cannot be written.
    """
    if png is not None and trace is None and bundle.manifest.loading.made_from is None:
        raise RecipeError(f"--png {png}: this bundle predicts no timeline, so there is none to draw without --trace")
    check_places({"-o": out} | ({"--png": png} if png is not None else {}))
    facts = bundle_facts(bundle)
    timelines = _predicted(facts) if trace is None else trace_timelines(trace, bundle)
    files = [("-o", out, render(facts, timelines, golden_clip(bundle)).encode())]
    if png is not None:
        files.append(("--png", png, picture(facts, timelines)))
    _write(*files)


def write_plan_report(planned: Plan, out: Path) -> None:
    """Write a page about a plan. Check the place before planning, by :func:`check_places`.

    Raises:
        SoraCompileError: the file cannot be written.
    """
    facts = plan_facts(planned)
    _write(("--html", out, render(facts, _predicted(facts)).encode()))


def _predicted(facts: Facts) -> list[Timeline]:
    found = predicted_timeline(facts.loading, facts.memory_budget_bytes)
    return [] if found is None else [found]


def check_places(places: Mapping[str, Path]) -> None:
    """Refuse, before any work is done, what cannot be written; ``places`` are files by the options that name them.

    Raises:
        RecipeError: a place is a folder, or two are the same.
        ResourceError: a folder does not exist or cannot be written, or the extra ``report`` is not installed.
    """
    for option, path in places.items():
        check_file(option, path)
    if len({p.absolute() for p in places.values()}) < len(places):
        raise RecipeError(f"{' and '.join(places)}: name the same file")
    for package in PACKAGES:
        require(package)


def _write(*files: tuple[str, Path, bytes]) -> None:
    """Write files, each by the option that names it, aside first; all are moved to their places when all are whole."""
    with contextlib.ExitStack() as stack:
        for option, path, data in files:
            stack.enter_context(whole_file(path, option)).write_bytes(data)
