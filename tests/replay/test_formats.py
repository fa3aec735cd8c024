"""Formats of traces: each is known by its marks and read in its units, or refused with a cure."""

from __future__ import annotations

import gzip
import json
import os
import random
import subprocess
import tempfile
from contextlib import suppress
from functools import cache
from pathlib import Path
from threading import Thread

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from running import odma
from typer.testing import CliRunner

from odma_service.cli import app
from odma_service.client.local import ODMA
from odma_service.traces import FORMATS, Trace, TraceError, describe, read_trace, write_trace


def lines(*records):
    return "".join(json.dumps(record) + "\n" for record in records)


def calls(*moments):
    return lines(
        *(
            {"timestamp": t, "input": "a" * 40, "output": "b" * 9, "session_id": "s"}
            for t in moments
        )
    )


def bailian(chat, seconds, tokens=521, ids=33):
    return {
        "chat_id": chat,
        "parent_chat_id": -1,
        "timestamp": seconds,
        "input_length": tokens,
        "output_length": 132,
        "type": "text",
        "turn": 1,
        "hash_ids": list(range(ids)),
    }


MOONCAKE_ROW = {"timestamp": 3052, "input_length": 7319, "output_length": 490, "hash_ids": [0, 14]}
VLLM = {
    "backend": "vllm",
    "request_rate": "inf",
    "duration": 9.5,
    "request_throughput": 0.3,
    "total_input_tokens": 60,
    "input_lens": [10, 20, 30],
    "output_lens": [5, 0, 7],
    "ttfts": [0.1, 0.0, 0.2],
    "itls": [[0.1], [], [0.2]],
    "start_times": [1000.5, 0.0, 1003.0],  # a failed one may have none
    "errors": ["", "refused", ""],
}
SGLANG = {
    "backend": "sglang",
    "request_throughput": 0.3,
    "total_input_tokens": 30,
    "total_output_tokens_retokenized": 11,
    "input_lens": [10, 20],
    "output_lens": [5, 6],
}
CHAT = {
    "id": "x_0",
    "conversations": [
        {"from": "human", "value": "q" * 40},
        {"from": "gpt", "value": "a" * 80},
        {"from": "human", "value": "é" * 20},
        {"from": "gpt", "value": "a" * 7},
    ],
}
SAMPLES = {
    "azure": """TIMESTAMP,ContextTokens,GeneratedTokens
2023-11-16 18:15:46.6805900,374,44
2023-11-16 18:15:50.9951690,396,109
""",
    "burstgpt": """Timestamp,Model,Request tokens,Response tokens,Total tokens,Log Type
19440110.0,GPT-4,470,18,488,Conversation log
19440150.0,ChatGPT,1080,230,1310,API log
19440200.0,ChatGPT,420,0,420,API log
""",
    "vidur": "arrived_at,num_prefill_tokens,num_decode_tokens\n0.0,374,44\n4.314579,396,109\n",
    "mooncake": lines({"timestamp": 0, "input_length": 655, "output_length": 52}, MOONCAKE_ROW),
    "bailian": lines(bailian(0, 61.114), bailian(1, 71.114), bailian(2, 101.114)),
    "aiperf": lines(
        {"session_id": "a", "timestamp": 0, "input_length": 100, "output_length": 40},
        {"session_id": "a", "delay": 500, "input_length": 150, "output_length": 50},
        {"session_id": "b", "timestamp": 100, "input_length": 200, "output_length": 60},
    ),
    "servegen-offline": lines(
        {"request_id": 0, "type": "text", "input_length": 61, "output_length": 2370},
        {"request_id": 1, "type": "text", "input_length": 54, "output_length": 2031},
    ),
    "lmcache": calls(1760428652866457, 1760428655872987, 1760428655127794),
    "sharegpt": json.dumps([CHAT, {"id": "x_1", "conversations": []}]),
    "vllm": json.dumps(VLLM),
    "sglang": lines(SGLANG),
    "decision-log": lines(
        *(
            {
                "odma": "request",
                "version": 1,
                "asked": asked,
                "prompt_tokens": 9,
                "output_tokens": 7,
                "end": "FINISHED",
                "request_class": "chat",
            }
            for asked in (100.0, 102.0)
        )
    ),
}
READ = {
    "azure": ([0, 4.314579], [374, 396], [44, 109]),
    "burstgpt": ([0, 40], [470, 1080], [18, 230]),
    "vidur": ([0, 4.314579], [374, 396], [44, 109]),
    "mooncake": ([0, 3.052], [655, 7319], [52, 490]),
    "bailian": ([0, 10, 40], [521] * 3, [132] * 3),
    "aiperf": ([0, 0.1, 0.5], [100, 200, 290], [40, 60, 50]),
    "servegen-offline": ([0, 0], [61, 54], [2370, 2031]),
    "lmcache": ([0, 2.261337, 3.00653], [10] * 3, [3] * 3),
    "sharegpt": ([0, 0], [10, 40], [20, 2]),
    "vllm": ([0, 2.5], [10, 30], [5, 7]),
    "sglang": ([0, 0], [10, 20], [5, 6]),
    "decision-log": ([0, 2], [9, 9], [7, 7]),
}


def written(folder, content, name="trace"):
    path = Path(folder) / name
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def refusal(path, **how):
    with pytest.raises(TraceError) as refused:
        read_trace(path, **how)
    return str(refused.value)


def assert_read(trace, name):
    seconds, inputs, outputs = READ[name]
    assert trace.t_seconds.tolist() == pytest.approx(seconds, abs=1e-6)
    assert trace.input_tokens.tolist() == inputs
    assert trace.output_tokens.tolist() == outputs


def test_every_format_has_a_sample():
    assert SAMPLES.keys() == READ.keys() == FORMATS.keys() - {"parquet"}


@pytest.mark.parametrize("name", SAMPLES)
def test_a_format_is_known_by_its_marks_named_zipped_and_from_a_pipe(tmp_path, name):
    path = written(tmp_path, SAMPLES[name], f"{name}.txt")
    assert_read(read_trace(path), name)
    assert_read(read_trace(path, form=name), name)
    zipped = written(tmp_path, gzip.compress(SAMPLES[name].encode()), "zipped.jsonl.gz")
    assert_read(read_trace(zipped), name)
    assert read_trace(zipped).label == "zipped"
    assert_read(read_trace(from_fifo(tmp_path, SAMPLES[name])), name)


def from_fifo(folder, content):
    """Return a FIFO that gives a content once."""
    path = Path(folder) / "fifo"
    path.unlink(missing_ok=True)
    os.mkfifo(path)
    content = content.encode() if isinstance(content, str) else content
    Thread(target=path.write_bytes, args=(content,), daemon=True).start()
    return path


def test_the_command_reads_its_input_as_a_file(tmp_path):
    """Lines of 128 bytes: they end where a pipe is read in pieces."""
    row = json.dumps(MOONCAKE_ROW)
    path = written(tmp_path, (row.ljust(127) + "\n") * 2_000)
    whole = json.loads(odma("trace", "describe", path, "--json").stdout)
    assert whole["requests"] == 2_000
    for packed in (path.read_bytes(), gzip.compress(path.read_bytes())):
        ran = subprocess.run(
            [*ODMA, "trace", "describe", "/dev/stdin", "--json"],
            input=packed,
            capture_output=True,
            check=True,
        )
        assert json.loads(ran.stdout) == whole | {"label": "stdin"}


def test_parquet_comes_from_a_pipe_too(tmp_path):
    path = tmp_path / "a.parquet"
    write_trace(read_trace(written(tmp_path, SAMPLES["bailian"])), path)
    again = read_trace(from_fifo(tmp_path, path.read_bytes()))
    assert_read(again, "bailian")
    assert again.block_tokens == 16
    assert len(again.prefix_ids[0]) == 33


def test_prefix_blocks_have_the_size_that_a_parquet_says(tmp_path):
    table = pa.table({"input_tokens": [128], "output_tokens": [1], "hash_ids": [[1, 2]]})
    path = tmp_path / "a.parquet"
    pq.write_table(table.replace_schema_metadata({"hash_block_tokens": "64"}), path)
    assert read_trace(path).block_tokens == 64
    pq.write_table(table, path)
    assert "2 blocks of 512 tokens in a prompt of 128" in refusal(path)
    pq.write_table(table.replace_schema_metadata({"hash_block_tokens": "0"}), path)
    assert "hash_block_tokens" in refusal(path)


def test_a_pretty_printed_result_is_one(tmp_path):
    assert_read(read_trace(written(tmp_path, json.dumps(VLLM, indent=2))), "vllm")


def test_what_happened_is_said_in_notes(tmp_path):
    notes = " ".join(read_trace(written(tmp_path, SAMPLES["aiperf"])).notes)
    assert "counts from the turn before" in notes
    assert "all that its session said before" in notes
    for name in ("lmcache", "sharegpt"):
        assert "4 bytes" in " ".join(read_trace(written(tmp_path, SAMPLES[name])).notes)
    assert "0 output tokens" in " ".join(read_trace(written(tmp_path, SAMPLES["vllm"])).notes)


def test_models_of_burstgpt_are_classes(tmp_path):
    assert read_trace(written(tmp_path, SAMPLES["burstgpt"])).request_class == ("GPT-4", "ChatGPT")


def test_sessions_without_timestamps_begin_together(tmp_path):
    messages = [{"role": "user", "content": "q" * 400}]
    row = {"messages": messages, "output_length": 5}
    trace = read_trace(
        written(
            tmp_path,
            lines(
                {"session_id": "a"} | row,
                {"session_id": "a", "delay": 2_000} | row,
                {"session_id": "b"} | row,
            ),
        )
    )
    assert trace.t_seconds.tolist() == [0, 0, 2]
    assert trace.input_tokens.tolist() == [100] * 3


@pytest.mark.parametrize("moments", [(0, 120, 240), (1.5e9, 1.5e9 + 240), (1.5e12, 1.5e12 + 240e3)])
def test_the_clock_of_lmcache_is_told_by_its_size(tmp_path, moments):
    assert describe(read_trace(written(tmp_path, calls(*moments)))).duration_seconds == 240


# Doubt


@pytest.mark.parametrize("seconds", [61.114, 0.5])
def test_times_that_may_be_seconds_are_not_taken_for_milliseconds(tmp_path, seconds):
    path = written(
        tmp_path,
        lines(
            {"timestamp": 0, "input_length": 10, "output_length": 5},
            {"timestamp": seconds, "input_length": 10, "output_length": 5},
        ),
    )
    said = refusal(path)
    assert "row 2, column 'timestamp'" in said
    assert "--format mooncake or --format bailian" in said
    for form, unit in (("mooncake", 1e-3), ("bailian", 1)):
        assert read_trace(path, form=form).t_seconds[-1] == pytest.approx(seconds * unit)


def test_blocks_are_held_against_the_prompt(tmp_path):
    row = bailian(0, 1)
    del row["chat_id"], row["parent_chat_id"]
    said = refusal(written(tmp_path, lines(row)))
    assert "row 1, column 'hash_ids': 33 blocks of 512 tokens in a prompt of 521" in said
    assert "--format" in said
    said = refusal(written(tmp_path, lines(bailian(0, 1), bailian(1, 2, ids=34))))
    assert "row 2, column 'hash_ids': 34 blocks of 16 tokens in a prompt of 521" in said


def test_marks_of_two_formats_are_refused(tmp_path):
    path = written(tmp_path, lines(bailian(0, 1) | {"session_id": "a"}))
    assert "it may be bailian or aiperf: say which with --format" in refusal(path)
    assert read_trace(path, form="bailian").block_tokens == 16


def test_keys_of_another_format_further_on_are_refused(tmp_path):
    rows = [{"timestamp": t, "input_length": 9, "output_length": 5} for t in range(150)]
    rows[140]["delay"] = 5
    said = refusal(written(tmp_path, lines(*rows)))
    assert "row 141, column 'delay'" in said
    assert "--format aiperf" in said


MALFORMED = [
    ("burstgpt", "1080", "-1080", "row 2, column 'Request tokens': -1080"),
    ("burstgpt", "19440150.0", "soon", "row 2, column 'Timestamp': 'soon' is not a number"),
    ("burstgpt", "ChatGPT,1080", "x" * 33 + ",1080", "row 2, column 'request_class'"),
    ("burstgpt", "Model", "Mode", "column 'Model' is missing"),
    ("vidur", "396", "1.5", "row 2, column 'num_prefill_tokens': 1.5"),
    ("vidur", "4.314579", "nan", "row 2, column 'arrived_at': nan"),
    ("azure", "2023-11-16 18:15:50.9951690", "20231116", "row 2, column 'TIMESTAMP'"),
    ("bailian", "71.114", '"71"', "row 2, column 'timestamp': '71' is not a number"),
    ("bailian", "[0, 1,", f"[{2**70}, 1,", "row 1, column 'hash_ids': not a list"),
    ("aiperf", "500", "-500", "row 2, column 'delay': -500 is not a number"),
    ("aiperf", '"timestamp": 100, ', "", "row 3, column 'timestamp': missing"),
    ("aiperf", '"output_length": 50', '"x": 50', "row 2, column 'output_length': missing"),
    ("lmcache", "1760428655872987", "1760428655", "row 2, column 'timestamp': 1.76043e+09 has"),
    ("lmcache", "1760428652866457", "99000000", "neither seconds from a start nor"),
    ("lmcache", '"input"', '"inputs"', "row 1, column 'input': missing"),
    ("sharegpt", '"value": "aaaaaaa"', '"value": 7', "row 1, column 'conversations': 7 is not"),
    ("sharegpt", "[]", '["x"]', "row 2, column 'conversations': not a list of turns"),
    ("sharegpt", '"from": "gpt"', '"who": "gpt"', "a turn without 'from'"),
    ("vllm", "[5, 0, 7]", "[5, 0]", "column 'output_lens': 2 values, but 3 in 'input_lens'"),
    ("vllm", "[5, 0, 7]", '[5, 0, "7"]', "row 3, column 'output_lens': '7' is not a number"),
    ("vllm", '"input_lens"', '"lens"', "benchmark again with --save-detailed (vLLM)"),
    ("sglang", "\n", "\n" + SAMPLES["sglang"], "2 results in it"),
    ("decision-log", "7", '"7"', "row 1, column 'output_tokens': '7' is not a number"),
]


@pytest.mark.parametrize(("name", "old", "new", "said"), MALFORMED)
def test_what_is_malformed_is_refused_by_row_and_column(tmp_path, name, old, new, said):
    assert old in SAMPLES[name]
    path = written(tmp_path, SAMPLES[name].replace(old, new))
    assert said in refusal(path)
    ran = CliRunner().invoke(app, ["trace", "describe", str(path)])
    assert ran.exit_code == 2
    assert ran.stderr.count("\n") == 1


def test_an_unknown_format_and_damaged_gzip_are_refused(tmp_path):
    path = written(tmp_path, SAMPLES["azure"])
    assert "no format is named 'azur'; known are parquet, azure" in refusal(path, form="azur")
    path = written(tmp_path, SAMPLES["vidur"])
    assert "column 'TIMESTAMP' is missing" in refusal(path, form="azure")
    whole = gzip.compress(SAMPLES["azure"].encode())
    assert "damaged gzip" in refusal(written(tmp_path, whole[:-9]))
    assert "damaged gzip" in refusal(written(tmp_path, whole[:12] + b"\xff" * 20 + whole[32:]))


# Classes and tenants


@pytest.mark.parametrize("column", ["request_class", "tenant"])
@pytest.mark.parametrize("name", ["x" * 33, "é" * 17, "a\0"])
def test_a_name_that_no_service_takes_is_refused_by_every_command(tmp_path, column, name):
    path = tmp_path / "a.parquet"
    columns = {"input_tokens": [1, 1], "output_tokens": [2, 2], column: ["é" * 16, name]}
    pq.write_table(pa.table(columns), path)
    for arguments in (
        ("trace", "describe", path),
        ("trace", "import", path, tmp_path / "out.parquet"),
        ("replay", path),
        ("demo", "--trace", path),
    ):
        ran = CliRunner().invoke(app, list(map(str, arguments)))
        assert ran.exit_code == 2
        assert f"row 2, column '{column}'" in ran.stderr
        assert "up to 32 bytes" in ran.stderr
    with pytest.raises(TraceError, match=f"row 1, column '{column}'"):
        Trace(np.zeros(1), np.ones(1, int), np.ones(1, int), "by hand", **{column: (name,)})


# Anything at all


@cache
def contents():
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "a.parquet"
        write_trace(read_trace(written(folder, SAMPLES["bailian"])), path)
        return (
            *(text.encode() for text in SAMPLES.values()),
            path.read_bytes(),
            gzip.compress(SAMPLES["mooncake"].encode()),
        )


def assert_read_or_refused(content):
    """Whatever its user takes it for: another error than a TraceError fails the test."""
    with tempfile.TemporaryDirectory() as folder:
        path = written(folder, content)
        for form in (None, *FORMATS):
            with suppress(TraceError):
                write_trace(read_trace(path, form=form), path.with_suffix(".parquet"))


@given(st.binary(max_size=200) | st.text(max_size=200).map(str.encode))
@settings(max_examples=60, deadline=None, derandomize=True)
def test_any_bytes_are_read_or_refused(content):
    assert_read_or_refused(content)


@given(st.integers(0, len(SAMPLES) + 1), st.integers(0, 2**32))
@settings(max_examples=150, deadline=None, derandomize=True)
def test_files_cut_off_or_with_bytes_changed_are_read_or_refused(which, seed):
    content = bytearray(contents()[which])
    chosen = random.Random(seed)
    if chosen.random() < 0.5:
        del content[chosen.randrange(len(content)) :]
    elif which != len(SAMPLES):  # pyarrow's own parser is not ours to test
        for _ in range(chosen.randint(1, 3)):
            place = chosen.randrange(len(content))
            content[place : place + 1] = chosen.choice(
                (b"", b"\xff", b"\0", b"[", b"{", b"null", b'"', b"-", b"e9", b",", b"\n")
            )
    assert_read_or_refused(bytes(content))


JUNK = (None, True, -1, 1.5, 1e308, float("nan"), 2**80, "x", "\ud800", [], {}, [None], [{}])


def damaged(value, chosen):
    """Return a JSON value with something in it gone, or replaced by what belongs elsewhere."""
    if isinstance(value, dict | list) and value and chosen.random() < 0.8:
        value = value.copy()
        key = chosen.choice(list(value) if isinstance(value, dict) else range(len(value)))
        if chosen.random() < 0.2:
            del value[key]
        else:
            value[key] = damaged(value[key], chosen)
        return value
    return chosen.choice(JUNK)


@given(st.sampled_from([n for n, s in SAMPLES.items() if s[0] in "{["]), st.integers(0, 2**32))
@settings(max_examples=300, deadline=None, derandomize=True)
def test_json_with_values_out_of_place_is_read_or_refused(name, seed):
    chosen = random.Random(seed)
    sample = SAMPLES[name]
    records = json.loads(sample) if sample[0] == "[" else list(map(json.loads, sample.splitlines()))
    records = damaged(damaged(records, chosen), chosen)
    assert_read_or_refused(lines(*records) if isinstance(records, list) else json.dumps(records))
