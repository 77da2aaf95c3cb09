"""Device profiles: how much memory an app gets, how fast blocks load and compute. Data, each number with its source.

A number is ``{value: …, source: …}`` where something published or measured says it, or ``{value: …, estimate: true,
source: …}`` where it was estimated; ``source`` then says how.
"""

from __future__ import annotations

import difflib
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from toolchain.errors import RecipeError
from toolchain.formats.yaml_text import read_yaml
from toolchain.system.store import key_of
from toolchain.validation import explain


class _Entry(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class Figure(_Entry):
    """A number and where it is from."""

    value: float = Field(ge=0, description="In the unit that the key's name says.")
    source: str = Field(min_length=1, description="Who says so; of an estimate, how it was made.")
    estimate: bool = Field(default=False, description="Nobody published or measured it.")


class Throughput(_Entry):
    """What one engine of a device computes in one precision."""

    engine: str = Field(description="Such as gpu, neural-engine or cpu.")
    precision: str = Field(description="Such as float32, float16 or int8.")
    flops_per_s: Figure = Field(
        description="Floating-point operations per second; a multiplication and an addition are two."
    )


class Device(_Entry):
    """A profile. Bytes and seconds; a gigabyte is 1e9 bytes."""

    version: Literal[1] = 1
    name: str = Field(description="The device, for people.")
    memory_bytes: Figure = Field(description="What an app may use of memory, for weights and activations together.")
    load_bytes_per_s: Figure = Field(description="From storage until a block can run.")
    load_overhead_s: Figure = Field(description="Of every load, however small.")
    memory_bytes_per_s: Figure = Field(description="What computing reads from and writes to memory.")
    call_overhead_s: Figure = Field(description="Of every call, however small.")
    overlap_loss: Figure = Field(description="Share of hidden load time that is lost because both are slower, 0 … 1.")
    throughput: list[Throughput] = Field(min_length=1, description="By engine and precision; the fastest is taken.")

    @model_validator(mode="after")
    def _possible(self) -> Device:
        rates = {"load_bytes_per_s": self.load_bytes_per_s, "memory_bytes_per_s": self.memory_bytes_per_s}
        rates |= {f"throughput.{i}.flops_per_s": t.flops_per_s for i, t in enumerate(self.throughput)}
        if zero := next((name for name, figure in rates.items() if figure.value == 0), None):
            raise ValueError(f"{zero}: a rate of 0 would take forever")
        if self.overlap_loss.value > 1:
            raise ValueError(f"overlap_loss: {self.overlap_loss.value} is not within 0 … 1")
        return self

    @property
    def sha256(self) -> str:
        """Of what it says, however it is written."""
        return key_of(self.model_dump(mode="json"))

    def flops_per_s(self, precision: str, engine: str | None = None) -> float:
        """What computes fastest in a precision, or one engine's.

        Raises:
            RecipeError: the profile has none; names what it has.
        """
        own = [t for t in self.throughput if t.precision == precision and engine in (None, t.engine)]
        if not own:
            asked = f"{precision} on {engine}" if engine else precision
            known = ", ".join(f"{t.precision} on {t.engine}" for t in self.throughput)
            raise RecipeError(f"device '{self.name}' has no throughput for {asked}; it has {known}")
        return max(t.flops_per_s.value for t in own)


def shipped_devices() -> dict[str, Path]:
    """The profiles that come with this package, by name."""
    import recipes

    folder = Path(next(iter(recipes.__path__))) / "devices"
    return {p.stem: p for p in sorted(folder.glob("*.yaml"))}


UNSPECIFIED = "unspecified"
"""The profile for recipes that name no device: all of it is estimated."""


def find_device(name: str | Path, base: Path = Path()) -> Path:
    """The file of a profile: a path, looked for in ``base`` first, or a shipped one's name.

    Raises:
        RecipeError: there is none of that name, with those that are near.
    """
    path, known = base / name, shipped_devices()
    if not path.is_file():
        path = Path(name)
    if path.is_file():
        return path
    if str(name) in known:
        return known[str(name)]
    near = difflib.get_close_matches(str(name), known, n=3, cutoff=0.4)
    hint = f"near ones are {', '.join(near)}" if near else f"known ones are {', '.join(known)}"
    raise RecipeError(f"unknown device '{name}'; {hint}")


def load_device(name: str | Path, base: Path = Path()) -> Device:
    """A profile, found by :func:`find_device`.

    Raises:
        RecipeError: there is none; or the file is wrong, with the key.
    """
    path = find_device(name, base)
    data = read_yaml(path)
    try:
        return Device.model_validate(data)
    except ValidationError as e:
        raise RecipeError(f"{path}: {explain(e, Device)}") from e
