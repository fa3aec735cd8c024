"""Traces: what is read, what is refused, what is made up and how it is described."""

from __future__ import annotations

import json
import os
import sys
import tempfile
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

from odma_service.cli import app
from odma_service.errors import OdmaError
from odma_service.traces import (
    LARGEST_TOKENS,
    Trace,
    TraceError,
    describe,
    generate,
    import_trace,
    read_trace,
    write_trace,
)

AZURE_2023 = """TIMESTAMP,ContextTokens,GeneratedTokens
2023-11-16 18:15:46.6805900,374,44
2023-11-16 18:15:50.9951690,396,109
"""
AZURE_2024 = """TIMESTAMP,ContextTokens,GeneratedTokens
2024-05-10 00:00:00.009930+00:00,2162,5
2024-05-10 00:00:01+00:00,2399,6
2024-05-10 02:00:02.009930+02:00,76,15
"""
MOONCAKE = """{"timestamp": 0, "input_length": 6755, "output_length": 500, "hash_ids": [0, 1]}
{"timestamp": 3052, "input_length": 7319, "output_length": 490, "hash_ids": [0, 14]}
"""


def trace_of(t_seconds, inputs, outputs, **others):
    others = {"label": "by hand"} | others
    return Trace(np.array(t_seconds, float), np.array(inputs), np.array(outputs), **others)


def values(trace):
    lengths = (trace.input_tokens.tolist(), trace.output_tokens.tolist())
    return trace.t_seconds.tolist(), *lengths


@pytest.fixture
def written(tmp_path):
    """Return a function that writes text, or columns as parquet, and returns the path."""

    def write(content, name="trace"):
        path = tmp_path / name
        if isinstance(content, str):
            path.write_text(content)
        else:
            pq.write_table(pa.table(content), path)
        return path

    return write


def refusal_of(path):
    with pytest.raises(TraceError) as refused:
        read_trace(path)
    assert str(path) in str(refused.value)
    assert str(refused.value).isprintable()
    return str(refused.value)


# A trace


def test_a_trace_error_is_one_of_ours():
    assert issubclass(TraceError, OdmaError)


def test_the_head_of_a_trace_is_its_first_requests():
    trace = trace_of([0, 1, 2], [1, 2, 3], [4, 5, 6], request_class=("a", "b", "c"))
    assert values(trace.head(2)) == ([0, 1], [1, 2], [4, 5])
    assert trace.head(2).request_class == ("a", "b")
    assert len(trace.head(9)) == 3
    with pytest.raises(TraceError, match="rows"):
        trace.head(0)


@pytest.mark.parametrize(
    ("t_seconds", "inputs", "outputs", "complaint"),
    [
        ([], np.zeros(0, int), np.zeros(0, int), "at least one request"),
        ([0, 1], [1, 1], [1], "'output_tokens' must be 2 values"),
        ([0, 1], [1.5, 1], [1, 1], "'input_tokens' must be 2 values of int64"),
        ([0, -1], [1, 1], [1, 1], "row 2, column 't_seconds': -1.0"),
        ([0, np.nan], [1, 1], [1, 1], "row 2, column 't_seconds': nan"),
        ([0, np.inf], [1, 1], [1, 1], "row 2, column 't_seconds': inf"),
        ([0, 1e13], [1, 1], [1, 1], "row 2, column 't_seconds': 10000000000000.0"),
        ([0, 2, 1], [1, 1, 1], [1, 1, 1], "row 3, column 't_seconds': earlier"),
        ([0, 1], [1, 0], [1, 1], "row 2, column 'input_tokens': 0"),
        ([0, 1], [1, 1], [0, 1], "row 1, column 'output_tokens': 0"),
        ([0], [1], [LARGEST_TOKENS + 1], "row 1, column 'output_tokens': 2147483648"),
    ],
)
def test_a_trace_cannot_be_built_wrong(t_seconds, inputs, outputs, complaint):
    with pytest.raises(TraceError, match=complaint):
        trace_of(t_seconds, inputs, outputs)


@pytest.mark.parametrize("column", ["request_class", "tenant"])
def test_a_trace_has_a_class_and_a_tenant_for_each_request_or_none_at_all(column):
    with pytest.raises(TraceError, match=column):
        trace_of([0, 1], [1, 1], [1, 1], **{column: ("chat",)})


# Files


@given(data=st.data(), rows=st.integers(1, 20))
@settings(max_examples=50, deadline=None, derandomize=True)
def test_what_is_written_is_read_again(data, rows):
    def column(element):
        return data.draw(st.lists(element, min_size=rows, max_size=rows))

    tokens = st.integers(1, LARGEST_TOKENS)
    seconds = st.floats(0, 1e12)
    names = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), max_size=8)
    classes = st.none() | st.lists(names, min_size=rows, max_size=rows).map(tuple)
    trace = trace_of(
        sorted(column(seconds)),
        column(tokens),
        column(tokens),
        label=data.draw(st.text("aé中 =1", min_size=1)),
        request_class=data.draw(classes),
        tenant=data.draw(classes),
    )
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.parquet"
        write_trace(trace, path)
        again = read_trace(path)
    assert values(again) == values(trace)
    assert again.request_class == trace.request_class
    assert again.tenant == trace.tenant
    assert again.label == trace.label
    assert again.notes == ()


def test_azure_2023_times_count_from_the_first_request(written):
    trace = read_trace(written(AZURE_2023, "conv.csv"))
    assert values(trace) == ([0, 4.314579], [374, 396], [44, 109])
    assert trace.label == "conv"


def test_azure_2024_times_may_have_offsets_and_no_fraction(written):
    trace = read_trace(written(AZURE_2024))
    assert values(trace) == ([0, 0.99007, 2], [2162, 2399, 76], [5, 6, 15])


def test_mooncake_times_are_milliseconds(written):
    assert values(read_trace(written(MOONCAKE))) == ([0, 3.052], [6755, 7319], [500, 490])


def test_the_content_says_what_a_file_is_and_not_its_name(written):
    assert len(read_trace(written(AZURE_2023, "a.parquet"))) == 2
    assert len(read_trace(written(MOONCAKE, "b.csv"))) == 2
    assert len(read_trace(written({"input_tokens": [1], "output_tokens": [2]}, "c.jsonl"))) == 1


def test_a_byte_order_mark_empty_lines_and_dos_line_ends_do_no_harm(written):
    text = "\ufeff" + AZURE_2023.replace("\n", "\r\n") + "\r\n\r\n"
    assert len(read_trace(written(text))) == 2
    assert len(read_trace(written("\n" + MOONCAKE.replace("\n", "\n\n")))) == 2


def test_without_arrival_times_all_requests_arrive_at_zero(written):
    trace = read_trace(written({"row": [0, 1], "input_tokens": [3, 4], "output_tokens": [5, 6]}))
    assert values(trace) == ([0, 0], [3, 4], [5, 6])
    assert "no arrival times" in trace.notes[0]


def test_rows_that_cannot_be_replayed_are_dropped_and_counted(written):
    trace = read_trace(
        written(
            {
                "t_seconds": [0.0, 1.0, 2.0, 3.0, 4.0],
                "input_tokens": [1, 2, 0, 4, 5],
                "output_tokens": [1, 0, 0, 4, 5],
                "output_recorded": [True, True, True, False, True],
                "request_class": ["a", "b", "c", "d", "e"],
                "tenant": ["v", "w", "x", "y", "z"],
            }
        )
    )
    assert values(trace) == ([0, 4], [1, 5], [1, 5])
    assert trace.request_class == ("a", "e")
    assert trace.tenant == ("v", "z")
    assert trace.notes == (
        "dropped 1 row without a recorded output",
        "dropped 2 rows with 0 output tokens",
    )


def test_requests_of_one_moment_keep_the_order_of_the_file(written):
    columns = {"t_seconds": [7.0, 7.0, 1.0], "input_tokens": [1, 2, 3], "output_tokens": [4, 5, 6]}
    trace = read_trace(written(columns))
    assert values(trace) == ([1, 7, 7], [3, 1, 2], [6, 4, 5])
    assert "sorted" in trace.notes[0]


@pytest.mark.parametrize("text", [AZURE_2023, MOONCAKE])
def test_rows_beyond_those_asked_for_are_not_looked_at(written, text):
    path = written(text + "what is this?\n")
    assert len(read_trace(path, rows=2)) == 2
    assert len(read_trace(path, rows=1)) == 1
    assert "row 3" in refusal_of(path)
    with pytest.raises(TraceError, match="rows"):
        read_trace(path, rows=0)


def test_importing_keeps_the_name_of_the_source(written, tmp_path):
    source = written(MOONCAKE, "conversation.jsonl")
    imported = import_trace(source, tmp_path / "out.parquet")
    again = read_trace(tmp_path / "out.parquet")
    assert values(again) == values(imported) == values(read_trace(source))
    assert again.label == "conversation"


# Files that are wrong


@pytest.mark.parametrize(
    ("old", "new", "complaint"),
    [
        ("GeneratedTokens", "Generated", "column 'GeneratedTokens' is missing"),
        ("GeneratedTokens", "TIMESTAMP", "column 'TIMESTAMP' is twice"),
        ("GeneratedTokens", "\x1b[1m\f", "column 'GeneratedTokens' is missing"),
        (",109", "", "row 2: 2 of 3 columns"),
        ("109", "-109", "row 2, column 'GeneratedTokens': -109"),
        ("109", "1.5", "row 2, column 'GeneratedTokens': 1.5"),
        ("396", "nan", "row 2, column 'ContextTokens': nan"),
        ("396", "many", "row 2, column 'ContextTokens': 'many' is not a number"),
        ("396", "9" * 400, "row 2, column 'ContextTokens': inf"),
        ("396", "", "row 2, column 'ContextTokens': '' is not a number"),
        ("396", "\0", "row 2, column 'ContextTokens': '\\x00' is not a number"),
        ("396", "3" * 200_000, "not a CSV: field larger than field limit"),
        ("2023-11-16 18:15:50.9951690", "noon", "row 2, column 'TIMESTAMP': 'noon' is not an ISO"),
    ],
)
def test_a_wrong_csv_is_refused_by_row_and_column(written, old, new, complaint):
    assert complaint in refusal_of(written(AZURE_2023.replace(old, new)))


@pytest.mark.parametrize(
    ("old", "new", "complaint"),
    [
        ('"output_length": 490, ', "", "row 2, column 'output_length': missing"),
        ("490", "-490", "row 2, column 'output_length': -490"),
        ("490", "4.5", "row 2, column 'output_length': 4.5"),
        ("7319", "NaN", "row 2, column 'input_length': nan"),
        ("7319", '"7319"', "row 2, column 'input_length': '7319' is not a number"),
        ("7319", "true", "row 2, column 'input_length': True is not a number"),
        ("7319", "9" * 400, "row 2, column 'input_length': 9999"),
        ("3052", "-1", "row 2, column 'timestamp': -1"),
        ("3052", "Infinity", "row 2, column 'timestamp': inf"),
        ("[0, 14]}", "[0, 14]", "row 2: not a JSON object"),
        ("[0, 14]", "[" * 100_000, "row 2: not a JSON object"),
    ],
)
def test_a_wrong_jsonl_is_refused_by_row_and_column(written, old, new, complaint):
    assert complaint in refusal_of(written(MOONCAKE.replace(old, new)))


@pytest.mark.parametrize(
    ("changed", "complaint"),
    [
        ({"input_tokens": [1, -2]}, "row 2, column 'input_tokens': -2"),
        ({"input_tokens": [1, None]}, "row 2, column 'input_tokens': nan"),
        ({"input_tokens": [1.0, float("nan")]}, "row 2, column 'input_tokens': nan"),
        ({"input_tokens": [1, 2**62]}, "row 2, column 'input_tokens': 4611686018427387904"),
        ({"output_tokens": [1.5, 2.0]}, "row 1, column 'output_tokens': 1.5"),
        ({"output_tokens": ["1", "2"]}, "column 'output_tokens' is string, but must be numbers"),
        ({"t_seconds": [0.0, float("inf")]}, "row 2, column 't_seconds': inf"),
        ({"t_seconds": [-1.0, 0.0]}, "row 1, column 't_seconds': -1"),
        ({"t_seconds": pa.array([0, 1], pa.timestamp("s"))}, "column 't_seconds' is timestamp["),
        ({"request_class": ["a", None]}, "column 'request_class' is string"),
        ({"request_class": [1, 2]}, "column 'request_class' is int64"),
        ({"tenant": ["a", None]}, "column 'tenant' is string"),
        ({"output_recorded": [True, None]}, "column 'output_recorded' is bool"),
        ({"output_recorded": [False, False]}, "no row can be replayed: dropped 2 rows without"),
    ],
)
def test_a_wrong_parquet_is_refused_by_row_and_column(written, changed, complaint):
    columns = {"t_seconds": [0.0, 1.0], "input_tokens": [1, 2], "output_tokens": [3, 4]}
    assert complaint in refusal_of(written(columns | changed))


def test_a_parquet_without_lengths_is_refused(written):
    path = written({"t_seconds": [0.0], "prompt": ["hello"], "output_tokens": [2]})
    assert "column 'input_tokens' is missing; there are t_seconds, prompt" in refusal_of(path)


def test_a_damaged_parquet_is_refused(written):
    path = written({"input_tokens": [1], "output_tokens": [2], "request_class": ["chat"]})
    whole = path.read_bytes()
    path.write_bytes(whole[:-9])
    assert "damaged parquet" in refusal_of(path)
    path.write_bytes(whole.replace(b"chat", b"ch\xfft"))
    assert "damaged parquet" in refusal_of(path)
    path.write_bytes(b"PAR1" + bytes(len(whole) - 4))
    refusal_of(path)


def test_a_file_without_requests_is_refused(written):
    assert "empty" in refusal_of(written(""))
    assert "empty" in refusal_of(written("\n\n"))
    assert "no rows" in refusal_of(written(AZURE_2023.splitlines()[0]))
    nothing = pa.array([], pa.int64())
    assert "no rows" in refusal_of(written({"input_tokens": nothing, "output_tokens": nothing}))


def test_what_is_no_trace_is_refused_with_a_list_of_what_is(written, tmp_path):
    for path in (written("hello\n", "a.csv"), written("[1, 2]\n", "b.jsonl")):
        assert "known are parquet (t_seconds, input_tokens, output_tokens)" in refusal_of(path)
    assert "No such file" in refusal_of(tmp_path / "absent.parquet")
    assert "directory" in refusal_of(tmp_path)
    (tmp_path / "binary").write_bytes(AZURE_2023.encode() + b"\xff\xfe,1,1\n")
    assert "not UTF-8" in refusal_of(tmp_path / "binary")


def test_only_a_parquet_name_is_written_to(written, tmp_path):
    source = written(AZURE_2023, "source.csv")
    for target in (source, tmp_path / "absent" / "out.parquet"):
        with pytest.raises(TraceError, match=target.name):
            write_trace(generate(1, seed=1), target)
    assert source.read_text() == AZURE_2023


def test_only_parquet_needs_pyarrow(written, tmp_path, monkeypatch):
    parquet = written({"input_tokens": [1], "output_tokens": [2]}, "a.parquet")
    csv = written(AZURE_2023, "a.csv")
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    assert len(generate(5, seed=1)) == 5
    assert len(read_trace(csv)) == 2
    assert "pip install 'odma-service[trace]'" in refusal_of(parquet)
    with pytest.raises(TraceError, match="pip install"):
        write_trace(read_trace(csv), tmp_path / "b.parquet")


# Synthetic traces


def test_the_same_seed_gives_the_same_trace_and_another_seed_another():
    one, same, other = generate(500, seed=7), generate(500, seed=7), generate(500, seed=8)
    assert values(one) == values(same)
    assert one.request_class == same.request_class
    assert values(one) != values(other)


def test_a_synthetic_trace_says_so_even_after_a_file(tmp_path):
    trace = generate(10, seed=7)
    write_trace(trace, tmp_path / "production.parquet")
    assert trace.label == read_trace(tmp_path / "production.parquet").label == "synthetic seed=7"


@pytest.mark.parametrize("rows", [1, 2, 3, 100])
def test_a_synthetic_trace_has_the_length_asked_for(rows):
    assert len(generate(rows, seed=1)) == rows


def test_synthetic_outputs_are_cut_at_the_limit():
    assert generate(5_000, seed=1).output_tokens.max() == 4_096
    assert generate(5_000, seed=1, max_output_tokens=500).output_tokens.max() == 500
    assert generate(5_000, seed=1, max_output_tokens=1).output_tokens.max() == 1


@pytest.mark.parametrize("wrong", [{"rows": 0}, {"seed": -1}, {"max_output_tokens": 0}])
def test_impossible_requests_for_a_synthetic_trace_are_refused(wrong):
    with pytest.raises(TraceError, match=f"{next(iter(wrong))} must be from"):
        generate(**({"rows": 10, "seed": 1} | wrong))


def test_synthetic_lengths_have_heavy_tails():
    lengths = describe(generate(10_000, seed=1))
    assert lengths.output_tokens.p99 > 10 * lengths.output_tokens.p50
    assert lengths.input_tokens.p99 > 10 * lengths.input_tokens.p50


def test_synthetic_outputs_drift_within_a_class_and_over_all():
    trace = generate(30_000, seed=1)
    first, last = trace.output_tokens[:5_000], trace.output_tokens[-5_000:]
    assert np.median(last) > 1.5 * np.median(first)
    chat = np.array(trace.request_class) == "chat"
    early, late = trace.output_tokens[:10_000][chat[:10_000]], trace.output_tokens[chat][-2_000:]
    assert np.median(late) > 1.2 * np.median(early)


def test_the_synthetic_mix_slides_and_jumps_once_two_thirds_through():
    chosen = np.array(generate(30_000, seed=1).request_class) == "reasoning"
    shares = chosen.reshape(30, 1_000).mean(axis=1)
    jumps = np.diff(shares)
    assert jumps.argmax() == 19
    assert jumps[19] > 0.2
    assert np.abs(np.delete(jumps, 19)).max() < 0.1
    assert shares[15:20].mean() > shares[:5].mean() + 0.1


def test_synthetic_arrivals_are_poisson_with_a_rate_that_swings():
    gaps_seconds = np.diff(generate(40_000, seed=1).t_seconds)
    dense, sparse = gaps_seconds[9_500:10_500], gaps_seconds[29_500:30_500]
    assert sparse.mean() > 3 * dense.mean()
    assert dense.std() / dense.mean() == pytest.approx(1, abs=0.1)


# A description


def test_a_description_agrees_with_a_count_by_hand():
    trace = trace_of(
        [10, 11, 14], [1, 2, 3], [10, 50, 50], request_class=("b", "a", "a"), notes=("a note",)
    )
    description = describe(trace)
    assert description.label == "by hand"
    assert description.requests == 3
    assert description.requests_by_class == {"a": 2, "b": 1}
    assert description.duration_seconds == 4
    assert description.requests_per_second == 0.5
    assert description.interarrival_cv == 0.5  # gaps of 1 and 3 seconds: mean 2, deviation 1
    assert description.input_tokens.mean == 2
    assert description.input_tokens.p10 == pytest.approx(1.2)
    assert description.input_tokens.p50 == 2
    assert description.input_tokens.p90 == pytest.approx(2.8)
    assert description.output_tokens.max == 50
    assert description.output_tokens.p95 == 50
    assert description.total_tokens.p50 == 52
    assert description.total_tokens.max == 53
    assert description.outputs_at_maximum == 2
    assert description.outputs_at_maximum_share == pytest.approx(2 / 3)
    assert description.notes == ("a note",)


@pytest.mark.parametrize("moments", [[5], [5, 5], [0, 5e-324]])
def test_requests_of_one_moment_have_no_rate(moments):
    description = describe(trace_of(moments, [1] * len(moments), [1] * len(moments)))
    assert description.requests_per_second is None
    assert description.interarrival_cv is None


# The command


def run(*arguments):
    return CliRunner().invoke(app, ["trace", *map(str, arguments)])


def test_the_command_generates_a_trace_and_describes_it(tmp_path):
    path = tmp_path / "made.parquet"
    made = run("generate", path, "--rows", 50, "--seed", 3)
    assert made.exit_code == 0
    assert "50 requests of synthetic seed=3" in made.stdout
    assert values(read_trace(path)) == values(generate(50, seed=3))

    shown = run("describe", path)
    assert shown.exit_code == 0
    assert "synthetic seed=3" in shown.stdout
    assert "p99" in shown.stdout

    described = json.loads(run("describe", path, "--json").stdout)
    assert described["requests"] == 50
    assert described["output_tokens"]["max"] == read_trace(path).output_tokens.max()


def test_the_command_says_what_an_import_dropped(written, tmp_path):
    source = written(AZURE_2023 + "2023-11-16 18:15:51.0000000,5,0\n", "code.csv")
    result = run("import", source, tmp_path / "code.parquet")
    assert result.exit_code == 0
    assert "dropped 1 row with 0 output tokens" in result.stdout
    assert "wrote 2 requests" in result.stdout


def test_a_failing_command_says_one_line_and_exits_with_two(written, tmp_path):
    broken = written(AZURE_2023.replace("109", "-1"), "broken.csv")
    for arguments in (
        ("describe", tmp_path / "absent"),
        ("describe", broken, "--json"),
        ("import", broken, tmp_path / "out.parquet"),
        ("import", written(AZURE_2023, "good.csv"), tmp_path / "out.csv"),
        ("generate", tmp_path / "out.parquet", "--rows", 0),
        ("generate", tmp_path / "out.parquet", "--seed", -1),
        ("generate", tmp_path / "absent" / "out.parquet"),
    ):
        result = run(*arguments)
        assert result.exit_code == 2
        assert result.stdout == ""
        assert result.stderr.startswith(f"odma trace {arguments[0]}: ")
        assert result.stderr.count("\n") == 1
    assert not (tmp_path / "out.parquet").exists()


# Real traces


@pytest.mark.parametrize(
    ("name", "rows", "longest_output"),
    [
        ("arxiv_summarization_lengths_first80pct", 22_605, 4_056),
        ("azure2023_code", 8_819, 1_899),
        ("lmcache_agent_sessions", 792, 10_000),
        ("mooncake_conversation_first2thirds", 7_689, 2_000),
        ("reasoning_synthetic", 3_000, 14_384),
    ],
)
def test_a_real_trace_is_read_whole(name, rows, longest_output):
    beside = Path(__file__).resolve().parents[3] / "shared" / "data"
    path = Path(os.environ.get("ODMA_DATA_DIR", beside)) / "traces" / f"{name}.parquet"
    if not path.exists():
        pytest.skip(f"REAL TRACE NOT TESTED: {path} is absent; set ODMA_DATA_DIR to the data")
    description = describe(read_trace(path))
    assert description.label == name
    assert description.requests == rows
    assert description.output_tokens.max == longest_output
