"""Manifests with one thing changed at random: how many are refused, and what playing the others leads to.

    python benchmarks/mutations.py BUNDLE ... [--count 1000] [--seed 0] [--play 1000]

Every bundle's manifest is changed ``--count`` times and opened. What opens is played, as far as ``--play`` goes, in a
process of its own with limited memory and time; files are checked as players check them. Prints how many ended how. An
outcome other than ``refused`` and ``played`` is a bug; so is a video of another shape than the geometry's, and one that
took more than twice the memory of the unchanged bundle's.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import multiprocessing
import random
import resource
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from toolchain.errors import BundleError, SoraCompileError
from toolchain.formats.bundle import Bundle, load_bundle, read_manifest
from toolchain.formats.manifest import FILE_NAME, Manifest

VALUES: list[Any] = [0, 1, -1, -7, 1 << 31, 1 << 40, 1 << 63, 1 << 200, 0.5, -0.5, 1e-30, 1e308]
VALUES += [
    math.nan,
    math.inf,
    -math.inf,
    "",
    "x",
    "two\nlines",
    "\ud800",
    "7",
    None,
    True,
    False,
    [],
    {},
    [0],
    {"x": 0},
]
"""What a value is replaced by."""
MEMORY_BYTES, SECONDS = 1 << 30, 60
"""What a play may take beyond what the process has before it, and how long it may last."""

Place = tuple[Any, Any]
"""A dict or list, and a key or index in it."""


@dataclass(frozen=True)
class Mutant:
    """A changed manifest as plain data; ``key`` is where, with ``*`` for places in lists, ``change`` what."""

    key: str
    change: str
    data: dict[str, Any]


def mutants(data: dict[str, Any], count: int, seed: int = 0) -> Iterator[Mutant]:
    """``count`` changed copies; keys are drawn alike, however many entries the lists above them have."""
    draw, text = random.Random(seed), json.dumps(data)
    while count:
        mutated = json.loads(text)
        places: dict[str, list[Place]] = {}
        _collect(mutated, "", places)
        key = draw.choice(sorted(places))
        container, at = draw.choice(places[key])
        name, change = draw.choice(CHANGES)
        if change(draw, mutated, container, at) and json.dumps(mutated) != text:
            count -= 1
            yield Mutant(key, name, mutated)


def _collect(value: Any, key: str, places: dict[str, list[Place]]) -> None:
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for k, v in items:
        own = f"{key}.{k if isinstance(value, dict) else '*'}".removeprefix(".")
        places.setdefault(own, []).append((value, k))
        _collect(v, own, places)


def _delete(draw: random.Random, whole: Any, container: Any, at: Any) -> bool:
    del container[at]
    return True


def _replace(draw: random.Random, whole: Any, container: Any, at: Any) -> bool:
    container[at] = copy.deepcopy(draw.choice(VALUES))
    return True


def _repeat(draw: random.Random, whole: Any, container: Any, at: Any) -> bool:
    if isinstance(container, list):
        container.insert(draw.randrange(len(container) + 1), copy.deepcopy(container[at]))
    return isinstance(container, list)


def _swap(draw: random.Random, whole: Any, container: Any, at: Any) -> bool:
    other = draw.choice(list(container) if isinstance(container, dict) else range(len(container)))
    container[at], container[other] = container[other], container[at]
    return True


def _reverse(draw: random.Random, whole: Any, container: Any, at: Any) -> bool:
    if isinstance(container[at], list):
        container[at].reverse()
    return isinstance(container[at], list)


def _rename(draw: random.Random, whole: Any, container: Any, at: Any) -> bool:
    """A text becomes another one of the manifest."""
    if not isinstance(container[at], str):
        return False
    places: dict[str, list[Place]] = {}
    _collect(whole, "", places)
    container[at] = draw.choice(sorted({c[k] for own in places.values() for c, k in own if isinstance(c[k], str)}))
    return True


def _rename_key(draw: random.Random, whole: Any, container: Any, at: Any) -> bool:
    if isinstance(container, dict):
        container[draw.choice([f"{at}_", "x", *container])] = container.pop(at)
    return isinstance(container, dict)


def _shift(draw: random.Random, whole: Any, container: Any, at: Any) -> bool:
    """A number becomes one that is near, a multiple, its negative, or of the other kind."""
    value = container[at]
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    other = float(value) if isinstance(value, int) else int(value)
    container[at] = draw.choice([value + 1, value - 1, value * 2, -value, value * 1000, other, str(value)])
    return True


def _borrow(draw: random.Random, whole: Any, container: Any, at: Any) -> bool:
    """A value becomes another one with the same key."""
    places: dict[str, list[Place]] = {}
    _collect(whole, "", places)
    alike = [c[k] for own in places.values() for c, k in own if k == at and isinstance(at, str)]
    container[at] = copy.deepcopy(draw.choice(alike)) if alike else container[at]
    return bool(alike)


CHANGES: list[tuple[str, Callable[[random.Random, Any, Any, Any], bool]]] = [
    ("deleted", _delete),
    ("replaced", _replace),
    ("repeated", _repeat),
    ("swapped", _swap),
    ("reversed", _reverse),
    ("renamed", _rename),
    ("key renamed", _rename_key),
    ("shifted", _shift),
    ("borrowed", _borrow),
]


def opened(mutant: Mutant, file: Path) -> Manifest | str:
    """The mutant's manifest, or the one line by which it was refused."""
    try:
        return read_manifest(mutant.data, file)
    except BundleError as e:
        assert "\n" not in str(e)
        return str(e)


@dataclass(frozen=True)
class Play:
    """How playing ended, and the bytes that it took beyond what the process had before."""

    outcome: str
    taken: int = 0


def played(bundle: Bundle) -> Play:
    """``played``, ``refused by the player``, or what went wrong."""
    context = multiprocessing.get_context("fork")
    outcomes: Any = context.Queue()
    process = context.Process(target=_play, args=(bundle, outcomes))
    process.start()
    try:
        process.join(SECONDS)
        if process.is_alive():
            process.kill()
            return Play(f"not done after {SECONDS} s")
        if process.exitcode != 0:
            return Play(f"died with {process.exitcode}")
        found: Play = outcomes.get(timeout=1)
        return found
    finally:
        process.join()


def _play(bundle: Bundle, outcomes: Any) -> None:
    from toolchain.player import Player

    used, resident = (int(n) * resource.getpagesize() for n in Path("/proc/self/statm").read_text().split()[:2])
    resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY_BYTES, resource.RLIM_INFINITY))
    g = bundle.manifest.geometry
    try:
        video = Player(bundle, warn=lambda _: None).video("a red fox", seed=1)
        agrees = list(video.shape) == [g.frames, 3, g.height, g.width] and bool(video.isfinite().all())
        outcome = "played" if agrees else f"played {list(video.shape)}, which is not the geometry's, or not finite"
    except SoraCompileError as e:
        outcome = "refused by the player" if "\n" not in str(e) else "several lines"
    except BaseException as e:  # whatever it is, it is counted
        outcome = f"{type(e).__name__}: {str(e)[:200]}"
    outcomes.put(Play(outcome, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - resident))


def main() -> None:
    """Count outcomes for the bundles on the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("bundles", nargs="+", type=Path)
    parser.add_argument("--count", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--play", type=int, default=1000)
    args = parser.parse_args()
    import toolchain.player  # noqa: F401  # once, before processes are forked

    for path in args.bundles:
        file = path / FILE_NAME
        outcomes: Counter[str] = Counter()
        survivors: list[tuple[Mutant, Manifest]] = []
        for mutant in mutants(json.loads(file.read_text()), args.count, args.seed):
            manifest = opened(mutant, file)
            if isinstance(manifest, Manifest):
                survivors.append((mutant, manifest))
            else:
                outcomes["refused when opened"] += 1
        usual = played(load_bundle(path))
        assert usual.outcome == "played", usual
        for mutant, manifest in survivors[: args.play]:
            found = played(Bundle(path, manifest))
            outcome = found.outcome if found.taken <= 2 * usual.taken else f"{found.outcome}, in twice the memory"
            outcomes[outcome] += 1
            if outcome not in ("played", "refused by the player"):
                print(f"{path}: {mutant.key} {mutant.change}: {outcome}", flush=True)
        outcomes["opened, not played"] += len(survivors[args.play :])
        print(f"{path}: {dict(outcomes)}", flush=True)


if __name__ == "__main__":
    main()
