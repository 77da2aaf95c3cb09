"""How long planning of loads takes, and how good plans are, for the whole Open-Sora 1.2 on a phone.

    python benchmarks/planning.py [--recipe open-sora-v1.2-iphone-15-pro] [--bandwidth 0.54e9] [--faster 1] [--shipped]

Blocks, weights, geometry and steps are those of the recipe (without its leap, so 30 steps: the case in which loading
costs most). What nobody has measured is assumed, and printed: times of calls are the published ones of a component
(T5 110.5 s, STDiT 35.4 s a step, VAE 135.0 s, On-device Sora), shared out by parameters, or over `--faster`; merged
calls take 0.7 of it; activations of a call are three times its inputs and outputs, in the block's precision; what lives
between calls is the largest output of the component and its tables. Loads take bytes / bandwidth + 20 ms.
"""

from __future__ import annotations

import argparse
import time
import tracemalloc
from dataclasses import replace
from math import prod
from pathlib import Path

from toolchain.formats.recipe_file import find_recipe, load_recipe, shipped
from toolchain.ir.blocks import Block as RealBlock
from toolchain.planning.loading.paper import leading_kept
from toolchain.planning.loading.planner import plan_loading
from toolchain.planning.loading.run import Block, Call, Phase, Run
from toolchain.planning.loading.schedule import free_bytes
from toolchain.planning.loading.simulate import simulate
from toolchain.planning.loading.unrolled import Unrolled, unroll
from toolchain.planning.plan import ComponentPlan, Plan, plan

ONE_PASS_S = {"text_encoder": 110.5, "transformer": 35.4, "vae": 135.0}
MERGED = 0.7
OVERHEAD_S = 0.02
CHUNK_FRAMES = 17
ITEM_BYTES = {"float32": 4, "float16": 2}


def run_of(planned: Plan, bandwidth: float, faster: float) -> Run:
    """The recipe's run, with what is assumed filled in."""
    text, transformer, vae = (planned.components[n] for n in ("text_encoder", "transformer", "vae"))
    video, sampler = planned.recipe.video, planned.recipe.sampler
    group = next(b for b in vae.blocks if b.rate == "frames").inputs[0].shape[0]
    chunks, groups = -(-video.frames // CHUNK_FRAMES), -(-video.frames // group)
    merged = min(sampler.merged_steps, sampler.steps)
    phases = [
        Phase("text", calls(text, "prompt", "base", 1 / faster)),
        Phase("caption", calls(transformer, "prompt", "base", 1 / faster)),
        *([Phase("merged steps", calls(transformer, "step", "merged", MERGED / faster), merged)] if merged else []),
        Phase("steps", calls(transformer, "step", "base", 1 / faster), sampler.steps - merged),
        Phase("temporal decoding", calls(vae, "chunk", "base", 1 / faster / chunks), chunks),
        Phase("spatial decoding", calls(vae, "frames", "base", 1 / faster / groups), groups),
    ]
    blocks = [
        Block(f"{c.name}/{b.name}", b.weight_bytes, b.weight_bytes / bandwidth + OVERHEAD_S)
        for c in (text, transformer, vae)
        for b in c.blocks
        if not b.rate.startswith("encode")
    ]
    return Run(tuple(blocks), tuple(phases))


def calls(component: ComponentPlan, rate: str, function: str, share: float) -> tuple[Call, ...]:
    """One round of a rate's blocks; ``share`` of the component's published time, over the blocks by parameters."""
    item = ITEM_BYTES[component.target.precision]
    own = [b for b in component.blocks if b.rate == rate]
    live = item * max(prod(port.shape) for b in own for port in (*b.inputs, *b.outputs))
    return tuple(
        Call(
            f"{component.name}/{b.name}",
            b.own_function(function),
            ONE_PASS_S[component.name] * share * b.parameters / component.parameters,
            3 * item * numbers(b),
            live,
        )
        for b in own
    )


def numbers(block: RealBlock) -> int:
    """In all inputs and outputs of a block."""
    return sum(prod(port.shape) for port in (*block.inputs, *block.outputs))


def by_weights_alone(u: Unrolled, budget: int) -> int:
    """What would be held at most if leading blocks stayed as long as weights alone fit, with the next block's."""
    weights = replace(u, room=[0] * len(u.room))
    kept = next(leading_kept(weights, [budget]))
    held = [budget - free for free in free_bytes(weights, kept, budget)]
    coming = [*u.block[1:], u.block[-1]]
    ahead = [
        0 if b == a or kept[u.preceding[i + 1]] else u.size[b]
        for i, (a, b) in enumerate(zip(u.block, coming, strict=True))
        if i + 1 < len(u.block)
    ]
    return max(h + r + n for h, r, n in zip(held, u.room, [*ahead, 0], strict=True))


def shipped_recipes() -> None:
    """What recipes that name a device are predicted to take, and what planning that takes."""
    print(
        "| recipe | budget, GB | weights, GB | activations, GB | least, GB | peak, GB | by weights alone, GB "
        "| loads, GB | predicted, s | bound, s | rule, s | planning, s | MB |"
    )
    print("|---|---|---|---|---|---|---|---|---|---|---|---|---|")
    for name, path in shipped().items():
        recipe = load_recipe(path)
        if recipe.device is None:
            continue
        planned = plan(recipe, base=path.parent)
        del planned.__dict__["loading"]  # planned already: once more, for its time, and once for its memory
        began = time.process_time()
        found = planned.loading.entry().prediction
        took = time.process_time() - began
        assert found is not None
        budget = planned.loading.planned.plan.budget_bytes
        del planned.__dict__["loading"]
        tracemalloc.start()
        planned.check_loading()
        memory = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        u = unroll(planned.loading.run)
        sizes = (sum(u.size), max(u.room), u.least_budget, found.peak_bytes, by_weights_alone(u, budget))
        print(
            f"| {name} | {budget / 1e9:g} | {' | '.join(f'{b / 1e9:.3f}' for b in sizes)} "
            f"| {found.loads_bytes / 1e9:.1f} | {found.total_s:.1f} "
            f"| {found.bound_s:.1f} | {found.paper_s:.1f} | {took:.2f} | {memory / 1e6:.1f} |",
            flush=True,
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipe", default="open-sora-v1.2-iphone-15-pro")
    parser.add_argument("--bandwidth", type=float, default=0.54e9, help="bytes a second that load")
    parser.add_argument("--faster", type=float, default=1.0, help="how many times faster than published calls are")
    parser.add_argument("--shipped", action="store_true", help="the shipped recipes, by their devices' profiles")
    parser.add_argument("--loss", type=float, default=0.0, help="overlap loss, 0 … 1")
    args = parser.parse_args()
    if args.shipped:
        shipped_recipes()
        return
    recipe = load_recipe(args.recipe)
    run = run_of(plan(recipe, base=Path(find_recipe(args.recipe)).parent), args.bandwidth, args.faster)
    u = unroll(run)
    everything = max(u.room) + sum(u.size)
    two = max(u.room[i] + u.size[b] + u.size[u.block[min(i + 1, len(u.block) - 1)]] for i, b in enumerate(u.block))
    whole = [u.least_budget, two, *(int(two * f) for f in (1.2, 1.5, 1.8)), 2_500_000_000, 3_300_000_000, everything]
    print(f"{len(u.block)} calls of {len(u.size)} blocks, {run.compute_s:.1f} s of computing, {args.bandwidth:g} B/s")
    print("| budget, MB | ours, s | published rule, s | bound, s | gap | loads, GB | events | planning, s |")
    print("|---|---|---|---|---|---|---|---|")
    for budget in sorted(set(whole)):
        began = time.process_time()
        planned = plan_loading(run, budget, args.loss)
        took = time.process_time() - began
        timeline = simulate(run, planned.plan, args.loss)
        assert timeline.peak_bytes <= budget
        loaded = sum(run.by_name[s.block].weight_bytes for s in timeline.loads)
        events = sum(len(s.events) for s in planned.plan.sections)
        print(
            f"| {budget / 1e6:.0f} | {planned.total_s:.1f} | {planned.paper_s:.1f} | {planned.bound_s:.1f} "
            f"| {planned.gap:.1%} | {loaded / 1e9:.1f} | {events} | {took:.2f} |",
            flush=True,
        )
    tracemalloc.start()  # not the process's peak, which preparing the recipe may have set before
    plan_loading(run, everything, args.loss)
    print(f"memory that planning takes at its peak: {tracemalloc.get_traced_memory()[1] / 1e6:.1f} MB")


if __name__ == "__main__":
    main()
