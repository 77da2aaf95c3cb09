"""What quantized weights cost in quality on the shipped miniature model, target by target.

    python benchmarks/quantized_quality.py [--prompts 40] [--targets executorch,onnx,coreml] [--decoded] [--sheet FILE]

Compiles the shipped recipe once for every setting, which says how weights are kept, and plays the prompts and seeds of
``benchmarks/quality.py``, in full: 30 steps, unless a row says otherwise. What a video shows is read off its frames;
PSNR and SSIM are against the video of ExecuTorch in float32, and ``worst`` is the least PSNR of all prompts.
Nothing is gated, so settings are built that a gate would refuse. With ``--decoded``, the weights that a target stores
are decoded into checkpoints, and ExecuTorch plays these in float32: it shows the weights alone, in a fraction of the
time that Core ML's programs take on this machine.
"""

from __future__ import annotations

import argparse
import shutil
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

sys.path.insert(0, str(Path(__file__).parents[1]))

import toolchain
from benchmarks.quality import (
    COLUMNS,
    SETTINGS,
    SHEET_PROMPT,
    Denoised,
    Setting,
    Video,
    decode,
    denoise,
    figures,
    player,
    prompts,
)
from benchmarks.sheet import contact_sheet
from toolchain.formats.recipe_file import find_recipe
from toolchain.formats.schedule import StaticLeap
from toolchain.ir.stored import decoding_reader
from toolchain.planning.candidates import with_rules
from toolchain.planning.plan import plan_resolved
from toolchain.planning.resolve import resolve
from toolchain.player.video import to_bytes
from toolchain.weights.block_weights import reader

REFERENCE = "float32"
"""Of ExecuTorch: what all videos are held against."""
UNGATED = ("gate.golden=null", "gate.mode=none")
"""What lets everything through that can be lowered: errors are a video's, here."""
LEAP = Setting("leap after 15", leap=StaticLeap(after=15))
TABLE = {"match": "embed.*", "scheme": "float"}
"""ExecuTorch keeps the table of tokens in float32 alone."""
Rules = Mapping[str, Any]


@dataclass(frozen=True)
class Kept:
    """How weights are kept, by component, and the schedule that the videos are made by."""

    rules: Mapping[str, Rules] = field(default_factory=dict)
    schedule: Setting = SETTINGS[0]


def both(scheme: Rules, schedule: Setting = SETTINGS[0], **more: Rules) -> Kept:
    """Text encoder and transformer in one scheme."""
    return Kept({"text_encoder": scheme, "transformer": scheme, **more}, schedule)


INT8: Rules = {"scheme": "int8"}
INT4: Rules = {"scheme": "int4", "block": 32}
CLIPPED: Rules = INT4 | {"symmetric": False, "clip": "error"}
PALETTES: dict[str, Kept] = {
    f"{bits}-bit palettes": both({"scheme": "palette", "bits": bits}) for bits in (8, 6, 4, 3, 2)
}
VAE: dict[str, Kept] = {"VAE int8": Kept({"vae": INT8}), "VAE too: all int8": both(INT8, vae=INT8)}
TARGETS: dict[str, dict[str, Kept]] = {
    "executorch": {
        REFERENCE: Kept(),
        "int8": both(INT8),
        "int4": both(INT4),
        "int4, clipped": both(INT4 | {"clip": "error"}),
        "int8, leap after 15": both(INT8, LEAP),
        "int4, leap after 15": both(INT4, LEAP),
    },
    "onnx": {
        "float32": Kept(),
        "int8": both(INT8),
        "int4": both(INT4),
        "int4, asymmetric, clipped": both(CLIPPED),
        "int8, leap after 15": both(INT8, LEAP),
        "int4, leap after 15": both(INT4, LEAP),
        **VAE,
    },
    "coreml": {
        "float16": Kept(),
        "int8": both(INT8),
        "int4": both(INT4),
        "int4, asymmetric, clipped": both(CLIPPED),
        **PALETTES,
        **VAE,
        "VAE 6-bit palettes": Kept({"vae": {"scheme": "palette", "bits": 6}}),
        "VAE 4-bit palettes": Kept({"vae": {"scheme": "palette", "bits": 4}}),
    },
}
NAMES = {"executorch": "ExecuTorch", "onnx": "ONNX", "coreml": "Core ML"}
SHOWN = {"psnr": "{:.1f}", "worst": "{:.1f}"}
"""Columns of this table that the other has not, or not so, put before the rest."""


def recipe(target: str, kept: Kept) -> toolchain.Recipe:
    """The shipped recipe with a setting's rules."""
    rules = {name: dict(given) for name, given in kept.rules.items()}
    if target == "executorch" and "text_encoder" in rules:
        rules["text_encoder"] = rules["text_encoder"] | {"rules": [TABLE]}
    return with_rules(toolchain.load_recipe("tiny", [f"target={target}", *UNGATED]), dict(rules))


def decoded(target: str, kept: Kept, folder: Path) -> toolchain.Recipe:
    """A recipe in float32, with checkpoints in ``folder`` that hold what a target's stored weights stand for."""
    shipped = find_recipe("tiny").parent
    planned = plan_resolved(resolve(recipe(target, kept), shipped, checkpoints=True))
    for name in kept.rules:
        part = planned.components[name]
        stored = {f"{pair.name}.{n}": w for pair in part.pairs for n, w in pair.lowered.weights.items()}
        read = decoding_reader(stored, reader(part.resolved.checkpoint, part.definition.aliases))
        shutil.copytree(shipped / "tiny" / name, folder / name)
        tensors = {n: read(n).float().contiguous().clone() for n in part.definition.expected}
        save_file(tensors, folder / name / "model.safetensors")
    own = [f"{name}.checkpoint={folder / name}" for name in kept.rules]
    return toolchain.load_recipe("tiny", ["target=executorch", *UNGATED, *own])


class Maker:
    """Plays the first prompts under a setting. Settings that differ in the VAE alone share their latents."""

    def __init__(self, count: int, decoded: bool) -> None:
        self.scenes = prompts(count)
        self._decoded = decoded
        self._latents: dict[str, list[Denoised]] = {}

    def videos(self, target: str, kept: Kept) -> list[Video]:
        """The setting's videos, prompt by prompt."""
        with tempfile.TemporaryDirectory() as tmp:
            built = decoded(target, kept, Path(tmp)) if self._decoded else recipe(target, kept)
            one = player(toolchain.compile_recipe(built, Path(tmp) / "bundle"), kept.schedule)
            before = {name: rule for name, rule in kept.rules.items() if name != "vae"}
            key = f"{target} {before} {kept.schedule}"
            if key not in self._latents:
                self._latents[key] = [denoise(one, scene, seed) for seed, scene in enumerate(self.scenes)]
            return [decode(one, latents) for latents in self._latents[key]]


def megabytes(target: str, kept: Kept) -> float:
    """All weights as artifacts keep them."""
    return sum(part.weight_bytes for part in toolchain.plan(recipe(target, kept)).components.values()) / 1e6


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompts", type=int, default=40)
    parser.add_argument("--targets", default=",".join(TARGETS), help="targets, parted by commas")
    parser.add_argument("--decoded", action="store_true", help="play the decoded weights in float32 on ExecuTorch")
    parser.add_argument("--sheet", type=Path, help="write the contact sheet here")
    args = parser.parse_args()
    if args.sheet and args.prompts <= SHEET_PROMPT:
        parser.error(f"--sheet shows prompt {SHEET_PROMPT + 1}; ask for as many --prompts")
    maker = Maker(args.prompts, args.decoded)
    columns = SHOWN | {k: v for k, v in COLUMNS.items() if k not in SHOWN}
    reference = maker.videos("executorch", TARGETS["executorch"][REFERENCE])
    pictures: dict[str, torch.Tensor] = {}
    print(f"| target | weights | MB | {' | '.join(columns)} |")
    print("|" + "---|" * (len(columns) + 3))
    for target in args.targets.split(","):
        for name, kept in TARGETS[target].items():
            videos = maker.videos(target, kept)
            found = figures(videos, maker.scenes, reference)
            numbers = " | ".join(form.format(found[column]) for column, form in columns.items())
            print(f"| {NAMES[target]} | {name} | {megabytes(target, kept):.2f} | {numbers} |", flush=True)
            if args.sheet:
                pictures[f"{NAMES[target]}, {name}"] = to_bytes(videos[SHEET_PROMPT].frames)
    if args.sheet:
        contact_sheet(pictures, args.sheet)


if __name__ == "__main__":
    main()
