"""Which steps may leave out what, and what is kept for them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import toolchain
from toolchain.errors import RecipeError, SoraCompileError
from toolchain.formats.calls import STEP
from toolchain.formats.recipe_file import find_recipe, load_recipe
from toolchain.formats.reuse import check_reuse, kept_after
from toolchain.formats.sampling import RangeEntry
from toolchain.formats.schedule import StaticLeap, plan_steps
from toolchain.planning.loading.run import Call
from toolchain.planning.plan import Plan
from toolchain.player.residuals import Residuals

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


def test_a_difference_that_is_kept_is_held() -> None:
    """Of the latents' size, from the first step with both halves on."""
    passes = "transformer.passes=[guidance-split, partition]"
    none, last = (tiny(passes, f"sampler.conditional={{steps: [2, 4], difference: {d}}}") for d in ("none", "last"))
    n = 4 * 5 * 8 * 8 * 4
    extra = [
        {b.live_bytes - a.live_bytes for a, b in zip(*calls, strict=True)}
        for calls in zip(rounds_of(none), rounds_of(last), strict=True)
    ]
    assert extra == [{0}, {n}, {n}, {n}, {n}, {n}]
    assert last.loading.timeline.peak_bytes <= none.loading.timeline.peak_bytes + n


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


def test_the_conditional_half_takes_the_first_of_what_both_added() -> None:
    own = RangeEntry(blocks=["a"], input="x.y", output="a.y", bytes=48)
    kept = Residuals()
    both = torch.arange(12.0).reshape(2, 3, 2)
    kept.keep(own, {"x.y": both, "a.y": both * 3}, torch.float16)
    one = torch.ones(1, 3, 2, dtype=torch.float16)
    assert torch.equal(kept.applied(own, one), one + 2 * both[:1].half())
    assert kept.applied(own, one).dtype == torch.float16
    assert torch.equal(kept.applied(own, both), both * 3)
    kept.drop(own)
    kept.drop(own)
    with pytest.raises(KeyError):
        kept.applied(own, one)


def rounds_of(planned: Plan) -> list[tuple[Call, ...]]:
    """The calls of every step."""
    return [p.calls for p in planned.loading.run.phases if f", {STEP}" in p.name for _ in range(p.times)]


def test_what_is_never_called_is_never_loaded() -> None:
    """With all but one of many steps left out, what is read is what one step reads."""
    planned = tiny("sampler.reuse={steps: [1, 2, 3, 4, 5]}", "memory_budget=6MB")
    loads = [s.block for s in planned.loading.timeline.loads]
    assert all(loads.count(f"transformer/pair_{i}") == 1 for i in range(4))
