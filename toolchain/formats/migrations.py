"""Older manifests brought to today's format, one version at a time; the history is in docs/manifest.md."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from itertools import groupby
from typing import Any

from toolchain.formats.calls import Round, StepCalls, rounds
from toolchain.formats.manifest import FORMAT_VERSION, DecodingEntry
from toolchain.formats.schedule import BASE

Data = dict[str, Any]


def migrated(data: Data) -> Data:
    """A manifest's data in today's format; it may be changed in place.

    Raises:
        KeyError, TypeError, ValueError: the data is not what its version says.
    """
    for version in range(int(data["format_version"]), FORMAT_VERSION):
        data = _STEPS[version](data)
    return data


def _from_1(data: Data) -> Data:
    """Format 1 had fixed names for inputs, results and tables; from 2 on the manifest says what each is for."""
    sampler = data["sampler"]
    feeds: Mapping[str, Data] = {
        "x": {"kind": "latents"},
        "timestep": {"kind": "timestep"},
        "y": {"kind": "text_embedding", "unconditional": "null_text"},
        "mask": {"kind": "token_mask"},
        "fps": {"kind": "constant", "value": sampler.pop("model_fps")},
        "x_mask": {"kind": "frame_mask"},
        "input_ids": {"kind": "token_ids"},
        "z": {"kind": "frames"},
        "x_z": {"kind": "frames"},
        "pixels": {"kind": "pixels"},
    }
    gives = {"y": "text_embedding", "out": "prediction", "x_z": "frames", "mean": "mean", "logvar": "log_variance"}
    gives["pixels"] = "pixels"
    for component in data["components"].values():
        for given in component["inputs"]:
            del given["meaning"]
            given["feed"] = dict(feeds[given["name"]])
        component["outputs"] = [
            {"source": source, "rate": rate, "gives": gives[source.partition(".")[2]]}
            for rate, sources in component["outputs"].items()
            for source in sources
        ]
        component["passes"] = ""  # format 1 wrote them in another way
        size = {"float16": 2, "float32": 4}[component["precision"]]
        for block in component["blocks"]:
            block["weight_bytes"] = {component["precision"]: size * block["parameters"]}
    for gone in ("timesteps", "merged_steps"):
        del sampler[gone]
    if data["text"] is not None:
        score = data["text"].pop("aesthetic_score")
        label = "aesthetic score:"
        data["text"]["suffixes"] = [] if score is None else [{"label": label, "text": f" {label} {score:.1f}."}]
        data["text"]["cleaning"] = "web-captions"
    if data["decoding"] is not None:
        data["decoding"] = {"stages": _stages(data["decoding"], data["geometry"]["frames"])}
    return data | {"format_version": 2}


def _from_2(data: Data) -> Data:
    """Until format 2 weights were stored as plain numbers."""
    for component in data["components"].values():
        for block in component["blocks"]:
            block["quantized"], block["quantization"] = {}, None
    return data | {"format_version": 3}


def _from_3(data: Data) -> Data:
    """Until format 3 a block was loaded when it was to run, and freed then or, if ``resident``, with its component."""
    components, sampler = data["components"], data["sampler"]
    for component in components.values():
        component.setdefault("default_function", BASE)
    text = data["text"].get("rate", "prompt") if data["text"] else "prompt"
    steps = [StepCalls(s["function"]) for s in sampler["steps"]]
    stages = DecodingEntry.model_validate(data["decoding"]).stages if data["decoding"] else []
    once, each = sampler.get("once", "prompt"), sampler.get("each", "step")
    sections: list[Data] = []
    weights = 0
    for name, group in groupby(
        rounds(components, steps, stages, text=text, once=once, each=each), lambda r: r.component
    ):
        events = list(_loaded_when_needed(name, components[name], group))
        sections += [{"times": 1, "events": events}] if events else []
    for component in components.values():
        weights += sum(sum(b["weight_bytes"].values()) for b in component["blocks"])
        del component["resident"]
    budget = data["memory_budget_bytes"] or max(1, weights)
    plan = {"version": 1, "budget_bytes": budget, "sections": sections}
    return data | {"format_version": 4, "loading": {"plan": plan, "prediction": None, "made_from": None}}


def _from_4(data: Data) -> Data:
    """Until format 4 every step computed all blocks, for both halves of guidance."""
    for step in data["sampler"]["steps"]:
        step["guidance"], step["reuse"] = "both", None
    data["sampler"] |= {"difference": "none", "ranges": {}, "rule": None}
    return data | {"format_version": 5}


def _from_5(data: Data) -> Data:
    """Until format 5 gate ``every`` was what is ``release`` since."""
    if data["gate"]["mode"] == "every":
        data["gate"]["mode"] = "release"
    return data | {"format_version": 6}


def _from_6(data: Data) -> Data:
    """Until format 6 every stage of decoding took whole frames."""
    for stage in data["decoding"]["stages"] if data["decoding"] else []:
        stage["tiles"] = None
    return data | {"format_version": 7}


def _loaded_when_needed(name: str, component: Data, group: Iterable[Round]) -> Iterator[Data]:
    blocks = {b["name"]: b for b in component["blocks"]}
    held: list[str] = []
    for round_ in group:
        for own in component["load_order"].get(round_.rate, []):
            function = round_.function if round_.function in blocks[own]["functions"] else component["default_function"]
            if own not in held:
                yield {"load": f"{name}/{own}"}
                held.append(own)
            yield {"run": f"{name}/{own}", "function": function}
            if own not in component["resident"]:
                held.remove(own)
                yield {"free": f"{name}/{own}"}
    yield from ({"free": f"{name}/{own}"} for own in held)


def _stages(decoding: Data, frames: int) -> list[Data]:
    """Chunks of latents, then groups of frames."""
    together = int(decoding["frames_per_call"])
    given = sum(c["frames"] for c in decoding["chunks"])
    if frames != given:  # before frames are counted out, which takes long if they are absurdly many
        raise ValueError(f"geometry.frames: {frames}, but decoding.chunks give {given}")
    chunks = [{"takes": c["latents"], "gives": c["frames"], "function": c["function"]} for c in decoding["chunks"]]
    groups = [
        {"takes": together, "gives": min(together, frames - start), "function": "base"}
        for start in range(0, frames, together)
    ]
    return [
        {"rate": "chunk", "layout": "clip", "pieces": chunks},
        {"rate": "frames", "layout": "frames", "pieces": groups},
    ]


_STEPS: Mapping[int, Callable[[Data], Data]] = {1: _from_1, 2: _from_2, 3: _from_3, 4: _from_4, 5: _from_5, 6: _from_6}
"""From each older version to the next."""
