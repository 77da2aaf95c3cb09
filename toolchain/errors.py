"""One family of errors. Each is a user-facing line and an exit code; anything else is a bug.

A message says what is wrong, where (recipe key, block, operator, file) and what to do about it.
"""

from __future__ import annotations


class SoraCompileError(Exception):
    """Base of all errors that a user can cause and mend. ``exit_code`` is the process exit status."""

    exit_code = 1


def interrupted(error: BaseException | None) -> bool:
    """Whether Ctrl-C is behind an error: libraries wrap it in errors of their own."""
    while error is not None and not isinstance(error, KeyboardInterrupt):
        error = error.__cause__ or error.__context__
    return error is not None


class CancelledError(KeyboardInterrupt):
    """Ends a build as Ctrl-C does, from code: :meth:`toolchain.Listener.cancelled` said so.

    No :class:`SoraCompileError`, since nothing is wrong, and what goes on after errors does not go on after this.
    """


class RecipeError(SoraCompileError):
    """The command line or the recipe asks for something that does not exist or cannot be."""

    exit_code = 2


class BundleError(SoraCompileError):
    """A bundle or its manifest is missing, damaged, or of another version."""

    exit_code = 2


class CheckpointError(SoraCompileError):
    """A checkpoint cannot be found, read, or does not belong to the model."""

    exit_code = 3


class LoweringError(SoraCompileError):
    """A pass or a target cannot lower a graph; names the block and, where known, the operator."""

    exit_code = 4


class PrecisionError(LoweringError):
    """A number of a weight is too large for the precision that it is to be stored in."""


class AccuracyError(SoraCompileError):
    """An artifact was executed and its numbers are off; names the block and the function."""

    exit_code = 5


class ResourceError(SoraCompileError):
    """Disk, memory or permissions: the machine, not the recipe."""

    exit_code = 6
