"""Pipelines as text: what is written is what was read, and what is wrong is named with its column."""

from __future__ import annotations

import datetime
import math
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from toolchain.ir.pipeline_text import parse_pipeline, pipeline_text

names = st.from_regex(r"[a-z0-9_][a-z0-9_.-]{0,8}", fullmatch=True)
lookalikes = st.sampled_from(
    ["", "1", "1.5", "1e3", "1.5e3", "0x10", "yes", "null", "~", "true", "2026-01-01", "1:30", "=", "<<", "a: b", "#"]
)
texts = st.text() | lookalikes
scalars = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | texts
values = st.recursive(scalars, lambda v: st.lists(v, max_size=4) | st.dictionaries(texts, v, max_size=4), max_leaves=8)
pipelines = st.lists(st.tuples(names, st.dictionaries(texts | names, values, max_size=4)), max_size=4).map(tuple)


@settings(deadline=None)
@given(pipeline=pipelines)
@example(pipeline=(("a", {"": {"": []}, "\ud800\U0001f600\x85 ": -0.0}),))
def test_what_is_written_is_what_was_read(pipeline: Any) -> None:
    text = pipeline_text(pipeline)
    again = parse_pipeline(text)
    assert again == pipeline
    assert repr(again) == repr(pipeline)  # 1 == 1.0 == True
    assert "\n" not in text


@settings(deadline=None)
@given(text=st.text(st.sampled_from("ab1 {}[]=:,'\"\\\n-#.")) | st.text())
def test_any_text_is_read_or_refused_in_one_line(text: str) -> None:
    try:
        found = parse_pipeline(text)
    except ValueError as e:
        assert "column " in str(e) and "expected " in str(e)
    else:
        assert all(isinstance(k, str) for _, options in found for k in options)


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("", ()),
        ("partition", (("partition", {}),)),
        ("partition{}", (("partition", {}),)),
        (" token-merge\n  partition{ blocks=2 }\n", (("token-merge", {}), ("partition", {"blocks": 2}))),
        ("a{x=1 y=b}", (("a", {"x": 1, "y": "b"}),)),
        ("a{x=1,y=b, z=1e-3,}", (("a", {"x": 1, "y": "b", "z": 1e-3}),)),
        ("a{x=[1, [b], {c: d}] y={e: [f]}}", (("a", {"x": [1, ["b"], {"c": "d"}], "y": {"e": ["f"]}}),)),
        ("a{x='it''s' y=\"\\n\" 'odd key'=it's}", (("a", {"x": "it's", "y": "\n", "odd key": "it's"}),)),
        ("a{x=hf://b/c@d:e y={f: g:h}}", (("a", {"x": "hf://b/c@d:e", "y": {"f": "g:h"}}),)),
        ("a{x=yes y=~ z=200MB w=-.inf}", (("a", {"x": True, "y": None, "z": "200MB", "w": -math.inf}),)),
        ("a a", (("a", {}), ("a", {}))),
    ],
)
def test_what_may_be_written(text: str, wanted: Any) -> None:
    assert parse_pipeline(text) == wanted


def test_what_is_written() -> None:
    passes = [("token-merge", {"where": ["self_attention", "é"], "b": True}), ("partition", {"max_bytes": "200MB"})]
    text = "token-merge{where=[self_attention, é] b=true} partition{max_bytes=200MB}"
    assert pipeline_text(passes) == text
    assert pipeline_text([("a", {"x": "200 MB", "y": {"b": None}, "z": (1.0, "1")})]) == (
        'a{x="200 MB" y={b: null} z=[1.0, "1"]}'
    )


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a,b", "column 2: expected a space after 'a', or its options, got ','"),
        ("a{}b", "column 4: expected a space after 'a', got 'b'"),
        ("a {x=1}", "column 3: expected a pass's name, got '{'"),
        ("a{x=1", "column 6: expected a space, ',' or '}', got the end"),
        ("a{", "column 3: expected an option's name or '}', got the end"),
        ("a{x}", "column 4: expected '=' and a value after 'x', got '}'"),
        ("a{x: 1}", "column 4: expected '=' and a value after 'x', got ':'"),
        ("a{x=}", "column 5: expected a value, got '}'"),
        ("a{x= 1}", "column 5: expected a value, got a space"),
        ("a{x=1 x=2}", "column 7: expected another key, 'x' is given twice, got 'x'"),
        ("a{x=[1 2]}", "column 8: expected ',' or ']', got '2'"),
        ("a{x={b}}", "column 7: expected ': ' and a value after 'b', got '}'"),
        ("a{x={b: 1, b: 2}}", "column 12: expected another key, 'b' is given twice, got 'b'"),
        ("a{x={[b]: 1}}", "column 6: expected a key or '}', got '['"),
        ("a{x='b}", "column 5: expected a text that ends with the quote that it begins with, got '''"),
        ('a{x="\\q"}', "column 5: expected a text in quotes as YAML writes it, got '\"'"),
        ("a{x=#b}", "column 5: expected a value; put a text that begins with '#' in quotes, got '#'"),
        ("a{x=2026-13-01}", "column 5: expected a value; put a text such as '2026-13-01' in quotes, got '2'"),
        ("a\n  b{x}", "line 2, column 6: expected '=' and a value after 'x', got '}'"),
    ],
)
def test_what_is_refused(text: str, message: str) -> None:
    with pytest.raises(ValueError) as raised:
        parse_pipeline(text)
    assert str(raised.value) == message


def test_what_cannot_be_written() -> None:
    with pytest.raises(ValueError, match="'a b' is no name of a pass"):
        pipeline_text([("a b", {})])
    with pytest.raises(TypeError, match="an option cannot be a date"):
        pipeline_text([("a", {"x": datetime.date(2026, 1, 1)})])
