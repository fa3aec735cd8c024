"""The commands around the replay, and what they are made of."""

from __future__ import annotations

import json
import os
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from lab.paper.reproduce import SHAPES, shaped
from odma_service import replay, traces
from odma_service.cli import app
from odma_service.replay.tune import GRIDS, TRAINED_ON, Tuner, reasoning_like

DATA = Path(os.environ.get("ODMA_DATA_DIR", Path(__file__).parents[3] / "shared/data"))


@pytest.fixture
def trace(tmp_path):
    path = tmp_path / "load.parquet"
    traces.write_trace(traces.generate(200, 5, max_output_tokens=800), path)
    return path


def odma(*arguments):
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def test_another_model_is_priced(trace, tmp_path):
    config = tmp_path / "config.json"
    config.write_text(
        '{"model_type": "deepseek_v32", "num_hidden_layers": 61, "kv_lora_rank": 512,'
        ' "qk_rope_head_dim": 64, "index_head_dim": 128, "torch_dtype": "bfloat16"}'
    )
    options = ("--policy", "elastic", "--capacity-tokens", 12_000, "--json")

    def replayed(*more):
        ran = odma("replay", trace, *options, *more)
        assert ran.exit_code == 0
        facts = json.loads(ran.stdout.splitlines()[-1])
        return facts["assumptions"], facts["policies"]["elastic"]["tokens_per_s"]

    assumed, rate = replayed()
    heavier, slower = replayed("--model", config, "--weights-gbytes", 37)
    assert (assumed["kv_bytes_per_token"], assumed["planes"]) == (57_344, 56)
    assert (heavier["kv_bytes_per_token"], heavier["planes"]) == (78_324, 122)
    assert heavier["weight_bytes"] == heavier["flops_per_token"] == 37e9
    assert heavier["model"] == str(config)
    assert slower < rate
    config.write_text("{}")
    assert odma("replay", trace, *options, "--model", config).exit_code == 2


def test_an_engine_that_moves_less_gets_fewer_copies(trace):
    def copies(*more):
        ran = odma(
            *("replay", trace, "--policy", "elastic,odma", "--capacity-tokens", 12_000, "--json"),
            *more,
        )
        policies = json.loads(ran.stdout.splitlines()[-1])["policies"]
        return [policies[name]["copies"] for name in ("elastic", "odma")]

    elastic, odma_own = copies()
    own_growth = copies("--moves", "own-growth")
    assert 0 < own_growth[0] < elastic
    assert own_growth[1] == odma_own > 0  # what it is for
    assert copies("--moves", "none") == [0, 0]


def test_replay_ends_with_one_json_object(trace):
    ran = odma("replay", trace, "--policy", "elastic,paged", "--capacity-tokens", 12_000, "--json")
    assert ran.exit_code == 0
    facts = json.loads(ran.stdout.splitlines()[-1])
    assert facts["load_class"] == "memory-bound"
    assert set(facts["policies"]) == {"ideal-16", "elastic", "paged-16"}
    assert {"device", "assumptions", "parameter_hash"} <= facts.keys()
    assert {
        "tokens_per_s",
        "requests_per_s",
        "utilisation_written_over_capacity",
        "utilisation_written_over_reserved",
        "preemptions",
        "recomputed_tokens",
        "copies",
        "copy_share_of_time",
        "ttft_p50_s",
        "ttft_p95_s",
        "ttft_p99_s",
        "tpot_p50_s",
        "tpot_p95_s",
        "tpot_p99_s",
        "safety_hits",
        "recalibrations",
    } <= facts["policies"]["elastic"].keys()


def test_replay_prints_the_class_first_and_writes_a_report(trace, tmp_path):
    ran = odma("replay", trace, "--policy", "odma,paged-64", "--report", tmp_path / "report")
    assert ran.exit_code == 0
    assert ran.stdout.splitlines()[0].endswith("memory-bound")
    assert "no prefix reuse" in ran.stdout
    assert (tmp_path / "report" / "report.csv").exists()


def test_a_report_is_one_page_that_needs_nothing_else(trace, tmp_path):
    pytest.importorskip("matplotlib")
    ran = odma("replay", trace, "--policy", "odma,elastic", "--report", tmp_path)
    assert ran.exit_code == 0
    page = (tmp_path / "report.html").read_text()
    assert "elastic" in page
    assert "data:image/png;base64," in page
    assert not re.findall(r"(?:src|href)=.(?!data:)", page)


def test_replay_tells_tenants_apart_and_gives_them_shares(trace, tmp_path):
    load = traces.read_trace(trace)
    shared = tmp_path / "shared.parquet"
    tenants = tuple("ab"[i % 3 == 0] for i in range(len(load)))
    traces.write_trace(replace(load, tenant=tenants), shared)
    options = ("--policy", "elastic", "--capacity-tokens", 12_000, "--rate", 2)
    ran = odma("replay", shared, trace, *options, "--tenant", "a=0.4:0.6", "--tenant", "b=0.5",
               "--json", "--report", tmp_path / "report")  # fmt: skip
    assert ran.exit_code == 0, ran.exception
    several, one = json.loads(ran.stdout.splitlines()[-1])["traces"]
    told = several["policies"]["elastic"]["tenants"]
    assert {"a", "b"} == told.keys()
    assert sum(tenant["requests"] for tenant in told.values()) <= 200
    assert several["assumptions"]["tenants"][0] == {
        "name": "a",
        "guaranteed_share": 0.4,
        "maximum_share": 0.6,
    }
    assert "tenants" not in one["policies"]["elastic"]
    ran = odma("replay", shared, *options, "--tenant", "a=0.4")
    assert re.search(r"elastic +│ a +│", ran.stdout)
    for wrong in ("a", "a=", "a=x", "a=0.4:x"):
        assert odma("replay", shared, "--tenant", wrong).exit_code == 2


def test_training_rows_are_not_quoted_as_a_test(trace, tmp_path):
    named = tmp_path / f"{next(iter(TRAINED_ON))}.parquet"
    load = traces.read_trace(trace)
    traces.write_trace(replace(load, label=named.stem), named)
    ran = odma("replay", named, "--policy", "paged", "--json")
    assert "not a test" in ran.stdout
    ran = odma("replay", named, "--policy", "paged", "--skip", 150, "--json")
    facts = json.loads(ran.stdout.splitlines()[-1])
    assert facts["requests"] == 50
    assert facts["notes"][0] == "the first 150 requests are left out"
    ran = odma("replay", named, "--skip", 200)
    assert ran.exit_code == 2
    assert "there are 200 requests, none after 200" in ran.stderr


AZURE = "TIMESTAMP,ContextTokens,GeneratedTokens"


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (f"{AZURE}\n2023-11-16 18:17:03,10,5\n", "elastic"),
        (f"extra,{AZURE}\n7,2023-11-16 18:17:03,10,5\n", "elastic"),
        (f"{AZURE}\n2023-11-16 18:17:03,10,0\n2023-11-16 18:17:03,10,1\n", "dropped 1 row"),
        (f"{AZURE}\n2023-11-16 18:17:03,10,0\n", "no row can be replayed"),
        (f"{AZURE}\n", "no rows"),
        ("TIMESTAMP,ContextTokens\n2023-11-16 18:17:03,10\n", "'GeneratedTokens' is missing"),
        (f"{AZURE}\n2023-11-16 18:17:03,200000,5\n", "can ever fit"),
        (
            '{"timestamp": 0, "input_length": 600, "output_length": 9, "hash_ids": [1, 2]}',
            "elastic",
        ),
        ('{"timestamp": 0, "input_length": 600, "output_length": 9, "hash_ids": 1}', "'hash_ids'"),
    ],
)
def test_odd_traces_are_replayed_or_refused_in_one_line(text, said, tmp_path):
    path = tmp_path / "odd"
    path.write_text(text)
    ran = odma("replay", path, "--policy", "elastic,odma,paged-16-prefix,extents-2")
    if said in ("elastic", "dropped 1 row"):
        assert ran.exit_code == 0
        assert said in ran.output
    else:
        assert ran.exit_code == 2
        [line] = ran.stderr.splitlines()
        assert line.startswith("odma replay: ")
        assert said in line


def test_an_unknown_policy_is_a_wrong_command_line(trace):
    ran = odma("replay", trace, "--policy", "best")
    assert ran.exit_code == 2


def test_bench_replay_prints_requests_a_minute(trace):
    ran = odma("bench", "replay", "--trace", trace, "--repeat", 1, "--json")
    assert ran.exit_code == 0
    assert json.loads(ran.stdout)["requests_per_minute"] > 0


def test_tuning_picks_what_scores_best(tmp_path):
    tuner = Tuner([reasoning_like(120, 1)], 20_000, tmp_path)
    said = []
    best = tuner.tune("ideal-16", said.append)
    scores = {share: tuner.score("ideal-16", {"headroom_share": share}) for share in (0.0, 0.08)}
    assert tuner.score("ideal-16", best) >= max(scores.values())
    assert len(said) == len(GRIDS["ideal-16"]["headroom_share"])


def test_every_policy_has_its_free_parameters_in_the_committed_file():
    parameters = replay.read_tuning().parameters
    assert set(GRIDS) == set(replay.NAMES)
    for name, grids in GRIDS.items():
        assert set(grids) == set(parameters.get(name, {})), name


def test_a_shaped_load_has_its_median():
    lengths = shaped(SHAPES[2], 4_000, 1).output_tokens
    assert np.median(lengths) == pytest.approx(700, rel=0.1)


def test_reproduce_writes_a_report(tmp_path):
    ran = odma(
        "reproduce", "--rows", 100, "--seeds", 2, "--out", tmp_path, "--data", tmp_path / "none"
    )
    assert ran.exit_code == 0
    text = (tmp_path / "reproduce.md").read_text()
    assert "cannot be compared" in text
    facts = json.loads((tmp_path / "reproduce.json").read_text())
    assert len(facts["loads"]) == len(SHAPES)


# --- ServeGen ---


@pytest.fixture
def servegen(tmp_path):
    """Two clients: one answers short in the first six hours, the other long in the next."""
    arrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    rates, lengths = tmp_path / "a_rates.parquet", tmp_path / "a_hist.parquet"
    slots = [
        (c, t, float(c == t // 21_600), 2.0, True) for c in (0, 1) for t in range(0, 43_200, 600)
    ]
    names = ("client", "t_seconds", "rate", "cv", "has_lengths")
    parquet.write_table(arrow.table(dict(zip(names, zip(*slots, strict=True), strict=True))), rates)
    bins = [
        (c, t, field, value, 0.5)
        for c in (0, 1)
        for t in (0, 21_600)
        for field, values in (("input_tokens", (10, 20)), ("output_tokens", (100 + 900 * c, 2_000)))
        for value in values
    ]
    names = ("client", "t_seconds", "field", "bin", "prob")
    parquet.write_table(
        arrow.table(dict(zip(names, zip(*bins, strict=True), strict=True))), lengths
    )
    return rates, lengths


def test_a_servegen_sample_drifts_as_its_histograms_do(servegen):
    trace = traces.sample_servegen(*servegen, rows=2_000, seed=1, hours=12)
    assert len(trace) == pytest.approx(2_000, rel=0.1)
    early = trace.t_seconds < 21_600
    assert set(trace.output_tokens[early].tolist()) == {100, 2_000}
    assert set(trace.output_tokens[~early].tolist()) == {1_000, 2_000}
    again = traces.sample_servegen(*servegen, rows=2_000, seed=1, hours=12)
    assert np.array_equal(trace.output_tokens, again.output_tokens)


@pytest.fixture
def published(tmp_path):
    """A folder as ServeGen publishes it: the second client has no lengths."""
    for client, rate in ((0, 1.0), (7, 100.0)):
        slots = "".join(f"{t},{rate},2.5,Gamma,0.16,6.25\n" for t in range(0, 43_200, 600))
        (tmp_path / f"chunk-{client}-trace.csv").write_text(slots)
    windows = {
        "0": {"input_tokens": "{10: 0.5, 20: 0.5}", "output_tokens": "{100: 1.0}"},
        "21600": {"input_tokens": "{30: 1.0}", "output_tokens": "{200: 0.25, 300: 0.75}"},
    }
    (tmp_path / "chunk-0-dataset.json").write_text(json.dumps(windows))
    (tmp_path / "chunk-7-dataset.json").write_text("{}")
    return tmp_path


def test_servegen_is_sampled_as_published(published, tmp_path):
    out = tmp_path / "out.parquet"
    ran = odma("trace", "servegen", published, out, "--rows", 2_000, "--hours", 12)
    assert ran.exit_code == 0, ran.output
    trace = traces.read_trace(out)
    assert len(trace) == pytest.approx(2_000, rel=0.1)
    early = trace.t_seconds < 21_600
    assert set(trace.input_tokens[early].tolist()) == {10, 20}
    assert set(trace.output_tokens[early].tolist()) == {100}
    assert set(trace.output_tokens[~early].tolist()) == {200, 300}
    assert published.name in trace.label


@pytest.mark.parametrize(
    ("name", "text", "said"),
    [
        ("chunk-0-trace.csv", "0,1.0,2.5\n600,fast,1\n", "row 2, column 'rate': 'fast'"),
        ("chunk-0-trace.csv", "0,1.0\n", "row 1: 2 columns"),
        ("chunk-0-dataset.json", '{"0": {"input_tokens": "{10: x}"}}', "column 'input_tokens'"),
        ("chunk-0-dataset.json", "{", "row 1: not a JSON object"),
        ("chunk-0-dataset.json", '{"0": 7}', "no client with lengths"),
    ],
)
def test_a_damaged_folder_of_servegen_is_refused(published, tmp_path, name, text, said):
    (published / name).write_text(text)
    ran = odma("trace", "servegen", published, tmp_path / "out.parquet")
    assert ran.exit_code == 2
    assert said in ran.stderr


def test_what_is_no_source_of_servegen_is_refused(tmp_path):
    out = tmp_path / "out.parquet"
    (tmp_path / "empty").mkdir()
    for source in ([tmp_path / "empty"], [tmp_path / "absent"], ["a", "b", "c"]):
        assert odma("trace", "servegen", *source, out).exit_code == 2


def test_a_window_without_requests_is_refused(servegen):
    with pytest.raises(traces.TraceError):
        traces.sample_servegen(*servegen, rows=100, seed=1, start_hours=50)


def test_a_sample_can_be_written_by_command(servegen, tmp_path):
    ran = odma("trace", "servegen", *servegen, tmp_path / "out.parquet", "--rows", 200)
    assert ran.exit_code == 0
    assert len(traces.read_trace(tmp_path / "out.parquet")) > 100


@pytest.mark.skipif(not (DATA / "servegen").is_dir(), reason=f"no public data in {DATA}")
def test_the_published_histograms_can_be_sampled():
    trace = traces.sample_servegen(
        DATA / "servegen" / "deepseek_r1_rates_first18h.parquet",
        DATA / "servegen" / "deepseek_r1_hist_first18h.parquet",
        rows=500,
        seed=1,
    )
    assert len(trace) == pytest.approx(500, rel=0.2)
