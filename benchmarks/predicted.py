"""Time and memory as predicted, by a calibration of this machine, against what playing takes; within three budgets.

    python benchmarks/predicted.py [--pairs 4] [--side 128] [--steps 10] [--width full|small] [--warm]

The model is one of full width with few pairs on ExecuTorch (see ``playing.py``). Every load reads from storage, when
times are measured and when it is played, unless ``--warm``. Budgets are from two blocks to everything resident. Each
video is played by a process of its own; "process" is the most memory of its own (pages of files not counted, which
the system may drop) that it takes over what it had before the first load, sampled every 5 ms from outside. Beside
weights and activations there is what the plan does not count: the interpreter's values, latents, the runtime.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import torch
from playing import ColdPlayer, add_sizes, build, drop

from toolchain.build.replan import replan_bundle
from toolchain.formats.bundle import load_bundle
from toolchain.planning.loading.predict import everything_bytes
from toolchain.planning.loading.run import Run
from toolchain.planning.loading.unrolled import unroll
from toolchain.player import Player
from toolchain.player.measuring import measure_times
from toolchain.system.memory import return_large_allocations

PROMPT = "a red fox"


def play(bundle: Path, budget: int, warm: bool) -> None:
    """In a process of its own: says when it begins, and prints both in figures."""
    torch.set_num_threads(1)
    return_large_allocations()
    player = (Player if warm else ColdPlayer)(bundle, memory_budget=budget)
    runtime = min((b for b, _ in player.manifest.calls()), key=lambda b: player.followed.run.by_name[b].weight_bytes)
    player.open_block(runtime, player.manifest.components[runtime.partition("/")[0]].default_function)
    print("ready", flush=True)
    sys.stdin.readline()
    player.video(PROMPT, seed=1)
    assert player.played is not None and player.followed.predicted is not None
    print(json.dumps({"played": player.played.to_data(), "predicted": player.followed.predicted.to_data()}))


def anonymous_bytes(pid: int) -> int:
    """Of a process: its memory without pages of files."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text(encoding="ascii").splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon:")), 0)


def played(bundle: Path, budget: int, warm: bool) -> tuple[dict[str, Any], int]:
    """Both in figures, and how much the process grew at most."""
    command = [sys.executable, __file__, "--one", str(bundle), str(budget), *(["--warm"] if warm else [])]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None and process.stdin is not None
    if process.stdout.readline().strip() != "ready":
        raise SystemExit(f"{' '.join(command)} failed")
    before = most = anonymous_bytes(process.pid)
    ended = threading.Event()

    def watch() -> None:
        nonlocal most
        while not ended.wait(0.005):
            most = max(most, anonymous_bytes(process.pid))

    watcher = threading.Thread(target=watch)
    watcher.start()
    process.stdin.write("\n")
    process.stdin.flush()
    answer = process.stdout.readline()
    ended.set()
    watcher.join()
    if process.wait():
        raise SystemExit(f"{' '.join(command)} ended with {process.returncode}")
    return json.loads(answer), most - before


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_sizes(parser)
    parser.add_argument("--warm", action="store_true", help="loads from the system's memory of files")
    parser.add_argument("--one", nargs=2, metavar=("BUNDLE", "BUDGET"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        play(Path(args.one[0]), int(args.one[1]), args.warm)
        return
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as tmp:
        bundle, _ = build(Path(tmp), args.width, args.pairs, args.side, args.steps)
        began = time.perf_counter()
        times = measure_times(bundle, **({} if args.warm else {"before_load": drop}))
        print(f"calibrated in {time.perf_counter() - began:.0f} s; overlap loss {times.overlap_loss:.2f}")
        file = Path(tmp) / "times.yaml"
        file.write_text(times.to_yaml(), encoding="utf-8")
        replan_bundle(bundle, calibration=file)
        made = load_bundle(bundle.path).manifest.loading.made_from
        assert made is not None
        run = Run.from_data(made.run)
        u = unroll(run)
        after = [*u.block[1:], u.block[-1]]
        two = max(r + u.size[a] + (u.size[b] if a != b else 0) for r, a, b in zip(u.room, u.block, after, strict=True))
        everything = everything_bytes(run)
        print(
            "| budget, MB | time, s: predicted | played | ratio | waiting, s: predicted | played | loads | read, GB "
            "| peak, MB: predicted | counted | process |"
        )
        print("|---|---|---|---|---|---|---|---|---|---|---|")
        for budget in (two, (two + everything) // 2, everything):
            found, grown = played(bundle.path, budget, args.warm)
            p, r = found["predicted"], found["played"]
            print(
                f"| {budget / 1e6:.0f} | {p['total_s']:.2f} | {r['total_s']:.2f} | {r['total_s'] / p['total_s']:.3f} "
                f"| {p['stalls_s']:.2f} | {r['stalls_s']:.2f} | {r['loads']} | {r['loads_bytes'] / 1e9:.2f} "
                f"| {p['peak_bytes'] / 1e6:.0f} | {r['peak_bytes'] / 1e6:.0f} | {grown / 1e6:.0f} |",
                flush=True,
            )


if __name__ == "__main__":
    main()
