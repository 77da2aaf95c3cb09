"""What choosing by measured sensitivity gains over keeping all weights alike, at equal bytes.

    python benchmarks/budget.py [--recipe tiny] [--component transformer] [--target coreml] [--schemes "int8;…"]

For each uniform scheme: the component as `quantize: {scheme: …}` makes it (what the model calls delicate is left
alone), and with every matrix in the scheme; then what `sora-compile quantize` chooses for as many bytes. Decibels are
those of the component's output on its quantized weights against its output on the checkpoint's, both in float32, the
mean error over all functions: on the inputs that the choice was made on, and on 32 others.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import Any

import toolchain
from toolchain.build.measured import measure_choice
from toolchain.build.tasks import builders
from toolchain.errors import RecipeError
from toolchain.formats.recipe import Recipe
from toolchain.formats.recipe_file import find_recipe, load_recipe
from toolchain.ir.uses import LEAST_NUMBERS, weight_uses
from toolchain.planning.candidates import with_rules
from toolchain.planning.plan import plan_resolved
from toolchain.planning.resolve import resolve
from toolchain.system.store import Store

UNIFORM: dict[str, dict[str, Any]] = {
    "int4": {"scheme": "int4"},
    "int4, asymmetric, clipped": {"scheme": "int4", "symmetric": False, "clip": "error"},
    "6-bit palette": {"scheme": "palette", "bits": 6},
    "4-bit palette": {"scheme": "palette", "bits": 4},
    "int8": {"scheme": "int8"},
}
TAKEN = {"coreml": UNIFORM, "onnx": {k: v for k, v in UNIFORM.items() if "palette" not in k}}
OTHERS: dict[str, Any] = {"seed": 12345, "inputs": 32}
"""Inputs that nothing was chosen on."""


def measured(recipe: Recipe, base: Path, component: str, store: Store) -> tuple[int, float, float]:
    """Bytes of a component's weights; SQNR of its output on the gate's inputs and on others, in dB."""
    found = []
    others = recipe.model_copy(update={"gate": recipe.gate.model_copy(update=OTHERS)})
    for each in (recipe, others):
        planned = plan_resolved(resolve(each, base, checkpoints=True))
        found.append(measure_choice(builders(planned, store, direct=False)[component], planned).sqnr_db)
    return planned.components[component].weight_bytes, found[0], found[1]


def all_alike(recipe: Recipe, base: Path, component: str, scheme: dict[str, Any]) -> Recipe:
    """The recipe with every matrix of a component in a scheme, those that the model calls delicate too."""
    graphs = plan_resolved(resolve(recipe, base, checkpoints=False)).components[component].graphs
    uses = {name: (use, graph.weights[name]) for graph in graphs for name, use in weight_uses(graph).items()}
    rules = [
        {"match": name, **scheme}
        for name, (use, weight) in uses.items()
        if use.use != "other" and weight.parameters >= LEAST_NUMBERS
    ]
    return with_rules(recipe, {component: {"scheme": "float", "rules": rules}})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipe", default="tiny")
    parser.add_argument("--component", default="transformer", choices=["text_encoder", "transformer", "vae"])
    parser.add_argument("--target", default="coreml", choices=list(TAKEN))
    parser.add_argument("--schemes", help="names of schemes, parted by ;")
    args = parser.parse_args()
    asked = args.schemes.split(";") if args.schemes else list(TAKEN[args.target])
    base, store = find_recipe(args.recipe).parent, Store()
    recipe = load_recipe(args.recipe, [f"target={args.target}"])
    plain = with_rules(recipe, {args.component: None})
    print(
        "| weights kept as | bytes | dB | dB, other inputs | chosen for as many | dB | gain | dB, other inputs | gain |"
    )
    print("|---|---|---|---|---|---|---|---|---|")
    for name in asked:
        scheme = TAKEN[args.target][name]
        uniform = with_rules(plain, {args.component: scheme})
        sizes = set()
        for label, each in ((name, uniform), (f"{name}, all", all_alike(plain, base, args.component, scheme))):
            try:
                size, own, other = measured(each, base, args.component, store)
            except RecipeError as error:
                print(f"| {label} | refused: {error} | | | | | | | |", flush=True)
                continue
            if size in sizes:  # nothing in it is delicate
                continue
            sizes.add(size)
            began = time.perf_counter()
            chosen = toolchain.quantize(plain, base=base, component=args.component, budget={"bytes": size}, store=store)
            seconds = time.perf_counter() - began
            taken, best, best_other = measured(chosen.recipe, base, args.component, store)
            figures = f"{best:.2f} | **{best - own:+.2f}** | {best_other:.2f} | **{best_other - other:+.2f}**"
            print(f"| {label} | {size} | {own:.2f} | {other:.2f} | {taken} ({seconds:.1f} s) | {figures} |", flush=True)


if __name__ == "__main__":
    main()
