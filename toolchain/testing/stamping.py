"""The part of a target's check that is about templates: cutting weights out, and stamping others in."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch

from toolchain.errors import LoweringError
from toolchain.ir.blocks import Block, BlockPair
from toolchain.ir.dtypes import FLOAT16_MAX
from toolchain.ir.stored import StoredParts
from toolchain.ir.target import Artifact, Target, Template, UnboundTemplateError, unique_weights
from toolchain.testing.files import content, difference, file_digest
from toolchain.testing.report import Report, require, require_refusal
from toolchain.testing.samples import Checkpoint

SEEDS = (0, 1, 2)
"""Random weights that happen to be found elsewhere in an artifact are drawn again, as a build does."""
LEAST_BYTES = 16
"""Shorter runs of bytes are found by chance."""


class _OneByOne(Mapping[str, torch.Tensor]):
    """Weights that are made anew whenever they are asked for, as a build reads them."""

    def __init__(self, weights: Mapping[str, torch.Tensor], dtype: torch.dtype = torch.float32) -> None:
        self._weights, self._dtype = weights, dtype

    def __getitem__(self, name: str) -> torch.Tensor:
        return self._weights[name].to(self._dtype, copy=True)

    def __iter__(self) -> Iterator[str]:
        return iter(self._weights)

    def __len__(self) -> int:
        return len(self._weights)


def check_stamping(
    target: Target, pair: BlockPair, folder: Path, checkpoint: Checkpoint, lowered: Artifact, report: Report
) -> None:
    """Hold templates of a block to what is promised of them.

    Args:
        lowered: the block with the checkpoint's weights.

    Raises:
        AssertionError: says what is broken.
    """
    block, where = pair.lowered, f"block '{pair.name}': "
    parts = ("template", "stamping", "bad weights are refused")
    try:
        with report.part(where + parts[0]):
            template = _template(target, block, folder)
    except AssertionError as e:
        if not isinstance(e.__cause__, UnboundTemplateError):
            raise
        for part in parts:
            report.skip(where + part, f"its weights cannot all be found: {e.__cause__}")
        return
    with report.part(where + parts[1]):
        _check_stamped(target, block, folder, template, checkpoint.values(block.weights), lowered)
    with report.part(where + parts[2]):
        _check_bad(target, block, folder, template, checkpoint.values(block.weights))


def _template(target: Target, block: Block, folder: Path) -> Template:
    """A template, moved elsewhere and with its slots read back from JSON, as the store keeps it."""
    for seed in SEEDS:
        try:
            template, constants = _bound(target, block, folder / f"template_{seed}", seed)
            if constants:
                _, others = _bound(target, block, folder / f"twin_{seed}", seed + len(SEEDS))
                if others != constants:
                    raise UnboundTemplateError("a constant depends on the weights")
        except UnboundTemplateError:
            if seed == SEEDS[-1]:
                raise
        else:
            return template
    raise AssertionError("no seeds")


def _bound(target: Target, block: Block, folder: Path, seed: int) -> tuple[Template, object]:
    folder.mkdir()
    weights = unique_weights(block, seed)
    artifact = target.lower(block, weights, folder / f"artifact{target.suffix}")
    template = target.bind(artifact, StoredParts(block.weights, weights))
    slots = json.loads(json.dumps(template.slots))
    require(slots == template.slots, "its slots are not plain data: JSON gives others back")
    _check_no_weights(template.artifact.path, block, weights)
    moved = folder.with_name(f"{folder.name}_moved")
    folder.rename(moved)
    kept = Artifact(moved / template.artifact.path.name, template.artifact.functions)
    return Template(kept, slots), template.constants


def _check_no_weights(path: Path, block: Block, weights: Mapping[str, torch.Tensor]) -> None:
    files = content(path)
    for name, weight in weights.items():
        encoded = block.weights[name].storage.encode(weight)
        for tensor in (weight, *encoded.values()):
            data = tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
            for file, held in files.items() if len(data) >= LEAST_BYTES else ():
                begin = data[: 4 * LEAST_BYTES]
                require(begin not in held, f"weight '{name}' is still in the template's '{file or path.name}'")


def _stamp(target: Target, template: Template, weights: Mapping[str, torch.Tensor], folder: Path) -> Artifact:
    folder.mkdir()
    return target.stamp(template, weights, folder / f"artifact{target.suffix}")


def _check_stamped(
    target: Target,
    block: Block,
    folder: Path,
    template: Template,
    weights: Mapping[str, torch.Tensor],
    lowered: Artifact,
) -> None:
    before = content(template.artifact.path)
    one = _stamp(target, template, _OneByOne(weights), folder / "stamped")
    other = _stamp(target, template, weights, folder / "stamped_again")
    require(content(template.artifact.path) == before, "stamp changed the template")
    for what, artifact in (("stamped with what lower was given", lowered), ("stamped twice", other)):
        said = difference(artifact.path, one.path)
        require(not said, f"{what}, {said}")
    require(tuple(one.functions) == tuple(lowered.functions), f"stamped, it has the functions {one.functions}")
    for path, digest in one.digests.items():
        require(file_digest(path) == digest, f"the digest of '{path.name}' is not that of the file")
    target.check(one.path, block)
    half = {name: weight.to(torch.bfloat16) for name, weight in weights.items()}
    narrow = _stamp(target, template, half, folder / "stamped_narrow")
    wide = _stamp(target, template, _OneByOne(half), folder / "stamped_wide")
    said = difference(wide.path, narrow.path)
    require(not said, f"stamped with the same numbers as bfloat16 and as float32, {said}")


def _check_bad(
    target: Target, block: Block, folder: Path, template: Template, weights: Mapping[str, torch.Tensor]
) -> None:
    bad = {"NaN": float("nan"), "infinity": float("inf"), "minus infinity": float("-inf")}
    for name in weights:
        kinds = dict(bad)
        if block.weights[name].storage.name == "float16":
            kinds["a number too large for float16"] = 2 * FLOAT16_MAX
        for what, value in kinds.items():
            spoilt = weights[name].clone()
            spoilt.reshape(-1)[-1] = value
            out = folder / f"bad_{what.replace(' ', '_')}_{name.replace('.', '_')}"
            try:
                _stamp(target, template, {**weights, name: spoilt}, out)
            except LoweringError as e:
                require_refusal(e, name)
            except Exception as e:
                raise AssertionError(f"{what} in '{name}': stamp fails with {type(e).__name__} ({e})") from e
            else:
                raise AssertionError(f"{what} in '{name}': stamp takes it")
