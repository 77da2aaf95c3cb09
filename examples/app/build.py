"""Puts a video model into an app: a step of the app's build, before its resources are packed.

    python build.py RECIPE RESOURCES [--most-mb 900] [--minutes 30]

Makes ``RESOURCES/Video.bundle``, or leaves it as it is if nothing has changed, and ``RESOURCES/video.json`` with what
the app shows before the model is loaded. Fails if the bundle is larger than the app may carry, and gives up, keeping
what is done for the next time, when the minutes are over.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import toolchain


class Lines(toolchain.Listener):
    """Progress as lines, which a build server's log keeps; and the end of the build when its time is over."""

    def __init__(self, seconds: float) -> None:
        self._end = time.monotonic() + seconds

    def cancelled(self) -> bool:
        return time.monotonic() > self._end

    def finished(self, component: str, block: str, accuracy: Mapping[str, Any] | None) -> None:
        errors = [a.relative_error for a in (accuracy or {}).values()]
        print(f"{component}/{block}" + (f": relative error {max(errors):.1e}" if errors else ""), flush=True)

    def remark(self, text: str) -> None:
        print(text, flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe", help="a file, or the name of a shipped recipe")
    parser.add_argument("resources", type=Path, help="the folder that the app's resources are packed from")
    parser.add_argument("--most-mb", type=float, default=900.0)
    parser.add_argument("--minutes", type=float, default=30.0)
    args = parser.parse_args()
    try:
        recipe = toolchain.load_recipe(args.recipe)
        out = args.resources / "Video.bundle"
        bundle = toolchain.compile_recipe(recipe, out, base=Path(args.recipe).parent, listener=Lines(args.minutes * 60))
    except toolchain.SoraCompileError as e:
        print(f"error: {e}", file=sys.stderr)
        raise SystemExit(e.exit_code) from None
    except toolchain.CancelledError:
        print("error: not done in time; the next build goes on where this one stopped", file=sys.stderr)
        raise SystemExit(130) from None
    megabytes = sum(file.bytes for file in bundle.files()) / 1e6
    if megabytes > args.most_mb:
        print(f"error: the model has {megabytes:.1f} MB, the app may carry {args.most_mb:.1f}", file=sys.stderr)
        raise SystemExit(1)
    video = bundle.manifest.geometry
    shown = {"width": video.width, "height": video.height, "seconds": video.frames / video.fps, "megabytes": megabytes}
    (args.resources / "video.json").write_text(json.dumps(shown, indent=1) + "\n")


if __name__ == "__main__":
    main()
