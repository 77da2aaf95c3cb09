"""The ``sora-compile`` command. No logic: parses, calls the library, prints.

A command imports what it needs when it runs, so that help and what is light stay so.
"""

from toolchain.cli.app import app, main

__all__ = ["app", "main"]
