"""A bundle's loading planned again, without building anything."""

from __future__ import annotations

from pathlib import Path

from toolchain.build.entries import manifest_text
from toolchain.errors import RecipeError
from toolchain.formats.bundle import Bundle, load_bundle
from toolchain.formats.manifest import FILE_NAME
from toolchain.formats.times import load_times
from toolchain.planning.loading.again import plan_again
from toolchain.system.files import whole_file


def replan_bundle(
    bundle: Bundle | str | Path, *, calibration: str | Path | None = None, memory_budget: int | None = None
) -> Bundle:
    """Plan what a bundle loads again, and write it into the manifest, which is replaced at once or not at all.

    Args:
        calibration: a file of times measured with this bundle; those of its plan until now if None.
        memory_budget: bytes for weights and activations; the bundle's own if None.

    Raises:
        RecipeError: neither is given, the calibration is none, or the budget is too small.
        BundleError: the calibration is of another bundle, or the bundle of an earlier version.
        ResourceError: the manifest cannot be written.
    """
    bundle = bundle if isinstance(bundle, Bundle) else load_bundle(bundle)
    if calibration is None and memory_budget is None:
        raise RecipeError("replan: give --calibration, --memory-budget or both")
    measured = None if calibration is None else load_times(Path(calibration))
    budget = bundle.manifest.memory_budget_bytes if memory_budget is None else memory_budget
    loading = plan_again(bundle.manifest, budget, measured).entry()
    manifest = bundle.manifest.model_copy(update={"loading": loading, "memory_budget_bytes": budget})
    with whole_file(bundle.path / FILE_NAME, "replan") as partial:
        partial.write_text(manifest_text(manifest), encoding="utf-8")
    return Bundle(bundle.path, manifest)
