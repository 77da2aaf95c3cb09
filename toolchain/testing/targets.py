"""Holding a target to its protocol, on the sample's blocks or on others.

from toolchain.testing.samples import sample_pairs
from toolchain.testing.targets import check_target

def test_my_target(tmp_path):
    target = MyTarget()
    report = check_target(target, sample_pairs(target), tmp_path, relative_error=1e-5)
    assert not report.skipped
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import get_args

import torch

from toolchain.accuracy.metrics import compare, scaled
from toolchain.errors import LoweringError
from toolchain.ir.blocks import Block, BlockPair
from toolchain.ir.dtypes import DType
from toolchain.ir.graph import compute_nodes, leaf_of
from toolchain.ir.graph_text import leaves_text
from toolchain.ir.leaves import Leaf, LegalForm, plain_attributes
from toolchain.ir.storage import Storage
from toolchain.ir.target import (
    Artifact,
    Engine,
    EngineUnavailableError,
    Target,
    UnsupportedStorageError,
    distinct_functions,
)
from toolchain.ir.uses import Use
from toolchain.testing.files import Ruined, content, difference, file_digest, ruined
from toolchain.testing.report import Report, require, require_refusal
from toolchain.testing.samples import Checkpoint, port_values
from toolchain.testing.stamping import check_stamping

__all__ = ["check_target"]

Pairs = Sequence[BlockPair | tuple[Block, Block]]


def check_target(
    target: Target, blocks: Pairs, folder: Path, *, relative_error: float, converters: Sequence[str] = ()
) -> Report:
    """Hold ``target`` to what a target promises, on each of ``blocks``. A crash of its runtime is not caught.

    Args:
        blocks: lowered and plain blocks, as :func:`toolchain.testing.samples.sample_pairs` gives them.
        folder: an empty one to work in.
        relative_error: most that results may be off, by the norm of a port's difference.
        converters: modules that importing and configuring the target must not import, in a process of its own.

    Returns:
        What was checked; ``skipped`` has what this machine or the target cannot do, with the reason.

    Raises:
        AssertionError: names the target, the block and what is broken.
    """
    pairs = [p if isinstance(p, BlockPair) else BlockPair(*p) for p in blocks]
    report = Report(f"target '{target.name}'")
    with report.part("options, storages and versions"):
        _check_settings(target, pairs)
    if converters:
        with report.part("imports no converter before it lowers"):
            _check_imports(target, converters)
    artifacts: list[Artifact] = []
    for pair in pairs:
        own = folder / pair.name
        own.mkdir()
        # that a stamped block equals the lowered one shows for each that lowering gives the same again; once is enough
        artifacts.append(_check_pair(target, pair, own, relative_error, report, twice=not artifacts))
    _check_others(target, pairs, artifacts, report)
    return report


def _check_settings(target: Target, pairs: Sequence[BlockPair]) -> None:
    config, cls = target.config, type(target.config)
    written = json.loads(json.dumps(config.model_dump(mode="json")))
    try:
        read = cls.model_validate(written)
    except ValueError as e:
        raise AssertionError(f"its options {written} are not read back: {e}") from e
    require(read == config, f"its options {config!r} are read back as {read!r}")
    require(type(target)(read).precision == target.precision, "another object of the same options differs in precision")
    require(_kept(target, target.storage), f"it refuses to keep a weight as {target.storage}, which is its own storage")
    versions = target.versions()
    texts = isinstance(versions, dict) and all(isinstance(x, str) for x in (*versions, *versions.values()))
    require(texts and versions, f"versions() gives {versions!r}; needed is a dict of texts that is not empty")
    require(target.versions() == versions, "versions() differ from call to call")
    for pair in pairs:
        for name, weight in pair.lowered.weights.items():
            said = f"weight '{name}' of block '{pair.name}' is kept as {weight.storage}, which it refuses or changes"
            require(_kept(target, weight.storage), said)
        for port in (*pair.lowered.inputs, *pair.lowered.outputs):
            require(isinstance(target.port_dtype(port), DType), f"port_dtype of '{port.name}' is no DType")
            if port.exact and port.dtype.is_floating_point:
                require(target.port_dtype(port).name == "float32", f"'{port.name}' is exact and not float32")


def _kept(target: Target, storage: Storage) -> bool:
    """Whether a target keeps something in ``storage``, as it is."""
    for use in get_args(Use):
        try:
            if target.keep(storage, use) == storage:
                return True
        except UnsupportedStorageError as e:
            require("it takes" in str(e), f"it refuses {storage} with '{e}', which does not say what it takes")
    return False


def _check_imports(target: Target, converters: Sequence[str]) -> None:
    module, name = type(target).__module__, type(target).__qualname__
    code = f"import sys, json\nfrom {module} import {name} as T\nt = T()\nt.storage, t.forms\n"
    code += f"print(json.dumps([m for m in {list(converters)!r} if m in sys.modules]))"
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env)
    require(done.returncode == 0, f"cannot be imported in a process of its own: {done.stderr[-300:]}")
    found = json.loads(done.stdout.splitlines()[-1])
    require(not found, f"importing it imports {', '.join(found)}")


def _check_pair(target: Target, pair: BlockPair, folder: Path, limit: float, report: Report, twice: bool) -> Artifact:
    block, where = pair.lowered, f"block '{pair.name}': "
    checkpoint = Checkpoint(pair.plain.weights)
    weights = checkpoint.values(block.weights)
    with report.part(f"{where}legal forms"):
        _check_forms(target.forms, pair)
        _check_legal(pair, checkpoint, limit)
    with report.part(f"{where}lowering"):
        artifact = _lower(target, block, weights, folder / "lowered")
        if twice:
            again = _lower(target, block, weights, folder / "again")
            said = difference(artifact.path, again.path)
            require(not said, f"lowered twice with the same weights, {said}")
    engine = _engine(target, artifact, block, f"{where}numbers", report)
    if engine is not None:
        with report.part(f"{where}numbers"):
            written = content(artifact.path)
            _check_numbers(engine, pair, artifact.functions, checkpoint, limit)
            require(content(artifact.path) == written, "running it changed the artifact")
    check_stamping(target, pair, folder, checkpoint, artifact, report)
    with report.part(f"{where}damaged artifacts are refused"):
        for damaged in ruined(artifact.path, folder / "damaged"):
            _check_refused(target, block, damaged)
    return artifact


def _lower(target: Target, block: Block, weights: Mapping[str, torch.Tensor], folder: Path) -> Artifact:
    folder.mkdir()
    out = folder / f"artifact{target.suffix}"
    before = {name: weight.clone() for name, weight in weights.items()}
    artifact = target.lower(block, weights, out)
    require(artifact.path == out and out.exists(), f"lower says that it wrote '{artifact.path}'; asked for was '{out}'")
    beside = [p.name for p in folder.iterdir() if p != out]
    require(not beside, f"lower wrote {beside} beside '{out.name}'")
    wanted = distinct_functions(block)
    require(set(artifact.functions) == set(wanted), f"the artifact has {artifact.functions}; needed are {wanted}")
    for name, weight in before.items():
        require(torch.equal(weight, weights[name]), f"lower changed weight '{name}'")
    for path, digest in artifact.digests.items():
        require(file_digest(path) == digest, f"the digest of '{path.name}' is not that of the file")
    written = content(out)
    target.check(out, block)
    require(content(out) == written, "check changed the artifact")
    return artifact


# --- legal forms -------------------------------------------------------------------------------------


def _check_forms(forms: Sequence[LegalForm], pair: BlockPair) -> None:
    for gm in pair.plain.functions.values():
        for node in compute_nodes(gm):
            leaf = leaf_of(gm, node)
            for form in forms if leaf is not None else ():
                leaf = _legal(form, leaf, str(node.target)) if leaf is not None and leaf.is_a(form.of) else leaf
    for gm in pair.lowered.functions.values():
        leaves_text(gm)  # which needs every function on a leaf to have a name
    pair.lowered.structure()


def _legal(form: LegalForm, leaf: Leaf, path: str) -> Leaf:
    where = f"legal form '{form.name}' of '{path}' ({leaf.kind or type(leaf).__name__})"
    before = plain_attributes(leaf), dict(leaf.named_modules())
    made = form.make(leaf)
    require(made is not None, f"{where}: has no answer, though it is for '{form.of}'")
    assert made is not None
    after = plain_attributes(leaf), dict(leaf.named_modules())
    require(after == before, f"{where}: changed the leaf itself; use Leaf.changed")
    again = form.make(made.leaf) if made.leaf.is_a(form.of) else made
    require(again is not None, f"{where}: has no answer for the leaf that it made; what is legal is its own answer")
    return made.leaf


def _check_legal(pair: BlockPair, checkpoint: Checkpoint, limit: float) -> None:
    """The lowered block computes what the plain one does, before any converter has seen it."""
    lowered = checkpoint.values(pair.lowered.weights)
    for function in pair.plain.functions:
        inputs, wanted = _eager(pair.plain, function, checkpoint.values(pair.plain.weights), 1)
        ports = pair.lowered.inputs, pair.lowered.outputs
        with torch.no_grad():
            found = pair.lowered.module(function, lowered)(*scaled(inputs, ports[0]).values())
        results = dict(zip([p.name for p in ports[1]], found, strict=True))
        _require_near(f"function '{function}' in legal forms", results, scaled(wanted, ports[1]), limit)


# --- numbers -----------------------------------------------------------------------------------------

Values = dict[str, torch.Tensor]


def _eager(block: Block, function: str, weights: Mapping[str, torch.Tensor], seed: int) -> tuple[Values, Values]:
    inputs = port_values(block, function, seed)
    with torch.no_grad():
        results = block.module(function, weights)(*inputs.values())
    return inputs, dict(zip([p.name for p in block.outputs], results, strict=True))


def _require_near(
    what: str, found: Mapping[str, torch.Tensor], wanted: Mapping[str, torch.Tensor], limit: float
) -> None:
    require(set(found) == set(wanted), f"{what} gives {sorted(found)}; needed are {sorted(wanted)}")
    for port, value in wanted.items():
        require(
            found[port].shape == value.shape, f"{what}: '{port}' is {list(found[port].shape)}, not {list(value.shape)}"
        )
        off = compare({port: found[port]}, {port: value}, limit).relative_error
        require(off <= limit, f"{what}: '{port}' is off by a relative error of {off:.3g}, allowed is {limit:.3g}")


def _engine(target: Target, artifact: Artifact, block: Block, what: str, report: Report) -> Engine | None:
    try:
        return target.engine(artifact.path, block.inputs, block.outputs)
    except EngineUnavailableError as e:
        report.skip(what, e)
        return None


def _check_numbers(
    engine: Engine, pair: BlockPair, functions: Sequence[str], checkpoint: Checkpoint, limit: float
) -> None:
    kept = checkpoint.values(pair.plain.weights, as_stored=True)
    ports = pair.lowered.inputs, pair.lowered.outputs
    for function in functions:
        first: Values = {}
        copies: Values = {}
        for seed in (1, 2):
            inputs, wanted = _eager(pair.plain, function, kept, seed)
            found = engine(function, scaled(inputs, ports[0]))
            _require_near(f"function '{function}'", found, scaled(wanted, ports[1]), limit)
            if seed == 1:
                first, copies = found, {k: v.clone() for k, v in found.items()}
        for port, value in first.items():
            same = torch.equal(value, copies[port])
            require(same, f"function '{function}': another call changed '{port}', which an earlier one gave")


# --- what must be refused ----------------------------------------------------------------------------


def _check_refused(target: Target, block: Block, damaged: Ruined) -> None:
    """``check`` or the engine refuses a damaged artifact with an error of ours."""
    try:
        target.check(damaged.path, block)
        engine = target.engine(damaged.path, block.inputs, block.outputs)
        for function in distinct_functions(block):
            engine(function, scaled(port_values(block, function), block.inputs))
    except LoweringError as e:
        require_refusal(e)
        return
    except EngineUnavailableError:
        raise AssertionError(f"{damaged.what}: check takes it") from None
    except Exception as e:
        said = " ".join(str(e).split())[:200]
        raise AssertionError(f"{damaged.what}: fails with {type(e).__name__} ({said}) instead of LoweringError") from e
    raise AssertionError(f"{damaged.what}: neither check nor the engine refuses it")


def _check_others(target: Target, pairs: Sequence[BlockPair], artifacts: Sequence[Artifact], report: Report) -> None:
    """``check`` refuses an artifact of another block."""
    what = "another block's artifact is refused"
    for pair, artifact in zip(pairs, artifacts, strict=True):
        for other in pairs:
            if other.lowered.signatures == pair.lowered.signatures:
                continue
            with report.part(what):
                try:
                    target.check(artifact.path, other.lowered)
                except LoweringError as e:
                    require_refusal(e)
                else:
                    raise AssertionError(f"check takes the artifact of '{pair.name}' for one of '{other.name}'")
    if what not in report.checked:
        report.skip(what, "no two blocks differ in their ports")
