"""The command: its group, and which commands are in it, in the order in which help lists them."""

from __future__ import annotations

import signal
import sys
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from toolchain.cli.building import compile_, plan
from toolchain.cli.bundles import diff, inspect, report, verify
from toolchain.cli.cache import cache
from toolchain.cli.init import init
from toolchain.cli.locking import lock
from toolchain.cli.matrix import build_all
from toolchain.cli.playing import calibrate, play, replan
from toolchain.cli.provenance import bom, card, sign, verify_signature
from toolchain.cli.schema import schema
from toolchain.cli.searches import quantize, tune
from toolchain.cli.shipped import devices, recipes


class _CompileByDefault(TyperGroup):
    """``sora-compile RECIPE …`` is ``sora-compile compile RECIPE …``."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        own = {o for p in self.params for o in p.opts} | {"--help"}
        if args and args[0] not in self.commands and args[0] not in own:
            args = ["compile", *args]
        return super().parse_args(ctx, args)


app = typer.Typer(
    cls=_CompileByDefault,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="Compile Open-Sora text-to-video models into bundles for phones: [bold]sora-compile RECIPE -o BUNDLE[/bold].",
    rich_markup_mode="rich",
)


@app.callback(invoke_without_command=True)
def _root(version: Annotated[bool, typer.Option("--version", help="Print the version and exit.")] = False) -> None:
    if version:
        from toolchain.version import VERSION

        typer.echo(VERSION)
        raise typer.Exit


app.command("compile")(compile_)
app.command("build-all")(build_all)
built = inspect, verify, diff, report, calibrate, replan, play
given_away = sign, verify_signature, bom, card
for command in (init, plan, lock, quantize, tune, *built, *given_away, cache, recipes, devices, schema):
    app.command()(command)


def _said_already(unraisable: sys.UnraisableHookArgs) -> None:
    """Converters leave temporary files open when the disk is full; closing them at the end fails once more."""
    if not isinstance(unraisable.exc_value, OSError):
        sys.__unraisablehook__(unraisable)


def main() -> None:
    """Entry point of the command."""
    sys.unraisablehook = _said_already
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # unwinds, so nothing half-written stays
    app(prog_name="sora-compile")  # also as a module: completion goes by it
