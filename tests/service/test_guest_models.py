"""A model is a guest: whatever it does, the histograms answer, and it is counted."""

from __future__ import annotations

import json
import math
import shutil
from collections import Counter

import numpy as np
import pytest
from registries import Clock, open_in, registry_of
from servers import open_pool, wait_for

from odma_service.client import Client
from odma_service.errors import ModelError
from odma_service.learning.predictor import History, Predictor, PromptInput, Run, default_model
from odma_service.pool.policy import named
from odma_service.service.pools import models
from odma_service.service.pools.models import Guest, Models, Watchdog
from odma_service.values import Allocate, Batch, End, Free, Place, PolicyChange

onnx = pytest.importorskip("onnx", reason="the train extra is not installed")


@pytest.fixture
def model_dir(tmp_path):
    return shutil.copytree(default_model(), tmp_path / "model")


def spoil(directory, then):
    """Make a model answer `then` instead, for prompts above 60,000 tokens.

    then: what is done with the answer, as an operator and a constant, or "endless".
    """
    file = directory / "model.onnx"
    model = onnx.load(file)
    [answer] = model.graph.output
    for node in model.graph.node:
        node.output[:] = ["plain" if name == answer.name else name for name in node.output]
    helper, proto = onnx.helper, onnx.TensorProto
    config = json.loads((directory / "config.json").read_text())
    width = model.graph.input[0].type.tensor_type.shape.dim[1].dim_value
    stats = config["features"]["stats"]
    at = width - (1 + 3 + 7) - stats  # the logarithm of the prompt's tokens

    def constant(name, values, kind=proto.FLOAT):
        array = np.array(values)
        return helper.make_tensor(name, kind, array.shape, array.flatten().tolist())

    model.graph.initializer.extend(
        [
            constant("spoil_at", [at], proto.INT64),
            constant("spoil_above", math.log1p(60_000)),
        ]
    )
    nodes = [
        helper.make_node("Gather", ["inputs", "spoil_at"], ["spoil_length"], axis=1),
        helper.make_node("Greater", ["spoil_length", "spoil_above"], ["spoil_long"]),
    ]
    if then == "endless":
        body = helper.make_graph(
            [
                helper.make_node("Identity", ["go_on"], ["goes_on"]),
                helper.make_node("Identity", ["so_far"], ["further"]),
            ],
            "round",
            [
                helper.make_tensor_value_info("round", proto.INT64, []),
                helper.make_tensor_value_info("go_on", proto.BOOL, []),
                helper.make_tensor_value_info("so_far", proto.FLOAT, [None, 7]),
            ],
            [
                helper.make_tensor_value_info("goes_on", proto.BOOL, []),
                helper.make_tensor_value_info("further", proto.FLOAT, [None, 7]),
            ],
        )
        nodes += [
            helper.make_node("Cast", ["spoil_long"], ["spoil_number"], to=proto.INT32),
            helper.make_node("ReduceMax", ["spoil_number"], ["spoil_any"], keepdims=0),
            helper.make_node("Cast", ["spoil_any"], ["spoil_go"], to=proto.BOOL),
            helper.make_node("Loop", ["", "spoil_go", "plain"], [answer.name], body=body),
        ]
    else:
        model.graph.initializer.append(constant("spoil_then", then))
        nodes.append(
            helper.make_node("Where", ["spoil_long", "spoil_then", "plain"], [answer.name])
        )
    model.graph.node.extend(nodes)
    file.write_bytes(model.SerializeToString())


def learnt_registry(tmp_path, model):
    """Return a registry with a pool that has seen 40 answers of 100 tokens."""
    registry = registry_of(tmp_path, Clock(), model=model)
    epoch = open_in(registry, "p", capacity_tokens=200_000, model_length_tokens=150_000).epoch
    with registry.owned("p", epoch) as learner:
        for seq in range(1, 81, 2):
            [place] = learner.apply(epoch, Batch(seq, seq - 1, [], [Allocate("r", 10)])).results
            done = Free(place.handle, End.FINISHED, 100)
            learner.apply(epoch, Batch(seq + 1, seq, [], [done]))
        learner.set_policy(named("odma", 150_000, 200_000))
    return registry, epoch


WRONG = {"NaN": math.nan, "negative": -3.0, "infinite": math.inf, "too long": 60.0}


@pytest.mark.parametrize("then", [*WRONG, "endless"])
def test_the_histograms_answer_where_a_model_fails(model_dir, tmp_path, then, monkeypatch):
    monkeypatch.setattr(models, "PREDICT_SECONDS", 0.5)
    spoil(model_dir, WRONG.get(then, "endless"))
    guests = Models(model_dir)
    directories = [tmp_path / name for name in ("with", "without")]
    for directory in directories:
        directory.mkdir()
    answers = []
    ops = [Allocate("long", 70_000), Allocate("short", 10)]
    for directory, model in zip(directories, (guests.now, lambda: None), strict=True):
        registry, epoch = learnt_registry(directory, model)
        with registry.owned("p", epoch) as learner:
            answers.append([f.quantiles for f in learner.question(ops, 0).answers()])
            results = learner.apply(epoch, Batch(81, 80, [], ops)).results
            assert all(isinstance(result, Place) for result in results)
        registry.close()
    assert answers[0] == answers[1]
    assert sum(guests.failures().values()) > 0
    guests.stop()


def test_a_model_that_comes_to_no_end_is_not_asked_again(model_dir, monkeypatch):
    monkeypatch.setattr(models, "PREDICT_SECONDS", 0.5)
    spoil(model_dir, "endless")
    failures = Counter()
    watchdog = Watchdog()
    guest = Guest(Predictor.load(model_dir, Run()), watchdog, failures)
    prompt = PromptInput(None, 70_000, History())
    for _ in range(3):
        with pytest.raises(models.ModelFailedError):
            guest.predict([prompt])
    assert failures == {"too_slow": 3}
    watchdog.stop()


HOSTILE = {
    "nested": ("config.json", "[" * 200_000),
    "nested object": ("config.json", '{"a":' * 200_000),
    "a number for a text": ("reference.json", None),
    "no list": ("reference.json", '{"examples": 5}'),
    "null": ("config.json", "null"),
}


@pytest.mark.parametrize("kind", HOSTILE)
def test_files_of_any_content_are_a_models_error(model_dir, kind):
    name, content = HOSTILE[kind]
    if content is None:
        reference = json.loads((model_dir / name).read_text())
        reference["examples"][0]["text"] = 5
        content = json.dumps(reference)
    (model_dir / name).write_text(content)
    with pytest.raises(ModelError):
        Predictor.load(model_dir)


def test_the_look_for_models_goes_on_after_a_hostile_directory(servers, model_dir):
    server = servers("--predictor-model", str(model_dir), "--log-format", "json")
    config = model_dir / "config.json"
    good = json.loads(config.read_text())
    with Client(server.target) as service:
        open_pool(service, "p", policy=PolicyChange(name="odma"))
        config.write_text("[" * 200_000)
        wait_for(lambda: "new model refused" in server.log.read_text(), "the refusal")
        config.write_text(json.dumps(good | {"version": "mended"}))
        wait_for(lambda: "mended" in server.log.read_text(), "the mended model")
