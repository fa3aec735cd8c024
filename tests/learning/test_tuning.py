"""A model that learns on from a deployment's own decision log: what is logged, read and learnt."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest
from conftest import open_pool, wait_for
from test_predictor import odma

from odma_service.client import Client
from odma_service.errors import InvalidError
from odma_service.learning.predictor import Predictor, default_model
from odma_service.learning.sketch import features_of
from odma_service.values import Allocate, End, Free, PolicyChange
from predictor_onnx.decisions import is_log, read_logs

PROMPT = "Name three rivers of Africa that a boat can follow for 1234567 metres."


@pytest.fixture(scope="module")
def shipped():
    return Predictor.load(default_model())


# --- sketches


def test_a_sketch_is_nearly_what_the_model_sees_and_has_no_number_of_the_prompt(shipped):
    seen, whole = shipped.seen(shipped.sketch(PROMPT.encode(), 17)), features(shipped, 17)
    steps = float(np.abs(shipped.embeddings[0]).max()) / 127
    assert seen[:96] == pytest.approx(whole[:96], abs=steps / 2 + 1e-6)
    assert seen[96:] == pytest.approx(whole[96:], abs=0.45)
    near = features(shipped, 17, PROMPT.replace("1234567", "1300000"))
    assert whole[-51:].tolist() != near[-51:].tolist()
    other = shipped.sketch(PROMPT.replace("1234567", "1300000").encode(), 17)
    assert shipped.seen(other)[-51:].tolist() == seen[-51:].tolist()


def features(model, prompt_tokens, text=PROMPT):
    from odma_service.learning.predictor import History, PromptInput

    [row] = model.inputs([PromptInput(text.encode(), prompt_tokens, History())])
    return row[: model.width]


def test_a_sketch_of_other_embeddings_or_a_broken_one_is_none(shipped):
    sketch = shipped.sketch(PROMPT.encode(), 17)
    name, coded = sketch.split(":")
    for other in ("", ":", f"0{name}:{coded}", f"{name}:{coded[:-4]}", f"{name}:%%", f"{name}:é"):
        assert shipped.seen(other) is None
    assert features_of(sketch, np.ones(32, np.float32), name) is not None


def test_a_log_holds_sketches_only_where_it_is_told_to(servers, tmp_path, name, shipped):
    for flag in ("--decision-log-sketches", "--no-decision-log-sketches"):
        log = tmp_path / f"{flag}.jsonl"
        server = servers("--decision-log", str(log), flag, name=flag)
        with Client(server.target) as service:
            pool = open_pool(service, name)
            pool.free(Free(pool.allocate(Allocate("r", 17, text=PROMPT)).handle, End.FINISHED, 5))
            pool.free(Free(pool.allocate(Allocate("s", 17)).handle, End.FINISHED, 5))
        wait_for(lambda log=log: log.read_text().count("\n") == 2, "two records")
        sketches = [json.loads(line)["sketch"] for line in log.read_text().splitlines()]
        told = flag == "--decision-log-sketches"
        assert sketches == [shipped.sketch(PROMPT.encode(), 17) if told else None, None]
        assert "rivers" not in log.read_text()


def test_sketches_without_a_log_are_refused():
    refused = odma("serve", "--decision-log-sketches")
    assert refused.returncode == 2
    assert "there is no decision-log" in refused.stderr


# --- what a log says


def record(number, asked, ended, output, **fields):
    return {
        "odma": "request",
        "version": 1,
        "pool": "main",
        "epoch": 1,
        "request_id": f"r{number}",
        "request_class": "chat",
        "asked": asked,
        "ended": ended,
        "prompt_tokens": 10,
        "generated_before_tokens": 0,
        "max_total_tokens": None,
        "end": "FINISHED",
        "output_tokens": output,
        "sketch": None,
    } | fields


def write_log(file, records):
    file.write_text("".join(json.dumps(record) + "\n" for record in records))
    return file


def test_a_history_is_of_what_had_ended_of_the_class_or_of_its_pool(tmp_path, shipped):
    few = [record(i, i, i + 0.5, 100 + i, request_class="few") for i in range(20)]
    many = [record(100 + i, 20 + i, 20 + i + 0.5, 200 + i) for i in range(150)]
    late = [
        record(900, 175, 180, 7, request_class="few"),
        record(901, 176, 181, 7),
        record(902, 177, 182, 7, pool="other"),
    ]
    seen, facts = read_logs([write_log(tmp_path / "log", late + many + few)], shipped)
    assert facts["used"] == 173
    few_now, many_now, other_now = (seen.take(np.array([i])) for i in (-3, -2, -1))
    for rows in (few_now, many_now):
        assert rows.counts == [100]
        assert np.expm1(rows.windows[0]) == pytest.approx(np.arange(250, 350), rel=1e-4)
    assert other_now.counts == [0]
    assert seen.counts[:22].tolist() == list(range(22))


def test_what_did_not_end_by_itself_teaches_nothing_and_what_is_cut_says_at_least(
    tmp_path, shipped
):
    whole = [
        record(1, 1, 5, 50, max_total_tokens=100),
        record(2, 2, 6, 90, max_total_tokens=100, end="HIT_LIMIT"),
        record(3, 3, 7, 40, end="HIT_LIMIT"),
        record(4, 4, 8, 40, end="ABORTED"),
        record(5, 5, 9, None, end="EPOCH_OVER"),
        record(6, None, 10, 60),
        record(7, 7, 11, 70, generated_before_tokens=30),
        record(8, 12, 13, 80),
    ]
    files = [write_log(tmp_path / name, whole) for name in ("log", "log.1")]
    seen, facts = read_logs(files, shipped)
    assert np.expm1(seen.logs).round().tolist() == [50, 90, 40, 80]
    assert np.expm1(seen.limits).round().tolist() == [90, 90, 40, np.inf]
    assert np.expm1(seen.windows[3, :5]).round().tolist() == [50, 90, 40, 60, 70]
    assert facts == {
        "records": 16,
        "used": 4,
        "sketched": 0,
        "at_their_limit": 2,
        "not_ended": 4,
        "for_histories_only": 2,
    }


@pytest.mark.parametrize("line", ["[]", "{}", '{"odma":"request","version":2}', "no"])
def test_a_line_that_is_no_record_is_named(tmp_path, shipped, line):
    file = write_log(tmp_path / "log", [record(1, 1, 2, 3)])
    file.write_text(file.read_text() + line + "\n")
    with pytest.raises(InvalidError, match="row 2"):
        read_logs([file], shipped)
    assert is_log(file)
    with pytest.raises(InvalidError, match="cannot be read"):
        is_log(tmp_path / "none")


def test_an_answer_at_its_limit_is_judged_only_up_to_it():
    pytest.importorskip("jax", reason="the train extra is not installed")
    from predictor_onnx.rows import LEVELS
    from predictor_onnx.tuning import _losses

    said, limit = np.full((3, 7), 5.0, np.float32), np.array([4.0, 6.0, np.inf], np.float32)
    cut, below, free_ = _losses(said, np.array([4.0, 6.0, 4.0], np.float32), limit)
    assert cut == 0
    assert below == pytest.approx(LEVELS.mean())
    assert free_ == pytest.approx((1 - LEVELS).mean())


# --- what is learnt


def serve(target, name, requests, kinds=("list", "essay"), turned=1.0):
    """Let requests come and go whose lengths follow their first word, until a share of them."""
    random = np.random.default_rng(5)
    with Client(target) as service:
        policy = PolicyChange(name="odma", limits_tokens=[64, 512])
        pool = open_pool(service, name, policy=policy, capacity_tokens=1 << 20)
        for first in range(0, requests, 20):
            kind = random.integers(0, 2, 20)
            wanted = kind if first < turned * requests else 1 - kind
            lengths = np.exp(3 + 2 * wanted + random.normal(0, 0.2, 20)).astype(int)
            texts = [f"{kinds[k]} {' '.join(random.choice(list('abcd'), 4))}" for k in kind]
            asked = {"max_total_tokens": 2_000}
            ops = [Allocate(f"r{first + i}", 6, text=text, **asked) for i, text in enumerate(texts)]
            places = pool.apply(ops=ops, completed_seq=pool.seq).results
            ends = zip(places, lengths.tolist(), strict=True)
            pool.apply(ops=[Free(place.handle, End.FINISHED, n) for place, n in ends])


def logged(servers, log, name, requests, **fields):
    server = servers("--decision-log", str(log), "--decision-log-sketches", name=name)
    serve(server.target, name, requests, **fields)
    wait_for(lambda: log.read_text().count("\n") == requests, "the records")
    return log


def test_a_served_log_makes_a_model_that_takes_over(servers, tmp_path, name):
    pytest.importorskip("jax", reason="the train extra is not installed")
    log = logged(servers, tmp_path / "log", name, 1_000)
    out, link = tmp_path / "tuned", tmp_path / "model"
    link.symlink_to(default_model())
    with Client(servers("--predictor-model", str(link), name="served").target) as service:
        open_pool(service, name)
        made = odma("predictor", "train", log, "--out", out, "--steps", 150)
        assert made.returncode == 0, made.stdout + made.stderr
        assert "better: wrote own-" in made.stdout
        (tmp_path / "next").symlink_to(out)
        (tmp_path / "next").rename(link)
        version = json.loads((out / "config.json").read_text())["version"]
        wait_for(lambda: service.predict(name, [prompt()]).model_version == version, version)
    card = (out / "card.md").read_text()
    assert "This deployment's own decision log" in card
    assert (default_model() / "card.md").read_text() in card
    # It learns on once more, from the same sketches.
    again = odma("predictor", "train", log, "--base", out, "--out", tmp_path / "b", "--steps", 15)
    assert "sketched 1,000" in again.stderr


def prompt():
    from odma_service.rpc.v1 import predictor_service_pb2 as pb

    return pb.Prompt(prompt_tokens=6)


def test_a_model_that_would_be_no_better_is_not_written(servers, tmp_path, name):
    pytest.importorskip("jax", reason="the train extra is not installed")
    log = logged(servers, tmp_path / "log", name, 800, turned=0.8)
    made = odma("predictor", "train", log, "--out", tmp_path / "tuned", "--steps", 150)
    assert made.returncode == 1
    assert "not better than chance: nothing is written" in made.stdout
    assert not (tmp_path / "tuned").exists()


def test_logs_that_cannot_be_learnt_from_are_refused(tmp_path, shipped):
    pytest.importorskip("jax", reason="the train extra is not installed")
    short = write_log(tmp_path / "log", [record(i, i, i + 1, 9) for i in range(20)])
    other = shutil.copy(default_model() / "config.json", tmp_path / "set.parquet")
    for files, complaint in (
        ([short], "20 requests to learn from, 500 at least"),
        ([short, other], "not both at once"),
    ):
        refused = odma("predictor", "train", *files, "--out", tmp_path / "out")
        assert refused.returncode == 2
        assert complaint in refused.stderr
