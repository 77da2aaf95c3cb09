"""How often coremltools validates a program that it converts."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

from coremltools.converters.mil.mil import Program
from coremltools.converters.mil.mil.passes.pass_pipeline import PassPipelineManager


@contextlib.contextmanager
def validated_at_the_ends() -> Iterator[None]:
    """Within it programs are validated before and after a pipeline of passes, and not after each of some hundred.

    That is a third of the time of a conversion. A pass that breaks a program is found all the same, and the program is
    then read back and run.
    """
    apply, validate = PassPipelineManager.apply_pipeline, Program.validate

    def apply_quickly(program: Any, pipeline: Any) -> None:
        validate(program)
        Program.validate = lambda self, **options: None
        try:
            apply(program, pipeline)
        finally:
            Program.validate = validate
        validate(program, check_essential_scope=True)

    PassPipelineManager.apply_pipeline = staticmethod(apply_quickly)
    try:
        yield
    finally:
        PassPipelineManager.apply_pipeline = staticmethod(apply)
