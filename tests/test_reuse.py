"""Which steps may leave out what, what is kept for them, and what a manifest may say of it."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError
from test_migrations import OLD

import toolchain
from toolchain.errors import RecipeError, SoraCompileError
from toolchain.formats.calls import STEP
from toolchain.formats.manifest import Manifest
from toolchain.formats.migrations import migrated
from toolchain.formats.recipe_file import find_recipe, load_recipe
from toolchain.formats.reuse import check_reuse, kept_after
from toolchain.formats.schedule import StaticLeap, plan_steps
from toolchain.planning.loading.run import Call
from toolchain.planning.plan import Plan

TIMES = [1000.0, 800.0, 600.0, 400.0, 200.0, 100.0]


# --- steps -------------------------------------------------------------------------------------------


def test_steps_say_what_they_leave_out() -> None:
    steps = plan_steps(TIMES, merged_steps=2, conditional_steps=[1, 4], reuse={"a": [2, 4], "b": [5]}, groups=2)
    assert [s.function for s in steps] == [
        "merged",
        "merged_conditional",
        "base",
        "base_2",
        "base_conditional_2",
        "base_2",
    ]
    assert [s.guidance == "conditional" for s in steps] == [False, True, False, False, True, False]
    assert [s.reuse for s in steps] == [None, None, "a", None, "a", "b"]
    plain = plan_steps(TIMES)
    assert [(s.t, s.dt) for s in steps] == [(s.t, s.dt) for s in plain]


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"reuse": {"a": [6]}}, r"^reuse\.steps: there is no step 6; of 6 denoiser calls, choose 0 to 5$"),
        ({"reuse": {"a": [3]}, "leap": StaticLeap(after=2)}, r"^reuse\.steps: there is no step 3; of 3 denoiser"),
        ({"reuse": {"a": [-1]}}, r"^reuse\.steps: there is no step -1"),
        ({"conditional_steps": [9]}, r"^conditional\.steps: there is no step 9"),
        ({"reuse": {"a": [1, 2], "b": [2]}}, r"^reuse\.steps: step 2 is in two lists"),
    ],
)
def test_places_that_are_none(options: dict[str, Any], said: str) -> None:
    with pytest.raises(RecipeError, match=said):
        plan_steps(TIMES, **options)


@dataclass(frozen=True)
class Step:
    guidance: Any
    reuse: str | None


RANGES = {"a": ["1", "2"], "b": ["2", "3"], "c": ["4"], "all": ["1", "2", "3", "4"]}
STEPS = st.builds(Step, st.sampled_from(["both", "conditional"]), st.sampled_from([None, None, *RANGES]))


@given(st.lists(STEPS, max_size=8), st.sampled_from(["none", "last"]))
@settings(max_examples=300, deadline=None)
def test_what_is_needed_was_computed_and_is_kept_until_then(steps: list[Step], difference: Any) -> None:
    """Played block by block: which step made what is there when it is wanted."""
    made: dict[str, int] = {}
    needed = {name: [False] * len(steps) for name in RANGES}
    right = True
    halves = 0
    for i, step in enumerate(steps):
        left_out = RANGES[step.reuse] if step.reuse else []
        if step.reuse:
            since = made.get(step.reuse)
            if since is None:
                right = False
                break
            for j in range(since, i):
                needed[step.reuse][j] = True
            if step.guidance == "both" and steps[since].guidance == "conditional":
                right = False
        if step.guidance == "conditional" and difference == "last" and not halves:
            right = False
        halves += step.guidance == "both"
        for name, blocks in RANGES.items():
            if all(b not in left_out for b in blocks):
                made[name] = i
    if not right:
        with pytest.raises(RecipeError, match=r"^(reuse|conditional)\.(steps|difference): .*step \d"):
            check_reuse(steps, RANGES, difference)
        return
    check_reuse(steps, RANGES, difference)
    assert kept_after(steps, RANGES) == needed


# --- recipes -----------------------------------------------------------------------------------------

REFUSED: dict[str, tuple[list[str], str]] = {
    "the first step": (["sampler.reuse={steps: [0]}"], "sampler: reuse.steps: no step before step 0 computes all of"),
    "a step twice": (["sampler.reuse={steps: [1, 1]}"], "sampler.reuse.0.steps: step 1 is listed twice"),
    "no step": (["sampler.reuse={steps: []}"], "sampler.reuse.0.steps: list should have at least 1 item"),
    "a step that there is not": (["sampler.reuse={steps: [6]}"], "sampler: reuse.steps: there is no step 6; of 6"),
    "a step after the leap": (
        ["sampler.reuse={steps: [4]}", "sampler.leap=3"],
        "sampler: reuse.steps: there is no step 4; of 4",
    ),
    "a key that is none": (["sampler.reuse={step: [1]}"], "sampler.reuse.0.step: unknown key; did you mean 'steps'?"),
    "one block": (["sampler.reuse={steps: [1], blocks: [pair_0]}"], "sampler.reuse.0.blocks: list should have at"),
    "the same blocks twice": (
        ["sampler.reuse=[{steps: [1]}, {steps: [2]}]"],
        "sampler: reuse: two entries are for the same blocks; list their steps in one",
    ),
    "one range by two names": (
        ["sampler.reuse=[{steps: [1]}, {steps: [2], blocks: [pair_0, pair_3]}]"],
        "sampler.reuse: two entries are for the blocks pair_0 to pair_3; list their steps in one",
    ),
    "no block": (
        ["sampler.reuse={steps: [1], blocks: [pair_0, pairs_3]}"],
        "sampler.reuse.blocks: no block of a step is called 'pairs_3'; did you mean 'pair_3'?",
    ),
    "a block that runs once a prompt": (
        ["sampler.reuse={steps: [1], blocks: [caption, pair_3]}"],
        "sampler.reuse.blocks: no block of a step is called 'caption'; those of a step are embed, pair_0, ",
    ),
    "the last block first": (
        ["sampler.reuse={steps: [1], blocks: [pair_2, pair_1]}"],
        "sampler.reuse.blocks: 'pair_1' runs before 'pair_2'; name the first block first",
    ),
    "several values come out": (
        ["sampler.reuse={steps: [1], blocks: [embed, pair_1]}"],
        "sampler.reuse.blocks: embed to pair_1 cannot be reused: one value has to come out of them, and that is "
        "embed.t, embed.t_mlp, pair_1.x_out",
    ),
    "another shape comes out": (
        ["sampler.reuse={steps: [1], blocks: [pair_1, final]}"],
        "sampler.reuse.blocks: pair_1 to final cannot be reused: one value has to go into 'pair_1' that is alike "
        "'final.out', which comes out, in shape and type, and there is none",
    ),
    "neither steps nor a rule": (
        ["sampler.reuse={blocks: [pair_0, pair_1]}"],
        "sampler.reuse.0: give the steps that reuse, or a rule that chooses them",
    ),
    "steps and a rule": (
        ["sampler.reuse={steps: [1], rule: {threshold: 0.1}}"],
        "sampler.reuse.0: give the steps that reuse, or a rule that chooses them",
    ),
    "steps that observe": (
        ["sampler.reuse={steps: [1], observes: embed.t}"],
        "sampler.reuse.0: observes: steps that are listed observe nothing; give a rule, or leave it out",
    ),
    "a rule beside steps": (
        ["sampler.reuse=[{rule: {threshold: 0.1}}, {steps: [1], blocks: [pair_1, pair_2]}]"],
        "sampler: reuse: a rule chooses the steps of one range; list no other entry beside it",
    ),
    "a rule that saves nothing": (
        ["sampler.reuse={rule: {threshold: 0.1, first: 2, last: 2}}", "sampler.leap=3"],
        "sampler: reuse.rule: the first 2 and the last 2 of 4 denoiser calls compute all",
    ),
    "a rule without a threshold": (
        ["sampler.reuse={rule: {treshold: 0.1}}"],
        "sampler.reuse.0.rule.treshold: unknown key; did you mean 'threshold'?",
    ),
    "a rule that observes nothing": (
        ["sampler.reuse={rule: {threshold: 0.1}, observes: embed.z}"],
        "sampler.reuse.observes: 'embed.z' comes out of no block of a step before the range; there are embed.t, embed.",
    ),
    "a rule that observes what comes later": (
        ["sampler.reuse={rule: {threshold: 0.1}, observes: pair_0.x_out}"],
        "sampler.reuse.observes: 'pair_0.x_out' comes out of no block of a step before the range; there are embed.t",
    ),
    "both halves of one": (
        ["sampler.conditional={steps: [1]}", "sampler.reuse={steps: [2]}"],
        "sampler: reuse.steps: step 2 computes both halves of guidance, but the last step that computed",
    ),
    "no last difference": (
        ["sampler.conditional={steps: [0], difference: last}"],
        "sampler: conditional.difference: no step before step 0 computes both halves",
    ),
    "no function of the conditional half": (
        ["sampler.conditional={steps: [3]}", "transformer.passes=partition"],
        "sampler.conditional: needs a pass in transformer.passes that provides 'base_conditional'; installed: ",
    ),
}


def tiny(*overrides: str) -> Plan:
    path = find_recipe("tiny")
    alone = ["text_encoder=null", "vae=null", "gate.golden=null", "sampler.steps=6", "sampler.leap=null"]
    return toolchain.plan(load_recipe(path, [*alone, *overrides]), base=path.parent)


@pytest.mark.parametrize("name", REFUSED)
def test_refused(name: str) -> None:
    overrides, said = REFUSED[name]
    with pytest.raises(SoraCompileError) as error:
        tiny(*overrides)
    assert str(error.value).startswith(said)
    assert error.value.exit_code == 2
    assert "\n" not in str(error.value)


def test_ranges_that_overlap_and_one_block_by_itself() -> None:
    asked = [
        {"steps": [1, 4]},
        {"steps": [2], "blocks": ["pair_1", "pair_2"]},
        {"steps": [5], "blocks": ["pair_3"] * 2},
    ]
    sampling = tiny(f"sampler.reuse={asked}").sampling
    assert list(sampling.ranges) == ["pair_0-pair_3", "pair_1-pair_2", "pair_3"]
    assert [s.reuse for s in sampling.steps] == [
        None,
        "pair_0-pair_3",
        "pair_1-pair_2",
        None,
        "pair_0-pair_3",
        "pair_3",
    ]


# --- planning ----------------------------------------------------------------------------------------


def test_what_is_left_out_is_not_called_and_what_is_kept_is_held() -> None:
    plain, planned = tiny(), tiny("sampler.reuse={steps: [2, 3, 5], blocks: [pair_1, pair_2]}")
    (own,) = planned.sampling.entries().values()
    assert (own.blocks, own.input, own.output) == (["pair_1", "pair_2"], "pair_0.x_out", "pair_2.x_out")
    assert own.bytes == 2 * 80 * 128 * 4, "float32 of both halves, 80 patches, 128 channels"
    called = rounds_of(planned)
    assert [[c.block.partition("/")[2] for c in calls] for calls in called][2] == ["embed", "pair_0", "pair_3", "final"]
    usual = {c.block: c for c in rounds_of(plain)[0]}
    extra = [[c.live_bytes - usual[c.block].live_bytes for c in calls] for calls in called]
    n = own.bytes
    assert extra == [
        [0, 0, 0, 0, 0, 0],
        [0, 0, n, n, n, n],
        [n, n, n, n],
        [n, n, 0, 0],
        [0, 0, n, n, n, n],
        [n, n, 0, 0],
    ]
    assert all(c.activation_bytes == usual[c.block].activation_bytes for calls in called for c in calls)
    assert planned.loading.timeline.peak_bytes >= plain.loading.timeline.peak_bytes
    assert planned.loading.run.compute_s < plain.loading.run.compute_s


def test_what_a_rule_may_leave_out_is_planned_as_called() -> None:
    plain = tiny("sampler.steps=4")
    planned = tiny("sampler.steps=4", "sampler.reuse={rule: {threshold: 0.1}, observes: embed.t_mlp}")
    rule = planned.sampling.rule
    assert rule is not None
    (own,) = planned.sampling.entries().values()
    assert (rule.range, rule.observes, rule.bytes) == ("pair_0-pair_3", "embed.t_mlp", 2 * 6 * 128 * 4)
    assert all(s.reuse is None for s in planned.steps)
    n, o = own.bytes, rule.bytes
    extra = [
        [b.live_bytes - a.live_bytes for a, b in zip(*calls, strict=True)]
        for calls in zip(rounds_of(plain), rounds_of(planned), strict=True)
    ]
    assert extra == [
        [0, *[n + o] * 5],
        [n + o] * 6,
        [n + o, *[o] * 5],
        [o, *[0] * 5],
    ]


def rounds_of(planned: Plan) -> list[tuple[Call, ...]]:
    """The calls of every step."""
    return [p.calls for p in planned.loading.run.phases if f", {STEP}" in p.name for _ in range(p.times)]


def test_what_is_never_called_is_never_loaded() -> None:
    """With all but one of many steps left out, what is read is what one step reads."""
    planned = tiny("sampler.reuse={steps: [1, 2, 3, 4, 5]}", "memory_budget=6MB")
    loads = [s.block for s in planned.loading.timeline.loads]
    assert all(loads.count(f"transformer/pair_{i}") == 1 for i in range(4))


# --- manifests ---------------------------------------------------------------------------------------

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
