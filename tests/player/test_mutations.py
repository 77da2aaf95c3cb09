"""A manifest with one thing changed is refused in one line, or what was changed is nothing that a player goes by."""

from __future__ import annotations

import copy
import itertools
import json
import re
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hollow import hollow_bundle

from benchmarks.mutations import mutants, opened, played
from toolchain.errors import BundleError
from toolchain.formats.bundle import Bundle, load_bundle, read_manifest
from toolchain.formats.manifest import FILE_NAME, Manifest

TARGETS = ("executorch", "coreml", "onnx")
COUNT = 300
"""Of mutants a target; the benchmark tries 1,000 of each, and plays what opens."""
HARMLESS = {
    "what is for people": r"name|model|tools.*|gate\..*|components\.\w+\.(config|dims|passes).*"
    r"|.*\.(structure|parameters|int8_inputs|weight_bytes|activations|accuracy|quantiz\w+)(\..*)?"
    r"|loading\.(prediction|made_from)\..*|.*\.memory(\..*)?|golden.*",
    "what nobody asks for": r".*\.blocks\.\*\.functions(\.\*)?",
    "what the target or the files' check refuses": r"target.*|.*\.(sha256|bytes|path|precision)"
    r"|.*\.blocks\.\*\.(in|out)puts\.\*\.name",
    "what is said once": r"geometry\.fps|sampler\.(guidance|leap.*|steps\.\*\.timestep)|text\.(suffixes.*|cleaning)"
    r"|.*\.feed(\.\w+)?|memory_budget_bytes|loading\.plan\.budget_bytes",
}
"""Keys whose values may be others in a manifest that opens, and why."""
NAMED = ("blocks", "inputs", "outputs", "tables", "functions", "files")
"""Lists whose order says nothing."""


def differing(one: Any, other: Any, key: str = "") -> Iterator[str]:
    """Keys at which two values differ, with ``*`` for places in lists."""
    if one == other:
        return
    if isinstance(one, dict) and isinstance(other, dict):
        pairs = [(k, one.get(k), other.get(k)) for k in {**one, **other}]
    elif isinstance(one, list) and isinstance(other, list) and len(one) == len(other):
        pairs = [("*", *both) for both in zip(one, other, strict=True)]
    else:
        yield key
        return
    for k, mine, its in pairs:
        yield from differing(mine, its, f"{key}.{k}".removeprefix("."))


def ordered(value: Any, key: str = "") -> Any:
    """Lists whose order says nothing in one order."""
    if isinstance(value, dict):
        return {k: ordered(v, k) for k, v in value.items()}
    if isinstance(value, list):
        items = [ordered(v) for v in value]
        return sorted(items, key=json.dumps) if key in NAMED else items
    return value


def harmful(one: Any, other: Any) -> list[str]:
    """Keys that differ, and that are not listed as harmless."""
    found = set(differing(one, other))
    return sorted(key for key in found if not any(re.fullmatch(keys, key) for keys in HARMLESS.values()))


@pytest.fixture(scope="module")
def manifests(recipe_data: dict[str, Any], source: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Manifests of the whole model by target, as plain data; do not edit them in place."""
    folder = tmp_path_factory.mktemp("hollow")
    made = {t: hollow_bundle(recipe_data | {"target": t}, source, folder / t) for t in TARGETS}
    return {t: json.loads((path / FILE_NAME).read_text()) for t, path in made.items()}


@pytest.mark.parametrize("target", TARGETS)
def test_mutants_are_refused_or_harmless(manifests: dict[str, Any], target: str, tmp_path: Path) -> None:
    file, outcomes, wrong = tmp_path / FILE_NAME, Counter[str](), []
    unchanged = read_manifest(copy.deepcopy(manifests[target]), file).model_dump(mode="json")
    in_order = ordered(unchanged)
    for mutant in mutants(manifests[target], COUNT):
        found = opened(mutant, file)
        outcomes[type(found).__name__] += 1
        if isinstance(found, str):
            assert found.startswith(f"'{file}' ") or "has manifest version" in found
            assert len(found) < 1000
        else:
            read = found.model_dump(mode="json")
            if harmful(unchanged, read) and harmful(in_order, ordered(read)):
                wrong.append((mutant.key, mutant.change, harmful(unchanged, read)))
    assert not wrong
    assert outcomes["str"] > COUNT / 2


@pytest.mark.slow
def test_a_sample_of_what_opens_is_played(bundle: Bundle) -> None:
    """In processes with limited memory and time; the benchmark plays them all, on every target."""
    file = bundle.path / FILE_NAME
    found = (opened(m, file) for m in mutants(json.loads(file.read_text()), 100, seed=1))
    survivors = itertools.islice((m for m in found if isinstance(m, Manifest)), 5)
    assert {played(Bundle(bundle.path, m)).outcome for m in survivors} <= {"played", "refused by the player"}


# --- contradictions, one by one ----------------------------------------------------------------------

Change = Callable[[dict[str, Any]], object]


def block(m: dict[str, Any], component: str, place: int) -> Any:
    return m["components"][component]["blocks"][place]


CONTRADICTIONS: dict[str, tuple[Change, str]] = {
    "frames beyond all": (lambda m: m["geometry"].update(frames=1 << 40), "geometry.frames: 1099511627776 does not go"),
    "a height below zero": (lambda m: m["geometry"].update(height=-7), "geometry.height: -7 is below 1"),
    "a height by itself": (lambda m: m["geometry"].update(height=41), "decoding.stages: they give .22, 3, 40, 48"),
    "latents of another size": (lambda m: m["geometry"].update(latent_width=7), "components.transformer.inputs.x: "),
    "no frames a second": (lambda m: m["geometry"].update(fps=0), "geometry.fps: 0 is below 1"),
    "a step's dt": (lambda m: m["sampler"]["steps"][1].update(dt=0.5), "sampler.steps.1.dt: 0.5, but by the timesteps"),
    "timesteps that rise": (lambda m: m["sampler"]["steps"][0].update(timestep=3.0), "sampler.steps.0.timestep: 3.0"),
    "a step too few": (lambda m: m["sampler"]["steps"].pop(0), "but the leap's rule says"),
    "a chunk that takes too much": (
        lambda m: m["decoding"]["stages"][0]["pieces"][0].update(takes=1 << 40),
        "decoding.stages.0.pieces: they take",
    ),
    "a last group that takes too much": (
        lambda m: m["decoding"]["stages"][1]["pieces"][-1].update(takes=1 << 40),
        "decoding.stages.1.pieces.5: 'base' takes .4, 4, 5, 6. as frames",
    ),
    "a chunk that gives too much": (
        lambda m: m["decoding"]["stages"][0]["pieces"][1].update(gives=18),
        r"decoding.stages.0.pieces.1.gives: 18, but 'tail' gives",
    ),
    "a group that is filled up first": (
        lambda m: m["decoding"]["stages"][1]["pieces"].reverse(),
        "decoding.stages.1.pieces.0.gives: 2, but 'base' gives 4 frames",
    ),
    "latents that nothing takes": (
        lambda m: next(i for i in m["components"]["transformer"]["inputs"] if i["feed"]["kind"] == "latents").update(
            feed={"kind": "constant", "value": 0.0}
        ),
        "components.transformer.inputs: none is fed latents",
    ),
    "bytes of a call": (
        lambda m: block(m, "vae", 0)["memory"]["base"].update(waiting=1 << 40),
        "a call of 'vae/.*' holds .* bytes, but its memory is",
    ),
    "a prompt's length": (lambda m: m["text"].update(max_tokens=1 << 40), "is not of text.max_tokens 1099511627776"),
    "an input beyond all": (
        lambda m: m["components"]["transformer"]["inputs"][4].update(shape=[1 << 40]),
        "components.transformer.inputs.fps: shape .1099511627776. takes",
    ),
    "an input that is wired elsewhere": (
        lambda m: block(m, "transformer", 2)["inputs"][4].update(source="caption.text"),
        "components.transformer.blocks.pair_0.inputs.x: 'merged' takes",
    ),
    "a circle": (
        lambda m: block(m, "transformer", 2)["inputs"][4].update(source="pair_0.x_out"),
        "'pair_0' does not run before 'pair_0'",
    ),
    "a shape of one function": (
        lambda m: block(m, "vae", 0)["other_shapes"]["tail"].update(x=[1, 16, 3, 5, 6]),
        "memory.tail.ports|'tail' takes",
    ),
    "two blocks of one artifact": (
        lambda m: block(m, "vae", 1).update(artifact=block(m, "vae", 0)["artifact"], files=block(m, "vae", 0)["files"]),
        "artifacts of blocks: .* is there twice",
    ),
    "an artifact without files": (lambda m: block(m, "vae", 0).update(files=[]), "has no files"),
    "a path of two lines": (lambda m: m["recipe"].update(path="a\nb"), "recipe: .* is no path"),
    "memory for weights": (
        lambda m: block(m, "vae", 0)["memory"]["base"].update(weights=1),
        "memory.base.weights: 1 bytes, but the block's have",
    ),
    "tables beyond their file": (
        lambda m: m["components"]["transformer"]["tables_file"].update(bytes=1),
        "components.transformer.tables: they take",
    ),
    "a section without calls, many times": (
        lambda m: m["loading"]["plan"]["sections"].append({"times": 1 << 40, "events": []}),
        "is followed 1099511627776 times, and runs nothing",
    ),
    "another run than the plan's": (
        lambda m: m["loading"]["made_from"]["run"]["phases"][2].update(times=1 << 40),
        "loading.made_from.run.phases: call",
    ),
    "bytes of loads": (lambda m: m["loading"]["prediction"].update(loads_bytes=7), "loading.prediction.loads_bytes: 7"),
    "not a number": (lambda m: m["sampler"].update(guidance=float("nan")), "sampler.guidance: nan is NaN or infinite"),
    "a number as text": (lambda m: m["geometry"].update(fps="8"), "geometry.fps: input should be a valid integer"),
}


@pytest.mark.parametrize("name", CONTRADICTIONS)
def test_a_contradiction(manifests: dict[str, Any], name: str, tmp_path: Path) -> None:
    change, said = CONTRADICTIONS[name]
    data = copy.deepcopy(manifests["executorch"])
    change(data)
    with pytest.raises(BundleError, match=said) as error:
        read_manifest(data, tmp_path / FILE_NAME)
    assert "\n" not in str(error.value)


def test_a_key_that_is_there_twice(manifests: dict[str, Any], tmp_path: Path) -> None:
    text = json.dumps(manifests["executorch"])
    (tmp_path / FILE_NAME).write_text(text.replace('"fps": 8', '"fps": 8, "fps": 9', 1))
    with pytest.raises(BundleError, match="a key is there twice"):
        load_bundle(tmp_path)
