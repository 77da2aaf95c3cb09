"""Builds that are killed, starved, damaged and crowded, at the transformer's full width.

    python benchmarks/hardship.py [--target coreml] [--kills 20] [--disk 100MB]

A build that nothing disturbs comes first. Then, each with an empty cache:

- killed (kill -9) at a random moment of its time, and run again: 20 times;
- two builds at once into one cache;
- a bit flipped in every file of the cache;
- on a disk with 100 MB left: it must say so in one line, and go on when the disk has grown (needs Linux's user
  namespaces).

Every bundle must have the bytes of the first, and nothing may be left behind. The first failure ends the script.
"""

from __future__ import annotations

import argparse
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import yaml
from compile import recipe, synthetic

from toolchain.system.store import Store, digest

SMALL_DISK = 'mount -t tmpfs -o size="$1" small disk && shift && exec "$@"'
GROW = "mount -o remount,size=4g disk"


def contents(bundle: Path) -> dict[str, str]:
    return {str(p.relative_to(bundle)): digest(p) for p in sorted(bundle.rglob("*")) if p.is_file()}


class Trials:
    """Runs builds of one recipe, and holds what they make against an undisturbed one."""

    def __init__(self, folder: Path, gate: str) -> None:
        self.folder = folder
        self.command = [sys.executable, "-m", "toolchain.cli", str(folder / "recipe.yaml"), "--gate", gate, "-o"]
        began = time.perf_counter()
        self.finish(folder / "cache", folder / "whole")
        self.seconds = time.perf_counter() - began
        self.expected = contents(folder / "whole")
        print(f"undisturbed: {self.seconds:.0f} s", flush=True)

    def start(self, cache: Path, out: Path) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [*self.command, str(out)],
            env={**os.environ, "SORA_COMPILE_CACHE": str(cache)},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )

    def finish(self, cache: Path, out: Path) -> None:
        process = self.start(cache, out)
        _, said = process.communicate()
        if process.returncode:
            raise SystemExit(f"a build ended with {process.returncode}: {said}")

    def hold(self, what: str, cache: Path, *bundles: Path) -> None:
        for bundle in bundles:
            if contents(bundle) != self.expected:
                raise SystemExit(f"{what}: other bytes in '{bundle}'")
        left = [*(cache / "scratch").iterdir(), *self.folder.glob(".*partial*")]
        if left:
            raise SystemExit(f"{what}: left behind: {left}")
        print(f"{what}: the same bytes, nothing left behind", flush=True)
        for folder in (cache, *bundles):
            shutil.rmtree(folder)

    def killed(self, moment: float) -> None:
        cache, out = self.folder / "killed-cache", self.folder / "killed"
        process = self.start(cache, out)
        time.sleep(moment)
        early = process.poll() is None
        if early:
            os.killpg(process.pid, signal.SIGKILL)
            process.communicate()
        self.finish(cache, out)
        self.hold(f"killed after {moment:.1f} s{'' if early else ' (it had ended)'}", cache, out)

    def crowded(self) -> None:
        cache, outs = self.folder / "shared-cache", [self.folder / "one", self.folder / "two"]
        for process in [self.start(cache, out) for out in outs]:
            _, said = process.communicate()
            if process.returncode:
                raise SystemExit(f"one of two builds ended with {process.returncode}: {said}")
        self.hold("two builds into one cache", cache, *outs)

    def damaged(self, seed: int) -> None:
        cache, out = self.folder / "damaged-cache", self.folder / "damaged"
        shutil.copytree(self.folder / "cache", cache)
        random_ = random.Random(seed)
        for entry in Store(cache).entries():
            for file in entry.files:
                with (entry.data / file.path).open("r+b") as f:
                    at = random_.randrange(file.bytes)
                    f.seek(at)
                    byte = f.read(1)[0]
                    f.seek(at)
                    f.write(bytes([byte ^ 1 << random_.randrange(8)]))
        self.finish(cache, out)
        self.hold("a bit flipped in every file of the cache", cache, out)

    def starved(self, room: str) -> None:
        """The disk is a memory file system of a process that waits between the two builds."""
        (self.folder / "disk").mkdir()
        cache = self.folder / "starved-cache"
        build = [*self.command, str(self.folder / "disk/bundle")]
        script = f'"$@"; echo "ended with $?"; {GROW} && "$@" && cp -r disk/bundle starved && cp -r disk/cache {cache}'
        alone = ["unshare", "--user", "--map-root-user", "--mount", "sh", "-c", SMALL_DISK, "sh", room]
        ran = subprocess.run(
            [*alone, "sh", "-c", script, "sh", *build],
            cwd=self.folder,
            env={**os.environ, "SORA_COMPILE_CACHE": str(self.folder / "disk/cache")},
            capture_output=True,
            text=True,
        )
        if ran.returncode or "ended with 6" not in ran.stdout or "the disk is full" not in ran.stderr:
            raise SystemExit(f"a small disk: {ran.stdout}{ran.stderr}")
        print(f"said: {ran.stderr.splitlines()[0]}")
        self.hold(f"a disk with {room} left", cache, self.folder / "starved")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--target", default="coreml")
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--pairs", type=int, default=2)
    parser.add_argument("--disk", default="100m", help="as mount's option size has it")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--gate", default="structure")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as tmp:
        folder = Path(tmp)
        synthetic("transformer", folder / "checkpoint/transformer", args.seed, "float32", [f"depth={args.pairs}"])
        (folder / "recipe.yaml").write_text(
            yaml.safe_dump(recipe(["transformer"], {"name": args.target}, folder / "checkpoint"))
        )
        trials = Trials(folder, args.gate)
        trials.starved(args.disk)
        trials.crowded()
        trials.damaged(args.seed)
        random_ = random.Random(args.seed)
        for _ in range(args.kills):
            trials.killed(random_.uniform(0, 0.9 * trials.seconds))


if __name__ == "__main__":
    main()
