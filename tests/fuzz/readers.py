"""What is fuzzed: every reader of files that somebody else may have written, as toolchain and player call it."""

from __future__ import annotations

import io
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from toolchain.formats.bundle import load_bundle
from toolchain.formats.recipe_file import load_recipe
from toolchain.formats.tensors import read_tensors
from toolchain.player.opening import load_engine, target_of
from toolchain.player.tokenizer import T5Tokenizer
from toolchain.weights.checkpoint import open_checkpoint, read_config


@dataclass(frozen=True)
class Reader:
    """``files`` are changed, one at a time; ``read`` opens what they belong to."""

    files: tuple[Path, ...]
    read: Callable[[], object]
    content: Callable[[Path], bytes] = Path.read_bytes
    """What of a file is changed."""
    whole: Callable[[Path, bytes], bytes] = lambda _, data: data
    """The file with what was changed in it."""


def readers(root: Path) -> dict[str, Reader]:
    """Those whose files are in ``root``, by the names of these."""
    makers = {
        "recipe.yaml": lambda p: Reader((p,), lambda: load_recipe(p)),
        "model.safetensors": lambda p: Reader((p,), lambda: _checkpoint(p)),
        "tables.safetensors": lambda p: Reader((p,), lambda: read_tensors(p)),
        "model.pt": lambda p: Reader((p,), lambda: _checkpoint(p), _pickle, _with_pickle),
        "archive.pt": lambda p: Reader((p,), lambda: _checkpoint(p)),
        "config.json": lambda p: Reader((p,), lambda: read_config(p.parent)),
        "x.safetensors.index.json": lambda p: Reader((p,), lambda: _checkpoint(p)),
        "spiece.model": lambda p: Reader((p,), lambda: T5Tokenizer(p)("a red circle", 16)),
        "onnx": _engine,
        "executorch": _engine,
        "coreml": _engine,
    }
    return {name: make(root / name) for name, make in makers.items() if (root / name).exists()}


def _checkpoint(path: Path) -> None:
    checkpoint = open_checkpoint(path.name, path.parent)
    for name in checkpoint.infos():
        checkpoint.tensor(name).sum()


def _engine(path: Path) -> Reader:
    """The smallest block of a bundle, loaded as a player does."""
    bundle = load_bundle(path)
    component, own = next(iter(bundle.manifest.components.items()))
    block = min(own.blocks, key=lambda b: sum(f.bytes for f in b.files))
    target = target_of(bundle.manifest, component)
    files = tuple(path / f.path for f in block.files)
    return Reader(files, lambda: load_engine(bundle, component, block, own.default_function, target))


def _pickle(path: Path) -> bytes:
    with zipfile.ZipFile(path) as archive:
        return archive.read(next(n for n in archive.namelist() if n.endswith("data.pkl")))


def _with_pickle(path: Path, data: bytes) -> bytes:
    """The archive with another pickle in it, and checksums that agree: else most changes would be found by these."""
    file = io.BytesIO()
    with zipfile.ZipFile(path) as before, zipfile.ZipFile(file, "w") as after:
        for name in before.namelist():
            after.writestr(name, data if name.endswith("data.pkl") else before.read(name))
    return file.getvalue()
