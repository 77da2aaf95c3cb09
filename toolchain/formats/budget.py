"""What a recipe or a command says when weights shall be chosen for: a budget of bytes, or of error."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from toolchain.errors import RecipeError
from toolchain.validation import Bytes, explain


class Budget(BaseModel):
    """Either of the two: the most ``bytes`` of weights, or the least ``sqnr_db`` of the component's output."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False)
    bytes: Bytes | None = Field(default=None, description="Most bytes of all weights of the component, as '1.2GB'.")
    sqnr_db: float | None = Field(
        default=None, gt=0, le=150, description="Least signal-to-quantization-noise ratio of its output."
    )

    @model_validator(mode="after")
    def _one(self) -> Budget:
        if (self.bytes is None) == (self.sqnr_db is None):
            raise ValueError("give one of bytes and sqnr_db")
        return self

    def __str__(self) -> str:
        return f"{self.bytes} bytes" if self.bytes is not None else f"{self.sqnr_db:g} dB"


def read_budget(data: object, key: str) -> Budget:
    """A budget from plain data; ``key`` is where it stands.

    Raises:
        RecipeError: names the key, and what is wrong.
    """
    try:
        return Budget.model_validate(data)
    except ValidationError as e:
        raise RecipeError(explain(e, Budget, key)) from e
