"""Sets of prompts as traces, and the predictors that need them."""

from __future__ import annotations

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from odma_service import traces
from odma_service.errors import InvalidError
from odma_service.replay.load import limits_for, load_of, shuffled
from odma_service.replay.loop import serve
from odma_service.replay.policies import memory_of
from odma_service.replay.predict import predictor
from odma_service.replay.prices import Serving
from odma_service.values import Text

ROWS = 120


@pytest.fixture
def prompts(tmp_path):
    """Return a file of prompts whose answers are as long as their number says."""
    numbers = range(ROWS)
    columns = {
        "prompt": [f"Count to {number}." for number in numbers],
        "prompt_tokens": [10] * ROWS,
        "output_tokens": [number + 1 for number in numbers],
        "model": [f"{'a-model-with-a-long-name-' * 2}{number % 2}" for number in numbers],
        "reasoning_hidden": [number == 7 for number in numbers],
        "split": ["train" if number < 10 else "val" for number in numbers],
    }
    pq.write_table(pa.table(columns), tmp_path / "prompts.parquet")
    return tmp_path / "prompts.parquet"


def test_a_set_of_prompts_is_a_trace_of_what_no_model_was_trained_on(prompts):
    trace = traces.read_trace(prompts)
    assert sorted(trace.output_tokens) == list(range(11, ROWS + 1))
    assert {name[-1] for name in trace.request_class} == {"0", "1"}
    assert all(len(name) <= 32 for name in trace.request_class)
    assert traces.read_trace(prompts, 5).output_tokens.tolist() == trace.output_tokens[:5].tolist()


def test_a_prompt_stays_with_its_answer(prompts):
    trace = shuffled(traces.read_trace(prompts), 3)
    load = load_of(trace, limits_for(trace, 4096))
    for request in load.requests:
        assert request.text == Text.of(f"Count to {request.output_tokens - 1}.")


@pytest.mark.parametrize("name", ["model", "history"])
def test_a_load_is_served_with_a_model_or_with_history_alone(prompts, name, tmp_path):
    trace = traces.read_trace(prompts)
    load = load_of(trace, limits_for(trace, 16_384, 512))
    with memory_of("odma", load, Serving(), {}, tmp_path, predictor_name=name) as memory:
        history = serve(load, memory, Serving().prices(), batch_cap=8)
        ring, _, ever = memory.pool.shown(None)
    assert len(history.finished) == len(load)
    assert ever >= len(load) - 8  # the last are not given back any more
    assert ring["raw"][-1, 6] > 0
    assert (ring["quantiles"][-1] >= 0).all()


def test_a_model_needs_prompts():
    trace = traces.generate(50, 1)
    load = load_of(trace, limits_for(trace, 111_000))
    with pytest.raises(InvalidError, match="needs prompts"):
        predictor("model", load, 0)
    assert predictor("history", load, 0).model.version == "history"
