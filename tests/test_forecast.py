"""``--dry-run``: what would be done is what a build then does, and nothing is written for knowing it."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file
from support import contents


def dry(run_cli: Any, project: Path, *args: str, cache: Path) -> dict[str, Any]:
    """A dry run's answer; folder and cache are as before."""
    before = contents(project), contents(cache)
    ran = run_cli(*args, "--dry-run", "--json", cwd=project, env={"SORA_COMPILE_CACHE": str(cache)})
    assert ran.code == 0, ran.err
    assert (contents(project), contents(cache)) == before
    found: dict[str, Any] = json.loads(ran.out)
    return found


def done(project: Path) -> Counter[str]:
    """What a build did, by kind."""
    events = [json.loads(line) for line in (project / "events").read_text().splitlines()[1:]]
    return Counter(e["kind"] for e in events if e["event"] == "done" and "block" in e)


@pytest.mark.slow
def test_what_is_said_is_done(project: Path, run_cli: Any, tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    args = ("recipe.yaml", "-o", "b", "--gate", "structure")

    found = dry(run_cli, project, *args, cache=cache)
    assert not cache.exists()
    part = found["components"]["transformer"]
    weights = project / "checkpoint" / "model.safetensors"
    assert (found["up_to_date"], part["blocks"], part["uncertain"]) == (False, 4, 4)
    assert part["read_bytes"] == weights.stat().st_size
    ran = run_cli(*args, "--events", "events", cwd=project, env={"SORA_COMPILE_CACHE": str(cache)})
    assert ran.code == 0, ran.err
    assert done(project)["template"] == part["to_lower"]
    assert done(project)["artifact"] == part["to_make"] == 4
    assert done(project)["gate"] <= part["to_execute"]
    stored = sum(p.stat().st_size for p in (project / "b").rglob("*") if p.name.startswith("weights"))
    assert stored == pytest.approx(found["disk"]["bundle_bytes"], rel=0.1)
    assert found["disk"]["cache_bytes"] == found["disk"]["bundle_bytes"]

    found = dry(run_cli, project, *args, cache=cache)
    assert found["up_to_date"]
    part = found["components"]["transformer"]
    assert (part["cached"], part["to_make"], part["to_lower"], part["to_execute"]) == (4, 0, 0, 0)
    ran = run_cli(*args, "--dry-run", cwd=project, env={"SORA_COMPILE_CACHE": str(cache)})
    assert ran.out.startswith("nothing to do: the bundle is up to date (")

    other = (*args, "--set", "sampler.guidance=3.0")
    part = dry(run_cli, project, *other, cache=cache)["components"]["transformer"]
    assert (part["cached"], part["to_make"], part["uncertain"], part["write_bytes"]) == (4, 0, 0, 0)

    save_file({k: v + 1 for k, v in load_file(weights).items()}, weights)
    part = dry(run_cli, project, *args, cache=cache)["components"]["transformer"]
    assert (part["cached"], part["to_make"], part["uncertain"], part["to_lower"]) == (0, 4, 4, 0)


def test_for_people(project: Path, run_cli: Any) -> None:
    checkpoint = "transformer.checkpoint=hf://me/no-such"
    config = f"transformer.config={(project / 'checkpoint' / 'config.json').read_text()}"
    args = ("recipe.yaml", "-o", "b", "--set", checkpoint, "--set", config)
    ran = run_cli(*args, "--dry-run", cwd=project)
    assert ran.code == 0, ran.err
    assert "to be fetched: hf://me/no-such" in ran.out
    assert "4 ?" in ran.out and "free in" in ran.out and "for each process" in ran.out


@pytest.mark.parametrize(
    ("args", "code", "message"),
    [
        (("--events", "e"), 2, "--dry-run and --events: nothing is built and nothing written; choose one"),
        (("--depfile", "d"), 2, "--dry-run and --depfile: "),
        (("--set", "transformer.checkpoint=no/such"), 3, "checkpoint 'no/such' does not exist"),
        (("--set", "memory_budget=1kB"), 2, "memory budget: 0.0 MB is too little"),
        (("-o", "recipe.yaml"), 2, "-o "),
        (("--frozen",), 2, "recipe.yaml.lock: there is no lock"),
    ],
    ids=str,
)
def test_refused_as_a_build_would(project: Path, run_cli: Any, args: tuple[str, ...], code: int, message: str) -> None:
    before = contents(project)
    ran = run_cli("recipe.yaml", "-o", "b", "--dry-run", *args, cwd=project)
    assert (ran.code, ran.out) == (code, "")
    assert ran.err.startswith(f"sora-compile: {message}")
    assert contents(project) == before
