"""What a build tells of itself: as it happens, in a file, as a summary and as a trace."""

from __future__ import annotations

import json
import os
import shutil
import threading
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from support import write_project

import toolchain
from toolchain.build.event_file import EventFile
from toolchain.build.spent import Record
from toolchain.errors import LoweringError, SoraCompileError
from toolchain.formats.recipe_file import load_recipe
from toolchain.system import events
from toolchain.system.events import SCHEMA, Event, What, cached, doing, happened, teller, telling
from toolchain.system.store import NewEntry, Store

slow = pytest.mark.slow


# --- telling -----------------------------------------------------------------------------------------


def test_who_hears_what() -> None:
    heard: list[Event] = []
    with doing(What("gate")):
        pass  # nobody asked
    with telling(heard.append), pytest.raises(LoweringError), doing(What("build", build="b")):
        with doing(What("artifact", "vae", "decoder"), "key") as said:
            said.bytes_written = 3
        threading.Thread(target=teller(), args=(happened("given", What("gate")),)).start()
        raise LoweringError("a line\nand another")
    told = [(e.event, e.what.kind) for e in heard if e.event != "given"]
    assert told == [("started", "build"), ("started", "artifact"), ("done", "artifact"), ("failed", "build")]
    assert heard[2].data().keys() >= {"component", "block", "key", "seconds", "cpu_seconds", "peak_bytes"}
    assert heard[2].bytes_written == 3
    assert heard[-1].error == "a line and another"
    assert heard[-1].what.build == "b"
    times = [e.time_s for e in heard if e.event != "given"]
    assert times == sorted(times) and 0 <= times[0] < 1


def test_a_thing_is_made_or_found_once(tmp_path: Path) -> None:
    """What was made is not told to be found by who asks again, here or elsewhere."""
    store, what, record = Store(tmp_path), What("template", "vae"), Record()
    elsewhere: list[Event] = []
    with telling(record.event):
        for key in ("a", "a", "b"):
            store.get_or_make("templates", key, lambda _: NewEntry(), what)
        store.get_or_make("templates", "c", lambda _: NewEntry())  # is nobody's business
        with telling(elsewhere.append, raw=True):
            store.get_or_make("templates", "a", lambda _: NewEntry(), what)
        for event in elsewhere:
            teller()(event)
    assert [(e.event, e.key) for e in record.ended] == [("done", "a"), ("done", "b")]
    assert [e.event for e in elsewhere] == ["cached"]
    again = Record()
    with telling(again.event):
        store.get_or_make("templates", "a", lambda _: NewEntry(), what)
    assert [e.event for e in again.events] == ["cached"]


Tree = st.recursive(st.just([]), lambda inner: st.lists(inner, max_size=3), max_leaves=12)


@given(Tree)
@settings(max_examples=40, deadline=None)
def test_times_add_up(tree: Sequence[Any]) -> None:
    """However things are nested, their own times are the whole's."""
    ticks = iter(range(1000))
    record = Record()

    def work(parts: Sequence[Any], depth: int) -> None:
        with doing(What(f"kind-{depth}")):
            for part in parts:
                work(part, depth + 1)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(events, "_now", lambda: float(next(ticks)))
        with telling(record.event):
            work(tree, 0)
    whole = record.ended[-1]
    assert whole.what.kind == "kind-0"
    assert sum(e.own_seconds or 0 for e in record.ended) == whole.seconds
    assert sum(row.seconds for row in record.spent()) == whole.seconds
    data = record.to_data()
    assert sum(row["share"] or 0 for row in data["spent"]) == pytest.approx(1, abs=1e-2)
    spans = [e for e in record.trace().data({})["traceEvents"] if e["ph"] == "X"]
    assert len(spans) == len(record.ended)


# --- the file ----------------------------------------------------------------------------------------


def test_places_where_no_file_can_be(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    os.mkfifo("pipe")
    for place, says in {
        "pipe": "--events pipe: expected the name of a file; a pipe or a device is none",
        "-": "--events -: expected the name of a file; a pipe",
        ".": "--events .: is a folder; expected the name of a file",
        "no/e": "--events no/e: its folder does not exist or cannot be written",
    }.items():
        with pytest.raises(SoraCompileError) as caught:
            EventFile(Path(place))
        assert str(caught.value).startswith(says)
    assert [p.name for p in tmp_path.iterdir()] == ["pipe"]


def test_a_disk_that_is_full(tmp_path: Path) -> None:
    """It costs the rest of the events; who builds is not told of it by an error."""
    full = Path("/dev/full").open("w", encoding="utf-8")  # noqa: SIM115 - the file closes it
    with EventFile(tmp_path / "e") as file, telling(file.event), doing(What("build")):
        file._file = full
        cached(What("digest"))
        cached(What("template"))
    assert file.lost == "No space left on device"


# --- builds ------------------------------------------------------------------------------------------

CHEAP = ("target=onnx", "transformer.passes=[partition]", "sampler.merged_steps=0")
"""What takes the least time: one function."""
BLOCKS = ("caption", "embed", "pair_0", "final")


def lines(path: Path) -> list[dict[str, Any]]:
    """A file's events, after its first line."""
    first, *rest = [json.loads(line) for line in path.read_text().splitlines()]
    assert first.keys() == {"schema", "sora_compile", "started_at"} and first["schema"] == SCHEMA
    return rest


def ended(told: Sequence[dict[str, Any]]) -> Counter[tuple[str, str]]:
    return Counter((e["event"], e["kind"]) for e in told if e["event"] in ("done", "cached", "failed"))


@pytest.fixture(scope="module")
def cold(one_pair: Any, tmp_path_factory: pytest.TempPathFactory, run_cli: Any) -> tuple[Path, dict[str, Any]]:
    """A folder with a project and a cache that a build filled, its events and its trace; and what it answered."""
    folder = tmp_path_factory.mktemp("events")
    project = write_project(folder / "project", one_pair)
    sets = [word for change in CHEAP for word in ("--set", change)]
    asked = ("--events", folder / "e.jsonl", "--trace", folder / "t.json", "-v", "--json")
    env = {"SORA_COMPILE_CACHE": str(folder / "cache")}
    ran = run_cli("recipe.yaml", *sets, "-o", folder / "bundle", *asked, cwd=project, env=env)
    assert ran.code == 0, ran.err
    assert "of which" not in ran.err  # the answer has it
    answer: dict[str, Any] = json.loads(ran.out)
    return folder, answer


@slow
def test_a_cold_build(cold: tuple[Path, dict[str, Any]]) -> None:
    folder, answer = cold
    told = lines(folder / "e.jsonl")
    assert told[0]["event"] == "started" and (told[0]["kind"], told[0]["build"]) == ("build", "small")
    assert (told[-1]["event"], told[-1]["kind"]) == ("done", "build")
    assert ended(told) == {
        **{("done", kind): 4 for kind in ("template", "artifact", "gate", "bundle")},
        **{("done", kind): 1 for kind in ("build", "plan", "digest")},
    }
    assert {e["block"] for e in told if e["kind"] == "gate"} == set(BLOCKS)
    done = [e for e in told if e["event"] == "done"]
    assert all(e["seconds"] >= e["own_seconds"] >= 0 and e["peak_bytes"] >= e["peak_grew_bytes"] for e in done)
    assert sum(e["own_seconds"] for e in done) == pytest.approx(told[-1]["seconds"], rel=1e-3)
    written = sum(e["bytes_written"] for e in done if e["kind"] == "artifact")
    assert written == sum(e.bytes for e in Store(folder / "cache").entries() if e.kind == "artifacts")
    spent = answer["spent"]
    assert sum(row["share"] for row in spent["spent"]) == pytest.approx(1, abs=1e-3)
    assert sum(row["seconds"] for row in spent["spent"]) == pytest.approx(told[-1]["seconds"], rel=1e-3)
    assert [e["kind"] for e in spent["dearest"]].count("template") >= 3


@slow
def test_its_trace(cold: tuple[Path, dict[str, Any]]) -> None:
    """Spans of a row lie within one another or apart."""
    trace = json.loads((cold[0] / "t.json").read_text())
    spans = [e for e in trace["traceEvents"] if e["ph"] == "X"]
    assert {e["cat"] for e in spans} == {"build", "plan", "digest", "template", "artifact", "gate", "bundle"}
    assert len({e["cname"] for e in spans}) == 7
    assert [e["args"]["name"] for e in trace["traceEvents"] if e["ph"] == "M"] == [events.process_name()]
    open_until: list[float] = []
    for span in sorted(spans, key=lambda e: (e["ts"], -e["dur"])):
        while open_until and open_until[-1] <= span["ts"]:
            open_until.pop()
        assert span["ts"] >= 0 and (not open_until or span["ts"] + span["dur"] <= open_until[-1])
        open_until.append(span["ts"] + span["dur"])


@slow
def test_everything_is_cached(cold: tuple[Path, dict[str, Any]], tmp_path: Path) -> None:
    """Python's listener gets what the file gets. Nothing is told of a template that nobody needs."""
    folder, _ = cold
    recipe, store = load_recipe(folder / "project/recipe.yaml", list(CHEAP)), Store(folder / "cache")
    first, second = Record(), Record()
    for record in (first, second):
        toolchain.compile_recipe(recipe, tmp_path / "b", base=folder / "project", store=store, listener=record)
    assert ended([e.data() for e in first.events]) == {
        **{("cached", kind): 4 for kind in ("artifact", "gate")},
        ("done", "bundle"): 4,
        ("cached", "digest"): 1,
        ("done", "plan"): 1,
        ("done", "build"): 1,
    }
    assert [(e.event, e.what.kind) for e in second.events] == [
        ("started", "build"),
        ("cached", "digest"),
        ("cached", "bundle"),
        ("done", "build"),
    ]


@slow
def test_other_processes_and_a_failure(cold: tuple[Path, dict[str, Any]], tmp_path: Path, run_cli: Any) -> None:
    """One has to build an artifact, and another task finds that it is not accurate enough."""
    folder, _ = cold
    shutil.copytree(folder / "cache", tmp_path / "cache")
    store = Store(tmp_path / "cache")
    for entry in [e for e in store.entries() if e.kind == "gates"]:
        store.remove(entry)
    store.remove(next(e for e in store.entries() if e.kind == "artifacts"))
    sets = [w for change in (*CHEAP, "gate.max_relative_error={float32: 1e-12}") for w in ("--set", change)]
    asked = ("--events", tmp_path / "e.jsonl", "--trace", tmp_path / "t.json", "--jobs", "2")
    env = {"SORA_COMPILE_CACHE": str(tmp_path / "cache")}
    ran = run_cli("recipe.yaml", *sets, "-o", tmp_path / "b", *asked, cwd=folder / "project", env=env)
    assert ran.code == 5
    told, own = lines(tmp_path / "e.jsonl"), events.process_name()
    assert [e["kind"] for e in told if e["event"] == "given"] == ["artifact", "gate"]
    (made,) = [e for e in told if e["kind"] == "artifact" and e["event"] == "done"]
    assert made["process"] != own and 0 < made["time_s"] < told[-1]["time_s"]
    failed = [e for e in told if e["event"] == "failed"]
    assert [(e["kind"], e["process"] == own) for e in failed] == [("gate", False), ("build", True)]
    assert all(f"sora-compile: {e['error']}" in ran.err for e in failed)
    assert ended(told)["done", "wait"] >= 1
    rows = [e for e in json.loads((tmp_path / "t.json").read_text())["traceEvents"] if e["ph"] == "M"]
    assert len(rows) >= 2


@slow
def test_many_builds(cold: tuple[Path, dict[str, Any]], tmp_path: Path, run_cli: Any) -> None:
    folder, _ = cold
    data = yaml.safe_load((folder / "project/recipe.yaml").read_text())
    data |= {"target": "onnx", "transformer": data["transformer"] | {"passes": ["partition"]}}
    data["sampler"]["merged_steps"] = 0
    (folder / "project/cheap.yaml").write_text(yaml.safe_dump(data))
    points = {"nine": {"sampler.steps": 9}, "eight": {"sampler.steps": 8}}
    matrix = {"recipes": [str(folder / "project/cheap.yaml")], "axes": {"n": points}, "out": f"{tmp_path}/{{n}}"}
    (tmp_path / "m.yaml").write_text(yaml.safe_dump(matrix, sort_keys=False))
    env = {"SORA_COMPILE_CACHE": str(folder / "cache")}
    ran = run_cli("build-all", "m.yaml", "--events", "e.jsonl", "-v", cwd=tmp_path, env=env)
    assert ran.code == 0, ran.err
    assert "s, of which" in ran.err
    told = lines(tmp_path / "e.jsonl")
    found = ended(told)
    assert (found["done", "builds"], found["done", "build"], found["cached", "artifact"]) == (1, 2, 4)
    assert [Path(e["build"]).name for e in told if e["kind"] == "build" and e["event"] == "done"] == ["nine", "eight"]
