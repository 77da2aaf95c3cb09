"""Checkpoints on the Hugging Face hub: one revision, pinned, through the hub's own cache."""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from toolchain.errors import CheckpointError

_LOCATION = re.compile(r"hf://(?P<repo>[\w.-]+/[\w.-]+)(@(?P<revision>[\w.-]+))?(/(?P<folder>.+?))?/?")
OFFLINE_VARIABLE = "HF_HUB_OFFLINE"
"""What the hub's own library goes by, and processes that this one starts."""


@contextlib.contextmanager
def offline() -> Iterator[None]:
    """Nothing is fetched in the body, nor by processes started in it: what is not in the hub's cache is not there."""
    before = os.environ.get(OFFLINE_VARIABLE)
    os.environ[OFFLINE_VARIABLE] = "1"
    try:
        yield
    finally:
        if before is None:
            del os.environ[OFFLINE_VARIABLE]
        else:
            os.environ[OFFLINE_VARIABLE] = before


def is_offline() -> bool:
    """Whether only the hub's cache is to be looked at, as its own library reads the variable."""
    return os.environ.get(OFFLINE_VARIABLE, "").upper() in ("1", "ON", "YES", "TRUE")


def fetch(location: str, probes: Sequence[str] = ("config.json",)) -> tuple[str, Path, Callable[[str], Path | None]]:
    """Resolve ``hf://owner/name[@revision][/folder]``.

    Args:
        probes: files of which one has to be there; the first that is, says which revision it is.

    Returns:
        The location with its revision pinned to a commit, the folder in the local cache, and a function
        that fetches a file of it by name (None when the repository has no such file).

    Raises:
        CheckpointError: the location is malformed, or the repository or revision cannot be had.
    """
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError, LocalEntryNotFoundError

    found = _LOCATION.fullmatch(location)
    if found is None:
        raise CheckpointError(f"'{location}': expected hf://owner/name, hf://owner/name@revision or …/folder")
    repo, revision, folder = found["repo"], found["revision"], found["folder"]

    def download(name: str) -> Path | None:
        try:
            return Path(hf_hub_download(repo, name, revision=revision, subfolder=folder, local_files_only=is_offline()))
        except LocalEntryNotFoundError:  # no network, and the file is not in the cache
            return None
        except EntryNotFoundError:
            return None
        except (HfHubHTTPError, OSError, ValueError) as e:
            raise CheckpointError(f"cannot fetch '{location}': {str(e).strip().splitlines()[0]}") from e

    found_file = next((path for path in map(download, probes) if path is not None), None)
    if found_file is None:
        raise CheckpointError(
            f"cannot fetch '{location}': no {' or '.join(probes)} there, or no network and nothing in the cache"
        )
    commit = found_file.parts[found_file.parts.index("snapshots") + 1]
    pinned = f"hf://{repo}@{commit}" + (f"/{folder}" if folder else "")
    revision = commit
    return pinned, found_file.parent, download
