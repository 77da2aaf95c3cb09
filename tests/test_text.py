"""Prompt cleaning and tokenizing against the golden pairs and Hugging Face's tokenizer."""

from __future__ import annotations

import json
import random
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from toolchain.errors import CheckpointError
from toolchain.models.open_sora_v1_2.prompts import suffixes
from toolchain.player.prompt import AFTER_MARKUP, AFTER_REPAIR, BEFORE_MARKUP, clean_text, prepare_prompt, strip_markup
from toolchain.player.tokenizer import T5Tokenizer

GOLDEN = Path(__file__).parent / "golden"
META = json.loads((GOLDEN / "t5.json").read_text())
PIECES = GOLDEN / "t5_spiece.model"

# --- cleaning ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("text", META["text_preprocessing"])
def test_cleaning_is_golden(text: str) -> None:
    assert clean_text(text) == META["text_preprocessing"][text]


# What the official code makes of these; one group of rules a line.
CLEANED = {
    "<Person> and <b>two</b> dogs": "person and two dogs",
    "see https://www.b.co.uk/p?q=1 or www.foo.org, by foo@bar.com": "see uk p?q=1 or , by foo",
    "x<br>y<script>z</script> &lt;3 &#39;a&#x41; &foo; <!-- no --> <![CDATA[in]]>": "xy <3 'aa foo in",
    "a @user 日本 \u3231 — 〜 b": "a - - b",
    "\u00abone\u00bb `two` \u2018three\u2019": 'one" "two" \'three',
    "from 192.168.0.1 at 12:30": "from at 12:30",
    "#123 #1234 #12345 123456 12345": "1234 12345",
    "my_file.jpeg and photo.mp4 \\n end": "and end",
    "***sale*** ~ § (x) [y] {z} a|b": "sale x y z a b",
    "jc6640 jc6640vc 6640vc231 j2d1a2a b2b": "",
    "free shipping worldwide, click on this, png images, page 12": "worldwide, ,",
    "1920x1080, 3.5\u04452, 16:9, 4k, 60fps": "16:9, 4k, 60fps",
    "dawn : a,b.c 3.14 i.e.word": "dawn: a, b. c 3.14 i. e. word",
    '"all of it"': "all of it",
    "_lead and trail-": "lead and trail",
    "a-b-c_d e": "a-b-c_d e",
    "a-b-c_d-e": "a b c d e",
    "sch\u00c3\u00b6n \ufb01sh \uff21\uff22 caf\u0065\u0301": "schã¶n fish ab café",
    "50%25 off+now": "50% off now",
    "": "",
    "   ": "",
}


@pytest.mark.parametrize("text", CLEANED)
def test_cleaning_by_rule(text: str) -> None:
    assert clean_text(text) == CLEANED[text]


@settings(max_examples=200, deadline=None)
@given(st.text(max_size=80))
def test_cleaning_takes_any_text(text: str) -> None:
    cleaned = clean_text(text)
    assert cleaned == cleaned.strip()
    assert "  " not in cleaned


def test_markup_that_cannot_be_read_stays() -> None:
    assert strip_markup("a <![what b") == "a <![what b"


def test_every_rule_says_why() -> None:
    assert all(rule.why for rule in (*BEFORE_MARKUP, *AFTER_MARKUP, *AFTER_REPAIR))


# --- what is appended --------------------------------------------------------------------------------


def prepared(prompt: str, **asked: Any) -> str:
    """A prompt as Open-Sora's family asks for it."""
    return prepare_prompt(prompt, [(s.label, s.text) for s in suffixes(**asked)])


def test_score_is_appended_before_cleaning() -> None:
    assert prepared("A Cat (sleeping)") == "a cat sleeping aesthetic score: 6.5."
    assert prepare_prompt("A Cat", [("(mood)", " (Calm)")]) == "a cat calm"


def test_suffixes() -> None:
    assert suffixes(score=None) == ()
    assert prepared("A cat", score=None) == prepare_prompt("A cat") == "a cat"
    assert prepared("A cat", flow=2, camera_motion="pan right") == (
        "a cat aesthetic score: 6.5. motion score: 2.0. camera motion: pan right."
    )


def test_a_suffix_that_is_there_is_kept() -> None:
    assert prepared("A cat aesthetic score: 5.0.") == "a cat aesthetic score: 5.0."
    assert prepared("A cat motion score: 9.", score=None, flow=1) == "a cat motion score: 9."


def test_a_prompt_that_is_not_cleaned() -> None:
    assert prepare_prompt("A Cat (sleeping)", [("x:", " X: 1.")], "none") == "A Cat (sleeping) X: 1."


# --- tokens ------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tokenizer() -> T5Tokenizer:
    return T5Tokenizer(PIECES)


@pytest.mark.parametrize(("case", "length"), [("L24", 24), ("L300", 300)])
def test_tokens_are_golden(tokenizer: T5Tokenizer, case: str, length: int) -> None:
    golden = load_file(GOLDEN / f"t5_case_{case}.safetensors")
    tokens = [tokenizer(prompt, length) for prompt in META["cases"][case]["prompts"]]
    assert [list(t.ids) for t in tokens] == golden["in.input_ids"].tolist()
    assert [list(t.mask) for t in tokens] == golden["in.attention_mask"].tolist()
    assert [t.count for t in tokens] == META["cases"][case]["lens"]


def test_truncation_keeps_the_end_and_says_so(tokenizer: T5Tokenizer) -> None:
    whole = tokenizer("a cat and a dog", 300)
    exact = tokenizer("a cat and a dog", whole.count)
    cut = tokenizer("a cat and a dog", whole.count - 1)
    assert (whole.truncated, exact.truncated, cut.truncated) == (False, False, True)
    assert exact.ids == whole.ids[: whole.count]
    assert cut.ids == (*whole.ids[: whole.count - 2], tokenizer.end)
    assert tokenizer("a cat", 1).ids == (tokenizer.end,)


def test_empty_prompt_is_the_end_mark(tokenizer: T5Tokenizer) -> None:
    tokens = tokenizer("", 4)
    assert (tokens.ids, tokens.mask, tokens.truncated) == ((1, 0, 0, 0), (1, 0, 0, 0), False)


def test_no_room_for_the_end_mark(tokenizer: T5Tokenizer) -> None:
    with pytest.raises(ValueError, match="cannot have 0 tokens"):
        tokenizer("a cat", 0)


def test_tokens_are_hugging_faces(tokenizer: T5Tokenizer, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    shutil.copy(PIECES, tmp_path / "spiece.model")
    theirs = transformers.T5Tokenizer.from_pretrained(tmp_path)
    words = [*CLEANED, *META["text_preprocessing"], "é", "日本", "🎬", "3.14", "\n", "\t", "\u00a0", "x" * 30]
    pick = random.Random(0)
    for i in range(150):
        text = "".join(pick.choice(words) + pick.choice([" ", "", "  ", ", "]) for _ in range(pick.randint(0, 6)))
        text = prepared(text) if i % 2 else text
        length = pick.choice([1, 20, 120])
        want = theirs(text, max_length=length, padding="max_length", truncation=True, return_attention_mask=True)
        got = tokenizer(text, length)
        assert (list(got.ids), list(got.mask)) == (want["input_ids"], want["attention_mask"]), text


@pytest.mark.parametrize("content", [None, b"", b"not a model"])
def test_a_bad_model_file_is_named(tmp_path: Path, content: bytes | None) -> None:
    path = tmp_path / "spiece.model"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(CheckpointError, match=r"spiece\.model"):
        T5Tokenizer(path)


def test_imports_are_light() -> None:
    heavy = "{'torch', 'transformers', 'ftfy', 'numpy'}"
    code = f"import toolchain.player.prompt, toolchain.player.tokenizer, sys; print({heavy} & set(sys.modules))"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "set()"
