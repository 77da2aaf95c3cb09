"""What Xcode and Netron show of an artifact: facts in it that change nothing of what is executed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import coremltools as ct
import onnx
import pytest
from support import contents, write_project

import toolchain
from toolchain.ir.labels import Labels
from toolchain.system.store import Store

CHEAP = ("gate.mode=none", "transformer.passes=[token-merge, partition]")
LABELS = Labels("m", "text_encoder", "layer_1", {"a": "tables.t", "b": "inputs.mask", "c": "layer_0.x"}, {"y": "text"})


def test_labels_in_words() -> None:
    assert LABELS.title == "m: block 'layer_1' of the text encoder, made by sora-compile"
    assert [LABELS.input(n) for n in "abc"] == [
        "constant 't' of the bundle's tables",
        "input 'mask' of the component",
        "output 'x' of block 'layer_0'",
    ]
    assert (LABELS.output("y"), LABELS.output("z")) == ("result 'text' of the component", "for later blocks")


@pytest.mark.slow
@pytest.mark.parametrize("target", ["coreml", "onnx"])
def test_artifacts_are_labelled(target: str, one_pair: Any, tmp_path: Path) -> None:
    project = write_project(tmp_path / "project", one_pair)
    store = Store(tmp_path / "store")

    def build(out: str, *changes: str) -> Path:
        recipe = toolchain.load_recipe(project / "recipe.yaml", [f"target={target}", *CHEAP, *changes])
        return toolchain.compile_recipe(recipe, tmp_path / out, base=project, store=store).path

    plain = build("plain")
    kept = contents(store.root / "artifacts")
    licensed = build("licensed", "transformer.license=Apache-2.0")
    assert contents(store.root / "artifacts") == kept  # the cache shares its files with bundles
    again = tmp_path / "again"
    licensed.rename(again)
    assert contents(build("licensed", "transformer.license=Apache-2.0")) == contents(again)

    show = {"coreml": xcode, "onnx": netron}[target]
    before, after = (show(folder / "transformer") for folder in (plain, again))
    assert after["license"] == "Apache-2.0" and not before["license"]
    assert after["title"].startswith("open-sora-v1.2: block 'pair_0' of the transformer")
    assert "constant 'rope' of the bundle's tables" in after["inputs"].values()
    assert after["inputs"]["x"].startswith("output '") and set(after["outputs"]) == {"x_out"}
    assert before["program"] == after["program"]
    toolchain.load_bundle(again).check_files()


def xcode(folder: Path) -> dict[str, Any]:
    spec = ct.utils.load_spec(str(folder / "pair_0.mlpackage"))
    assert {f.name for f in spec.description.functions} == {"base", "merged"}
    base = spec.description.functions[0]
    return {
        "title": spec.description.metadata.shortDescription,
        "license": spec.description.metadata.license,
        "inputs": {p.name: p.shortDescription for p in base.input},
        "outputs": {p.name: p.shortDescription for p in base.output},
        "program": spec.mlProgram.SerializeToString(deterministic=True),
    }


def netron(folder: Path) -> dict[str, Any]:
    model = onnx.load(folder / "pair_0/merged.onnx", load_external_data=False)
    facts = {p.key: p.value for p in model.metadata_props}
    return {
        "title": model.doc_string,
        "license": facts.get("license"),
        "inputs": {p.name: p.doc_string for p in model.graph.input},
        "outputs": {p.name: p.doc_string for p in model.graph.output},
        "program": [n.SerializeToString(deterministic=True) for n in model.graph.node],
    }
