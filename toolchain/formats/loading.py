"""What a manifest says about loading: the plan to follow, what it is predicted to cost, and what both were made from.

Plan and run are plain data (here their shapes); what they mean is said where they are worked with, in
:mod:`toolchain.planning.loading.events` and :mod:`toolchain.planning.loading.run`.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Annotated, Literal, final

from pydantic import BaseModel, ConfigDict, Field, with_config
from typing_extensions import TypedDict

Count = Annotated[int, Field(ge=1)]
Bytes = Annotated[int, Field(ge=0)]
Seconds = Annotated[float, Field(ge=0, allow_inf_nan=False)]


_strict = with_config(ConfigDict(extra="forbid"))


@final
@_strict
class LoadData(TypedDict):
    """Load a block, once the load before it is done."""

    load: str


@final
@_strict
class RunData(TypedDict):
    """Run a function of a block, which is loaded by then."""

    run: str
    function: str


@final
@_strict
class FreeData(TypedDict):
    """Free a block's memory."""

    free: str


EventData = LoadData | RunData | FreeData


@final
@_strict
class SectionData(TypedDict):
    """``events`` in order, ``times`` times over."""

    times: Count
    events: list[EventData]


@final
@_strict
class PlanData(TypedDict):
    """A loading plan; blocks are ``COMPONENT/BLOCK``."""

    version: Literal[1]
    budget_bytes: Count
    sections: list[SectionData]


@final
@_strict
class BlockData(TypedDict):
    """A block: bytes of its weights, and seconds until it can run."""

    name: str
    weight_bytes: Bytes
    load_s: Seconds


@final
@_strict
class CallData(TypedDict):
    """A call of a block: its seconds, and bytes of activations and of what waits meanwhile."""

    block: str
    function: str
    compute_s: Seconds
    activation_bytes: Bytes
    live_bytes: Bytes


@final
@_strict
class PhaseData(TypedDict):
    """``calls`` in order, ``times`` times over; ``name`` is for people."""

    name: str
    times: Count
    calls: list[CallData]


@final
@_strict
class WholeRunData(TypedDict):
    """All that a whole video asks of a device, with the seconds that each part was taken to last."""

    blocks: list[BlockData]
    phases: list[PhaseData]


class Entry(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Times(Entry):
    """Where the seconds are from: a device's profile, or what was measured on one; ``sha256`` is of what it says."""

    kind: Literal["device", "calibration"]
    name: str
    sha256: str = Field(pattern=r"^[0-9a-f]{64}$")


class MadeFrom(Entry):
    """All that planning again takes, with other times or another budget."""

    times: Times
    overlap_loss: float = Field(ge=0, le=1, description="Share of hidden load time that is lost.")
    run: WholeRunData


class Prediction(Entry):
    """What the plan costs. No plan within its budget takes less than ``bound_s``.

    ``stalls_s`` is how long the computer waits for loads, all together; ``paper_s`` what the published rule takes.
    """

    total_s: Seconds
    compute_s: Seconds
    load_s: Seconds
    stalls_s: Seconds
    peak_bytes: Bytes
    bound_s: Seconds
    paper_s: Seconds
    loads_bytes: Bytes


class Loading(Entry):
    """``prediction`` and ``made_from`` are null in bundles of before loading was planned."""

    plan: PlanData
    prediction: Prediction | None
    made_from: MadeFrom | None


def events_of(plan: PlanData) -> Iterator[EventData]:
    """All events, in order, repeated ones as often as they happen."""
    for section in plan["sections"]:
        for _ in range(section["times"]):
            yield from section["events"]


def loads_of(plan: PlanData) -> dict[str, int]:
    """How often each block is loaded over the whole run, of those that are."""
    found: dict[str, int] = {}
    for section in plan["sections"]:
        for event in section["events"]:
            if "load" in event:
                found[event["load"]] = found.get(event["load"], 0) + section["times"]
    return found


def check_plan(plan: PlanData, calls: Iterable[tuple[str, str]]) -> None:
    """Hold a plan against the calls that it has to make, blocks and functions in order.

    Raises:
        ValueError: it makes others, repeats a section that makes none, or a block is not loaded when it is needed,
            twice, or freed without; says where.
    """
    for i, section in enumerate(plan["sections"]):
        if section["times"] > 1 and not any("run" in event for event in section["events"]):
            raise ValueError(f"loading.plan.sections.{i}: it is followed {section['times']} times, and runs nothing")
    expected = iter(calls)
    held: set[str] = set()
    for place, event in enumerate(events_of(plan)):
        where = f"loading.plan: event {place}"
        if "load" in event:
            if event["load"] in held:
                raise ValueError(f"{where} loads '{event['load']}', which is loaded already")
            held.add(event["load"])
        elif "free" in event:
            if event["free"] not in held:
                raise ValueError(f"{where} frees '{event['free']}', which is not loaded")
            held.remove(event["free"])
        else:
            own = event["run"], event["function"]
            asked = next(expected, None)
            if own != asked:
                next_ = f"the next call is '{asked[0]}' ({asked[1]})" if asked else "there are no more calls"
                raise ValueError(f"{where} runs '{own[0]}' ({own[1]}), but {next_}")
            if own[0] not in held:
                raise ValueError(f"{where} runs '{own[0]}', which is not loaded")
    if left := next(expected, None):
        raise ValueError(f"loading.plan ends before '{left[0]}' ({left[1]}) has run")
    if held:
        raise ValueError(f"loading.plan never frees '{min(held)}'")
