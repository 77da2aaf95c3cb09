"""What a manifest may say of steps that leave out blocks, or half of the guidance, and what contradicts it."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable
from typing import Any

import pytest
from pydantic import ValidationError
from test_migrations import OLD

from toolchain.formats.manifest import Manifest
from toolchain.formats.migrations import migrated

Change = Callable[[dict[str, Any]], object]


def alone(change: Change | None = None) -> dict[str, Any]:
    """A manifest of the denoiser alone, whose steps 1, 2 and 4 leave out the pair, and whose last two are conditional.

    Its plan loads what runs when it runs.
    """
    data = migrated(copy.deepcopy(OLD))
    data |= {"text": None, "decoding": None, "components": {"transformer": data["components"]["transformer"]}}
    sampler, denoiser = data["sampler"], data["components"]["transformer"]
    sampler["steps"], sampler["leap"] = sampler["steps"][:6], None
    for i, step in enumerate(sampler["steps"]):
        step |= {"leap": False, "reuse": "pairs" if i in (1, 2, 4) else None, "function": "merged" if i < 2 else "base"}
        step |= {"guidance": "conditional", "function": "base_conditional"} if i > 3 else {}
    pairs = {"blocks": ["pair_0"], "input": "embed.x_out", "output": "pair_0.x_out", "bytes": 2 * 80 * 128 * 4}
    sampler |= {"ranges": {"pairs": pairs}, "difference": "last"}
    for block in denoiser["blocks"]:
        if block["rate"] == "step":
            block["functions"].append("base_conditional")
            ports = [p for p in block["inputs"] + block["outputs"] if p["shape"][0] == 2]
            block["other_shapes"] = {"base_conditional": {p["name"]: [1, *p["shape"][1:]] for p in ports}}
    if change is not None:
        change(data)
    calls = [("caption", "base")]
    for step in sampler["steps"]:
        left_out = sampler["ranges"].get(step["reuse"], {"blocks": []})["blocks"]
        for block in denoiser["blocks"]:
            if block["rate"] == "step" and block["name"] not in left_out:
                own = step["function"] if step["function"] in block["functions"] else "base"
                calls.append((block["name"], own))
    events = [
        event
        for b, f in calls
        for event in (
            {"load": f"transformer/{b}"},
            {"run": f"transformer/{b}", "function": f},
            {"free": f"transformer/{b}"},
        )
    ]
    data["loading"]["plan"]["sections"] = [{"times": 1, "events": events}]
    return data


def test_a_manifest_that_reuses() -> None:
    manifest = Manifest.model_validate(alone())
    assert Manifest.model_validate_json(manifest.model_dump_json()) == manifest
    runs = [block.partition("/")[2] for block, _ in manifest.calls()]
    whole, less = ["embed", "pair_0", "final"], ["embed", "final"]
    assert runs == ["caption", *whole, *less, *less, *whole, *less, *whole]
    assert [s.reuse for s in manifest.sampler.plan()] == [None, "pairs", "pairs", None, "pairs", None]


def _range(**changes: Any) -> Change:
    return lambda d: d["sampler"]["ranges"]["pairs"].update(changes)


def _step(i: int, **changes: Any) -> Change:
    return lambda d: d["sampler"]["steps"][i].update(changes)


DAMAGES: dict[str, tuple[Change, str]] = {
    "a range that there is not": (_step(1, reuse="others"), "a step reuses 'others', which is no range"),
    "a range that nothing reuses": (
        lambda d: d["sampler"]["ranges"].update(more=d["sampler"]["ranges"]["pairs"]),
        "ranges: no step reuses 'more'",
    ),
    "a first step that reuses": (_step(0, reuse="pairs"), "reuse.steps: no step before step 0 computes all of 'pairs'"),
    "no block": (
        _range(blocks=["pair_7"]),
        "sampler.ranges.pairs: blocks do not follow one another in load_order.step",
    ),
    "a block of another rate": (_range(blocks=["caption"]), "sampler.ranges.pairs: blocks do not follow one another"),
    "blocks in another order": (_range(blocks=["final", "pair_0"]), "sampler.ranges.pairs: blocks do not follow"),
    "no blocks": (_range(blocks=[]), "List should have at least 1 item"),
    "another input": (_range(input="embed.t"), "input 'embed.t' does not go from an earlier block into the first one"),
    "an input that comes later": (_range(input="final.out"), "input 'final.out' does not go from an earlier block"),
    "an input of the component": (_range(input="inputs.x"), "input 'inputs.x' does not go from an earlier block"),
    "an input in another shape": (_range(input="embed.t_mlp"), "input and output differ in their shape or type"),
    "another output": (_range(output="pair_0.y"), "what leaves its blocks is ['pair_0.x_out'], not 'pair_0.y' alone"),
    "more that comes out": (
        lambda d: _range(blocks=["embed", "pair_0"], input="caption.text")(d),
        "input 'caption.text' does not go from an earlier block",
    ),
    "other bytes": (_range(bytes=1), "sampler.ranges.pairs: bytes are 1, but what is kept has 81920"),
    "both halves of one": (
        lambda d: (
            _step(3, guidance="conditional", function="base_conditional")(d),
            _step(4, guidance="both", function="base")(d),
        ),
        "reuse.steps: step 4 computes both halves of guidance, but",
    ),
    "a conditional step that calls both halves": (
        _step(5, function="base"),
        "sampler.steps.5: 'base' of block 'embed' takes latents [2, 4, 5, 8, 8], which is not what guidance 'cond",
    ),
    "a step of both halves that calls one": (
        _step(3, function="base_conditional"),
        "sampler.steps.3: 'base_conditional' of block 'embed' takes latents [1, 4, 5, 8, 8], which is not",
    ),
    "a block that lacks the conditional half": (
        lambda d: d["components"]["transformer"]["blocks"][3]["functions"].remove("base_conditional"),
        "sampler.steps.4: block 'final' lacks 'base_conditional'",
    ),
    "no difference that is kept": (_step(3, difference="last"), "Extra inputs"),
    "a first step that is conditional": (
        lambda d: [_step(i, guidance="conditional", function="base_conditional")(d) for i in range(6)],
        "conditional.difference: no step before step 0 computes both halves",
    ),
    "a difference that nothing takes": (
        lambda d: [_step(i, guidance="both", function="base")(d) for i in (4, 5)],
        "difference is 'last', but no step is conditional",
    ),
}


def ruled(data: dict[str, Any]) -> None:
    """Of all the steps a rule decides."""
    for step in data["sampler"]["steps"]:
        step |= {"reuse": None, "guidance": "both", "function": "base"}
    rule = {"threshold": 0.1, "polynomial": [2.0, 0.5], "first": 2, "last": 1, "range": "pairs"}
    data["sampler"] |= {"difference": "none", "rule": rule | {"observes": "embed.t_mlp", "bytes": 2 * 768 * 4}}


def _rule(**changes: Any) -> Change:
    return lambda d: (ruled(d), d["sampler"]["rule"].update(changes))


DAMAGES |= {
    "a rule beside steps": (lambda d: (ruled(d), _step(1, reuse="pairs")(d)), "rule: it chooses the steps of 'pairs'"),
    "a rule for no range": (_rule(range="others"), "rule: it chooses the steps of 'others'"),
    "a rule that saves nothing": (_rule(first=6), "reuse.rule: the first 6 and the last 1 of 6 denoiser calls"),
    "a rule that observes nothing": (_rule(observes="embed.z"), "sampler.rule: 'embed.z' comes out of no block of a"),
    "a rule that observes the range": (_rule(observes="pair_0.x_out"), "sampler.rule: 'pair_0.x_out' comes out of no"),
    "other bytes of a rule": (_rule(bytes=3), "sampler.rule: bytes are 3, but what it observes has 6144"),
}


def test_a_manifest_with_a_rule() -> None:
    manifest = Manifest.model_validate(alone(ruled))
    assert Manifest.model_validate_json(manifest.model_dump_json()) == manifest
    assert len(list(manifest.calls())) == 1 + 3 * 6


@pytest.mark.parametrize("name", DAMAGES)
def test_a_manifest_that_contradicts_itself(name: str) -> None:
    change, said = DAMAGES[name]
    with pytest.raises(ValidationError, match=re.escape(said)):
        Manifest.model_validate(alone(change))


def test_a_plan_that_runs_what_is_left_out() -> None:
    data = alone()
    for step in data["sampler"]["steps"]:
        step["reuse"] = None
    data["sampler"]["ranges"] = {}
    with pytest.raises(ValidationError, match=r"event .* runs .*, but the next call is 'transformer/pair_0'"):
        Manifest.model_validate(data)
