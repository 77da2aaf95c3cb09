"""Calibrations: how long a device really takes to load each structure of a bundle, and to run each of its functions.

``sora-compile calibrate`` writes such a file on this machine; an app can write the same on a phone. The format is
described in docs/planning.md.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from toolchain.errors import RecipeError
from toolchain.formats.loading import Seconds, Times
from toolchain.formats.yaml_text import read_yaml
from toolchain.system.store import key_of
from toolchain.validation import explain

Digest = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]


class _Entry(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class MeasuredStructure(_Entry):
    """Of one structure: blocks that differ in their weights alone take as long as one another."""

    load_s: Seconds = Field(description="From storage until it can run, all overhead included, while nothing runs.")
    run_s: dict[str, Seconds] = Field(min_length=1, description="A call of each function, while nothing loads.")


class MeasuredTimes(_Entry):
    """A calibration. ``structures`` are by the digest that a manifest's blocks have as ``structure``."""

    version: Literal[1] = 1
    machine: str = Field(min_length=1, description="What it was measured on, for people.")
    bundle: str = Field(description="Name of the bundle that it was measured with, for people.")
    overlap_loss: float = Field(ge=0, le=1, description="Share of hidden load time that is lost.")
    structures: dict[Digest, MeasuredStructure] = Field(min_length=1)

    @property
    def sha256(self) -> str:
        """Of what it says, however it is written."""
        return key_of(self.model_dump(mode="json"))

    def to_yaml(self) -> str:
        """As a file."""
        text: str = yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False, allow_unicode=True, width=100)
        return text


@dataclass(frozen=True)
class TimesFile:
    """A calibration, and the file that it is from."""

    times: MeasuredTimes
    path: str

    @property
    def source(self) -> Times:
        """What a manifest says of it."""
        return Times(kind="calibration", name=self.times.machine, sha256=self.times.sha256)


def load_times(path: Path) -> TimesFile:
    """Read a calibration, JSON or YAML.

    Raises:
        RecipeError: it cannot be read, or is none; names the file and the key.
    """
    where = f"--calibration {path}"
    data = read_yaml(path, where)
    try:
        return TimesFile(MeasuredTimes.model_validate(data), str(path))
    except ValidationError as e:
        raise RecipeError(f"{where}: {explain(e, MeasuredTimes)}") from e
