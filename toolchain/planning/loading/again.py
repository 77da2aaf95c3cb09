"""Planning again what a bundle loads, from what its manifest says: with measured times, or within another budget."""

from __future__ import annotations

from toolchain.errors import BundleError
from toolchain.formats.manifest import Manifest
from toolchain.formats.times import TimesFile
from toolchain.planning.loading.predict import Predicted, predict
from toolchain.planning.loading.run import Run
from toolchain.planning.loading.whole import retimed


def plan_again(manifest: Manifest, budget_bytes: int | None, measured: TimesFile | None = None) -> Predicted:
    """A new plan for a bundle.

    Args:
        budget_bytes: memory for weights and activations; None keeps everything.
        measured: times, instead of those that the bundle's plan was made from.

    Raises:
        BundleError: an earlier version wrote the manifest, so that it does not say what planning takes; or what was
            measured is of another bundle.
        RecipeError: the budget is too small; says the smallest that works.
    """
    made = manifest.loading.made_from
    if made is None:
        raise BundleError(
            f"'{manifest.name}' was built by an earlier version, and does not say what planning its loads again takes; "
            "build it again"
        )
    run = Run.from_data(made.run)
    if measured is None:
        return predict(run, budget_bytes, made.overlap_loss, made.times)
    structures = {f"{name}/{b.name}": b.structure for name, c in manifest.components.items() for b in c.blocks}
    return predict(retimed(run, structures, measured), budget_bytes, measured.times.overlap_loss, measured.source)
