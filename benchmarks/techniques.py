"""What the published techniques gain on this machine's ExecuTorch, one by one and together, where memory is short.

    python benchmarks/techniques.py [--pairs 4] [--side 128] [--steps 10] [--width full|small] [--resident 0.5]

The model is one of full width with few pairs (see ``playing.py``), and every load reads from storage: what the system
keeps of a block's files is dropped before. Rows:

- none: every block is loaded, run and freed, one after the other.
- LPL: the same, with a leap after half of the steps. TDTM: the same, the first half of the steps merged.
- CI: the next block is loaded while one runs, none stays. CI-DL: and leading blocks stay, by the published rule, in a
  budget that holds ``--resident`` of the pairs. planner: this project's plan in the same budget.
- all: LPL, TDTM and CI-DL; and once more with the planner.

"predicted" is by a calibration of this machine, made before. The paper's seconds are its STDiT's at 192² on an
iPhone 15 Pro, 30 steps; for none they are 30 times its 35.4 s a step. Other model, machine and ratio of loading to
computing: what can be compared is by what factor each technique is faster than none.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Callable, Mapping
from itertools import groupby
from pathlib import Path
from typing import Any

import torch
from playing import ColdPlayer, add_sizes, build, drop, with_sampler

from toolchain.formats.manifest import Manifest
from toolchain.formats.times import TimesFile
from toolchain.planning.loading.events import Execute, Free, Load, LoadingPlan, Section
from toolchain.planning.loading.loops import find_loops
from toolchain.planning.loading.paper import needed_by_leading, paper_schedule
from toolchain.planning.loading.planner import plan_loading
from toolchain.planning.loading.run import Phase, Run
from toolchain.planning.loading.simulate import simulate
from toolchain.planning.loading.unrolled import unroll
from toolchain.planning.loading.whole import retimed
from toolchain.planning.loading.writing import write
from toolchain.player.following import Followed
from toolchain.player.measuring import measure_times

PUBLISHED_S: Mapping[str, float] = {
    "none": 30 * 35.4,
    "LPL": 390.7,
    "TDTM": 696.0,
    "CI-DL": 566.8,
    "all": 293.5,
}
Planning = Callable[[Run, int], LoadingPlan]


def one_by_one(run: Run, budget: int) -> LoadingPlan:
    """Nothing beside one another, and nothing stays."""
    events = tuple(e for c in run.calls() for e in (Load(c.block), Execute(c.block, c.function), Free(c.block)))
    return LoadingPlan(unroll(run).least_budget, (Section(1, events),))


def leading(run: Run, budget: int) -> LoadingPlan:
    """The published rule."""
    u = unroll(run)
    return write(u, paper_schedule(u, budget), budget)


def without_residents(run: Run, budget: int) -> LoadingPlan:
    return leading(run, staying_bytes(run, 0.0))


def planned(run: Run, budget: int) -> LoadingPlan:
    return plan_loading(run, budget).plan


def staying_bytes(run: Run, share: float) -> int:
    """A budget in which the published rule keeps a share of the blocks of every loop, and no more of the largest."""
    u = unroll(run)
    needed = [needed_by_leading(u, loop) for loop in find_loops(u)]
    return max([u.least_budget, *(n[int(share * (len(n) - 1))] for n in needed)])


def run_of(manifest: Manifest, measured: TimesFile) -> Run:
    """The run of a manifest whose sampler is not the one that its loading was planned for."""
    made = manifest.loading.made_from
    assert made is not None
    built = Run.from_data(made.run)
    known = {(c.block, c.function): c for c in built.calls()}
    phases = (
        Phase("", tuple(known[c] for c in calls), len(list(alike)))
        for calls, alike in groupby(manifest.rounds())
        if calls
    )
    run = Run(built.blocks, tuple(phases))
    structures = {f"{n}/{b.name}": b.structure for n, c in manifest.components.items() for b in c.blocks}
    return retimed(run, structures, measured)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_sizes(parser)
    parser.add_argument("--resident", type=float, default=0.5, help="share of the pairs that the budget holds")
    args = parser.parse_args()
    half = args.steps // 2
    plain: dict[str, Any] = {"steps": args.steps}
    lpl, tdtm = {"leap": half}, {"merged_steps": half}
    rows: list[tuple[str, dict[str, Any], Planning]] = [
        ("none", plain, one_by_one),
        ("LPL", plain | lpl, one_by_one),
        ("TDTM", plain | tdtm, one_by_one),
        ("CI", plain, without_residents),
        ("CI-DL", plain, leading),
        ("planner", plain, planned),
        ("all", plain | lpl | tdtm, leading),
        ("all, planner", plain | lpl | tdtm, planned),
    ]
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as tmp:
        bundle, recipe = build(Path(tmp), args.width, args.pairs, args.side, args.steps)
        measured = TimesFile(measure_times(bundle, before_load=drop), "calibration")
        print(f"overlap loss {measured.times.overlap_loss:.2f}")
        for digest, own in measured.times.structures.items():
            if own.load_s > 0.02:
                runs = ", ".join(f"{f} {s:.3f} s" for f, s in own.run_s.items())
                print(f"structure {digest[:8]}: load {own.load_s:.3f} s, {runs}")
        budget = staying_bytes(run_of(with_sampler(bundle, recipe, **plain).manifest, measured), args.resident)
        print(f"budget of CI-DL and the planner: {budget / 1e6:.0f} MB; of CI: two blocks; of the others: one")
        print(
            "| techniques | time, s | of none | predicted, s | loads | read, GB | waiting, s | peak, MB "
            "| paper, s | of none |"
        )
        print("|---|---|---|---|---|---|---|---|---|---|")
        none_s = 0.0
        for name, sampler, planning in rows:
            player = ColdPlayer(with_sampler(bundle, recipe, **sampler))
            run = run_of(player.manifest, measured)
            plan = planning(run, budget)
            player.followed = Followed(run, plan, simulate(run, plan, measured.times.overlap_loss))
            player.video("a red fox", seed=1)
            played, predicted = player.played, player.followed.predicted
            assert played is not None and predicted is not None
            none_s = none_s or played.total_s
            paper = PUBLISHED_S.get(name)
            published = " | " if paper is None else f"{paper:.1f} | {paper / PUBLISHED_S['none']:.2f}"
            print(
                f"| {name} | {played.total_s:.1f} | {played.total_s / none_s:.2f} | {predicted.total_s:.1f} "
                f"| {played.loads} | {played.loads_bytes / 1e9:.2f} | {played.stalls_s:.1f} "
                f"| {played.peak_bytes / 1e6:.0f} | {published} |",
                flush=True,
            )


if __name__ == "__main__":
    main()
