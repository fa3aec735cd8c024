"""What a prompt looks like to a model: golden values, a plain twin, and any bytes."""

from __future__ import annotations

import math
import re
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from odma_service._native import features
from odma_service._native.features import BUCKETS, GROUPS, HEAD, NO_ROW, STATS, TAIL, Embeddings
from odma_service.errors import InvalidError

SENTENCE = b"Write 12 words about the Sea, please?"

# As version 1 sees SENTENCE. They may change only together with ODMA_FEATURES_VERSION.
GOLDEN_WORDS = [3475, 3916, 17911, 6957, 25294, 1971, 17463, 27501, 15705, 13613]
GOLDEN_SUMS = (133806, 101000, 1089177)


def fnv(data, state=2166136261):
    for byte in data:
        state = (state ^ byte) * 16777619 % 2**32
    return state


def bucket(state):
    state = (state ^ state >> 16) * 0x85EBCA6B % 2**32
    state = (state ^ state >> 13) * 0xC2B2AE35 % 2**32
    return (state ^ state >> 16) % BUCKETS


def plain_ids(text):
    """Return the ids of a text's groups, as the comment in features.c says it."""
    if len(text) > HEAD + TAIL:
        text = text[:HEAD] + b"\n" + text[len(text) - TAIL + 1 :]
    words = re.findall(rb"[a-z0-9\x80-\xff]+", re.sub(rb"[A-Z]", lambda m: m[0].lower(), text))
    hashes = [fnv(word, fnv([1])) for word in words]

    def of(seed, *others):
        return bucket(fnv(b"".join(h.to_bytes(4, "little") for h in others), fnv([seed])))

    single = [bucket(h) for h in hashes]
    if hashes:
        single += [of(2, hashes[0]), of(3, hashes[-1])]
    if len(hashes) > 1:
        single.append(of(4, *hashes[:2]))
    pieces = []
    for word in words:
        marked = b"<" + re.sub(rb"[0-9]", b"0", word) + b">"
        for start in range(len(marked) - 2):
            ends = range(start + 3, min(start + 5, len(marked)) + 1)
            pieces += [bucket(fnv(marked[start:end], fnv([6]))) for end in ends]
    return single, [of(5, *pair) for pair in pairwise(hashes)], pieces


def test_a_sentence_is_seen_as_it_always_was():
    seen = features.see(SENTENCE, 9)
    assert seen.ids[0].tolist() == GOLDEN_WORDS
    assert tuple(int(ids.sum()) for ids in seen.ids) == GOLDEN_SUMS
    assert features.VERSION == 1


@given(st.binary(max_size=2_000) | st.text(max_size=1_200).map(str.encode))
def test_the_ids_are_those_of_the_plain_rule(text):
    for ids, plain in zip(features.see(text, 3).ids, plain_ids(text), strict=True):
        assert ids.tolist() == plain


@pytest.mark.parametrize("length", [HEAD + TAIL - 1, HEAD + TAIL, HEAD + TAIL + 1, 100_000])
def test_of_a_long_text_head_and_tail_are_seen(length):
    text = bytes(97 + i * 7919 % 26 if i % 5 else 32 for i in range(length))
    seen = features.see(text, 3)
    assert [ids.tolist() for ids in seen.ids] == list(map(list, plain_ids(text)))
    middle = b"zzz".join((text[:HEAD], text[-TAIL:]))
    if length > HEAD + TAIL:
        other = features.see(middle, 3)
        assert [ids.tolist() for ids in other.ids] == [ids.tolist() for ids in seen.ids]


def test_statistics_count_what_they_say():
    stats = features.see(SENTENCE, 9).stats
    assert stats[0] == pytest.approx(math.log1p(9))
    assert stats[1] == pytest.approx(math.log1p(len(SENTENCE)))
    assert stats[2] == pytest.approx(len(SENTENCE) / 9)
    assert stats[4] == pytest.approx(math.log1p(7))  # words
    assert stats[6] == pytest.approx(2 / len(SENTENCE))  # digits
    assert stats[7] == pytest.approx(2 / len(SENTENCE))  # capitals
    assert stats[12] == pytest.approx(math.log1p(12))  # the greatest number
    assert stats[18] == 1  # it ends with a question mark
    assert not features.see(b"", 0).stats.any()


@given(st.binary(max_size=4_000), st.integers(0, 2**40))
def test_statistics_of_any_bytes_are_finite(text, prompt_tokens):
    stats = features.see(text, prompt_tokens).stats
    assert np.isfinite(stats).all()
    assert (stats >= 0).all()


def embeddings(random, dims=5, rows=40):
    row_of = random.integers(0, rows, BUCKETS).astype(np.uint16)
    row_of[random.random(BUCKETS) < 0.5] = NO_ROW
    table = random.integers(-128, 128, (rows, dims)).astype(np.int8)
    return row_of, table, random.random(dims).astype(np.float32)


def test_pooling_is_the_mean_of_the_rows_that_are_known():
    row_of, table, scales = embeddings(np.random.default_rng(1))
    model = Embeddings(row_of, table, scales)
    for text in (SENTENCE, b"", b"?", b"one"):
        into = np.zeros(model.width, np.float32)
        model.embed(text, 9, into)
        seen = features.see(text, 9)
        for g, ids in enumerate(seen.ids):
            rows = [table[row_of[i]] for i in ids if row_of[i] != NO_ROW]
            mean = np.mean(rows, 0) * scales if rows else np.zeros(5)
            assert into[g * 5 : g * 5 + 5] == pytest.approx(mean, abs=1e-4)
            assert into[GROUPS * 5 + g] == pytest.approx(len(rows) / max(len(ids), 1))
        assert (into[-STATS:] == seen.stats).all()


@pytest.mark.parametrize(
    "spoil",
    [
        lambda row_of, rows, scales: (np.full_like(row_of, 40), rows, scales),
        lambda row_of, rows, scales: (row_of[:-1], rows, scales),
        lambda row_of, rows, scales: (row_of, rows[:, :0], scales),
        lambda row_of, rows, scales: (row_of, rows, scales[:-1]),
        lambda row_of, rows, scales: (row_of, np.zeros((40, 65), np.int8), np.zeros(65)),
    ],
)
def test_embeddings_that_do_not_fit_are_refused(spoil):
    with pytest.raises(InvalidError):
        Embeddings(*spoil(*embeddings(np.random.default_rng(1))))
