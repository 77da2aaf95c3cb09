"""``verify --explain``: a block of a bundle, walked step by step against its checkpoint."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from toolchain.accuracy import goldens
from toolchain.accuracy.metrics import unscaled
from toolchain.accuracy.references import run_eager
from toolchain.accuracy.walk import Explanation, explain
from toolchain.errors import BundleError, RecipeError
from toolchain.formats.bundle import RECIPE_FILE, Bundle, load_bundle
from toolchain.formats.recipe import Recipe
from toolchain.formats.recipe_file import load_recipe
from toolchain.formats.tensors import read_tensors
from toolchain.ir.calibration import Calibrated
from toolchain.planning.plan import plan
from toolchain.planning.resolve import find_weights
from toolchain.player.opening import open_engine
from toolchain.weights.block_weights import BlockWeights


def explain_block(
    bundle: Bundle | str | Path,
    name: str,
    *,
    base: str | Path = ".",
    calibrate: Callable[[Recipe, Path, str], Calibrated] | None = None,
) -> tuple[Explanation, ...]:
    """Walk every function of the block ``COMPONENT/BLOCK`` on its golden inputs.

    The bundle's recipe says where the checkpoint is; relative paths are looked for in ``base``.

    Args:
        calibrate: measures a recipe's component again, where its weights were encoded with what was measured then
            (:func:`toolchain.build.calibration.calibrate_recipe`).

    Raises:
        RecipeError: there is no such block; lists those there are.
        BundleError: the block has no goldens, or this version makes another block of the recipe.
        CheckpointError: the checkpoint is not there.
    """
    bundle = bundle if isinstance(bundle, Bundle) else load_bundle(bundle)
    blocks = {f"{c}/{b.name}": (c, b) for c, part in bundle.manifest.components.items() for b in part.blocks}
    if name not in blocks:
        raise RecipeError(f"--explain {name}: no such block; there are {', '.join(blocks)}")
    component, entry = blocks[name]
    if entry.goldens is None or entry.accuracy is None:
        raise BundleError(f"'{bundle.path}' has no goldens for {name}, since it was not executed when it was built")
    recipe = load_recipe(bundle.path / RECIPE_FILE)
    planned = plan(recipe, base=base).components[component]
    pair = next((p for p in planned.pairs if p.name == entry.name), None)
    if pair is None or pair.lowered.structure() != entry.structure:
        raise BundleError(f"'{bundle.path}': this version makes another {name} of its recipe; build the bundle again")
    block, plain = pair.lowered, pair.plain
    checkpoint = find_weights(recipe.components()[component], Path(base))
    aliases = planned.definition.aliases
    calibrated = None
    if block.int8_inputs or any(w.storage.needs for w in block.weights.values()):
        if calibrate is None:
            raise BundleError(f"'{bundle.path}': {name} was encoded with a calibration; give what measures it again")
        calibrated = calibrate(recipe, Path(base), component)
    weights, own = (
        BlockWeights(b, checkpoint, aliases, stored=block.weights, calibrated=calibrated) for b in (plain, block)
    )
    engine = open_engine(bundle, component, entry, planned.target)
    tensors = read_tensors(bundle.path / entry.goldens.path)
    found = []
    for function in entry.functions:
        stored = goldens.stored_for(tensors, function)
        drawn = goldens.draw(function, stored, {p.name: p.shape for p in block.signatures[function].inputs})
        case = run_eager(plain, function, weights, unscaled(drawn, block.inputs))
        found.append(explain(block, own, case, engine, planned.target, entry.accuracy[function].limit))
    return tuple(found)
