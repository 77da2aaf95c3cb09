"""A checkpoint with LoRA adapters merged into it, tensor by tensor, as it is read.

Nothing is written: another adapter costs a stamp, no second checkpoint. LoRA: arXiv 2106.09685, equation 3, with the
scale alpha / rank; rank-stabilised: arXiv 2312.03732.
"""

from __future__ import annotations

import functools
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from toolchain.errors import CheckpointError
from toolchain.system.store import key_of
from toolchain.validation import explain
from toolchain.weights.adapter_names import AdapterLayer, adapter_layers
from toolchain.weights.checkpoint import HUB, Checkpoint, TensorInfo, find_checkpoint, read_json

if TYPE_CHECKING:
    import torch

CONFIG_FILE, SUFFIX = "adapter_config.json", ".safetensors"
FILE_NAMES = ("adapter_model.safetensors", "pytorch_lora_weights.safetensors", "adapter_model.bin")


class _Config(BaseModel):
    """What decides an adapter's numbers in PEFT's ``adapter_config.json``; its other keys are of training."""

    model_config = ConfigDict(extra="ignore", frozen=True)

    lora_alpha: float | None = Field(default=None, allow_inf_nan=False)
    alpha_pattern: dict[str, float] = {}
    use_rslora: bool = False
    use_dora: bool = False
    fan_in_fan_out: bool = False

    def alpha(self, module: str) -> float | None:
        """Alpha of a module: that of the name in ``alpha_pattern`` that its own ends with, or else the common one."""
        named = (alpha for end, alpha in self.alpha_pattern.items() if f".{module}".endswith(f".{end}"))
        return next(named, self.lora_alpha)


@dataclass(frozen=True)
class Adapter:
    """An adapter on disk and how much of it is added."""

    source: Checkpoint
    weight: float

    @functools.cached_property
    def config(self) -> _Config:
        """What stands in its ``adapter_config.json``; without one, alpha is what the tensors say, or else the rank.

        Raises:
            CheckpointError: it is damaged, or of an adapter that adds more than a product of two matrices.
        """
        path = self.source.beside(CONFIG_FILE)
        if path is None:
            return _Config()
        try:
            config = _Config.model_validate(read_json(path))
        except ValidationError as e:
            raise CheckpointError(f"'{path}' is not an adapter's configuration: {explain(e, _Config)}") from e
        for name in config.alpha_pattern:
            if not re.fullmatch(r"[\w.-]+", name):
                raise CheckpointError(f"'{path}': alpha_pattern '{name}' is not a module's name; write the names out")
        for key in ("use_dora", "fan_in_fan_out"):
            if getattr(config, key):
                raise CheckpointError(f"'{path}': adapters with {key} are not merged here; save the merged model")
        return config

    def layers(self, names: Sequence[str], weights: Sequence[str]) -> dict[str, AdapterLayer]:
        """Its layers by the weight that each changes. Raises as :func:`adapter_layers`."""
        return adapter_layers(names, weights, self.source.location)

    def change(self, layer: AdapterLayer, shape: tuple[int, ...]) -> torch.Tensor:
        """What is added to the weight of a layer, float32, of the weight's shape ``[out, in, ...]``.

        Raises:
            CheckpointError: the layer's matrices are of other shapes.
        """
        down, up = self.source.tensor(layer.down).float(), self.source.tensor(layer.up).float()
        rank = down.shape[0] if down.ndim else 0
        fits = rank > 0 and up.ndim > 1 and down.numel() * shape[0] == rank * math.prod(shape)
        if not fits or up.shape[:2] != (shape[0], rank) or up.numel() != shape[0] * rank:
            raise CheckpointError(
                f"adapter '{self.source.location}': '{layer.up}' {list(up.shape)} and '{layer.down}' "
                f"{list(down.shape)} do not make the {list(shape)} of '{layer.module}.weight'"
            )
        return (up.reshape(shape[0], rank) @ down.reshape(rank, -1)).reshape(shape) * self._scale(layer, rank)

    def _scale(self, layer: AdapterLayer, rank: int) -> float:
        if layer.alpha is not None:
            stored = self.source.tensor(layer.alpha)
            if stored.numel() != 1:
                raise CheckpointError(f"adapter '{self.source.location}': '{layer.alpha}' is not one number")
            return self.weight * float(stored) / rank
        alpha = self.config.alpha(layer.module)
        if alpha is None:
            return self.weight
        return self.weight * alpha / (math.sqrt(rank) if self.config.use_rslora else rank)

    def describe(self) -> dict[str, Any]:
        """What decides its numbers besides its tensors, as plain data."""
        return {"weight": self.weight, **self.config.model_dump()}


class AdaptedCheckpoint(Checkpoint):
    """A checkpoint and the adapters that are added to it, in their order. Changed weights are float32."""

    def __init__(self, base: Checkpoint, adapters: Sequence[Adapter]) -> None:
        super().__init__(base.location, base.root)
        self.find, self.chosen = base.find, base.chosen
        self.base, self.adapters = base, tuple(adapters)

    @functools.cached_property
    def _changes(self) -> dict[str, list[tuple[Adapter, AdapterLayer]]]:
        names = list(self.base.infos())
        found: dict[str, list[tuple[Adapter, AdapterLayer]]] = {}
        for adapter in self.adapters:
            for weight, layer in adapter.layers(list(adapter.source.infos()), names).items():
                found.setdefault(weight, []).append((adapter, layer))
        return found

    def infos(self) -> Mapping[str, TensorInfo]:
        import torch

        return {
            name: TensorInfo(info.shape, torch.float32) if name in self._changes else info
            for name, info in self.base.infos().items()
        }

    def tensor(self, name: str) -> torch.Tensor:
        tensor = self.base.tensor(name)
        for adapter, layer in self._changes.get(name, ()):
            tensor = tensor.float() + adapter.change(layer, tuple(tensor.shape))
        return tensor

    def files(self) -> tuple[Path, ...]:
        return self.base.files()

    def file_of(self, name: str) -> Path:
        return self.base.file_of(name)

    def wrapper(self) -> str:
        return self.base.wrapper()

    def layers(self) -> tuple[Checkpoint, ...]:
        return (self.base, *(a.source for a in self.adapters))

    def combined(self, digests: Sequence[Mapping[str, str]]) -> dict[str, str]:
        merged = dict(digests[0])
        for adapter, own in zip(self.adapters, digests[1:], strict=True):
            for weight, layer in adapter.layers(list(own), list(merged)).items():
                parts = [merged[weight], *(own[t] for t in layer.tensors)]
                merged[weight] = key_of({"adapted": parts, **adapter.describe()})
        return merged


def find_adapter(location: str, weight: float, base: Path) -> Adapter:
    """An adapter at a location as of a checkpoint; on the hub also ``hf://owner/name/FILE.safetensors``.

    Raises:
        CheckpointError: nothing is there, or it cannot be fetched.
    """
    folder, _, file = location.rpartition("/")
    if location.startswith(HUB) and file.endswith(SUFFIX):
        source = find_checkpoint(folder, base, (file,), (file,))
        source.location += f"/{file}"
    else:
        source = find_checkpoint(location, base, FILE_NAMES, (CONFIG_FILE, *FILE_NAMES))
    return Adapter(source, weight)


def find_adapted(location: str, adapters: Sequence[tuple[str, float]], base: Path) -> Checkpoint:
    """A checkpoint with adapters, as (location, weight), merged into it; the checkpoint itself if there are none.

    Raises:
        CheckpointError: as :func:`find_checkpoint`, also of an adapter.
    """
    checkpoint = find_checkpoint(location, base)
    if not adapters:
        return checkpoint
    return AdaptedCheckpoint(checkpoint, [find_adapter(where, weight, base) for where, weight in adapters])
