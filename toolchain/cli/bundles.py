"""What is done with a built bundle: ``inspect``, ``verify``, ``diff``, ``report``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from toolchain.cli.options import BundleArgument, JsonOption, VerboseOption


def inspect(
    what: Annotated[
        str, typer.Argument(metavar="BUNDLE_OR_CHECKPOINT", help="A bundle's folder, or where a checkpoint is.")
    ],
    as_json: JsonOption = False,
    verbose: VerboseOption = False,
) -> None:
    """Show what a bundle holds, after checking its files; or what a checkpoint or a LoRA adapter holds."""
    from toolchain.ui.console import Console

    with Console(as_json, verbose) as console:
        import toolchain
        from toolchain.ui.bundles import bundle_json, bundle_table
        from toolchain.weights.checkpoint import is_checkpoint, open_checkpoint

        if is_checkpoint(what):
            from toolchain.ui.checkpoints import checkpoint_json, checkpoint_table

            facts = checkpoint_json(open_checkpoint(what, Path()))
            console.answer(facts, checkpoint_table(facts))
            return
        loaded = toolchain.load_bundle(what)
        loaded.check_files()
        console.answer(bundle_json(loaded), bundle_table(loaded))


def verify(
    bundle: BundleArgument,
    explain: Annotated[
        str | None,
        typer.Option("--explain", metavar="COMPONENT/BLOCK", help="Walk a block step by step; needs its checkpoint."),
    ] = None,
    goldens_of: Annotated[
        Path | None, typer.Option("--goldens-of", metavar="BUNDLE", help="Use another bundle's goldens.")
    ] = None,
    files_only: Annotated[
        bool, typer.Option("--files-only", help="Execute nothing: only hold the files against their digests.")
    ] = False,
    as_json: JsonOption = False,
    verbose: VerboseOption = False,
) -> None:
    """Check a bundle's files, and run its artifacts against its goldens. Needs no checkpoint."""
    from toolchain.ui.console import Console

    with Console(as_json, verbose) as console:
        import toolchain
        from toolchain.errors import RecipeError
        from toolchain.ui.verifying import explanation_json, verification_json, verification_table

        if files_only:
            if explain is not None or goldens_of is not None:
                raise RecipeError("--files-only: executes nothing, so leave out --explain and --goldens-of")
            whole = toolchain.load_bundle(bundle)
            whole.check_files()
            console.answer({"bundle": str(whole.path)}, f"{whole.path}: all files are what was built")
            return
        if explain is not None:
            from toolchain.accuracy.explain import explain_block
            from toolchain.build.calibration import calibrate_recipe

            found = explain_block(bundle, explain, calibrate=calibrate_recipe)
            console.answer(explanation_json(found), "\n\n".join(e.text() for e in found))
            return
        with console.progress(None) as listener:
            verified = toolchain.verify(bundle, goldens_of=goldens_of, listener=listener)
        console.answer(verification_json(verified), verification_table(verified))
        verified.require()


def diff(
    a: Annotated[Path, typer.Argument(metavar="BUNDLE_A", help="A bundle's folder.")],
    b: Annotated[Path, typer.Argument(metavar="BUNDLE_B", help="Another's.")],
    as_json: JsonOption = False,
    verbose: VerboseOption = False,
) -> None:
    """Compare two bundles: manifest, sizes, accuracy, and what their artifacts give."""
    from toolchain.ui.console import Console

    with Console(as_json, verbose) as console:
        from toolchain.accuracy.diff import compare_bundles
        from toolchain.ui.verifying import comparison_json, comparison_table

        found = compare_bundles(a, b)
        console.answer(comparison_json(found), comparison_table(found))


def report(
    bundle: BundleArgument,
    output: Annotated[
        Path | None, typer.Option("-o", "--output", metavar="HTML", help="The page; BUNDLE.html if not given.")
    ] = None,
    trace: Annotated[
        Path | None, typer.Option("--trace", metavar="FILE", help="Show the timeline that play --trace recorded.")
    ] = None,
    png: Annotated[Path | None, typer.Option("--png", metavar="PNG", help="Also draw the timeline alone.")] = None,
    as_json: JsonOption = False,
    verbose: VerboseOption = False,
) -> None:
    """Write one self-contained page about a bundle, after checking its files."""
    from toolchain.ui.console import Console

    with Console(as_json, verbose) as console:
        import toolchain
        from toolchain.ui.report.write import write_bundle_report

        loaded = toolchain.load_bundle(bundle)
        page = output or bundle.absolute().with_name(f"{bundle.absolute().name}.html")
        write_bundle_report(loaded, page, trace=trace, png=png)
        console.answer({"page": str(page)} | ({"png": str(png)} if png else {}), str(page))
