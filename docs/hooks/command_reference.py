"""The reference of the command, from the command itself."""

from __future__ import annotations

import re
from typing import Any

from markdown_text import cell, table

HEAD = """# The command

What `sora-compile --help` and `sora-compile COMMAND --help` print. `sora-compile RECIPE -o BUNDLE` is short for
`sora-compile compile RECIPE -o BUNDLE`.

Answers go to stdout, as JSON with `--json`; progress and errors go to stderr.

| exit code | meaning |
|---|---|
| 0 | done |
| 1 | a bug |
| 2 | usage, recipe or bundle |
| 3 | checkpoint |
| 4 | cannot lower |
| 5 | accuracy gate |
| 6 | resources: memory or disk |
| 130 | interrupted |
"""

KINDS = {int: "N", float: "NUMBER", str: "TEXT", type(None): "TEXT"}
"""What an option takes that does not say so, by its default."""


def command_page() -> str:
    """Every command with its arguments and options, in the order in which help lists them."""
    import typer.main

    from toolchain.cli import app

    group: Any = typer.main.get_command(app)
    return HEAD + "".join(_command(name, command) for name, command in group.commands.items())


def _command(name: str, command: Any) -> str:
    arguments = [p for p in command.params if p.param_type_name == "argument"]
    options = [p for p in command.params if p.param_type_name == "option"]
    words = " ".join(f"{p.metavar}" if p.required else f"[{p.metavar}]" for p in arguments)
    text = (
        f"\n## `{name}`\n\n{_plain(command.help)}\n\n```text\nsora-compile {name} {words}".rstrip()
        + " [OPTIONS]\n```\n"
    )
    if arguments:
        text += "\n" + table(("argument", "meaning", "default"), [_row(p, f"`{p.metavar}`") for p in arguments])
    return text + "\n" + table(("option", "meaning", "default"), [_row(p, _names(p)) for p in options])


def _names(option: Any) -> str:
    takes = "" if option.is_flag else f" {option.metavar or KINDS[type(option.default)]}"
    return ", ".join(f"`{name}{takes if name.startswith('--') else ''}`" for name in option.opts).replace("|", "\\|")


def _row(parameter: Any, name: str) -> tuple[str, str, str]:
    if parameter.required:
        return name, cell(_plain(parameter.help)), "required"
    shown = "" if parameter.default in (None, False, [], ()) else f"`{parameter.default}`"
    again = " May be given several times." if parameter.multiple else ""
    return name, cell(_plain(parameter.help)) + again, shown


def _plain(text: str | None) -> str:
    """Help without the marks of rich."""
    return re.sub(r"\[/?(bold|dim|italic)\]", "", text or "").strip()
