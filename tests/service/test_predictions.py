"""Predictions over the wire: Predict, models exchanged while serving, and what outlives a crash."""

from __future__ import annotations

import json
import shutil

import pytest
from conftest import open_pool, wait_for

from odma_service.client import Client
from odma_service.errors import InvalidError, PoolNotFoundError
from odma_service.learning.predictor import default_model
from odma_service.rpc.v1 import predictor_service_pb2 as pb
from odma_service.rpc.v1 import types_pb2 as types
from odma_service.values import Allocate, End, Free, PolicyChange, Used

TEXT = "Write a poem about the sea that nobody else may read."
ODMA = PolicyChange(name="odma", overflow_risk=0.05)


def prompt(text=TEXT, tokens=20, **fields):
    return pb.Prompt(text=text, prompt_tokens=tokens, **fields)


def complete(pool, count, output=300, **fields):
    """Let requests come and go, all in one batch each way."""
    ids = [f"r{number}" for number in range(count)]
    asked = [Allocate(name, 20, max_total_tokens=80, **fields) for name in ids]
    places = pool.apply(ops=asked).results
    pool.apply(ops=[Free(place.handle, End.FINISHED, output) for place in places])


@pytest.fixture
def learnt(service, name):
    """Return the name of a pool that has seen 48 completions with a model."""
    pool = open_pool(service, name, policy=ODMA)
    complete(pool, 24, text=TEXT)
    complete(pool, 24, text=TEXT)
    return name


@pytest.fixture
def model_dir(tmp_path):
    """Return a copy of our own model, to be changed."""
    return shutil.copytree(default_model(), tmp_path / "model")


def rename(model_dir, version):
    """Give a model another version, as another training would."""
    file = model_dir / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"version": version}))


def test_a_batch_of_prompts_is_predicted(service, learnt):
    answer = service.predict(learnt, [prompt(), prompt(None, 2000), prompt(generated_tokens=5000)])
    assert answer.model_version == service.get_pool(learnt).model_version != ""
    assert len(answer.predictions) == 3
    for prediction in answer.predictions:
        quantiles = list(prediction.output_quantiles_tokens)
        assert quantiles == sorted(quantiles)
        assert len(quantiles) == len(prediction.raw_output_quantiles_tokens) == 7
        assert prediction.basis in (types.PREDICTION_BASIS_MODEL, types.PREDICTION_BASIS_WINDOW)
        assert prediction.completions == 48
    assert 200 < answer.predictions[0].output_quantiles_tokens[2] < 400
    assert answer.predictions[2].output_quantiles_tokens[0] >= 5000


def test_an_answer_says_that_nothing_is_corrected_yet(service, name):
    open_pool(service, name)
    (prediction,) = service.predict(name, [prompt()]).predictions
    assert prediction.basis == types.PREDICTION_BASIS_MODEL
    assert prediction.completions == 0
    assert list(prediction.output_quantiles_tokens) == list(prediction.raw_output_quantiles_tokens)


def test_an_allocate_is_given_what_predict_answers(service, name):
    pool = open_pool(
        service, name, policy=PolicyChange(name="odma", overflow_risk=0.05, clear_limits=True)
    )
    complete(pool, 32, text=TEXT)
    (prediction,) = service.predict(name, [prompt()]).predictions
    wanted = 20 + prediction.output_quantiles_tokens[5]  # at a risk of 0.05
    place = pool.allocate(Allocate("asked", 20, text=TEXT))
    assert wanted <= place.length_tokens < wanted + 32


@pytest.mark.parametrize(
    ("prompts", "field"),
    [
        ([], "prompts"),
        ([prompt()] * 1025, "prompts"),
        ([prompt(), prompt("x" * 16385)], "prompts[1].text"),
        ([prompt(tokens=0)], "prompts[0].prompt_tokens"),
        ([prompt(tokens=2**28 + 1)], "prompts[0].prompt_tokens"),
        ([prompt(generated_tokens=2**28 + 1)], "prompts[0].generated_tokens"),
        ([prompt(request_class="c" * 33)], "prompts[0].request_class"),
    ],
)
def test_what_breaks_a_rule_is_named(service, learnt, prompts, field):
    with pytest.raises(InvalidError) as caught:
        service.predict(learnt, prompts)
    assert caught.value.field == field


def test_a_pool_that_is_not_there_is_not_found(service):
    with pytest.raises(PoolNotFoundError):
        service.predict("nobody", [prompt()])
    with pytest.raises(InvalidError):
        service.predict("../etc/passwd", [prompt()])


def test_any_text_is_predicted_and_none_is_logged(servers):
    server = servers("--log-level", "debug")
    with Client(server.target) as service:
        pool = open_pool(service, "p", policy=ODMA)
        complete(pool, 40, text=TEXT)
        for text in ("", "\0\ufffd\u202e", "é" * 8000, TEXT):
            service.predict("p", [prompt(text)])
            pool.apply(ops=[Allocate(f"a {len(text)}", 20, max_total_tokens=90, text=text)])
    assert "poem" not in server.log.read_text()


def test_a_class_says_how_its_predictions_fare(service, name):
    pool = open_pool(service, name, policy=ODMA)
    for _ in range(3):
        complete(pool, 32, output=300, request_class="chat")
    (report,) = service.get_pool(name).classes
    assert report.predicted == 64  # the first 32 were not predicted for
    assert 0 <= report.covered <= report.predicted
    assert report.target_coverage == pytest.approx(0.95)
    assert report.basis in (types.PREDICTION_BASIS_MODEL, types.PREDICTION_BASIS_WINDOW)


def test_without_a_model_the_live_histograms_predict(servers):
    with Client(servers("--predictor-model", "none").target) as service:
        pool = open_pool(service, "p", policy=ODMA)
        answer = service.predict("p", [prompt()])
        assert answer.predictions[0].basis == types.PREDICTION_BASIS_NOTHING
        assert not answer.predictions[0].output_quantiles_tokens
        complete(pool, 40)
        answer = service.predict("p", [prompt()])
        assert answer.predictions[0].basis == types.PREDICTION_BASIS_HISTOGRAM
        assert answer.model_version == service.get_pool("p").model_version == ""
        assert 280 < answer.predictions[0].output_quantiles_tokens[2] < 320


# --- after a crash ---


def test_the_correction_is_the_same_after_kill_9(servers):
    server = servers()
    with Client(server.target) as service:
        pool = open_pool(service, "p", policy=ODMA)
        for length in (40, 400, 4000):
            complete(pool, 24, output=length, text=TEXT, request_class="chat")
        ids = ["a", "b", "c"]
        fields = {"max_total_tokens": 80, "request_class": "chat"}
        handles = [pool.allocate(Allocate(name, 20, **fields)).handle for name in ids]
        pool.apply(used=[Used(handle, 70) for handle in handles])
        asked = [prompt(request_class="chat"), prompt(None), prompt(request_class="new")]
        before = service.predict("p", asked), service.get_pool("p").classes[0]
        server.restart()
        after = service.predict("p", asked), service.get_pool("p").classes[0]
        assert after == before
        assert before[1].predicted > 0


# --- models exchanged ---


def version(service):
    return service.predict("p", [prompt()]).model_version


def test_a_new_model_in_the_directory_takes_over_whole(servers, model_dir):
    server = servers("--predictor-model", str(model_dir), "--log-format", "json")
    with Client(server.target) as service:
        open_pool(service, "p")
        old = version(service)
        rename(model_dir, "another-1")
        wait_for(lambda: version(service) != old, "the new model")
        assert version(service) == "another-1"
        wait_for(lambda: "model exchanged" in server.log.read_text(), "the line in the log")


def test_a_link_that_points_elsewhere_is_a_new_model(servers, model_dir, tmp_path):
    link, other = tmp_path / "now", shutil.copytree(model_dir, tmp_path / "other")
    rename(other, "another-2")
    link.symlink_to(model_dir)
    with Client(servers("--predictor-model", str(link)).target) as service:
        open_pool(service, "p")
        (tmp_path / "next").symlink_to(other)
        (tmp_path / "next").rename(link)
        wait_for(lambda: version(service) == "another-2", "the model behind the link")


def test_a_bad_model_is_refused_and_the_old_one_stays(servers, model_dir):
    server = servers("--predictor-model", str(model_dir), "--log-format", "json")
    with Client(server.target) as service:
        open_pool(service, "p")
        old = version(service)
        whole = (model_dir / "model.onnx").read_bytes()
        (model_dir / "model.onnx").write_bytes(whole[: len(whole) // 2])
        wait_for(lambda: "new model refused" in server.log.read_text(), "the refusal")
        assert version(service) == old
        (model_dir / "model.onnx").write_bytes(whole)
        rename(model_dir, "another-3")
        wait_for(lambda: version(service) == "another-3", "the mended model")


def test_a_server_does_not_start_with_a_model_it_cannot_use(tmp_path):
    from test_restart import fail_to_serve

    address = ("--listen", "127.0.0.1:0", "--pool-dir", tmp_path / "pools")
    assert "model" in fail_to_serve(*address, "--predictor-model", tmp_path / "nothing")


def test_a_research_model_is_served_only_where_it_may_be(servers, model_dir, tmp_path):
    from test_restart import fail_to_serve

    rename(model_dir, "research-1")
    flags = ("--predictor-model", str(model_dir))
    address = ("--listen", "127.0.0.1:0", "--pool-dir", tmp_path / "pools")
    assert "--non-commercial-model" in fail_to_serve(*address, *flags)
    with Client(servers(*flags, "--non-commercial-model").target) as service:
        open_pool(service, "p")
        assert version(service) == "research-1"
