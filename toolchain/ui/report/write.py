"""Reports as files, which appear whole or not at all."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

from toolchain.errors import RecipeError, ResourceError
from toolchain.formats.bundle import Bundle
from toolchain.planning.plan import Plan
from toolchain.ui.report.facts import bundle_facts, plan_facts
from toolchain.ui.report.page import picture, render, require
from toolchain.ui.report.timeline import played_timeline
from toolchain.ui.report.video import golden_clip

PACKAGES = ("jinja2", "vl_convert")


def write_bundle_report(bundle: Bundle, out: Path, *, trace: Path | None = None, png: Path | None = None) -> None:
    """Write a page about a bundle.

    Args:
        out: the page's file.
        trace: what ``play --trace`` wrote; its timeline is shown.
        png: also write the timeline alone as this picture.

    Raises:
        SoraCompileError: the bundle is damaged, the trace is another bundle's, or a file cannot be written.
    """
    if png is not None and trace is None:
        raise RecipeError(f"--png {png}: there is no timeline to draw without --trace")
    check_places({"-o": out} | ({"--png": png} if png is not None else {}))
    facts = bundle_facts(bundle)
    timelines = [] if trace is None else [played_timeline(trace, bundle)]
    files = {out: render(facts, timelines, golden_clip(bundle)).encode()}
    if png is not None:
        files[png] = picture(facts, timelines)
    _write(files)


def write_plan_report(planned: Plan, out: Path) -> None:
    """Write a page about a plan. Check the place before planning, by :func:`check_places`.

    Raises:
        SoraCompileError: the file cannot be written.
    """
    _write({out: render(plan_facts(planned)).encode()})


def check_places(places: Mapping[str, Path]) -> None:
    """Refuse, before any work is done, what cannot be written; ``places`` are files by the options that name them.

    Raises:
        RecipeError: a place is a folder, or two are the same.
        ResourceError: a folder does not exist or cannot be written, or the extra ``report`` is not installed.
    """
    for option, path in places.items():
        if path.is_dir():
            raise RecipeError(f"{option} {path}: is a folder; expected the name of a file")
        folder = path.absolute().parent
        if not folder.is_dir() or not os.access(folder, os.W_OK):
            raise ResourceError(f"{option} {path}: its folder does not exist or cannot be written")
    if len({p.absolute() for p in places.values()}) < len(places):
        raise RecipeError(f"{' and '.join(places)}: name the same file")
    for package in PACKAGES:
        require(package)


def _write(files: Mapping[Path, bytes]) -> None:
    """Write each file aside, then move all to their places."""
    partial = {path: path.with_name(f".{path.name}.partial-{os.getpid()}") for path in files}
    try:
        for path, data in files.items():
            partial[path].write_bytes(data)
        for path in files:
            partial[path].replace(path)
    except OSError as e:
        raise ResourceError(f"'{e.filename}' cannot be written: {e.strerror or e}") from e
    finally:
        for path in partial.values():
            path.unlink(missing_ok=True)
