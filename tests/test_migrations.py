"""Manifests of older versions are read as today's; what is no manifest is refused in one line."""

from __future__ import annotations

import copy
import json
import re
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from toolchain.errors import BundleError
from toolchain.formats.bundle import load_bundle
from toolchain.formats.loading import events_of, loads_of
from toolchain.formats.manifest import FORMAT_VERSION, DecodingEntry, Manifest
from toolchain.formats.migrations import migrated
from toolchain.models.open_sora_v1_2.prompts import suffixes
from toolchain.models.open_sora_v1_2.timesteps import timesteps

OLD: dict[str, Any] = json.loads((Path(__file__).parent / "golden/manifest_v1.json").read_text())
"""Of the recipe ``tiny``, as the last version that knew no other format wrote it; some of its layers left out."""
Change = Callable[[dict[str, Any]], object]


def old(change: Change | None = None) -> dict[str, Any]:
    data = copy.deepcopy(OLD)
    if change is not None:
        change(data)
    return data


def read(folder: Path, data: Any) -> Manifest:
    """A manifest through the door that players and everybody else use."""
    (folder / "manifest.json").write_text(data if isinstance(data, str) else json.dumps(data))
    return load_bundle(folder).manifest


@pytest.fixture
def manifest(tmp_path: Path) -> Manifest:
    return read(tmp_path, OLD)


# --- format 1 ----------------------------------------------------------------------------------------


def test_it_is_of_todays_version(manifest: Manifest) -> None:
    assert OLD["format_version"] == 1
    assert manifest.format_version == FORMAT_VERSION == 7
    assert Manifest.model_validate(manifest.model_dump(mode="json")) == manifest


def test_a_manifest_without_a_version(tmp_path: Path, manifest: Manifest) -> None:
    today = manifest.model_dump(mode="json", exclude={"format_version"})
    for data in (old(lambda m: m.pop("format_version")), today):
        assert refused(tmp_path, data).endswith("manifest.json' is damaged: KeyError: 'format_version'")


def test_todays_is_left_alone(tmp_path: Path, manifest: Manifest) -> None:
    data = manifest.model_dump(mode="json")
    assert migrated(copy.deepcopy(data)) == data
    assert read(tmp_path, data) == manifest


def test_inputs_say_what_feeds_them(manifest: Manifest) -> None:
    feeds = {
        name: {i.name: i.feed.model_dump() for i in component.inputs} for name, component in manifest.components.items()
    }
    assert feeds == {
        "text_encoder": {"input_ids": {"kind": "token_ids"}, "mask": {"kind": "token_mask"}},
        "transformer": {
            "x": {"kind": "latents"},
            "timestep": {"kind": "timestep"},
            "y": {"kind": "text_embedding", "unconditional": "null_text"},
            "mask": {"kind": "token_mask"},
            "fps": {"kind": "constant", "value": 24.0},
        },
        "vae": {"z": {"kind": "frames"}, "x_z": {"kind": "frames"}},
    }


def test_shapes_types_and_rates_of_inputs_stay(manifest: Manifest) -> None:
    for name, component in manifest.components.items():
        kept = [i.model_dump(exclude={"feed"}) for i in component.inputs]
        assert kept == [{k: v for k, v in i.items() if k != "meaning"} for i in OLD["components"][name]["inputs"]]


def test_outputs_say_what_they_give(manifest: Manifest) -> None:
    assert {n: [o.model_dump() for o in c.outputs] for n, c in manifest.components.items()} == {
        "text_encoder": [{"source": "final.y", "rate": "prompt", "gives": "text_embedding"}],
        "transformer": [{"source": "final.out", "rate": "step", "gives": "prediction"}],
        "vae": [
            {"source": "temporal_0_8.x_z", "rate": "chunk", "gives": "frames"},
            {"source": "spatial_00_15.pixels", "rate": "frames", "gives": "pixels"},
        ],
    }


def test_decoding_is_in_stages(manifest: Manifest) -> None:
    assert manifest.decoding is not None
    assert [s.model_dump() for s in manifest.decoding.stages] == [
        {"rate": "chunk", "layout": "clip", "pieces": [{"takes": 5, "gives": 17, "function": "base"}], "tiles": None},
        {
            "rate": "frames",
            "layout": "frames",
            "pieces": [{"takes": 1, "gives": 1, "function": "base"}] * 17,
            "tiles": None,
        },
    ]


def test_a_short_chunk_and_a_short_group() -> None:
    def change(m: dict[str, Any]) -> None:
        m["geometry"]["frames"] = 22
        m["decoding"]["frames_per_call"] = 4
        m["decoding"]["chunks"].append({"latents": 2, "frames": 5, "function": "tail"})

    decoding = DecodingEntry.model_validate(migrated(old(change))["decoding"])
    chunks, groups = ([(p.takes, p.gives, p.function) for p in s.pieces] for s in decoding.stages)
    assert chunks == [(5, 17, "base"), (2, 5, "tail")]
    assert groups == [(4, 4, "base")] * 5 + [(4, 2, "base")]


def test_prompts_get_their_suffix(manifest: Manifest) -> None:
    text = manifest.text
    assert text is not None
    assert [s.model_dump() for s in text.suffixes] == [{"label": "aesthetic score:", "text": " aesthetic score: 6.5."}]
    assert tuple(text.suffixes) == suffixes()  # as today's family asks for
    assert (text.cleaning, text.max_tokens, text.rate) == ("web-captions", 24, "prompt")


def test_prompts_without_a_score(tmp_path: Path) -> None:
    text = read(tmp_path, old(lambda m: m["text"].update(aesthetic_score=None))).text
    assert text is not None
    assert text.suffixes == []


def test_the_steps_are_the_samplers(manifest: Manifest) -> None:
    sampler, was = manifest.sampler, OLD["sampler"]
    new = {"guidance": "both", "reuse": None}
    assert [s.model_dump() for s in sampler.steps] == [s | new for s in was["steps"]]
    assert (sampler.ranges, sampler.difference) == ({}, "none")
    assert [s.timestep for s in sampler.steps] == was["timesteps"][: len(sampler.steps)]
    g = manifest.geometry
    schedule = timesteps(30, height=g.height, width=g.width, frames=g.frames)
    assert [s.timestep for s in sampler.steps] == list(schedule[:16])
    assert sampler.steps[-1].leap
    assert (sampler.guidance, sampler.once, sampler.each, sampler.time_scale) == (2.5, "prompt", "step", 1000)


def test_bytes_of_weights_are_by_precision(tmp_path: Path, manifest: Manifest) -> None:
    for component in manifest.components.values():
        assert [b.weight_bytes for b in component.blocks] == [{"float32": 4 * b.parameters} for b in component.blocks]
    halves = read(tmp_path, old(lambda m: m["components"]["vae"].update(precision="float16")))
    for block in halves.components["vae"].blocks:
        assert block.weight_bytes == {"float16": 2 * block.parameters}


def test_what_is_else_in_it_stays(manifest: Manifest) -> None:
    data = manifest.model_dump(mode="json")
    for key in ("name", "model", "target", "geometry", "memory_budget_bytes", "golden", "tools", "recipe"):
        assert data[key] == OLD[key]
    assert OLD["gate"]["mode"] == "every"
    assert data["gate"] == OLD["gate"] | {"mode": "release"}  # that was what it meant
    for name, component in data["components"].items():
        before = OLD["components"][name]
        for key in ("precision", "dims", "config", "tables_file", "tables", "load_order"):
            assert component[key] == before[key]
        assert component["default_function"] == "base"
        new = {"weight_bytes", "quantized", "quantization", "int8_inputs", "memory"}
        assert [{k: v for k, v in b.items() if k not in new} for b in component["blocks"]] == before["blocks"]
        assert all(b["quantized"] == {} and b["quantization"] is None for b in component["blocks"])


def test_frames_given_as_condition(tmp_path: Path) -> None:
    given = {"name": "x_mask", "dtype": "float32", "shape": [2, 5], "rate": "step", "meaning": "per latent frame"}
    found = read(tmp_path, old(lambda m: m["components"]["transformer"]["inputs"].append(given)))
    assert found.components["transformer"].inputs[-1].feed.kind == "frame_mask"


def test_a_bundle_with_the_encoder(tmp_path: Path) -> None:
    """The encoder's blocks were two more, whose inputs are pixels and frames."""

    def change(m: dict[str, Any]) -> None:
        vae = m["components"]["vae"]
        for rate, name, port in (("encode_frames", "spatial_encoder", "pixels"), ("encode_chunk", "encoder", "x_z")):
            block = copy.deepcopy(vae["blocks"][0]) | {"name": name, "artifact": f"vae/{name}", "rate": rate}
            block["files"] = [f | {"path": f"vae/{name}/{Path(f['path']).name}"} for f in block["files"]]
            block["outputs"] = [block["outputs"][0] | {"name": out} for out in ("mean", "logvar")]
            block["inputs"] = [block["inputs"][0] | {"name": port, "source": f"inputs.{port}"}]
            vae["blocks"].append(block)
            vae["load_order"][rate] = [name]
            vae["outputs"][rate] = [f"{name}.mean", f"{name}.logvar"]
            vae["inputs"].append(vae["inputs"][0] | {"name": port, "rate": rate})

    vae = read(tmp_path, old(change)).components["vae"]
    assert [(o.source, o.rate, o.gives) for o in vae.outputs[2:]] == [
        ("spatial_encoder.mean", "encode_frames", "mean"),
        ("spatial_encoder.logvar", "encode_frames", "log_variance"),
        ("encoder.mean", "encode_chunk", "mean"),
        ("encoder.logvar", "encode_chunk", "log_variance"),
    ]
    assert [i.feed.kind for i in vae.inputs] == ["frames", "frames", "pixels", "frames"]


def test_the_transformer_alone(tmp_path: Path) -> None:
    def change(m: dict[str, Any]) -> None:
        del m["components"]["text_encoder"], m["components"]["vae"]
        m.update(text=None, decoding=None)

    found = read(tmp_path, old(change))
    assert (list(found.components), found.text, found.decoding) == (["transformer"], None, None)


# --- format 3 ----------------------------------------------------------------------------------------


def followed(manifest: Manifest) -> list[tuple[str, str]]:
    """The plan's events by kind and block; functions are left out."""
    return [next(iter(e.items())) for e in events_of(manifest.loading.plan)]


def test_it_loads_what_stayed_once_and_everything_else_when_it_runs(tmp_path: Path) -> None:
    staying = OLD["components"]["transformer"]["blocks"][1]["name"]

    def change(m: dict[str, Any]) -> None:
        for name, component in m["components"].items():
            component["resident"] = [staying] if name == "transformer" else []

    manifest = read(tmp_path, old(change))
    assert (manifest.loading.prediction, manifest.loading.made_from) == (None, None)
    loads = loads_of(manifest.loading.plan)
    runs = Counter(block for block, _ in manifest.calls())
    assert loads == {block: 1 if block == f"transformer/{staying}" else n for block, n in runs.items()}
    events = followed(manifest)
    for place, (kind, block) in enumerate(events):
        if kind == "load" and block != f"transformer/{staying}":
            assert [k for k, b in events[place : place + 3] if b == block] == ["load", "run", "free"]
    last = max(i for i, (_, block) in enumerate(events) if block.startswith("transformer/"))
    assert events[last] == ("free", f"transformer/{staying}"), "what stays is freed with its component"


def test_its_budget_stays_and_is_that_of_all_weights_without_one(tmp_path: Path, manifest: Manifest) -> None:
    weights = sum(sum(b.weight_bytes.values()) for c in manifest.components.values() for b in c.blocks)
    assert manifest.loading.plan["budget_bytes"] == weights
    given = read(tmp_path, old(lambda m: m.update(memory_budget_bytes=5_000_000)))
    assert given.loading.plan["budget_bytes"] == 5_000_000


PLANS: dict[str, tuple[int, Callable[[list[Any]], object], str]] = {
    "a call too few": (0, lambda e: e.pop(1), "event .* runs .*, but the next call is"),
    "a load too few": (0, lambda e: e.pop(0), "event 0 runs .*, which is not loaded"),
    "two loads": (0, lambda e: e.insert(0, e[0]), "event 1 loads .*, which is loaded already"),
    "another function": (
        0,
        lambda e: e[1].update(function="merged"),
        r"event 1 runs .* \(merged\), but the next call is",
    ),
    "a free too few": (-1, lambda e: e.pop(), "never frees"),
    "a free too many": (-1, lambda e: e.append(e[-1]), "frees .*, which is not loaded"),
    "nothing": (-1, lambda e: e.clear(), "ends before"),
    "no event": (0, lambda e: e.insert(0, {"wait": "a"}), r"loading\.plan\.sections\.0\.events\.0"),
}


@pytest.mark.parametrize("name", PLANS)
def test_a_plan_that_contradicts_the_manifest_is_refused(tmp_path: Path, manifest: Manifest, name: str) -> None:
    section, change, said = PLANS[name]
    data = manifest.model_dump(mode="json")
    change(data["loading"]["plan"]["sections"][section]["events"])
    assert re.search(said, refused(tmp_path, data))


# --- what is refused ---------------------------------------------------------------------------------


def refused(folder: Path, data: Any) -> str:
    with pytest.raises(BundleError) as error:
        read(folder, data)
    assert error.value.exit_code == 2
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.mark.parametrize("version", [FORMAT_VERSION + 1, 10**20])
@pytest.mark.parametrize("more", [{}, {"components": "of another kind"}], ids=["same keys", "other keys"])
def test_a_newer_version(tmp_path: Path, version: int, more: dict[str, Any]) -> None:
    assert refused(tmp_path, old(lambda m: m.update(format_version=version, **more))) == (
        f"'{tmp_path}' has manifest version {version}, this program knows {FORMAT_VERSION}; update sora-compile"
    )


@pytest.mark.parametrize("version", [0, -1, "1", "two", 1.0, None, True, [1], {}], ids=repr)
def test_a_version_that_is_none(tmp_path: Path, version: Any) -> None:
    said = refused(tmp_path, old(lambda m: m.update(format_version=version)))
    assert said == f"'{tmp_path / 'manifest.json'}' is damaged: ValueError: format_version {version!r}"


DAMAGES: dict[str, tuple[Change, str]] = {
    "no sampler": (lambda m: m.pop("sampler"), "KeyError: 'sampler'"),
    "a sampler that is text": (lambda m: m.update(sampler="fast"), ""),
    "no frames per second": (lambda m: m["sampler"].pop("model_fps"), "KeyError: 'model_fps'"),
    "no components": (lambda m: m.pop("components"), "KeyError: 'components'"),
    "components in a list": (lambda m: m.update(components=[]), "AttributeError: "),
    "an input that there never was": (
        lambda m: m["components"]["vae"]["inputs"][0].update(name="zz"),
        "KeyError: 'zz'",
    ),
    "an input without its meaning": (lambda m: m["components"]["vae"]["inputs"][0].pop("meaning"), "KeyError: "),
    "an output that there never was": (
        lambda m: m["components"]["vae"]["outputs"].update(chunk=["temporal_0_8.zz"]),
        "KeyError: 'zz'",
    ),
    "an output of no block": (
        lambda m: m["components"]["vae"]["outputs"].update(chunk=["nobody.x_z"]),
        "components.vae: outputs: there is no 'nobody.x_z'",
    ),
    "a precision that there never was": (lambda m: m["components"]["vae"].update(precision="int8"), "KeyError: 'int8'"),
    "parameters that are text": (lambda m: m["components"]["vae"]["blocks"][0].update(parameters="many"), ""),
    "frames a call that are none": (lambda m: m["decoding"].update(frames_per_call=0), "ValueError: "),
    "chunks that are none": (lambda m: m["decoding"].update(chunks=None), "TypeError: "),
    "a chunk of a function that no block has": (
        lambda m: m["decoding"]["chunks"][0].update(function="tail"),
        "vae: no block of rate 'chunk' has the function 'tail'",
    ),
    "no table for the unconditional half": (
        lambda m: m["components"]["transformer"].update(tables=[]),
        "components.transformer: block 'embed' takes 'tables.",
    ),
    "a key that there never was": (lambda m: m.update(prefetch=1), "prefetch: "),
    "a path that leaves": (lambda m: m["recipe"].update(path="../recipe.yaml"), "recipe.path: path '../recipe.yaml'"),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_a_damaged_one(tmp_path: Path, name: str) -> None:
    change, said = DAMAGES[name]
    assert refused(tmp_path, old(change)).startswith(f"'{tmp_path / 'manifest.json'}' is damaged: {said}")


@pytest.mark.parametrize("text", ["", "{", "[1]", "null", "1", '"text"', "{}"], ids=repr)
def test_what_is_no_manifest(tmp_path: Path, text: str) -> None:
    assert refused(tmp_path, text).startswith(f"'{tmp_path / 'manifest.json'}' is damaged: ")
