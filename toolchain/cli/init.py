"""``init``: a first recipe, from flags or from answers."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from toolchain.cli.options import JsonOption, VerboseOption


def init(
    output: Annotated[Path, typer.Option("-o", "--output", metavar="RECIPE", help="The file to write.")] = Path(
        "recipe.yaml"
    ),
    model: Annotated[str | None, typer.Option("--model", metavar="NAME", help="The model family.")] = None,
    checkpoint: Annotated[
        list[str],
        typer.Option(
            "--checkpoint",
            metavar="[COMPONENT=]LOCATION",
            help="A folder with a folder for each component; or once for each, as vae=hf://owner/name.",
        ),
    ] = [],  # noqa: B006 - typer reads it
    device: Annotated[str | None, typer.Option("--device", metavar="NAME", help="The device; see devices.")] = None,
    target: Annotated[str | None, typer.Option("--target", metavar="NAME", help="The target.")] = None,
    video: Annotated[
        str, typer.Option("--video", metavar="FRAMESxHEIGHTxWIDTH", help="Frames, and their size in pixels.")
    ] = "68x192x192",
    as_json: JsonOption = False,
    verbose: VerboseOption = False,
) -> None:
    """Write a recipe to begin with, with comments. Asks for what no flag says, if there is a terminal."""
    from toolchain.ui.console import Console

    with Console(as_json, verbose) as console:
        from toolchain import plugins
        from toolchain.errors import RecipeError
        from toolchain.formats.device import shipped_devices
        from toolchain.system.files import check_file, whole_file
        from toolchain.ui.new_recipe import Wanted, recipe_text

        check_file("-o", output)
        if output.exists():
            raise RecipeError(f"-o {output}: exists; choose another name or remove it")
        models, targets = plugins.names(plugins.MODELS), plugins.names(plugins.TARGETS)
        if model is None:
            model = models[0] if len(models) == 1 else _asked("--model", f"Model ({', '.join(models)})")
        given = checkpoint or [_asked("--checkpoint", "Checkpoint: a folder, a file or hf://owner/name")]
        target = target or _asked("--target", f"Target ({', '.join(targets)})")
        if device is None and sys.stdin.isatty():
            device = _asked("--device", f"Device ({', '.join(shipped_devices())}; nothing for any)", True) or None
        text = recipe_text(Wanted(model, target, tuple(given), device, video), output)
        with whole_file(output) as partial:
            partial.write_text(text, encoding="utf-8")
        console.answer({"path": str(output)}, f"{output}\nnext: sora-compile {output} -o BUNDLE")


def _asked(option: str, question: str, may_be_empty: bool = False) -> str:
    """A user's answer.

    Raises:
        RecipeError: there is nobody to ask, or no answer.
    """
    from toolchain.errors import RecipeError

    if not sys.stdin.isatty():
        raise RecipeError(f"init: give {option}; without a terminal nobody can be asked")
    typer.echo(f"{question}: ", nl=False, err=True)
    answer = sys.stdin.readline().strip()
    if not answer and not may_be_empty:
        raise RecipeError(f"init: {option} is needed, and there was no answer")
    return answer
