"""A device that follows a manifest's events, to hold them against every rule. It shares no code with the planner."""

from __future__ import annotations

from typing import Any


def calls_of(manifest: dict[str, Any]) -> list[tuple[str, str]]:
    """What a player calls for a whole video, in order, read off the manifest's plain data as docs/manifest.md says."""
    found: list[tuple[str, str]] = []

    def run(name: str, rate: str, asked: str | None, left_out: list[str] | None = None) -> None:
        component = manifest["components"][name]
        functions = {b["name"]: b["functions"] for b in component["blocks"]}
        for block in component["load_order"].get(rate, []):
            if block in (left_out or []):
                continue
            has = asked in functions[block]
            found.append((f"{name}/{block}", str(asked) if has else component["default_function"]))

    if "text_encoder" in manifest["components"]:
        run("text_encoder", manifest["text"]["rate"], None)
    run("transformer", manifest["sampler"]["once"], None)
    for step in manifest["sampler"]["steps"]:
        reused = manifest["sampler"]["ranges"].get(step.get("reuse"), {"blocks": []})
        run("transformer", manifest["sampler"]["each"], step["function"], reused["blocks"])
    if "vae" in manifest["components"]:
        for stage in manifest["decoding"]["stages"]:
            tiles = stage["tiles"] or {"tops": [0], "lefts": [0]}
            for piece in stage["pieces"]:
                for _ in [(top, left) for top in tiles["tops"] for left in tiles["lefts"]]:
                    run("vae", stage["rate"], piece["function"])
    return found


def follow(manifest: dict[str, Any]) -> int:
    """Follow all events with the manifest's own sizes; fails at the first that breaks a rule.

    Memory is counted as if each load happened as early as it may, at its place in the list, and each free no earlier
    than at its own; so no device holds more.

    Returns:
        The most bytes that are held at once.
    """
    sizes = {
        f"{name}/{b['name']}": sum(b["weight_bytes"].values())
        for name, c in manifest["components"].items()
        for b in c["blocks"]
    }
    plan, made = manifest["loading"]["plan"], manifest["loading"]["made_from"]
    needs = [
        (c["block"], c["function"], c["activation_bytes"], c["live_bytes"])
        for p in made["run"]["phases"]
        for _ in range(p["times"])
        for c in p["calls"]
    ]
    assert [n[:2] for n in needs] == calls_of(manifest)
    for block in made["run"]["blocks"]:
        assert block["weight_bytes"] == sizes[block["name"]]
    budget = plan["budget_bytes"]
    assert manifest["memory_budget_bytes"] in (None, budget)
    held: set[str] = set()
    peak, at, live = 0, 0, 0
    for section in plan["sections"]:
        for event in section["events"] * section["times"]:
            ((kind, block), *more) = event.items()
            if kind == "load":
                assert block not in held
                held.add(block)
                # it may start while the call before is over and its values wait, or during the call that follows
                peak = max(peak, live + sum(sizes[b] for b in held))
            elif kind == "free":
                assert block in held
                held.remove(block)
            else:
                expected, function, activations, stays = needs[at]
                assert (kind, block, more) == ("run", expected, [("function", function)])
                assert block in held
                peak = max(peak, stays + activations + sum(sizes[b] for b in held))
                live, at = stays, at + 1
            assert peak <= budget, (at, event)
    assert at == len(needs)
    assert not held
    return peak
