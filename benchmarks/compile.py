"""What building costs at full size: cold, after fine-tuning, with nothing changed; the published way; the floor.

    python benchmarks/compile.py [--component transformer] [--target coreml] [--every] [--published-pairs 1]

Rows, side by side in one run, each a process of its own, with the checkpoint in the file cache unless it says:

- cold: an empty cache, gate ``structure``; with ``--every`` also gate ``every``.
- nothing changed: the same command again.
- fine-tuned: another checkpoint, templates in the cache; several times, in turns with
- floor: reading the checkpoint and writing the bundle's bytes. Both with the checkpoint in the file cache, and on disk.
- published: see ``published.py``; measured on a few pairs and scaled to the depth, the load counted once.

Memory is the peak of the process tree. "written" is what the processes wrote to files, temporary ones included;
"kept" is the bytes of distinct files that are left in cache and bundle. Checkpoints are synthetic: official names,
shapes and dtypes. ``--component all`` is the whole pipeline, by the shipped recipe of the target, or by ``--recipe``.
With ``--quantize int8`` the component is built cold once more with its weights so, right after; several can be given,
also as the options of the pass: ``'{scheme: int4, clip: error}'``. After each cold build stands what it leaves of every
component, in turns with what ``sora-compile plan`` said.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml
from measure import Cost, run

HERE = Path(__file__).parent
VIDEO = {"frames": 68, "height": 192, "width": 192}
SHIPPED = {"coreml": "open-sora-v1.2-iphone-15-pro", "executorch": "open-sora-v1.2-android"}
TOKENIZER = HERE.parent / "recipes/tiny/text_encoder/spiece.model"
DTYPES = {"transformer": "float32", "text_encoder": "bfloat16", "vae": "float32"}
SMALL_TRANSFORMER = ["depth=1", "hidden_size=32", "num_heads=2", "caption_channels=4096"]
FLOOR = """
import sys
from pathlib import Path
left = int(sys.argv[1])
with open("floor.bin", "wb") as out:
    for folder in sys.argv[2:]:
        for path in sorted(Path(folder).glob("*.safetensors")):
            with path.open("rb") as f:
                while part := f.read(1 << 24):
                    out.write(part[: max(0, left)])
                    left -= len(part)
    while left > 0:
        out.write(b"\\1" * min(left, 1 << 24))
        left -= 1 << 24
"""


def synthetic(component: str, out: Path, seed: int, dtype: str, changes: list[str]) -> None:
    command = [sys.executable, str(HERE / "synthetic.py"), component, str(out), "--dtype", dtype, "--seed", str(seed)]
    subprocess.run([*command, *(x for c in changes for x in ("--set", c))], check=True)
    if component == "text_encoder":
        shutil.copy(TOKENIZER, out)


def recipe(
    components: list[str], target: dict[str, Any], checkpoints: Path, scheme: dict[str, Any] | None = None
) -> dict[str, Any]:
    """A recipe of one full-size component; beside the text encoder stands a transformer of next to no size."""
    parts: dict[str, Any] = {c: {"checkpoint": str(checkpoints / c)} for c in components}
    for component in components if scheme else ():
        first = ["token-merge"] if component == "transformer" else []
        parts[component]["passes"] = [*first, {"quantize": scheme}, "partition"]
    parts.setdefault("transformer", {"checkpoint": "small"})["passes"] = ["token-merge", "partition"]
    sampler = {"steps": 30, "merged_steps": 15, "leap": 15}
    return {"name": "full", "model": "open-sora-v1.2", "video": VIDEO, "sampler": sampler, "target": target} | parts


def shipped(components: list[str], name: str, checkpoints: Path) -> dict[str, Any]:
    """The shipped recipe, with synthetic checkpoints for the published ones."""
    whole: dict[str, Any] = yaml.safe_load((HERE.parent / "recipes" / f"{name}.yaml").read_text())
    for component in components:
        whole[component]["checkpoint"] = str(checkpoints / component)
    return whole


def kept(*folders: Path) -> int:
    """Bytes of the distinct files below the folders."""
    stats = [p.stat() for f in folders if f.exists() for p in f.rglob("*") if p.is_file()]
    return sum({s.st_ino: s.st_size for s in stats}.values())


class Table:
    """Prints a row for each command."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        print(f"{'':28} {'seconds':>8} {'CPU s':>8} {'peak MB':>8} {'written MB':>11} {'kept MB':>8}")

    def row(
        self, name: str, seconds: float, processor: float, peak: float, written: float, kept_bytes: float | None = None
    ) -> None:
        left = f"{kept_bytes / 1e6:8.0f}" if kept_bytes is not None else ""
        print(f"{name:28} {seconds:8.1f} {processor:8.1f} {peak / 1e6:8.0f} {written / 1e6:11.0f} {left}", flush=True)

    def run(
        self,
        name: str,
        command: list[str],
        checkpoint: Path | None,
        left: Callable[[], int] | None,
        cached: bool = True,
    ) -> Cost:
        """Run a command with the checkpoint in the file cache, or out of it, and print what it took."""
        for path in sorted(checkpoint.rglob("*.safetensors")) if checkpoint else ():
            with path.open("rb", buffering=0) as f:
                if not cached:
                    os.fsync(f.fileno())
                    os.posix_fadvise(f.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
                while cached and f.read(1 << 24):
                    pass
        os.sync()  # what others wrote is not to slow this one down
        cost = run(command, self._folder)
        self.row(name, cost.seconds, cost.processor, cost.peak, cost.written, left() if left else None)
        return cost


def compare(folder: Path, path: Path, components: list[str], depth: int | None, args: argparse.Namespace) -> None:
    first, tuned, cache, bundle = args.checkpoints, folder / "tuned", folder / "cache", folder / "bundle"
    command = [sys.executable, "-m", "toolchain.cli", str(path), "-o", str(bundle), "--json", "--jobs", str(args.jobs)]
    structure = [*command, "--gate", "structure"]
    dtypes = ", ".join(f"{c} {kept(first / c) / 1e9:.2f} GB {DTYPES[c]}" for c in components)
    print(f"{args.target}{', ' + args.precision if args.precision else ''}; {args.jobs} process(es); {dtypes}")
    table = Table(folder)
    table.run("imports alone", [sys.executable, "-c", "import torch, pydantic, rich"], None, None)
    cold = table.run("cold, gate structure", structure, first, lambda: kept(cache, bundle))
    against_plan(path, cold, bundle)
    table.run("nothing changed", structure, None, None)
    if args.every:
        shutil.rmtree(cache)
        every = table.run("cold, gate every", command, first, lambda: kept(cache, bundle))
        print(worst(json.loads(every.output)["manifest"]))
        shutil.rmtree(cache)
        run(structure, folder)
    for scheme in args.quantize:
        for old in (cache, bundle):
            shutil.rmtree(old)
        other = folder / "quantized.yaml"
        options = yaml.safe_load(scheme)
        options = {"scheme": options} if isinstance(options, str) else options
        other.write_text(yaml.safe_dump(recipe(components, target_of(args), first, options)))
        again = [str(other) if a == str(path) else a for a in structure]
        quantized = table.run(f"cold, {scheme}", again, first, lambda: kept(cache, bundle))
        against_plan(other, quantized, bundle)
        ratios = [f"{q / c:.2f}" for q, c in zip(_figures(quantized), _figures(cold), strict=True)]
        print("{} / plain: {} of the seconds, {} of the CPU's, {} of the memory".format(scheme, *ratios), flush=True)
    if args.cold_only:
        return
    if args.quantize:
        for old in (cache, bundle):
            shutil.rmtree(old)
        run(structure, folder)
    path.write_text(path.read_text().replace(str(first), str(tuned)))
    size = json.loads(cold.output)["bytes"]
    fine_tuned(folder, table, structure, size, [tuned / c for c in components], args.rounds)
    if args.published_pairs and components == ["transformer"]:
        published(folder, first / "transformer", table, depth or 28, args.published_pairs, cold, bundle)


def _figures(cost: Cost) -> tuple[float, float, float]:
    return cost.seconds, cost.processor, cost.peak


def against_plan(path: Path, cost: Cost, bundle: Path) -> None:
    """Bytes that a build left of each component, in all and of artifacts, in turns with what the plan says."""
    command = [sys.executable, "-m", "toolchain.cli", "plan", str(path), "--json"]
    planned = json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE, cwd=path.parent).stdout)
    for name, component in json.loads(cost.output)["manifest"]["components"].items():
        files = sum(f["bytes"] for b in component["blocks"] for f in b["files"])
        said = planned["components"][name]["weight_bytes"]
        print(f"  {name}: weights planned {said}, artifacts {files}, {100 * (files - said) / files:.2f} % under")
    said, found = sum(c["weight_bytes"] for c in planned["components"].values()), kept(bundle)
    print(f"  bundle: weights planned {said}, in all {found}, {100 * (found - said) / found:.2f} % under", flush=True)


def target_of(args: argparse.Namespace) -> dict[str, Any]:
    return {"name": args.target} | ({"precision": args.precision} if args.precision else {})


def fine_tuned(folder: Path, table: Table, command: list[str], size: int, tuned: list[Path], rounds: int) -> None:
    """Another checkpoint with the templates in the cache, and the floor, in turns."""
    cache, bundle, templates = (folder / n for n in ("cache", "bundle", "templates"))
    shutil.copytree(cache, templates, copy_function=os.link)
    before = kept(cache)
    floor = [sys.executable, "-c", FLOOR, str(size), *map(str, tuned)]
    seconds: dict[str, list[tuple[float, float]]] = {"in the file cache": [], "on disk": []}
    for _ in range(rounds):
        for where, pairs in seconds.items():
            for old in (cache, bundle):
                shutil.rmtree(old)
            shutil.copytree(templates, cache, copy_function=os.link)
            cached = where == "in the file cache"
            source = tuned[0].parent
            warm = table.run(f"fine-tuned, {where}", command, source, lambda: kept(cache, bundle) - before, cached)
            least = table.run(f"floor, {where}", floor, source, lambda: size, cached)
            pairs.append((warm.seconds, least.seconds))
    shutil.rmtree(templates)
    for where, pairs in seconds.items():
        warm_median, floor_median = (statistics.median(column) for column in zip(*pairs, strict=True))
        print(f"fine-tuned / floor, {where}: {warm_median / floor_median:.1f} (medians of {rounds})")


def worst(manifest: dict[str, Any]) -> str:
    """The largest relative error of each component's artifacts."""
    found = []
    for name, component in manifest["components"].items():
        errors = [a["relative_error"] for b in component["blocks"] for a in (b["accuracy"] or {}).values()]
        found.append(f"{name} {max(errors):.1e}" if errors else f"{name} not executed")
    return f"largest relative error: {', '.join(found)}"


def published(folder: Path, checkpoint: Path, table: Table, depth: int, pairs: int, cold: Cost, bundle: Path) -> None:
    cost = run([sys.executable, str(HERE / "published.py"), str(folder), str(checkpoint), str(pairs)], folder)
    loading, converting, left = map(float, cost.output.splitlines()[-1].split())
    scale = depth / pairs
    seconds, written, left_all = loading + converting * scale, cost.written * scale, left * scale
    table.row(f"published, {pairs} of {depth} pairs", cost.seconds, cost.processor, cost.peak, cost.written, left)
    table.row(f"published, scaled to {depth}", seconds, cost.processor * scale, cost.peak, written, left_all)
    print(
        f"published / cold: {seconds / cold.seconds:.1f} of the time; bytes: cold / published "
        f"{100 * cold.written / written:.1f} % written, {100 * kept(bundle) / left_all:.1f} % in the result"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--component", choices=[*DTYPES, "all"], default="transformer")
    parser.add_argument("--target", default="coreml")
    parser.add_argument("--precision", help="the target's own if absent")
    parser.add_argument("--depth", type=int, help="pairs or layers; 28 and 24 if absent")
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--published-pairs", type=int, default=1, help="0 leaves the published way out")
    parser.add_argument("--rounds", type=int, default=3, help="of fine-tuned and floor, which vary")
    parser.add_argument("--every", action="store_true", help="also with gate every")
    parser.add_argument("--cold-only", action="store_true", help="not fine-tuned, no floor: half of the disk")
    parser.add_argument("--quantize", action="append", default=[], metavar="SCHEME", help="also cold, quantized so")
    parser.add_argument("--recipe", help="shipped recipe for --component all; the target's float one if absent")
    parser.add_argument("--folder", type=Path, help="where to work; a temporary folder if absent")
    parser.add_argument("--checkpoints", type=Path, help="folder that keeps the checkpoints; they are made if absent")
    args = parser.parse_args()
    components = list(DTYPES) if args.component == "all" else [args.component]
    keys = {"transformer": "depth", "text_encoder": "num_layers"}
    if args.folder is not None:
        args.folder.mkdir(parents=True, exist_ok=True)
    if args.component == "all" and (args.quantize or not args.cold_only):
        parser.error("--component all is built --cold-only, and quantized by its --recipe")
    with tempfile.TemporaryDirectory(dir=args.folder) as tmp:
        folder = Path(tmp)
        os.environ["SORA_COMPILE_CACHE"] = str(folder / "cache")
        args.checkpoints = (args.checkpoints or folder / "checkpoint").absolute()
        for component in components:
            changes = [f"{keys[component]}={args.depth}"] if args.depth and component in keys else []
            if not (args.checkpoints / component).exists():
                synthetic(component, args.checkpoints / component, 0, DTYPES[component], changes)
            if not args.cold_only:
                synthetic(component, folder / "tuned" / component, 1, DTYPES[component], changes)
        if "transformer" not in components:
            synthetic("transformer", folder / "small", 0, "float32", SMALL_TRANSFORMER)
        path = folder / "recipe.yaml"
        whole = (
            shipped(components, args.recipe or SHIPPED[args.target], args.checkpoints)
            if args.component == "all"
            else recipe(components, target_of(args), args.checkpoints)
        )
        path.write_text(yaml.safe_dump(whole))
        compare(folder, path, components, args.depth, args)


if __name__ == "__main__":
    main()
