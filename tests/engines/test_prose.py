"""Texts that grow: whole characters only, and nothing that may become a stop."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoTokenizer

from odma_service.engines.transformers.prose import Prose


@pytest.fixture(scope="module")
def tokenizer(model_dir):
    return AutoTokenizer.from_pretrained(model_dir)


def said(tokenizer, text, *stops):
    """Return what each token of a text shows, and what comes at the end."""
    prose = Prose(tokenizer, stops)
    return [prose.add(token) for token in tokenizer(text).input_ids] + [prose.end()]


def test_a_character_is_shown_when_all_its_bytes_are_there(tokenizer):
    assert said(tokenizer, "aé€b") == ["a", "", "é", "", "", "€", "b", ""]


def test_bytes_that_are_no_character_are_shown_at_the_end(tokenizer):
    prose = Prose(tokenizer)
    first, *_ = tokenizer("€").input_ids
    assert prose.add(first) == ""
    assert prose.end() == "\N{REPLACEMENT CHARACTER}"


def test_what_may_become_a_stop_is_held_back(tokenizer):
    assert said(tokenizer, "abcabx", "abd", "cax") == ["", "", "ab", "", "c", "abx", ""]


def test_a_text_ends_before_its_stop(tokenizer):
    assert "".join(said(tokenizer, "one\nUser: two", "\nUser:")) == "one"


def test_the_first_of_several_stops_counts(tokenizer):
    assert "".join(said(tokenizer, "abcdef", "de", "bcde")) == "a"


@given(st.text(st.sampled_from("abé€"), max_size=12), st.text("ab", min_size=1, max_size=3))
def test_a_text_is_what_stands_before_the_stop(tokenizer, text, stop):
    assert "".join(said(tokenizer, text, stop)) == text.partition(stop)[0]
