"""What options gain that go by a calibration, on the shipped miniature, which is trained.

    python benchmarks/calibration.py [--component transformer] [--inputs 8] [--schemes …]

Decibels are those of the component's output on its quantized weights against its output on the checkpoint's, both in
float32, the mean error over base and merged function; "blocks" is the relative error of a block alone on exact inputs,
the worst of its runs: the mean over the blocks that have quantized weights, and the worst of them. All are measured on
8 inputs of another seed than what was calibrated on. Delicate weights stay in float; bytes are those of all weights as
Core ML keeps them.
"""

from __future__ import annotations

import argparse
from typing import Any

from toolchain.build.measured import measure_choice
from toolchain.build.tasks import builders
from toolchain.formats.recipe_file import find_recipe, load_recipe
from toolchain.planning.candidates import with_rules
from toolchain.planning.plan import plan_resolved
from toolchain.planning.resolve import resolve
from toolchain.system.store import Store

OTHERS: dict[str, Any] = {"seed": 12345, "inputs": 8}
"""Inputs that nothing was calibrated on."""
FOUR: dict[str, Any] = {"scheme": "int4"}
ASYMMETRIC = FOUR | {"symmetric": False}
CLIPS: dict[str, dict[str, Any]] = {
    "": {},
    ", clip: error": {"clip": "error"},
    ", clip: half-quadratic": {"clip": "half-quadratic"},
    ", clip: output": {"clip": "output"},
    ", compensate": {"compensate": True},
    ", clip: error, compensate": {"clip": "error", "compensate": True},
    ", clip: output, compensate": {"clip": "output", "compensate": True},
}
RANKS: dict[str, dict[str, Any]] = {
    ", rank 8": {"rank": 8},
    ", rank 8, weighted": {"rank": 8, "weighted": True},
    ", clip: output, rank 8, weighted": {"clip": "output", "rank": 8, "weighted": True},
    ", clip: output, compensate, rank 8, weighted": {
        "clip": "output",
        "compensate": True,
        "rank": 8,
        "weighted": True,
    },
}
SCHEMES: dict[str, dict[str, Any]] = {
    **{f"int4{name}": FOUR | options for name, options in CLIPS.items()},
    **{f"int4, asymmetric{name}": ASYMMETRIC | options for name, options in CLIPS.items()},
    **{f"int4{name}": FOUR | options for name, options in RANKS.items()},
    **{
        f"palette, {bits} bits{name}": {"scheme": "palette", "bits": bits} | options
        for bits in (4, 3)
        for name, options in (("", {}), (", weighted", {"weighted": True}))
    },
    "int8": {"scheme": "int8"},
    "int8, clip: output": {"scheme": "int8", "clip": "output"},
    "int8, compensate": {"scheme": "int8", "compensate": True},
}


def options(scheme: dict[str, Any], inputs: int) -> dict[str, Any]:
    """The pass's options: with a calibration where one is needed, and without a rank where captions are too narrow."""
    needs = scheme.get("clip") == "output" or scheme.get("weighted") or scheme.get("compensate")
    without = {k: v for k, v in scheme.items() if k not in ("rank", "weighted")}
    rules = [{"match": "caption.*", **without}] if "rank" in scheme else []
    return {**scheme, "rules": rules, **({"calibration": {"inputs": inputs}} if needs else {})}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--component", default="transformer", choices=["text_encoder", "transformer"])
    parser.add_argument("--inputs", type=int, default=8)
    parser.add_argument("--schemes", default=";".join(SCHEMES), help="names of schemes, parted by ;")
    args = parser.parse_args()
    base, store = find_recipe("tiny").parent, Store()
    recipe = load_recipe("tiny", ["target=coreml"])
    recipe = recipe.model_copy(update={"gate": recipe.gate.model_copy(update=OTHERS)})
    print("| weights kept as | bytes | dB | blocks, mean | worst |")
    print("|---|---|---|---|---|")
    for name in args.schemes.split(";"):
        quantized = with_rules(recipe, {args.component: options(SCHEMES[name], args.inputs)})
        planned = plan_resolved(resolve(quantized, base, checkpoints=True))
        found = measure_choice(builders(planned, store, direct=False)[args.component], planned)
        prices = list(found.prices.values())
        figures = f"{found.sqnr_db:.2f} | {sum(prices) / len(prices):.4f} | {max(prices):.4f}"
        print(f"| {name} | {planned.components[args.component].weight_bytes} | {figures} |", flush=True)


if __name__ == "__main__":
    main()
