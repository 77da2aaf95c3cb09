"""Which weights the tensors of a LoRA adapter belong to, from their names alone.

Two styles are read. PEFT and diffusers: ``[base_model.model.]MODULE.lora_A[.ADAPTER].weight`` with ``lora_B``, and
``MODULE.lora.down.weight`` with ``lora.up``. kohya: ``lora_PREFIX_MODULE.lora_down.weight`` with ``lora_up`` and
``alpha``, where dots of the module's name have become underscores.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from toolchain.errors import CheckpointError

_ROLES = {"lora_A": "down", "lora.down": "down", "lora_down": "down", "lora_B": "up", "lora.up": "up", "lora_up": "up"}
_NAME = re.compile(
    r"(?P<module>.+)\.(?:(?P<role>lora_[AB]|lora\.down|lora\.up|lora_down|lora_up)(?:\.[^.]+)?\.weight|(?P<alpha>alpha))"
)
_WRAPPING = re.compile(r"(base_model|model|module|_orig_mod|transformer|unet|text_encoder|vae|diffusion_model)\.(.+)")
"""What trainers put before a module's name."""
_FLAT = re.compile(r"lora_[a-z0-9]+_(.+)")
"""A flattened name behind what kohya's trainers put before it, such as ``lora_unet_``."""


@dataclass(frozen=True)
class AdapterLayer:
    """The tensors of an adapter that change one weight, by name: ``up @ down`` is added to it."""

    module: str
    """The module's name in the checkpoint."""
    down: str
    up: str
    alpha: str | None
    """The tensor that says alpha, where one does."""

    @property
    def tensors(self) -> tuple[str, ...]:
        return (self.down, self.up) if self.alpha is None else (self.down, self.up, self.alpha)


def adapter_layers(names: Iterable[str], weights: Iterable[str], location: str) -> dict[str, AdapterLayer]:
    """The layers of an adapter with tensors ``names``, by the weight of the checkpoint that each changes.

    Args:
        weights: names of the checkpoint's tensors.
        location: of the adapter, for errors.

    Raises:
        CheckpointError: a tensor is of no style that is known, belongs to no weight, or lacks the others of its layer.
    """
    modules = {name.removesuffix(".weight") for name in weights if name.endswith(".weight")}
    flat: dict[str, list[str]] = {}
    for module in sorted(modules):
        flat.setdefault(module.replace(".", "_"), []).append(module)
    parts: dict[str, dict[str, str]] = {}
    for name in sorted(names):
        found = _NAME.fullmatch(name)
        if found is None:
            raise CheckpointError(
                f"adapter '{location}': tensor '{name}' is not of a LoRA (lora_A and lora_B, or lora_down, lora_up "
                "and alpha); of other adapters, of DoRA, biases and retrained modules save the merged model"
            )
        module = _module(found["module"], modules, flat, f"adapter '{location}': tensor '{name}'")
        role = "alpha" if found["alpha"] else _ROLES[found["role"]]
        other = parts.setdefault(module, {}).setdefault(role, name)
        if other != name:
            raise CheckpointError(
                f"adapter '{location}': '{other}' and '{name}' are both for '{module}.weight'; save one adapter a file"
            )
    if not parts:
        raise CheckpointError(f"adapter '{location}' holds no tensors")
    for module, roles in parts.items():
        for role in ("down", "up"):
            if role not in roles:
                raise CheckpointError(f"adapter '{location}': '{module}' has no {role} matrix; the file is not whole")
    return {
        f"{module}.weight": AdapterLayer(module, roles["down"], roles["up"], roles.get("alpha"))
        for module, roles in parts.items()
    }


def _module(name: str, modules: set[str], flat: Mapping[str, list[str]], what: str) -> str:
    """The checkpoint's module that an adapter calls ``name``."""
    dotted: str | None = name
    while dotted is not None:
        if dotted in modules:
            return dotted
        inner = _WRAPPING.fullmatch(dotted)
        dotted = inner[2] if inner else None
    underscored = _FLAT.fullmatch(name)
    for candidate in (name.removeprefix("lora_"), underscored[1] if underscored else ""):
        found = flat.get(candidate, [])
        if len(found) > 1:
            raise CheckpointError(f"{what} could be of {' or '.join(found)}; save it with dotted names")
        if found:
            return found[0]
    raise CheckpointError(f"{what} belongs to no weight of the checkpoint; is the adapter of another component?")
