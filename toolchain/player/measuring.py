"""How long this machine takes to load each structure of a bundle, and to run each of its functions."""

from __future__ import annotations

import math
import os
import platform
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import torch

from toolchain.formats.bundle import Bundle
from toolchain.formats.manifest import BlockEntry
from toolchain.formats.times import MeasuredStructure, MeasuredTimes
from toolchain.ir.target import Engine, Target
from toolchain.player.opening import load_engine, signatures, target_of

Progress = Callable[[str, int, int], None]
BeforeLoad = Callable[[Sequence[Path]], None]
OVERLAP_S = 0.5
"""How long loading and computing beside one another are measured, at least."""


@dataclass(frozen=True)
class _Structure:
    """The first block of a structure, which is measured for all."""

    component: str
    block: BlockEntry
    target: Target


def measure_times(
    bundle: Bundle,
    *,
    repeats: int = 3,
    progress: Progress = lambda *_: None,
    before_load: BeforeLoad = lambda _: None,
) -> MeasuredTimes:
    """Load and run every structure of a bundle as the player does; times are medians of ``repeats``.

    Files are read before, so loads are from the system's cache, not from storage, unless ``before_load`` drops them:
    it is given a block's files before each load.

    Raises:
        BundleError: a file is missing or altered.
        EngineUnavailableError: this machine cannot run the bundle.
    """
    bundle.check_files()
    found: dict[str, _Structure] = {}
    for name, component in bundle.manifest.components.items():
        target = target_of(bundle.manifest, name)
        for block in component.blocks:
            found.setdefault(block.structure, _Structure(name, block, target))
    measured: dict[str, MeasuredStructure] = {}
    for done, (digest, own) in enumerate(found.items()):
        progress("calibrate", done, len(found))
        measured[digest] = _measure(bundle, own, repeats, before_load)
    loss = _overlap_loss(bundle, found, measured, before_load)
    progress("calibrate", len(found), len(found))
    return MeasuredTimes(
        machine=f"{platform.system()} {platform.machine()}, {os.cpu_count()} cores, {torch.get_num_threads()} threads",
        bundle=bundle.manifest.name,
        overlap_loss=loss,
        structures=measured,
    )


def _measure(bundle: Bundle, own: _Structure, repeats: int, before_load: BeforeLoad) -> MeasuredStructure:
    default = bundle.manifest.components[own.component].default_function
    loads, runs = [], {}
    engine = None
    for _ in range(repeats + 1):  # the first has the start of the runtime in it
        del engine  # one at a time
        took, engine = _load_s(bundle, own, default, before_load)
        loads.append(took)
    assert engine is not None
    for function in own.block.functions:
        _call_s(engine, own.block, function)
        runs[function] = median(_call_s(engine, own.block, function) for _ in range(repeats))
    return MeasuredStructure(load_s=median(loads[1:]), run_s=runs)


def _load_s(bundle: Bundle, own: _Structure, function: str, before_load: BeforeLoad) -> tuple[float, Engine]:
    before_load([bundle.path / file.path for file in own.block.files])
    began = time.perf_counter()
    engine = load_engine(bundle, own.component, own.block, function, own.target)
    return time.perf_counter() - began, engine


def _call_s(engine: Engine, block: BlockEntry, function: str) -> float:
    inputs = _inputs(block, function)
    began = time.perf_counter()
    engine(function, inputs)
    return time.perf_counter() - began


def _inputs(block: BlockEntry, function: str) -> dict[str, torch.Tensor]:
    """Numbers between 0 and 1, and of whole ones 0, which is a token."""
    return {
        p.name: torch.rand(p.shape).to(p.dtype) if p.dtype.is_floating_point else torch.zeros(p.shape, dtype=p.dtype)
        for p in signatures(block)[function].inputs
    }


def _overlap_loss(
    bundle: Bundle,
    structures: dict[str, _Structure],
    measured: dict[str, MeasuredStructure],
    before_load: BeforeLoad,
) -> float:
    """Share of hidden load time that is lost: the dearest load again and again, while the dearest call runs.

    Alone, so many loads take l and calls e seconds; beside one another they end after max(l, e) + λ · min(l, e).
    """
    load = max(structures, key=lambda d: measured[d].load_s)
    run = max(structures, key=lambda d: max(measured[d].run_s.values()))
    function = max(measured[run].run_s, key=lambda f: measured[run].run_s[f])
    loaded, running = structures[load], structures[run]
    engine = load_engine(bundle, running.component, running.block, function, running.target)
    _call_s(engine, running.block, function)

    def load_often(times: int) -> None:
        for _ in range(times):
            _load_s(bundle, loaded, bundle.manifest.components[loaded.component].default_function, before_load)

    loads = math.ceil(OVERLAP_S / max(measured[load].load_s, 1e-3))
    began = time.perf_counter()
    load_often(loads)
    loading = time.perf_counter() - began
    calls = math.ceil(loading / max(measured[run].run_s[function], 1e-4))
    began = time.perf_counter()
    for _ in range(calls):
        _call_s(engine, running.block, function)
    computing = time.perf_counter() - began
    thread = threading.Thread(target=load_often, args=(loads,))
    began = time.perf_counter()
    thread.start()
    for _ in range(calls):
        _call_s(engine, running.block, function)
    thread.join()
    both = time.perf_counter() - began
    return min(1.0, max(0.0, (both - max(loading, computing)) / min(loading, computing)))
