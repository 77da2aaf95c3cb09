"""Building again: the same bytes whatever the circumstances, and nothing done twice."""

from __future__ import annotations

import hashlib
import json
import os
import random
import re
import shutil
import signal
import subprocess
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from commands import command
from safetensors.torch import load_file, save_file
from support import write_checkpoint, write_project

import toolchain
from toolchain.accuracy.diff import compare_bundles
from toolchain.accuracy.verify import verify
from toolchain.errors import AccuracyError, BundleError
from toolchain.formats.bundle import load_bundle
from toolchain.formats.recipe_file import load_recipe
from toolchain.system.store import Store
from toolchain.testing import assert_bundle

pytestmark = pytest.mark.slow

TARGET = "onnx"
"""What lowers in the least time."""


def contents(folder: Path) -> dict[str, str]:
    """Digests of a bundle's files."""
    files = sorted(p for p in folder.rglob("*") if p.is_file())
    return {p.relative_to(folder).as_posix(): hashlib.sha256(p.read_bytes()).hexdigest() for p in files}


def counts(store: Store) -> Counter[str]:
    return Counter(e.kind for e in store.entries())


def compile_(project: Path, out: Path, store: Store, *changes: str, **options: Any) -> toolchain.Bundle:
    recipe = load_recipe(project / "recipe.yaml", [f"target={TARGET}", *changes])
    return toolchain.compile_recipe(recipe, out, base=project, store=store, **options)


@pytest.fixture(scope="module")
def built(one_pair: Any, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A project, its bundle, and the store that both share."""
    folder = tmp_path_factory.mktemp("builds")
    project = write_project(folder / "project", one_pair)
    store = Store(folder / "store")
    compile_(project, folder / "bundle", store)
    return project, folder / "bundle", store


# --- the same bytes ----------------------------------------------------------------------------------


def test_path_time_jobs_and_hashes_do_not_matter(start_cli: Any, project: Path, built: Any, tmp_path: Path) -> None:
    """Two processes at once, into one cache, each with a place, a number of jobs and hashes of its own; the other
    build was in this process. Each target's bytes have tests of their own.
    """
    place = tmp_path / "a place" / "deep"
    shutil.copytree(project, place)
    arguments = ("recipe.yaml", "-o", "b", "--set", f"target={TARGET}")
    running = [
        start_cli(*arguments, "-j", jobs, cwd=folder, cache=tmp_path / "cache", env={"PYTHONHASHSEED": seed})
        for folder, jobs, seed in ((place, "2", "7"), (project, "1", "23"))
    ]
    for process in running:
        _, err = process.communicate(timeout=300)
        assert process.returncode == 0, err
    assert contents(place / "b") == contents(project / "b") == contents(built[1])
    assert counts(Store(tmp_path / "cache"))["templates"] == 4


def test_direct_is_the_same(built: Any, tmp_path: Path) -> None:
    project, bundle, store = built
    compile_(project, tmp_path / "direct", store, direct=True)
    assert contents(tmp_path / "direct") == contents(bundle)


# --- nothing twice -----------------------------------------------------------------------------------


def test_nothing_has_changed(built: Any) -> None:
    project, bundle, store = built
    before, times = counts(store), {p: p.stat().st_mtime_ns for p in bundle.rglob("*")}
    said: list[str] = []

    class Listener(toolchain.Listener):
        def remark(self, text: str) -> None:
            said.append(text)

    compile_(project, bundle, store, listener=Listener())
    assert said == ["nothing has changed since this bundle was built"]
    assert counts(store) == before
    assert {p: p.stat().st_mtime_ns for p in bundle.rglob("*")} == times


def test_a_bundle_that_was_altered_is_mended(built: Any, tmp_path: Path) -> None:
    project, bundle, store = built
    mine = tmp_path / "mine"
    compile_(project, mine, store)
    file = mine / "transformer/tables.safetensors"
    file.write_bytes(file.read_bytes()[:-1] + b"?")
    compile_(project, mine, store)
    assert contents(mine) == contents(bundle)


def test_a_sampler_lowers_stamps_and_executes_nothing(built: Any, tmp_path: Path) -> None:
    project, bundle, store = built
    before = counts(store)
    compile_(project, tmp_path / "other", store, "sampler.steps=9", "sampler.leap=null", "sampler.merged_steps=1")
    assert counts(store) - before == Counter({"builds": 1})
    theirs, own = contents(tmp_path / "other"), contents(bundle)
    assert {k for k in own if own[k] != theirs[k]} == {"manifest.json", "recipe.yaml"}


def test_a_checkpoint_lowers_nothing(built: Any, tmp_path: Path) -> None:
    project, _, store = built
    changed = tmp_path / "changed"
    shutil.copytree(project, changed)
    weights = load_file(changed / "checkpoint/model.safetensors")
    weights["temporal_blocks.0.mlp.fc1.weight"] = weights["temporal_blocks.0.mlp.fc1.weight"] * 1.01
    save_file(weights, changed / "checkpoint/model.safetensors")
    before = counts(store)
    compile_(changed, tmp_path / "other", store)
    new = counts(store) - before
    assert new["templates"] == 0
    assert new["artifacts"] == 1  # the pair's


# --- killed, damaged, shared -------------------------------------------------------------------------


def test_killed_at_any_moment(start_cli: Any, project: Path, built: Any, tmp_path: Path) -> None:
    """And then run again: the same bytes, nothing left behind."""
    cache = tmp_path / "cache"
    arguments = ("recipe.yaml", "-o", "bundle", "--set", f"target={TARGET}")
    random_ = random.Random(0)
    killed = 0
    for _ in range(2):
        process = start_cli(*arguments, cwd=project, cache=cache)
        more = len(list(cache.rglob("*"))) + random_.randrange(1, 12)
        while process.poll() is None and len(list(cache.rglob("*"))) < more:
            time.sleep(0.01)
        time.sleep(random_.uniform(0, 0.5))
        process.kill()
        process.communicate()
        killed += process.returncode == -signal.SIGKILL
    assert killed >= 1  # a slow test may come too late for the last
    assert not (project / "bundle").exists() or killed < 2
    process = start_cli(*arguments, cwd=project, cache=cache)
    _, err = process.communicate(timeout=240)
    assert process.returncode == 0, err
    assert contents(project / "bundle") == contents(built[1])
    assert sorted(p.name for p in project.iterdir()) == ["bundle", "checkpoint", "recipe.yaml"]
    assert list((cache / "scratch").iterdir()) == []


ON_A_SMALL_DISK = """
mount -t tmpfs -o size=$1 small "$2" && cp -r project "$2" && cd "$2/project" && shift 2
"$@"; code=$?
ls -A . "$SORA_COMPILE_CACHE/scratch" | tr '\\n' ' '
[ "$AGAIN" ] || exit $code
mount -o remount,size=100m "$OLDPWD/disk" || exit 99
"$@" > /dev/null && cp -r bundle "$OLDPWD/made" && exit $code
"""
"""Runs a command on a disk of a size, and, if it is told to, once more when it has grown; ends as the first run did."""


@pytest.mark.parametrize(("target", "bytes_", "again"), [("onnx", 1_500_000, "1"), ("coreml", 1_700_000, "")])
def test_a_full_disk(project: Path, tmp_path: Path, target: str, bytes_: int, again: str) -> None:
    """One line says so, nothing is left behind, and with more room the same command goes on, whatever the target."""
    (tmp_path / "disk").mkdir()
    alone = ["unshare", "--user", "--map-root-user", "--mount"]
    if subprocess.run([*alone, "mount", "-t", "tmpfs", "t", "disk"], cwd=tmp_path, capture_output=True).returncode:
        pytest.skip("this machine lets nobody mount a disk of their own")
    build = command("recipe.yaml", "-o", "bundle", "--set", f"target={target}")
    ran = subprocess.run(
        [*alone, "sh", "-c", ON_A_SMALL_DISK, "sh", str(bytes_), "disk", *build],
        cwd=tmp_path,
        env={
            **os.environ,
            "SORA_COMPILE_CACHE": str(tmp_path / "disk/cache"),
            "PYTHONPATH": str(Path(__file__).parents[1]),
            "AGAIN": again,
        },
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert ran.returncode == 6, ran.stderr
    said = ran.stderr.splitlines()
    assert re.fullmatch(r"sora-compile: -o bundle: the disk is full \(.* free in .*\); .*run again .*", said[0])
    assert "Traceback" not in ran.stderr
    assert ran.stdout.split() == [".:", "checkpoint", "recipe.yaml", f"{tmp_path}/disk/cache/scratch:"]
    assert (tmp_path / "made").exists() == bool(again)
    if again:
        load_bundle(tmp_path / "made").check_files()


def test_a_cache_with_flipped_bits(built: Any, tmp_path: Path) -> None:
    project, bundle, store = built
    mine = Store(tmp_path / "store")
    shutil.copytree(store.root, mine.root)
    random_ = random.Random(0)
    time.sleep(0.01)
    for entry in list(mine.entries()):
        for file in entry.files:
            flip(entry.data / file.path, random_)
    compile_(project, tmp_path / "again", mine)
    assert contents(tmp_path / "again") == contents(bundle)


def flip(path: Path, random_: random.Random) -> None:
    """Flip a bit in place of a file's own copy."""
    content = bytearray(path.read_bytes())
    content[random_.randrange(len(content))] ^= 1 << random_.randrange(8)
    path.unlink()  # it may be linked from a bundle
    path.write_bytes(content)


# --- the gate ----------------------------------------------------------------------------------------


def test_no_gate_is_recorded(built: Any, tmp_path: Path) -> None:
    project, _, store = built
    made = compile_(project, tmp_path / "b", store, "gate.mode=none").manifest
    assert made.gate.mode == "none"
    assert all(b.accuracy is None and b.goldens is None for b in made.components["transformer"].blocks)
    with pytest.raises(BundleError, match=r"has no goldens, since nothing was executed .*\(gate: none\)"):
        verify(tmp_path / "b")


def test_one_of_each_structure(small_weights: Any, facts: Any, tmp_path: Path) -> None:
    """Another gate, the same artifacts; figures of one structure's first block are no other's."""
    write_checkpoint(tmp_path / "checkpoint", facts["config"], small_weights)
    (tmp_path / "recipe.yaml").write_text(
        "name: small\nmodel: open-sora-v1.2\nvideo: {frames: 17, height: 32, width: 48}\n"
        "transformer: {checkpoint: checkpoint, passes: [token-merge, partition]}\ntarget: onnx\n"
    )
    store = Store(tmp_path / "store")
    every = compile_(tmp_path, tmp_path / "every", store).manifest
    one = compile_(tmp_path, tmp_path / "structure", store, "gate.mode=structure").manifest
    assert (every.gate.mode, one.gate.mode) == ("every", "structure")
    assert all(b.accuracy is None and b.goldens is None for b in one.components["transformer"].blocks)
    with pytest.raises(BundleError, match=r"has no goldens.*\(gate: structure\)"):
        verify(tmp_path / "structure")
    before = counts(store)
    compile_(tmp_path, tmp_path / "again", store, "gate.mode=structure", "sampler.steps=5")
    assert counts(store) - before == Counter({"builds": 1})
    own, theirs = (contents(tmp_path / n) for n in ("every", "structure"))
    assert {k: v for k, v in own.items() if k.startswith("transformer/")} == {
        k: v for k, v in theirs.items() if k.startswith("transformer/")
    }


# --- verify and diff ---------------------------------------------------------------------------------


def test_verify_finds_every_changed_byte(built: Any, tmp_path: Path) -> None:
    _, bundle, _ = built
    mine = tmp_path / "mine"
    shutil.copytree(bundle, mine)
    assert not verify(mine).failed
    random_ = random.Random(1)
    for name in contents(bundle).keys() - {"manifest.json"}:
        whole = (mine / name).read_bytes()
        for _ in range(3):
            flip(mine / name, random_)
            with pytest.raises(BundleError, match="is not what was built"):
                verify(mine)
            (mine / name).write_bytes(whole)
    assert not verify(mine).failed


def test_a_golden_that_was_replaced_whole(built: Any, tmp_path: Path) -> None:
    """Even with a digest that fits, its numbers do not."""
    _, bundle, _ = built
    mine = tmp_path / "mine"
    shutil.copytree(bundle, mine)
    path = mine / "goldens/transformer/pair_0.safetensors"
    tensors = load_file(path)
    path.unlink()
    save_file(tensors | {"merged.out.x_out": tensors["merged.out.x_out"] * 1.1}, path)
    manifest = json.loads((mine / "manifest.json").read_text())
    pair = next(b for b in manifest["components"]["transformer"]["blocks"] if b["name"] == "pair_0")
    pair["goldens"] |= {"sha256": hashlib.sha256(path.read_bytes()).hexdigest(), "bytes": path.stat().st_size}
    (mine / "manifest.json").unlink()
    (mine / "manifest.json").write_text(json.dumps(manifest))
    found = verify(mine)
    assert [(c.block, c.function) for c in found.failed] == [("pair_0", "merged")]
    with pytest.raises(AccuracyError, match=r"transformer: block 'pair_0', function 'merged': relative error 0\.0909"):
        found.require()
    with pytest.raises(AssertionError, match="'pair_0'"):
        assert_bundle(mine)
    assert_bundle(mine, goldens_of=bundle)


def test_verify_explains(run_cli: Any, built: Any) -> None:
    project, bundle, _ = built
    ran = run_cli("verify", bundle, "--explain", "transformer/pair_0", cwd=project)
    assert ran.code == 0, ran.err
    assert "pair_0, merged: what the artifact gave, step by step" in ran.out
    assert "spatial_blocks_0_attn_0" in ran.out
    ran = run_cli("verify", bundle, "--explain", "transformer/pair_9", cwd=project)
    assert ran.code == 2
    assert "no such block; there are transformer/caption" in ran.err


def test_verify_as_a_command(run_cli: Any, built: Any, tmp_path: Path) -> None:
    ran = run_cli("verify", built[1], "--json", cwd=tmp_path)
    answer = json.loads(ran.out)
    assert (ran.code, answer["passed"], len(answer["checks"])) == (0, True, 5)
    assert {c["function"] for c in answer["checks"] if c["block"] == "pair_0"} == {"base", "merged"}


def test_diff(run_cli: Any, built: Any, tmp_path: Path) -> None:
    project, bundle, store = built
    assert compare_bundles(bundle, bundle).same
    weights = load_file(project / "checkpoint/model.safetensors")
    changed = tmp_path / "changed"
    shutil.copytree(project, changed)
    save_file(
        {k: v * 1.01 if "mlp.fc2" in k else v for k, v in weights.items()}, changed / "checkpoint/model.safetensors"
    )
    compile_(changed, tmp_path / "other", store, "sampler.guidance=3")
    found = compare_bundles(bundle, tmp_path / "other")
    assert not found.same
    assert "sampler.guidance" in {d.key for d in found.differences}
    differing = {b.block: b for b in found.blocks if not b.same}
    assert list(differing) == ["transformer/pair_0"]
    outputs = differing["transformer/pair_0"].outputs
    assert outputs is not None and set(outputs) == {"base", "merged"}
    assert all(1e-4 < e < 0.1 for e in outputs.values())
    ran = run_cli("diff", bundle, tmp_path / "other", cwd=tmp_path)
    assert ran.code == 0
    assert "1 blocks differ, 3 are the same byte for byte" in ran.out


def test_cache_as_a_command(run_cli: Any, built: Any, tmp_path: Path) -> None:
    mine = tmp_path / "store"
    shutil.copytree(built[2].root, mine)
    run: Callable[..., Any] = lambda *a: run_cli("cache", *a, cwd=tmp_path, env={"SORA_COMPILE_CACHE": str(mine)})  # noqa: E731
    assert json.loads(run("show", "--json").out)["kinds"]["templates"]["entries"] >= 4
    assert "all entries are whole" in run("verify").out
    entry = next(e for e in Store(mine).entries() if e.kind == "artifacts")
    stat = (entry.data / entry.files[0].path).stat()
    flip(entry.data / entry.files[0].path, random.Random(0))
    os.utime(entry.data / entry.files[0].path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert "1 damaged entries removed" in run("verify").out
    assert "cleared" in run("clear").out
    assert list(Store(mine).entries()) == []
    assert run("shw").code == 2


def test_a_bundle_outlives_the_cache(built: Any, tmp_path: Path) -> None:
    project, bundle, store = built
    mine = Store(tmp_path / "store")
    shutil.copytree(store.root, mine.root)
    compile_(project, tmp_path / "b", mine)
    mine.clear()
    load_bundle(tmp_path / "b").check_files()
    assert contents(tmp_path / "b") == contents(bundle)
