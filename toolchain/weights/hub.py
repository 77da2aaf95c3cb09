"""Checkpoints on the Hugging Face hub: one revision, pinned, through the hub's own cache."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from pathlib import Path

from toolchain.errors import CheckpointError

_LOCATION = re.compile(r"hf://(?P<repo>[\w.-]+/[\w.-]+)(@(?P<revision>[\w.-]+))?(/(?P<folder>.+?))?/?")


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
            return Path(hf_hub_download(repo, name, revision=revision, subfolder=folder))
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
