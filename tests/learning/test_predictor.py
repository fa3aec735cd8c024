"""Length predictors: the one that is shipped, one made here, and what is refused."""

from __future__ import annotations

import json
import math
import shutil
from collections import defaultdict

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st
from running import odma

from odma_service.errors import InvalidError, ModelError
from odma_service.learning.predictor import (
    MOST_BYTES,
    WINDOW,
    History,
    Predictor,
    PromptInput,
    default_model,
)
from odma_service.learning.survival import LEVELS
from odma_service.values import Text
from predictor_onnx.evaluate import evaluate, over_reservation, pinball
from predictor_onnx.rows import histories, read_rows, resting, running, summarise

PAST = History.of(range(50, 650, 6))
PROMPT = Text(b"Explain in three sentences why the sky is blue.")


@pytest.fixture(scope="module")
def shipped():
    return Predictor.load(default_model())


@pytest.fixture
def spoilt(tmp_path):
    """Return a copy of the shipped model, to be spoilt."""
    shutil.copytree(default_model(), tmp_path / "model")
    return tmp_path / "model"


def write_rows(file, rows, seed=1, split="val", models=("a", "b")):
    """Write rows whose lengths follow their first word and their model."""
    random = np.random.default_rng(seed)
    kind, model = random.integers(0, 2, rows), random.integers(0, len(models), rows)
    prompts = [
        f"{('list', 'essay')[k]} about {' '.join(random.choice(list('abcdefgh'), 4))}" for k in kind
    ]
    lengths = np.exp(3 + 2 * kind + model + random.normal(0, 0.2, rows)).astype(int)
    columns = {
        "prompt": prompts,
        "prompt_tokens": [len(prompt.split()) for prompt in prompts],
        "output_tokens": lengths.tolist(),
        "model": [models[m] for m in model],
        "reasoning_hidden": [False] * rows,
        "split": [split] * rows,
    }
    pq.write_table(pa.table(columns), file)
    return file


# --- what is answered


@given(
    st.binary(max_size=3_000) | st.none(),
    st.integers(0, 2**33),
    st.lists(st.integers(0, 2**31), max_size=120),
)
def test_quantiles_ascend_and_are_lengths_whatever_is_asked(shipped, text, prompt_tokens, past):
    told = None if text is None else Text(text)
    [quantiles] = shipped.predict([PromptInput(told, prompt_tokens, History.of(past))])
    assert len(quantiles) == len(LEVELS)
    assert all(map(math.isfinite, quantiles))
    assert list(quantiles) == sorted(quantiles)
    assert quantiles[0] >= 0


def test_an_answer_does_not_depend_on_its_batch(shipped):
    prompts = [
        PromptInput(text, 9, past)
        for text in (PROMPT, None, Text(b""), Text(b"x" * 5_000))
        for past in (PAST, History())
    ]
    together = np.array(shipped.predict(prompts))
    alone = np.array([shipped.predict([prompt])[0] for prompt in prompts])
    assert together == pytest.approx(alone, rel=1e-4)
    assert shipped.predict([]) == []


def test_a_text_keeps_its_features_for_the_model_and_the_length_that_they_are_of(shipped):
    text, other = Text(b"How far is the moon?"), Predictor.load(default_model())
    shipped.predict([PromptInput(text, 9, PAST)])
    seen = text.seen
    sketch = shipped.sketch(text, 9)
    assert text.seen is seen
    assert sketch == shipped.sketch(Text(text.data), 9)
    for predictor, prompt_tokens in ((shipped, 10), (other, 10)):
        seen = text.seen
        answer = predictor.predict([PromptInput(text, prompt_tokens, PAST)])
        assert text.seen is not seen
        assert answer == predictor.predict([PromptInput(Text(text.data), prompt_tokens, PAST)])


def test_answers_follow_the_level_of_the_history(shipped):
    short, long = (
        shipped.predict([PromptInput(PROMPT, 9, History.of([n, n + 1, n + 3] * 30))])[0]
        for n in (20, 2_000)
    )
    assert long[2] > 10 * short[2]


def test_without_history_the_answer_is_wide(shipped):
    known, unknown = (
        shipped.predict([PromptInput(None, 9, past)])[0]
        for past in (History.of([200, 210, 190, 205] * 25), History())
    )
    assert unknown[4] / unknown[0] > 3 * known[4] / known[0]


@given(st.lists(st.lists(st.integers(0, 10**6), max_size=WINDOW), min_size=1, max_size=5))
def test_histories_in_training_are_those_in_service(windows):
    rows, counts = np.zeros((len(windows), WINDOW), np.float32), []
    for row, window in zip(rows, windows, strict=True):
        row[: len(window)] = np.log1p(window)
        counts.append(len(window))
    for made, window in zip(histories(summarise(rows, np.array(counts))), windows, strict=True):
        real = History.of(window)
        assert made.count == real.count
        assert (made.mean, made.sd, *made.quantiles) == pytest.approx(
            (real.mean, real.sd, *real.quantiles), abs=2e-5
        )


def test_a_history_is_of_the_last_hundred():
    assert History.of([*range(500), *([7] * WINDOW)]) == History.of([7] * WINDOW)
    assert History.of([]).count == 0


# --- what is refused


def spoil_json(directory, name, **changes):
    file = directory / name
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def answer_otherwise(directory):
    examples = json.loads((directory / "reference.json").read_text())["examples"]
    examples[5]["quantiles"][3] *= 1.1
    spoil_json(directory, "reference.json", examples=examples)


def grow(file):
    with file.open("r+b") as opened:
        opened.truncate(MOST_BYTES + 1)


def cut(file):
    file.write_bytes(file.read_bytes()[:-1])


def point_beyond(file):
    data = bytearray(file.read_bytes())
    data[: 2 * 32768] = b"\xfe\xff" * 32768
    file.write_bytes(data)


@pytest.mark.parametrize(
    ("spoil", "file", "complaint"),
    [
        (lambda d: (d / "model.onnx").unlink(), "model.onnx", "No such file"),
        (lambda d: (d / "card.md").unlink(), "card.md", "No such file"),
        (lambda d: grow(d / "model.onnx"), "model.onnx", "at most"),
        (lambda d: cut(d / "model.onnx"), "model.onnx", "onnxruntime refuses it"),
        (lambda d: cut(d / "embeddings.bin"), "embeddings.bin", "do not hold"),
        (lambda d: point_beyond(d / "embeddings.bin"), "embeddings.bin", "row_of"),
        (lambda d: (d / "config.json").write_text("{"), "config.json", "cannot be read"),
        (lambda d: (d / "config.json").write_text("[]"), "config.json", "JSON object"),
        (lambda d: spoil_json(d, "config.json", format=2), "config.json", "format is 2, not 1"),
        (lambda d: spoil_json(d, "config.json", levels=[0.5]), "config.json", "levels"),
        (lambda d: spoil_json(d, "config.json", features={}), "config.json", "features"),
        (lambda d: spoil_json(d, "config.json", version=""), "config.json", "version"),
        (lambda d: spoil_json(d, "config.json", wide=[1]), "config.json", "wide"),
        (lambda d: spoil_json(d, "config.json", dims=0), "config.json", "dims"),
        (lambda d: spoil_json(d, "reference.json", examples=[]), "reference.json", "checked"),
        (lambda d: spoil_json(d, "reference.json", examples=[{}]), "reference.json", "checked"),
        (answer_otherwise, "reference.json", "answers otherwise"),
    ],
)
def test_a_model_that_is_not_as_it_was_exported_is_refused(spoilt, spoil, file, complaint):
    Predictor.load(spoilt)
    spoil(spoilt)
    with pytest.raises(ModelError, match=complaint) as refused:
        Predictor.load(spoilt)
    assert refused.value.file == spoilt / file


def test_a_graph_with_other_inputs_is_refused(spoilt):
    onnx = pytest.importorskip("onnx", reason="the train extra is not installed")
    model = onnx.load(spoilt / "model.onnx")
    model.graph.input[0].type.tensor_type.shape.dim[1].dim_value = 7
    (spoilt / "model.onnx").write_bytes(model.SerializeToString())
    with pytest.raises(ModelError, match=r"model\.onnx"):
        Predictor.load(spoilt)


# --- how it is scored


def test_a_completion_is_known_when_it_is_late_enough(tmp_path):
    rows = read_rows(write_rows(tmp_path / "set.parquet", 300))
    for delay in (0, 1, 64):
        shuffled, table = running(rows, delay, seed=3)
        done = defaultdict(list)
        for i, history in enumerate(histories(table)):
            if i >= max(delay, 1):
                before = i - max(delay, 1)
                done[shuffled.model[before]].append(shuffled.output_tokens[before])
            real = History.of(done[shuffled.model[i]])
            assert history.count == real.count
            assert history.quantiles == pytest.approx(real.quantiles, abs=2e-5)


def test_a_resting_history_is_of_the_same_model(tmp_path):
    past = read_rows(write_rows(tmp_path / "past.parquet", 400, models=("b", "c")))
    rows = read_rows(write_rows(tmp_path / "now.parquet", 50, models=("a", "b")))
    of = {"a": [], "b": past.output_tokens[past.model == past.models.index("b")]}
    for model, history in zip(rows.model, histories(resting(rows, past)), strict=True):
        known = of[rows.models[model]]
        assert history.count == min(len(known), WINDOW)
        if len(known):
            assert history.mean == pytest.approx(np.log1p(known).mean(), abs=1e-5)


def test_the_metrics_are_what_they_are_called():
    actual = np.log1p(np.arange(1, 101))
    assert pinball(np.repeat(actual[:, None], 7, 1), actual) == 0
    low = np.repeat(actual[:, None] - 1, 7, 1)
    assert pinball(low, actual) == pytest.approx(LEVELS.mean())
    assert over_reservation(actual - 3, actual) == pytest.approx(1)
    # The same for all: the 95th of 100 lengths covers 95 %.
    assert over_reservation(np.zeros(100), actual) == pytest.approx(96 * 100 / 5050)


def test_rows_for_training_and_with_hidden_reasoning_are_left_out(tmp_path, shipped):
    table = pq.read_table(write_rows(tmp_path / "set.parquet", 200))
    splits = ["train"] * 80 + ["val"] * 120
    hidden = [i % 4 == 0 for i in range(200)]
    for name, values in (("split", splits), ("reasoning_hidden", hidden)):
        table = table.set_column(table.column_names.index(name), name, pa.array(values))
    pq.write_table(table, tmp_path / "set.parquet")
    report = evaluate([tmp_path / "set.parquet"], shipped, seeds=2)
    assert report["sets"]["set"]["rows"] == 90
    assert len(report["sets"]["set"]["pinball_log_by_seed"]) == 2
    assert evaluate([tmp_path / "set.parquet"], shipped, every_row=True)["macro"]["sets"] == 1
    assert report["model_version"] == shipped.version


def test_human_answers_are_not_among_the_generated(tmp_path, shipped):
    files = [
        write_rows(tmp_path / "people.parquet", 100, models=("human",)),
        write_rows(tmp_path / "models.parquet", 100),
    ]
    report = evaluate(files, shipped, seeds=1)
    assert report["macro"]["sets"] == 2
    assert report["macro_generated"]["sets"] == 1
    scores = [report["sets"][name]["pinball_log"] for name in ("people", "models")]
    assert report["macro"]["pinball_log"] == pytest.approx(np.mean(scores), abs=1e-5)


def test_files_that_cannot_be_scored_are_named(tmp_path, shipped):
    (tmp_path / "no.parquet").write_text("no")
    pq.write_table(pa.table({"prompt": ["a"]}), tmp_path / "lacking.parquet")
    write_rows(tmp_path / "training.parquet", 100, split="train")
    for name, complaint in (
        ("no", "not a parquet file"),
        ("missing", "no such file"),
        ("lacking", "no column prompt_tokens, output_tokens, model"),
        ("training", "no rows but those for training"),
    ):
        with pytest.raises(InvalidError, match=complaint):
            evaluate([tmp_path / f"{name}.parquet"], shipped)


# --- making one


def small():
    """Return a recipe that takes seconds."""
    from predictor_onnx.train import Recipe

    steps = {"steps": 120, "fold_steps": 40, "trust_steps": 60, "trust_batches": 4}
    return Recipe(batch=128, folds=2, least_prompts=4, **steps)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Return files of two sets and a model that was made of them."""
    pytest.importorskip("jax", reason="the train extra is not installed")
    from predictor_onnx.making import make

    place = tmp_path_factory.mktemp("made")
    files = [place / "one.parquet", place / "two.parquet"]
    for i, file in enumerate(files):
        parts = [
            pq.read_table(write_rows(file, rows, seed=10 * i + k, split=split))
            for k, (rows, split) in enumerate(((600, "train"), (300, "val")))
        ]
        pq.write_table(pa.concat_tables(parts), file)
    model = make(files, place / "model", "small", 1, small(), "ours", lambda told: None)
    return files, place / "model", model


def test_a_model_is_served_as_it_was_trained(made):
    _, directory, model = made
    config = json.loads((directory / "config.json").read_text())
    assert config["version"] == model.version
    assert model.version.startswith("small-")
    assert config["proof"]["onnx_from_training"] < 1e-4
    assert config["proof"]["service_from_training"] < 1e-4
    assert config["proof"]["int8_from_float_most"] < 0.1
    card = (directory / "card.md").read_text()
    assert "**Licences of the data.** ours" in card
    assert "| one | 600 |" in card


def test_a_model_learns_what_its_prompts_say(made):
    files, _, model = made
    for figures in evaluate(files, model, seeds=1)["sets"].values():
        assert figures["pinball_log"] < 0.8 * figures["baseline_pinball_log"]


def test_the_same_rows_and_seed_make_the_same_weights(made):
    from predictor_onnx.train import Recipe, train

    rows = [read_rows(made[0][0], split="train")]
    one, two = (train(rows, 7, Recipe(steps=3, batch=32, folds=0, least_prompts=4)) for _ in "12")
    assert (one.table == two.table).all()
    for name, weights in one.weights.items():
        assert (weights == two.weights[name]).all()


def test_non_commercial_rows_make_a_model_only_under_a_name_that_says_so(tmp_path):
    pytest.importorskip("jax", reason="the train extra is not installed")
    from predictor_onnx.making import NOT_FOR_BUSINESS, make
    from predictor_onnx.train import Recipe

    file = write_rows(tmp_path / "code_alpaca.parquet", 300, split="train")
    refused = odma("predictor", "train", file, "--out", tmp_path / "model")
    assert refused.returncode == 2
    assert "code_alpaca: non-commercial" in refused.stderr
    recipe = Recipe(steps=2, batch=32, folds=0, least_prompts=4)
    model = make([file], tmp_path / "model", "research-a", 1, recipe, "NC", lambda told: None)
    assert model.non_commercial
    assert NOT_FOR_BUSINESS in (tmp_path / "model" / "card.md").read_text()


# --- commands


def test_the_commands_score_and_show(tmp_path):
    file = write_rows(tmp_path / "set.parquet", 120)
    scored = odma("predictor", "evaluate", file, "--seeds", 1, "--json")
    assert json.loads(scored.stdout)["sets"]["set"]["rows"] == 120
    version = json.loads((default_model() / "config.json").read_text())["version"]
    assert version in odma("predictor", "card").stdout
    wrong = odma("predictor", "evaluate", file, "--model", tmp_path)
    assert wrong.returncode == 2
    assert "config.json" in wrong.stderr
    timed = odma("bench", "predictor", "--seconds", 0.1, "--json")
    figures = json.loads(timed.stdout)
    assert set(figures["per_prompt"]) == {"1", "8", "64"}
    assert figures["model_version"] == version


def test_the_shipped_model_says_what_it_was_trained_on():
    card = (default_model() / "card.md").read_text()
    config = json.loads((default_model() / "config.json").read_text())
    assert config["version"] in card
    for name in ("alpaca", "dolly", "nq_open"):
        assert name not in card
