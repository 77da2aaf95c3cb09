"""``python tests/fuzz/batch.py FOLDER EXAMPLES SEED``: changes files, reads each in a process with little memory.

Prints one JSON object: by reader, how many files were read, refused in one line, and what else happened, with one
file of each such kind kept beside FOLDER.
"""

from __future__ import annotations

import json
import os
import resource
import signal
import sys
import traceback
from collections import Counter
from pathlib import Path
from typing import Any

import hypothesis
import torch
from hypothesis import strategies as st
from mutations import mutated
from readers import Reader, readers

from toolchain.errors import SoraCompileError

SPARE_BYTES = 256 << 20
"""More than the process has: runtimes keep tables of their own, and a thread takes a stack."""
TIMES_SIZE = 64
SECONDS = 20
RUNS = {"os.system", "os.exec", "os.posix_spawn", "os.fork", "subprocess.Popen", "socket.connect"}


def main(root: Path, examples: int, seed: int) -> dict[str, dict[str, int]]:
    torch.set_num_threads(1)
    kept = root.with_name(f"{root.name}-found")
    return {name: fuzz(name, reader, examples, seed, kept) for name, reader in readers(root).items()}


def fuzz(name: str, reader: Reader, examples: int, seed: int, kept: Path) -> dict[str, int]:
    """Counts of how reading ended. The files as they are must be read, or its error is raised."""
    ends: Counter[str] = Counter()
    originals = {file: file.read_bytes() for file in reader.files}
    contents = {file: reader.content(file) for file in reader.files}
    reader.read()  # as it is, here, so that what it imports is there for all

    @hypothesis.seed(seed)
    @hypothesis.settings(
        max_examples=examples,
        deadline=None,
        database=None,
        phases=[hypothesis.Phase.generate],
        suppress_health_check=list(hypothesis.HealthCheck),
    )
    @hypothesis.given(st.data())
    def one(data: st.DataObject) -> None:
        file = data.draw(st.sampled_from(reader.files))
        changed = reader.whole(file, data.draw(mutated(contents[file])))
        replace(file, changed)
        end = read_apart(reader)
        replace(file, originals[file])
        if end not in ("read", "refused") and end not in ends:
            kept.mkdir(exist_ok=True)
            (kept / f"{name}-{len(ends)}-{file.name}").write_bytes(changed)
        ends[end] += 1

    one()
    return dict(sorted(ends.items()))


def replace(file: Path, data: bytes) -> None:
    """A new file: the old one may be a link to what others read."""
    file.unlink()
    file.write_bytes(data)


def read_apart(reader: Reader) -> str:
    """``read``, ``refused``, or what else happened, in a process of its own."""
    out, into = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.close(out)
        end = "died"
        try:
            end = read_here(reader)
        finally:
            os.write(into, end.encode()[:4000])
            os._exit(0)
    os.close(into)
    with os.fdopen(out, "rb") as pipe:
        end = pipe.read().decode()
    _, status = os.waitpid(pid, 0)
    return f"killed by {signal.Signals(os.WTERMSIG(status)).name}" if os.WIFSIGNALED(status) else end


def read_here(reader: Reader) -> str:
    ran: list[str] = []
    null = os.open(os.devnull, os.O_WRONLY)
    for stream in (1, 2):
        os.dup2(null, stream)
    sys.addaudithook(lambda event, _: ran.append(event) if event in RUNS else None)
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    signal.alarm(SECONDS)
    size = sum(f.stat().st_size for f in reader.files)
    held = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    most = held + SPARE_BYTES + TIMES_SIZE * size
    resource.setrlimit(resource.RLIMIT_AS, (most, most))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    try:
        reader.read()
        end = "read"
    except SoraCompileError as e:
        end = "refused" if str(e) and "\n" not in str(e) else f"refused in other than one line: {e!r}"
    except BaseException as e:
        where = traceback.extract_tb(e.__traceback__)[-1]
        end = f"{type(e).__name__} at {Path(where.filename).name}:{where.lineno}: {str(e)[:200]}"
    return f"ran code: {ran}" if ran else end


if __name__ == "__main__":
    found: Any = main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))
    print(json.dumps(found))
