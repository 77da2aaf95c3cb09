"""Names mean nothing to the player: a bundle in which every one of them is another gives the same video."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx
import pytest
import torch
from safetensors.torch import load_file, save_file

import toolchain
from toolchain.formats.bundle import Bundle
from toolchain.formats.recipe import Recipe
from toolchain.formats.recipe_file import parse_recipe
from toolchain.player import Player

PROMPT = "a small red circle"


class Renaming:
    """Another name for every name, the same one each time."""

    def __init__(self) -> None:
        self.known: dict[str, str] = {}

    def __call__(self, name: str) -> str:
        return self.known.setdefault(name, f"n{len(self.known)}")

    def source(self, source: str) -> str:
        """Where a value comes from: the words ``inputs`` and ``tables`` are the format's, the rest are names."""
        place, _, name = source.partition(".")
        return f"{place if place in ('inputs', 'tables') else self(place)}.{self(name)}"


def file_entry(root: Path, path: str) -> dict[str, Any]:
    content = (root / path).read_bytes()
    return {"path": path, "bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}


def rename_models(root: Path, block: dict[str, Any], new: Renaming) -> None:
    """Rename ports and functions in a block's models, and describe its files anew."""
    folder = root / block["artifact"]
    ports = {p["name"]: new(p["name"]) for p in (*block["inputs"], *block["outputs"])}
    for function in block["functions"]:
        path = folder / f"{function}.onnx"
        model = onnx.load(str(path), load_external_data=False)
        for value in (*model.graph.input, *model.graph.output):
            value.name = ports[value.name]
        for node in model.graph.node:
            for names in (node.input, node.output):
                for i, name in enumerate(names):
                    names[i] = ports.get(name, name)
        path.unlink()
        (folder / f"{new(function)}.onnx").write_bytes(model.SerializeToString())
    block["files"] = [file_entry(root, str(p.relative_to(root))) for p in sorted(folder.iterdir())]


def renamed(bundle: Bundle, root: Path) -> Bundle:
    """A copy of an ONNX bundle with every port, table, function and block called something else."""
    shutil.copytree(bundle.path, root)
    data: dict[str, Any] = json.loads((root / "manifest.json").read_text())
    new = Renaming()
    for component in data["components"].values():
        for block in component["blocks"]:
            rename_models(root, block, new)
            block["name"] = new(block["name"])
            block["functions"] = [new(f) for f in block["functions"]]
            for port in (*block["inputs"], *block["outputs"]):
                port["name"] = new(port["name"])
            for port in block["inputs"]:
                port["source"] = new.source(port["source"])
            block["other_shapes"] = {
                new(f): {new(p): shape for p, shape in ports.items()} for f, ports in block["other_shapes"].items()
            }
        if component["tables_file"] is not None:
            path = component["tables_file"]["path"]
            tables = {new(k): v for k, v in load_file(root / path).items()}
            (root / path).unlink()
            save_file(tables, root / path)
            component["tables_file"] = file_entry(root, path)
        for table in component["tables"]:
            table["name"] = new(table["name"])
        for given in component["inputs"]:
            given["name"] = new(given["name"])
            if given["feed"]["kind"] == "text_embedding":
                given["feed"]["unconditional"] = new(given["feed"]["unconditional"])
        for output in component["outputs"]:
            output["source"] = new.source(output["source"])
        component["load_order"] = {rate: [new(b) for b in names] for rate, names in component["load_order"].items()}
        component["default_function"] = new(component["default_function"])
    sampler = data["sampler"]
    for step in sampler["steps"]:
        step |= {"function": new(step["function"]), "reuse": step["reuse"] and new(step["reuse"])}
    sampler["ranges"] = {new(name): own for name, own in sampler["ranges"].items()}
    for own in sampler["ranges"].values():
        ends = {"input": new.source(own["input"]), "output": new.source(own["output"])}
        own |= {"blocks": [new(b) for b in own["blocks"]]} | ends
    for stage in data["decoding"]["stages"]:
        for piece in stage["pieces"]:
            piece["function"] = new(piece["function"])
    data["loading"] |= {"prediction": None, "made_from": None}
    for event in (e for s in data["loading"]["plan"]["sections"] for e in s["events"]):
        for kind in ("load", "run", "free"):
            if kind in event:
                component, _, block = event[kind].partition("/")
                event[kind] = f"{component}/{new(block)}"
        if "function" in event:
            event["function"] = new(event["function"])
    (root / "manifest.json").write_text(json.dumps(data))
    return toolchain.load_bundle(root)


@pytest.mark.slow
def test_a_bundle_of_other_names_gives_the_same_video(
    build: Callable[[Recipe], Bundle], recipe_data: dict[str, Any], tmp_path: Path
) -> None:
    whole = {
        **recipe_data,
        "target": "onnx",
        "sampler": recipe_data["sampler"] | {"reuse": {"steps": [1]}},
        "gate": {"mode": "none"},
        "transformer": recipe_data["transformer"] | {"frame_conditions": True},
    }
    bundle = build(parse_recipe(whole))
    other = renamed(bundle, tmp_path / "renamed")
    used = {s.function for s in bundle.manifest.sampler.steps}
    used |= {p.function for stage in bundle.manifest.decoding.stages for p in stage.pieces}  # type: ignore[union-attr]
    assert used == {"base", "merged", "tail"}
    old = {p.name for c in bundle.manifest.components.values() for b in c.blocks for p in (*b.inputs, *b.outputs)}
    now = {p.name for c in other.manifest.components.values() for b in c.blocks for p in (*b.inputs, *b.outputs)}
    assert old
    assert not old & now
    videos = [Player(b, warn=lambda _: None).video(PROMPT, 7) for b in (bundle, other)]
    assert torch.equal(*videos)
