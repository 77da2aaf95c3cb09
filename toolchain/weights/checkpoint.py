"""Checkpoints as published: tensors by official name, read lazily.

A location is a path (file or folder), ``hf://owner/name[@revision][/folder]``, or ``shipped://name`` for
the small checkpoints that come with this package. ``#KEY`` behind it chooses one of several state_dicts in a file of
``torch.save``, as in ``last.ckpt#ema``. A prefix that all names have (:data:`PREFIXES`) is left out of them.
"""

from __future__ import annotations

import abc
import contextlib
import functools
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
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
HUB, SHIPPED = "hf://", "shipped://"
NOT_LOCAL = (HUB, SHIPPED)
"""What locations that are not paths begin with."""
PREFIXES = ("module.", "model.", "_orig_mod.")
"""What wrappers (data parallel, trainers, ``torch.compile``) put before every name."""
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
        self.chosen = ""
        """Which of several state_dicts in its files it is, by its key; empty where nothing was chosen."""

    def layers(self) -> tuple[Checkpoint, ...]:
        """The checkpoints on disk that it is made of; itself alone if it is one."""
        return (self,)

    def combined(self, digests: Sequence[Mapping[str, str]]) -> dict[str, str]:
        """Digests of its tensors from those of its layers' tensors, in the order of :meth:`layers`.

        Raises:
            CheckpointError: its layers do not fit each other.
        """
        (own,) = digests
        return dict(own)

    def wrapper(self) -> str:
        """What stands before all of its names in the files, and is left out of them here."""
        return ""

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
    config = read_json(path)
    if not isinstance(config, dict):
        raise CheckpointError(f"'{path}' is not a JSON object; expected the model's configuration")
    return config


class FileCheckpoint(Checkpoint):
    """One or several files of one kind."""

    def __init__(self, location: str, root: Path, shards: tuple[Path, ...]) -> None:
        super().__init__(location, root)
        self._shards = tuple(sorted(shards))

    @abc.abstractmethod
    def read_headers(self) -> dict[str, tuple[Path, TensorInfo]]:
        """Every tensor's file, shape and type, by its name there. Raises as :meth:`infos`."""

    @functools.cached_property
    def _headers(self) -> dict[str, tuple[Path, TensorInfo]]:
        return self.read_headers()

    @functools.cached_property
    def _wrapper(self) -> str:
        return shared_prefix(self._headers)

    def wrapper(self) -> str:
        return self._wrapper

    def infos(self) -> Mapping[str, TensorInfo]:
        return {name.removeprefix(self._wrapper): info for name, (_, info) in self._headers.items()}

    def files(self) -> tuple[Path, ...]:
        return self._shards

    def file_of(self, name: str) -> Path:
        return self._headers[self._wrapper + name][0]


class SafetensorsCheckpoint(FileCheckpoint):
    """Safetensors files."""

    def read_headers(self) -> dict[str, tuple[Path, TensorInfo]]:
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

    def tensor(self, name: str) -> torch.Tensor:
        with _opened(self.file_of(name)) as f:
            tensor: torch.Tensor = f.get_tensor(self.wrapper() + name)
        return tensor


def shared_prefix(names: Iterable[str]) -> str:
    """What wrappers put before every one of ``names``; empty if one of them has it not."""
    names, prefix = list(names), ""
    while names:
        more = next((p for p in PREFIXES if all(n.startswith(prefix + p) for n in names)), None)
        if more is None:
            break
        prefix += more
    return prefix


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[Any]:
    try:
        with safe_open(path, framework="pt") as f:
            yield f
    except SafetensorError as e:
        raise CheckpointError(f"'{path}' is truncated or not a safetensors file ({e}); fetch it again") from e
    except OSError as e:
        raise CheckpointError(f"cannot read '{path}': {e.strerror or e}") from e


def open_checkpoint(location: str, base: Path) -> Checkpoint:
    """Open a checkpoint. Relative paths are looked for beside the recipe (``base``), then here.

    Raises:
        CheckpointError: nothing is there, it cannot be fetched, or it cannot be read.
    """
    checkpoint = find_checkpoint(location, base)
    checkpoint.infos()
    return checkpoint


def find_checkpoint(
    location: str, base: Path, names: Sequence[str] = FILE_NAMES, probes: Sequence[str] = ("config.json",)
) -> Checkpoint:
    """As :func:`open_checkpoint`, without reading the files of weights: what is wrong in them is said at first use.

    Args:
        names: what the file of weights may be called in a folder; the first that is there is taken.
        probes: files of which a repository on the hub has one.

    Raises:
        CheckpointError: nothing is there, or it cannot be fetched.
    """
    if location.startswith(HUB):
        from toolchain.weights.hub import fetch

        where, chosen = split_choice(location)
        pinned, root, fetcher = fetch(where, probes)
        checkpoint = _open_folder(pinned, root, fetcher, names)
        checkpoint.find = fetcher
    else:
        path, chosen = _local(location, base)
        if path.is_dir():
            find = lambda name: path / name if (path / name).is_file() else None  # noqa: E731
            checkpoint = _open_folder(location, path, find, names)
        elif path.name.endswith(".index.json"):
            checkpoint = _open_index(location, path, lambda name: path.parent / name)
        else:
            checkpoint = _open_files(location, path.parent, (path,))
    if chosen:
        if isinstance(checkpoint, SafetensorsCheckpoint):
            raise CheckpointError(
                f"'{location}': only files of torch.save hold several state_dicts; remove '#{chosen}'"
            )
        checkpoint.chosen = chosen
        checkpoint.location = f"{split_choice(checkpoint.location)[0]}#{chosen}"
    return checkpoint


def split_choice(location: str) -> tuple[str, str]:
    """A location and the key behind its ``#``, empty if there is none."""
    where, _, chosen = location.rpartition("#")
    return (where, chosen) if where else (location, "")


def is_checkpoint(what: str) -> bool:
    """Whether ``what``, which a user wants to see, names a checkpoint: a file, a folder with weights, a remote one."""
    if what.startswith(NOT_LOCAL):
        return True
    try:
        path, _ = _local(what, Path())
    except CheckpointError:
        return False
    listed = (*INDEX_NAMES, *FILE_NAMES)
    return path.is_file() or any((path / n).is_file() for n in listed) or len(list(path.glob("*.safetensors"))) == 1


def local_path(location: str, base: Path) -> Path:
    """The file or folder that a location without ``hf://`` names.

    Raises:
        CheckpointError: nothing is there.
    """
    return _local(location, base)[0]


def absolute_location(location: str, base: Path) -> str:
    """The same location for whoever has another working folder; those that are not paths stay as they are.

    Raises:
        CheckpointError: nothing is there.
    """
    if location.startswith(NOT_LOCAL):
        return location
    path, chosen = _local(location, base)
    return str(path.absolute()) + (f"#{chosen}" if chosen else "")


def _local(location: str, base: Path) -> tuple[Path, str]:
    """The path, and the key of the state_dict that is chosen in it. A path that exists with its ``#`` is a path."""
    where, chosen = split_choice(location)
    try:
        return _existing(location, location, base), ""
    except CheckpointError:
        if not chosen:
            raise
        return _existing(where, location, base), chosen


def _existing(where: str, location: str, base: Path) -> Path:
    if where.startswith(SHIPPED):
        import recipes

        path = Path(next(iter(recipes.__path__))) / where.removeprefix(SHIPPED)
        candidates = [path]
    else:
        candidates = [base / Path(where).expanduser(), Path(where).expanduser()]
    for path in candidates:
        if path.exists():
            return path
    looked = " or ".join(f"'{p}'" for p in dict.fromkeys(c.absolute() for c in candidates))
    raise CheckpointError(f"checkpoint '{location}' does not exist: looked for {looked}")


def _open_folder(location: str, root: Path, find: Callable[[str], Path | None], names: Sequence[str]) -> Checkpoint:
    for name in INDEX_NAMES if names is FILE_NAMES else ():
        if (index := find(name)) is not None:
            return _open_index(location, index, find)
    for name in names:
        if (file := find(name)) is not None:
            return _open_files(location, file.parent, (file,))
    others = sorted(root.glob("*.safetensors")) if root.is_dir() else []
    if len(others) == 1:
        return _open_files(location, root, (others[0],))
    found = _some(sorted(p.name for p in root.iterdir())) if root.is_dir() else ""
    expected = f"{', '.join(names)}{' or an index' if names is FILE_NAMES else ''}"
    raise CheckpointError(f"no weights in '{location}': expected {expected}; it holds {found or 'nothing'}")


def _open_index(location: str, index: Path, find: Callable[[str], Path | None]) -> Checkpoint:
    data = read_json(index)
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
        from toolchain.weights.torch_file import TorchCheckpoint

        return TorchCheckpoint(location, root, files)
    raise CheckpointError(
        f"'{files[0]}': expected a file of type .safetensors, {', '.join(TORCH_SUFFIXES)} or .index.json"
    )


def read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as e:
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
