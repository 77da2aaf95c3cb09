"""What tests of reports share: a bundle whose every text is hostile, with a golden video, and a trace of playing it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from toolchain.formats.bundle import Bundle, describe_file, load_bundle
from toolchain.formats.loading import loads_of
from toolchain.ir.target import Engine
from toolchain.planning.loading.events import LoadingPlan
from toolchain.planning.loading.jobs import jobs_of
from toolchain.planning.loading.run import Run
from toolchain.player.following import followed
from toolchain.player.loader import Loader
from toolchain.player.opening import load_engine, target_of
from toolchain.player.runner import ComponentRunner
from toolchain.player.trace import Trace

HOSTILE = "</script><script>window.hacked=1</script><img src=x onerror=window.hacked=2>\"'{{7*7}}&amp;<!--"
FRAMES, SIZE = 12, 32


@dataclass(frozen=True)
class Shown:
    """A bundle to report on, and the trace of a run of it."""

    bundle: Bundle
    trace: Path


@pytest.fixture(scope="session")
def edited(onnx_bundle: Any, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Bundle]:
    """A copy of the built bundle, its manifest edited as plain data; checked as any manifest is."""

    def make(edit: Callable[[dict[str, Any], Path], None]) -> Bundle:
        folder = tmp_path_factory.mktemp("edited") / "bundle"
        shutil.copytree(onnx_bundle.path, folder)
        path = folder / "manifest.json"
        data = json.loads(path.read_text())
        edit(data, folder)
        path.write_text(json.dumps(data))
        return load_bundle(folder)

    return make


def renamed(value: Any, old: str, new: str) -> Any:
    """Plain data in which a block has another name, wherever it is named; its files keep theirs."""
    if isinstance(value, dict):
        return {k: v if k == "artifact" else renamed(v, old, new) for k, v in value.items()}
    if isinstance(value, list):
        return [renamed(v, old, new) for v in value]
    if value == f"transformer/{old}":
        return f"transformer/{new}"
    return new + value.removeprefix(old) if value == old or str(value).startswith(f"{old}.") else value


def streamed(loading: dict[str, Any]) -> dict[str, Any]:
    """The loading of a bundle in which nothing stays: each run loads first; its budget is its peak."""
    sections = [
        {
            "times": section["times"],
            "events": [
                event
                for run in section["events"]
                if "run" in run
                for event in ({"load": run["run"]}, run, {"free": run["run"]})
            ],
        }
        for section in loading["plan"]["sections"]
    ]
    plan, run = loading["plan"] | {"sections": sections}, loading["made_from"]["run"]
    budget = jobs_of(Run.from_data(run), LoadingPlan.from_data(plan)).peak_bytes
    blocks = {b["name"]: b for b in run["blocks"]}
    loads_bytes, load_s = (sum(blocks[b][k] * n for b, n in loads_of(plan).items()) for k in ("weight_bytes", "load_s"))
    said = {"loads_bytes": loads_bytes, "load_s": load_s, "peak_bytes": budget}
    return loading | {"plan": plan | {"budget_bytes": budget}, "prediction": loading["prediction"] | said}


def moving_square() -> torch.Tensor:
    """Frames ``[F, H, W, 3]``."""
    pixels = torch.full((FRAMES, SIZE, SIZE, 3), 40, dtype=torch.uint8)
    for n in range(FRAMES):
        pixels[n, 8:24, 2 * n : 2 * n + 8, 0] = 250
    return pixels


def make_hostile(data: dict[str, Any], folder: Path) -> None:
    """Texts that would run as scripts if they were not escaped; a golden video; a budget with nothing to spare."""
    data["components"] = renamed(data["components"], "pair_0", f"{HOSTILE}pair")
    data["name"] = data["model"] = HOSTILE
    data["tools"][HOSTILE] = HOSTILE
    data["loading"] = renamed(streamed(data["loading"]), "pair_0", f"{HOSTILE}pair")
    data["memory_budget_bytes"] = data["loading"]["plan"]["budget_bytes"]
    recipe = folder / data["recipe"]["path"]
    recipe.write_text(recipe.read_text() + f"# {HOSTILE}\n")
    data["recipe"] = describe_file(recipe, folder).model_dump(mode="json")
    save_file({"pixels": moving_square()}, folder / "goldens/video.safetensors")
    golden = describe_file(folder / "goldens/video.safetensors", folder).model_dump(mode="json")
    data["golden"] = {"file": golden, "prompt": HOSTILE, "seed": 3, "psnr_db": 51.25, "limit_db": 40.0}


@pytest.fixture(scope="session")
def shown(edited: Callable[..., Bundle], tmp_path_factory: pytest.TempPathFactory) -> Shown:
    """The hostile bundle, and the trace of three steps that were run; nothing stays loaded, so each run loads first."""
    bundle = edited(make_hostile)
    trace, found = Trace(), followed(bundle.manifest)
    target = target_of(bundle.manifest, "transformer")
    blocks = {f"transformer/{b.name}": b for b in bundle.manifest.components["transformer"].blocks}

    def open_block(block: str, function: str) -> Engine:
        return load_engine(bundle, "transformer", blocks[block], function, target)

    with Loader(found.run, found.plan, open_block, trace) as loader:
        loader.enter("transformer")
        runner = ComponentRunner(bundle, "transformer", loader.call)
        inputs = {i.feed.kind: i.shape for i in runner.entry.inputs}
        given = {kind: torch.zeros(1, *inputs[kind][1:]) for kind in ("text_embedding", "token_mask", "latents")}
        given["timestep"] = torch.tensor(500.0)
        runner.run("prompt", given, "base")
        for step in bundle.manifest.sampler.steps[:3]:
            runner.run("step", given, step.function)
    path = tmp_path_factory.mktemp("trace") / "trace.json"
    assert found.timeline is not None
    manifest = bundle.manifest
    about = {"recipe_sha256": manifest.recipe.sha256, "memory_budget_bytes": manifest.memory_budget_bytes}
    trace.write(path, about, Trace.of(found.timeline))
    return Shown(bundle, path)
