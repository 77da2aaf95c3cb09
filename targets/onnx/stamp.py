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
from targets.onnx.packing import packed
from targets.onnx.storages import Form, Spec
from targets.stamping import Stretch, copy_with, cut, raw
from toolchain.ir.stored import MARK
from toolchain.ir.target import Artifact, Template, UnboundTemplateError


def bind(artifact: Artifact, weights: Mapping[str, torch.Tensor]) -> Template:
    """Hold the models' references and the stored bytes against ``weights``; where these lie, names decide."""
    models = {f: onnx.load(str(artifact.path / f"{f}.onnx"), load_external_data=False) for f in artifact.functions}
    specs = _specs(models, weights)
    slots = store.layout(specs)
    for function, model in models.items():
        for tensor in store.foreign(model, slots):
            raise UnboundTemplateError(f"'{function}.onnx' looks for weight '{tensor}' in another place")
    path = artifact.path / store.FILE
    if path.stat().st_size != store.total_bytes(slots):
        raise UnboundTemplateError(f"'{store.FILE}' has another size than the weights")
    if slots:
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as stored:
            for slot in slots.values():
                expected = raw(packed(weights[slot.weight], slot.spec.form))
                if stored[slot.offset : slot.offset + slot.size] != expected:
                    raise UnboundTemplateError(f"weight '{slot.weight}' is not where '{store.FILE}' should have it")
    cut(path, [(slot.offset, slot.size) for slot in slots.values()])
    entries = [{"weight": s.weight, "offset": s.offset, "size": s.size, "form": s.spec.form} for s in slots.values()]
    return Template(artifact, entries)


def _specs(models: Mapping[str, onnx.ModelProto], weights: Mapping[str, torch.Tensor]) -> dict[str, Spec]:
    """What models say of the parts, and of plain weights that none of them uses, what these are."""
    found = {key: spec for model in models.values() for key, spec in store.declared(model)}
    for key in weights.keys() - found.keys():
        if MARK in key:
            raise UnboundTemplateError(f"no model looks for '{key}'")
        found[key] = Spec("float32", tuple(weights[key].shape))
    for key in found.keys() - weights.keys():
        raise UnboundTemplateError(f"a model looks for '{key}', which is no weight's")
    return found


def stamp(template: Template, weights: Mapping[str, torch.Tensor], out: Path) -> Artifact:
    """Copy the models, and the file of weights with each part's bytes replaced, one after the other."""
    source = template.artifact.path
    out.mkdir()
    for function in template.artifact.functions:
        shutil.copyfile(source / f"{function}.onnx", out / f"{function}.onnx")

    def read(key: str, form: Form) -> torch.Tensor:
        return packed(weights[key], form)

    stretches = [
        Stretch(
            s["offset"], s["size"], s["weight"], store.dtype(s["form"]), functools.partial(read, s["weight"], s["form"])
        )
        for s in template.slots
    ]
    digest = copy_with(source / store.FILE, out / store.FILE, stretches)
    return Artifact(out, template.artifact.functions, {out / store.FILE: digest})
