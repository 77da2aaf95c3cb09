"""Peaks of activations, and cutting by them."""

from __future__ import annotations

from itertools import combinations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import toolchain
from toolchain.errors import LoweringError, RecipeError
from toolchain.formats.loading import loads_of
from toolchain.ir.blocks import Port
from toolchain.ir.cutting import Needs, cut
from toolchain.ir.memory import Effect, Peak, peak
from toolchain.ir.operators import Operator, OperatorGraph, Value, operator_graph


def value(number: int, size: int, memory: int | None = None, weight: str | None = None) -> Value:
    return Value(number, number if memory is None else memory, (size,), torch.float32, weight)


def graph(given: list[Value], operators: list[Operator], results: list[Value]) -> OperatorGraph:
    def ports(values: list[Value]) -> tuple[tuple[Port, Value], ...]:
        return tuple((Port(f"p{v.number}", v.shape), v) for v in values)

    return OperatorGraph(tuple(operators), ports(given), ports(results))


def peak_of(g: OperatorGraph, /, late: int = 0, **effects: Effect) -> Peak:
    def effect(operator: Operator) -> Effect:
        return effects.get(operator.name, Effect(view=operator.is_view))

    return peak(g, lambda v: v.shape[0], effect, late)


X, A, B, C, Y = value(0, 10), value(1, 100), value(2, 100), value(3, 7), value(4, 10)


def test_a_value_lives_to_its_last_use_and_ports_all_along() -> None:
    chain = [Operator("f", (X,), (A,)), Operator("g", (A,), (B,)), Operator("h", (B,), (C,)), Operator("i", (C,), (Y,))]
    found = peak_of(graph([X], chain, [Y]))
    assert (found.bytes, found.ports, found.operator) == (10 + 10 + 100 + 100, 20, "g")
    again = [*chain[:3], Operator("i", (C, A), (Y,))]
    assert peak_of(graph([X], again, [Y])).bytes == 20 + 100 + 100 + 7


def test_views_cost_nothing_and_keep_what_they_view() -> None:
    view = value(5, 100, memory=1)
    ops = [Operator("f", (X,), (A,)), Operator("view", (A,), (view,)), Operator("g", (X,), (B,))]
    kept = [*ops, Operator("h", (view,), (C,)), Operator("i", (C, B), (Y,))]
    assert peak_of(graph([X], kept, [Y])).bytes == 20 + 100 + 100 + 7
    copied = peak_of(graph([X], kept, [Y]), view=Effect(view=False))  # a target for which it is a copy
    assert copied.bytes == 20 + 100 + 100 + 7
    assert peak_of(graph([X], [*ops[:2], Operator("h", (view,), (C,)), Operator("i", (C,), (Y,))], [Y])).bytes == 127


def test_in_place_scratch_and_late_frees() -> None:
    chain = graph([X], [Operator("f", (X,), (A,)), Operator("g", (A,), (B,)), Operator("i", (B,), (Y,))], [Y])
    assert peak_of(chain, g=Effect(in_place=True)).bytes == 120
    assert peak_of(chain, g=Effect(scratch=33)).bytes == 253
    kept = graph([X], [Operator("f", (X,), (A,)), Operator("g", (A,), (B,)), Operator("i", (B, A), (Y,))], [Y])
    assert peak_of(kept, g=Effect(in_place=True)).bytes == 220  # something still reads it
    four = [Operator("f", (X,), (A,)), Operator("g", (A,), (B,)), Operator("h", (B,), (C,)), Operator("i", (C,), (Y,))]
    assert peak_of(graph([X], four, [Y]), late=1).bytes == 227


def test_weights_and_what_is_computed_from_them_alone_are_no_activations() -> None:
    w = value(6, 1000, weight="w")
    ops = [Operator("neg", (w,), (A,)), Operator("arange", (), (B,)), Operator("add", (X, A, B), (Y,))]
    assert peak_of(graph([X], ops, [Y])).bytes == 20


@settings(max_examples=60, deadline=None)
@given(st.data(), st.integers(1, 4))
def test_at_least_every_operator_and_monotone_in_the_batch(data: st.DataObject, batch: int) -> None:
    sizes = data.draw(st.lists(st.integers(1, 50), min_size=2, max_size=9))
    reads = [data.draw(st.sets(st.integers(0, i - 1), min_size=1, max_size=3)) for i in range(1, len(sizes))]

    def of(times: int) -> OperatorGraph:
        values = [value(i, size * times) for i, size in enumerate(sizes)]
        ops = [Operator("f", tuple(values[r] for r in reads[i]), (values[i + 1],)) for i in range(len(reads))]
        return graph(values[:1], ops, values[-1:])

    one, more = of(1), of(batch)
    least = max(sum(v.shape[0] for v in (*o.reads, *o.gives)) for o in one.operators)
    assert least <= peak_of(one).bytes <= peak_of(more).bytes


@settings(max_examples=80, deadline=None)
@given(st.lists(st.integers(1, 20), min_size=1, max_size=8), st.integers(0, 9), st.integers(1, 60))
def test_cuts_are_as_good_as_the_best_of_all(units: list[int], ports: int, most: int) -> None:
    def cost(i: int, j: int) -> int:
        return sum(units[i:j]) + ports

    n, best = len(units), None
    for k in range(n):
        for places in combinations(range(1, n), k):
            ranges = list(zip((0, *places), (*places, n), strict=True))
            largest = max(cost(*r) for r in ranges)
            if largest <= most and (best is None or (k + 1, largest) < best):
                best = (k + 1, largest)
    found = cut(n, cost, most)
    assert (found is None) == (best is None)
    if found is not None:
        assert [i for i, _ in found] == [0, *(j for _, j in found[:-1])] and found[-1][1] == n
        assert (len(found), max(cost(*r) for r in found)) == best


TINY = ["text_encoder=null", "vae=null"]


@pytest.mark.slow
def test_a_block_of_several_units_is_reckoned_no_lower_than_liveness_finds_it() -> None:
    recipe = toolchain.load_recipe("tiny", [*TINY, "target=coreml", "transformer.passes=token-merge partition"])
    parts = toolchain.plan(recipe).components["transformer"]
    needs = Needs(parts.blocks, parts.target)
    whole = toolchain.load_recipe(
        "tiny", [*TINY, "target=coreml", "transformer.passes=token-merge partition{layers_per_block=4}"]
    )
    block = next(b for b in toolchain.plan(whole).blocks if b.name.startswith("pair"))
    names = [b.name for b in parts.blocks]
    first = names.index("pair_0")
    peak_bytes = max(parts.target.peak(block, parts.target.operators(block, f)).bytes for f in block.functions)
    assert block.weight_bytes + peak_bytes <= needs(first, first + 4) <= block.weight_bytes + 1.25 * peak_bytes


@pytest.mark.parametrize("target", ["coreml", "executorch", "onnx"])
@pytest.mark.slow
def test_blocks_fit_what_the_partition_was_given(target: str) -> None:
    passes = "transformer.passes=token-merge partition{max_memory=6MB}"
    part = toolchain.plan(toolchain.load_recipe("tiny", [*TINY, f"target={target}", passes])).components["transformer"]
    assert str(part.passes).endswith("partition{max_memory=6MB}")
    assert all(m.weights + m.peaks[m.function].bytes <= 6_000_000 for m in part.memory.values())
    assert [b.name for b in part.blocks] == [p.plain.name for p in part.pairs]
    pairs = [b for b in part.blocks if b.name.startswith("pair")]
    assert 1 < len(pairs) < 4 or target == "coreml"


def test_a_unit_that_is_too_large_is_named_with_the_least_that_works() -> None:
    settings_ = [*TINY, "transformer.passes=partition{max_memory=1MB}"]
    with pytest.raises(
        LoweringError, match=r"'pair\.\d\.\w+' alone needs .* function 'base' .* that works is (\d+)"
    ) as e:
        toolchain.plan(toolchain.load_recipe("tiny", settings_))
    least = str(e.value).split()[-1]
    toolchain.plan(toolchain.load_recipe("tiny", [*TINY, f"transformer.passes=partition{{max_memory={least}}}"]))


def test_one_rule_alone() -> None:
    with pytest.raises(RecipeError, match="max_memory"):
        toolchain.plan(toolchain.load_recipe("tiny", [*TINY, "transformer.passes=partition{blocks=2 max_memory=9MB}"]))


@pytest.mark.slow
def test_a_budget_holds_activations_too() -> None:
    memory = toolchain.plan(toolchain.load_recipe("tiny", TINY)).components["transformer"].memory
    least = max(m.total for m in memory.values())
    fits = toolchain.plan(toolchain.load_recipe("tiny", [*TINY, f"memory_budget={least}"])).loading
    assert fits.timeline.peak_bytes == least
    assert max(loads_of(fits.entry().plan).values()) > 1
    said = rf"'transformer/pair_\d' \(base\) needs {least} bytes .*, which is the smallest budget that works"
    with pytest.raises(RecipeError, match=said):
        toolchain.plan(toolchain.load_recipe("tiny", [*TINY, f"memory_budget={least - 1}"]))


@pytest.mark.slow
def test_predicted_as_the_core_ml_engine_holds(tmp_path) -> None:  # type: ignore[no-untyped-def]
    from toolchain.ir.target import unique_weights

    recipe = toolchain.load_recipe("tiny", [*TINY, "target=coreml"])
    part = toolchain.plan(recipe).components["transformer"]
    block = next(b for b in part.blocks if b.name.startswith("pair"))
    path = tmp_path / "block.mlpackage"
    part.target.lower(block, unique_weights(block), path)
    engine = part.target.engine(path, block.inputs, block.outputs, device=False)  # type: ignore[call-arg]
    for function, signature in block.signatures.items():
        inputs = {p.name: torch.rand(p.shape) for p in signature.inputs}
        if function not in engine.functions:  # type: ignore[attr-defined]
            continue
        measured = max(size for _, size in engine.held(function, inputs))  # type: ignore[attr-defined]
        assert measured <= part.memory[block.name].peaks[function].bytes <= 1.1 * measured


def test_operators_are_recorded_without_memory() -> None:
    block = next(b for b in toolchain.plan(toolchain.load_recipe("tiny", TINY)).blocks if b.name.startswith("pair"))
    names = [o.name for o in operator_graph(block, "base").operators]
    assert names.count("bmm") == 8 and "linear" in names and "softmax" in names
