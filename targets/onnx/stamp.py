"""Replacing the weights of a lowered block: its models stay, its file of weights is written anew."""

from __future__ import annotations

import functools
import mmap
import shutil
from collections.abc import Mapping
from pathlib import Path

import onnx
import torch

from targets.onnx import weights as store
from targets.stamping import Stretch, copy_with, cut, raw
from toolchain.ir.target import Artifact, Template, UnboundTemplateError


def bind(artifact: Artifact, weights: Mapping[str, torch.Tensor]) -> Template:
    """Hold the models' references and the stored bytes against ``weights``; where these lie, names decide."""
    slots = store.layout({name: tuple(w.shape) for name, w in weights.items()})
    for function in artifact.functions:
        model = onnx.load(str(artifact.path / f"{function}.onnx"), load_external_data=False)
        for tensor in store.foreign(model, slots):
            raise UnboundTemplateError(f"'{function}.onnx' looks for weight '{tensor}' in another place")
    path = artifact.path / store.FILE
    if path.stat().st_size != store.total_bytes(slots):
        raise UnboundTemplateError(f"'{store.FILE}' has another size than the weights")
    if slots:
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as stored:
            for slot in slots.values():
                if stored[slot.offset : slot.offset + slot.size] != raw(weights[slot.weight]):
                    raise UnboundTemplateError(f"weight '{slot.weight}' is not where '{store.FILE}' should have it")
    cut(path, [(slot.offset, slot.size) for slot in slots.values()])
    return Template(artifact, [{"weight": s.weight, "offset": s.offset, "size": s.size} for s in slots.values()])


def stamp(template: Template, weights: Mapping[str, torch.Tensor], out: Path) -> Artifact:
    """Copy the models, and the file of weights with each weight's bytes replaced, one after the other."""
    source = template.artifact.path
    out.mkdir()
    for function in template.artifact.functions:
        shutil.copyfile(source / f"{function}.onnx", out / f"{function}.onnx")
    stretches = [
        Stretch(s["offset"], s["size"], s["weight"], torch.float32, functools.partial(weights.__getitem__, s["weight"]))
        for s in template.slots
    ]
    digest = copy_with(source / store.FILE, out / store.FILE, stretches)
    return Artifact(out, template.artifact.functions, {out / store.FILE: digest})
