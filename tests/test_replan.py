"""``calibrate`` and ``replan``: what a machine takes, measured, and a bundle planned anew with it without building."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml

from toolchain.build.replan import replan_bundle
from toolchain.formats.bundle import Bundle, load_bundle
from toolchain.formats.times import MeasuredTimes, load_times
from toolchain.planning.loading.again import plan_again
from toolchain.player.measuring import measure_times

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def calibration(onnx_bundle: Any, run_cli: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("calibration")
    ran = run_cli("calibrate", onnx_bundle.path, "-o", "c.yaml", "--repeats", "1", cwd=folder)
    assert (ran.code, ran.err) == (0, "")
    assert ran.out.splitlines()[0] == "c.yaml"
    assert [p.name for p in folder.iterdir()] == ["c.yaml"]
    return folder / "c.yaml"


@pytest.fixture
def bundle(onnx_bundle: Any, tmp_path: Path) -> Bundle:
    shutil.copytree(onnx_bundle.path, tmp_path / "bundle")
    return load_bundle(tmp_path / "bundle")


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def test_every_structure_and_function_is_measured(calibration: Path, bundle: Bundle) -> None:
    times = load_times(calibration).times
    blocks = [b for c in bundle.manifest.components.values() for b in c.blocks]
    assert {d: set(s.run_s) for d, s in times.structures.items()} == {b.structure: set(b.functions) for b in blocks}
    assert all(s.load_s > 0 and min(s.run_s.values()) > 0 for s in times.structures.values())
    assert times.bundle == bundle.manifest.name


def test_replan_changes_the_loading_and_nothing_else(
    calibration: Path, bundle: Bundle, run_cli: Any, tmp_path: Path
) -> None:
    before = contents(bundle.path)
    data = json.loads(before.pop("manifest.json"))
    budget = data["loading"]["plan"]["budget_bytes"] - 1
    options = ("--calibration", calibration, "--memory-budget", str(budget), "--json")
    ran = run_cli("replan", bundle.path, *options, cwd=tmp_path)
    assert (ran.code, ran.err) == (0, "")
    after = contents(bundle.path)
    new = json.loads(after.pop("manifest.json"))
    assert after == before
    loading = new.pop("loading")
    assert new == {k: v for k, v in data.items() if k != "loading"} | {"memory_budget_bytes": budget}
    assert loading["plan"]["budget_bytes"] == budget
    times = load_times(calibration)
    assert loading["made_from"]["times"] == times.source.model_dump()
    assert {b["load_s"] for b in loading["made_from"]["run"]["blocks"]} <= {
        s.load_s for s in times.times.structures.values()
    }
    said = json.loads(ran.out)
    assert said["prediction"].items() >= loading["prediction"].items()
    assert load_bundle(bundle.path).manifest.loading.model_dump(mode="json") == loading
    again = replan_bundle(bundle.path, memory_budget=budget)  # with the times that the manifest has by now
    assert again.manifest.loading.model_dump(mode="json") == loading
    assert plan_again(again.manifest, None, times).planned.plan.budget_bytes > budget


def of_another(times: MeasuredTimes) -> MeasuredTimes:
    first, *others = times.structures.items()
    return times.model_copy(update={"bundle": "other", "structures": dict(others) | {"0" * 64: first[1]}})


def test_what_is_refused_leaves_the_bundle_as_it_was(
    calibration: Path, bundle: Bundle, run_cli: Any, tmp_path: Path
) -> None:
    (tmp_path / "other.yaml").write_text(of_another(load_times(calibration).times).to_yaml())
    before = contents(tmp_path)
    for options, code, said in (
        ((), 2, "replan: give --calibration, --memory-budget or both"),
        (("--memory-budget", "1kB"), 2, "memory budget: 0.0 MB is too little; 'transformer/"),
        (("--memory-budget", "much"), 2, "--memory-budget much: expected a size such as 2.5GB"),
        (("--calibration", "other.yaml"), 2, "--calibration other.yaml: is a calibration of another bundle ('other')"),
        (("--calibration", "none.yaml"), 2, "--calibration none.yaml: cannot be read: No such file or directory"),
    ):
        ran = run_cli("replan", "bundle", *options, cwd=tmp_path)
        assert (ran.code, ran.out) == (code, "")
        assert ran.err.startswith(f"sora-compile: {said}")
        assert len(ran.err.splitlines()) == 1
        assert contents(tmp_path) == before


def test_a_bundle_of_before_there_was_a_run(bundle: Bundle, run_cli: Any, tmp_path: Path) -> None:
    path = bundle.path / "manifest.json"
    data = json.loads(path.read_text())
    data["loading"] |= {"prediction": None, "made_from": None}
    path.write_text(json.dumps(data))
    ran = run_cli("replan", "bundle", "--memory-budget", "1GB", cwd=tmp_path)
    assert (ran.code, ran.out) == (2, "")
    assert "was built by an earlier version" in ran.err


def test_a_damaged_bundle_is_not_measured(bundle: Bundle, run_cli: Any, tmp_path: Path) -> None:
    with (bundle.path / "transformer/final/weights.bin").open("ab") as file:
        file.write(b"x")
    ran = run_cli("calibrate", "bundle", "-o", "c.yaml", cwd=tmp_path)
    assert (ran.code, ran.out) == (2, "")
    assert "'transformer/final/weights.bin' is not what was built (checksum)" in ran.err
    assert not (tmp_path / "c.yaml").exists()


def test_progress_is_told_and_the_file_is_plain(bundle: Bundle) -> None:
    told: list[tuple[str, int, int]] = []
    times = measure_times(bundle, repeats=1, progress=lambda *event: told.append(event))
    count = len(times.structures)
    assert told == [("calibrate", n, count) for n in range(count + 1)]
    assert MeasuredTimes.model_validate(yaml.safe_load(times.to_yaml())) == times
