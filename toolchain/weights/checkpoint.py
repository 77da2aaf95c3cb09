"""Checkpoints as published: tensors by official name, read lazily.

A location is a path (file or folder), ``hf://owner/name[@revision][/folder]``, or ``shipped://name`` for
the small checkpoints that come with this package.
"""

from __future__ import annotations

import abc
import contextlib
import functools
import json
import pickle
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError, safe_open

from toolchain.errors import CheckpointError
from toolchain.ir.dtypes import BY_SAFETENSORS

if TYPE_CHECKING:
    import torch

INDEX_NAMES = (
    "model.safetensors.index.json",
    "diffusion_pytorch_model.safetensors.index.json",
    "pytorch_model.bin.index.json",
)
FILE_NAMES = ("model.safetensors", "diffusion_pytorch_model.safetensors", "pytorch_model.bin")
TORCH_SUFFIXES = (".pt", ".pth", ".bin", ".ckpt")
WRAPPERS = ("state_dict", "model", "module", "ema")
SHOWN = 8


@dataclass(frozen=True)
class TensorInfo:
    shape: tuple[int, ...]
    dtype: torch.dtype


class Checkpoint(abc.ABC):
    """Named tensors on disk. ``location`` is how a recipe would name them, with a revision if remote.

    Nothing is read, and torch is not imported, before what the files hold is asked for.
    """

    def __init__(self, location: str, root: Path) -> None:
        self.location = location
        self.root = root
        self.find: Callable[[str], Path | None] | None = None
        """Fetches a file of a remote repository by name; None for local checkpoints."""

    @abc.abstractmethod
    def infos(self) -> Mapping[str, TensorInfo]:
        """Shape and dtype of every tensor, without reading any.

        Raises:
            CheckpointError: a file is damaged, or holds something else than tensors of known types.
        """

    @abc.abstractmethod
    def tensor(self, name: str) -> torch.Tensor:
        """One tensor, read now."""

    @abc.abstractmethod
    def files(self) -> tuple[Path, ...]:
        """The files that hold the tensors, sorted."""

    @abc.abstractmethod
    def file_of(self, name: str) -> Path:
        """The file that holds a tensor."""

    def beside(self, name: str) -> Path | None:
        """A file that lies beside the weights, fetched if need be; None if there is no such file."""
        path = self.find(name) if self.find is not None else self.root / name
        return path if path is not None and path.is_file() else None


def read_config(root: Path) -> dict[str, Any] | None:
    """The ``config.json`` in ``root``, or None.

    Raises:
        CheckpointError: it is not a JSON object.
    """
    path = root / "config.json"
    if not path.is_file():
        return None
    config = _read_json(path)
    if not isinstance(config, dict):
        raise CheckpointError(f"'{path}' is not a JSON object; expected the model's configuration")
    return config


class SafetensorsCheckpoint(Checkpoint):
    """One or several safetensors files."""

    def __init__(self, location: str, root: Path, shards: tuple[Path, ...]) -> None:
        super().__init__(location, root)
        self._shards = tuple(sorted(shards))

    @functools.cached_property
    def _headers(self) -> dict[str, tuple[Path, TensorInfo]]:
        found = {}
        for shard in self._shards:
            with _opened(shard) as f:
                for name in f.keys():  # noqa: SIM118 - not a dict
                    part = f.get_slice(name)
                    dtype = part.get_dtype()
                    if dtype not in BY_SAFETENSORS:
                        known = ", ".join(BY_SAFETENSORS)
                        raise CheckpointError(f"'{shard}': tensor '{name}' is of type {dtype}; known are {known}")
                    found[name] = shard, TensorInfo(tuple(part.get_shape()), BY_SAFETENSORS[dtype].torch)
        return found

    def infos(self) -> Mapping[str, TensorInfo]:
        return {name: info for name, (_, info) in self._headers.items()}

    def tensor(self, name: str) -> torch.Tensor:
        with _opened(self.file_of(name)) as f:
            tensor: torch.Tensor = f.get_tensor(name)
        return tensor

    def files(self) -> tuple[Path, ...]:
        return self._shards

    def file_of(self, name: str) -> Path:
        return self._headers[name][0]


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[Any]:
    try:
        with safe_open(path, framework="pt") as f:
            yield f
    except SafetensorError as e:
        raise CheckpointError(f"'{path}' is truncated or not a safetensors file ({e}); fetch it again") from e
    except OSError as e:
        raise CheckpointError(f"cannot read '{path}': {e.strerror or e}") from e


class TorchCheckpoint(Checkpoint):
    """Files of ``torch.save``, loaded with ``weights_only``: no code of theirs is run."""

    def __init__(self, location: str, root: Path, shards: tuple[Path, ...]) -> None:
        super().__init__(location, root)
        self._shards = tuple(sorted(shards))

    @functools.cached_property
    def _held(self) -> dict[str, tuple[Path, torch.Tensor]]:
        return {name: (shard, tensor) for shard in self._shards for name, tensor in _load_torch(shard).items()}

    def infos(self) -> Mapping[str, TensorInfo]:
        return {k: TensorInfo(tuple(t.shape), t.dtype) for k, (_, t) in self._held.items()}

    def tensor(self, name: str) -> torch.Tensor:
        return self._held[name][1]  # memory-mapped: read when used

    def files(self) -> tuple[Path, ...]:
        return self._shards

    def file_of(self, name: str) -> Path:
        return self._held[name][0]


def _load_torch(path: Path) -> dict[str, torch.Tensor]:
    import torch

    def load(mmap: bool) -> Any:
        return torch.load(path, map_location="cpu", weights_only=True, mmap=mmap)

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                data = load(mmap=True)
            except RuntimeError:  # files of torch < 1.6 cannot be mapped
                data = load(mmap=False)
    except pickle.UnpicklingError as e:
        raise CheckpointError(f"'{path}' holds more than weights; refused, since loading it would run its code") from e
    except Exception as e:  # noise makes the unpickler raise nearly anything
        raise CheckpointError(f"'{path}' is truncated or not a file of torch.save; fetch it again") from e
    for wrapper in WRAPPERS:
        if isinstance(data, dict) and isinstance(data.get(wrapper), dict):
            data = data[wrapper]
            break
    if not isinstance(data, dict) or not all(
        isinstance(k, str) and isinstance(v, torch.Tensor) for k, v in data.items()
    ):
        raise CheckpointError(f"'{path}' is not a state_dict (names to tensors); save model.state_dict()")
    return data


def open_checkpoint(location: str, base: Path) -> Checkpoint:
    """Open a checkpoint. Relative paths are looked for beside the recipe (``base``), then here.

    Raises:
        CheckpointError: nothing is there, it cannot be fetched, or it cannot be read.
    """
    checkpoint = find_checkpoint(location, base)
    checkpoint.infos()
    return checkpoint


def find_checkpoint(location: str, base: Path) -> Checkpoint:
    """As :func:`open_checkpoint`, without reading the files of weights: what is wrong in them is said at first use.

    Raises:
        CheckpointError: nothing is there, or it cannot be fetched.
    """
    if location.startswith("hf://"):
        from toolchain.weights.hub import fetch

        pinned, root, fetcher = fetch(location)
        checkpoint = _open_folder(pinned, root, fetcher)
        checkpoint.find = fetcher
        return checkpoint
    path = local_path(location, base)
    if path.is_dir():
        return _open_folder(location, path, lambda name: path / name if (path / name).is_file() else None)
    if path.name.endswith(".index.json"):
        return _open_index(location, path, lambda name: path.parent / name)
    return _open_files(location, path.parent, (path,))


def local_path(location: str, base: Path) -> Path:
    """The file or folder that a location without ``hf://`` names.

    Raises:
        CheckpointError: nothing is there.
    """
    if location.startswith("shipped://"):
        import recipes

        path = Path(next(iter(recipes.__path__))) / location.removeprefix("shipped://")
        candidates = [path]
    else:
        candidates = [base / Path(location).expanduser(), Path(location).expanduser()]
    for path in candidates:
        if path.exists():
            return path
    looked = " or ".join(f"'{p}'" for p in dict.fromkeys(c.absolute() for c in candidates))
    raise CheckpointError(f"checkpoint '{location}' does not exist: looked for {looked}")


def _open_folder(location: str, root: Path, find: Callable[[str], Path | None]) -> Checkpoint:
    for name in INDEX_NAMES:
        if (index := find(name)) is not None:
            return _open_index(location, index, find)
    for name in FILE_NAMES:
        if (file := find(name)) is not None:
            return _open_files(location, file.parent, (file,))
    others = sorted(root.glob("*.safetensors")) if root.is_dir() else []
    if len(others) == 1:
        return _open_files(location, root, (others[0],))
    found = _some(sorted(p.name for p in root.iterdir())) if root.is_dir() else ""
    expected = f"{', '.join(FILE_NAMES)} or an index"
    raise CheckpointError(f"no weights in '{location}': expected {expected}; it holds {found or 'nothing'}")


def _open_index(location: str, index: Path, find: Callable[[str], Path | None]) -> Checkpoint:
    data = _read_json(index)
    weight_map = data.get("weight_map") if isinstance(data, dict) else None
    if not isinstance(weight_map, dict) or not weight_map or not all(isinstance(v, str) for v in weight_map.values()):
        raise CheckpointError(f"'{index}' is not an index of shards: it has no weight_map")
    shards = {name: find(name) for name in sorted(set(weight_map.values()))}
    missing = [n for n, p in shards.items() if p is None or not p.is_file()]
    if missing:
        raise CheckpointError(f"'{index}' names shards that are not there: {_some(missing)}")
    return _open_files(location, index.parent, tuple(p for p in shards.values() if p is not None))


def _open_files(location: str, root: Path, files: tuple[Path, ...]) -> Checkpoint:
    if all(f.suffix == ".safetensors" for f in files):
        return SafetensorsCheckpoint(location, root, files)
    if all(f.suffix in TORCH_SUFFIXES for f in files):
        return TorchCheckpoint(location, root, files)
    raise CheckpointError(
        f"'{files[0]}': expected a file of type .safetensors, {', '.join(TORCH_SUFFIXES)} or .index.json"
    )


def _read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as e:
        raise CheckpointError(f"cannot read '{path}' as JSON: {e}") from e


def match(
    checkpoint: Checkpoint,
    expected: Mapping[str, tuple[int, ...]],
    component: str,
    aliases: Mapping[str, str] | None = None,
) -> None:
    """Hold a checkpoint's keys and shapes against the model's.

    ``aliases`` are other names of expected tensors: a checkpoint may hold either or both.

    Raises:
        CheckpointError: lists missing, unexpected and misshapen keys, all in one line.
    """
    infos = dict(checkpoint.infos())
    for name, other in (aliases or {}).items():
        if other in infos:
            infos.setdefault(name, infos.pop(other))
            infos.pop(other, None)
    missing = sorted(expected.keys() - infos.keys())
    extra = sorted(infos.keys() - expected.keys())
    misshapen = [
        f"{k} is {list(infos[k].shape)}, expected {list(expected[k])}"
        for k in sorted(expected.keys() & infos.keys())
        if infos[k].shape != expected[k]
    ]
    problems = [
        f"{len(names)} {kind} ({_some(names)})"
        for kind, names in (("missing", missing), ("unexpected", extra), ("of the wrong shape", misshapen))
        if names
    ]
    if problems:
        hint = (
            "it is of another model or size"
            if len(missing) + len(misshapen) > len(expected) // 2
            else "check its config"
        )
        raise CheckpointError(
            f"checkpoint '{checkpoint.location}' does not fit {component}: {'; '.join(problems)}; {hint}"
        )


def _some(names: list[str]) -> str:
    more = len(names) - SHOWN
    return ", ".join(names[:SHOWN]) + (f", and {more} more" if more > 0 else "")
