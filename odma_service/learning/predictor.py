"""Predictor: how long an answer will be, from its prompt and from the answers before it.

The answers before it are worth more than any text: the last completions of the same model and
class (History) set the level and the spread, the prompt moves and narrows them. Without text the
counts and the history remain; without history the prediction is wide.

A model is a directory that describes itself:

    config.json      format, version (its name), how prompts are seen, sizes
    model.onnx       inputs [n, width] -> quantiles [n, 7] of log(1 + output tokens)
    embeddings.bin   row of each bucket (uint16), scales (float32), rows (int8), little-endian
    reference.json   prompts with the quantiles that the model was exported with
    card.md          date, data, licences, figures
"""

from __future__ import annotations

import hashlib
import json
import math
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, Self

import numpy as np

from odma_service._native import features
from odma_service.errors import ModelError
from odma_service.learning.runtime import onnxruntime
from odma_service.learning.sketch import features_of, sketched
from odma_service.learning.survival import Distribution, summaries
from odma_service.values import QUANTILE_LEVELS, Quantiles, Text

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from numpy.typing import NDArray

FORMAT = 1
WINDOW = 100
"""Completions that a History is of, at most."""

RESEARCH = "research-"
"""The version of a model that was trained on non-commercial data starts with this."""

HISTORY_FIELDS = 3 + len(QUANTILE_LEVELS)
FILES = ("config.json", "model.onnx", "embeddings.bin", "reference.json", "card.md")
MOST_TOKENS = 2**32 - 1
ABSURD_TOKENS = 2**48  # a model that says so is broken; below, the longest length is meant
MOST_BYTES = 64 << 20
TOLERANCE = 2e-3
"""How far a log length may be from the reference: another machine rounds otherwise."""


def default_model() -> Path:
    """Return the directory of the model that comes with the package."""
    return Path(str(files("predictor_onnx"))) / "model"


@dataclass(frozen=True, slots=True)
class History:
    """The last completions of one model and class, as log(1 + output tokens).

    `quantiles` are at QUANTILE_LEVELS, interpolated between neighbours. `count`, at most
    WINDOW, says of how many; 0: nothing is known and the other fields mean nothing.
    """

    mean: float = 0.0
    sd: float = 0.0
    quantiles: Quantiles = (0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0)
    count: int = 0

    @classmethod
    def of(cls, output_tokens: Iterable[float]) -> History:
        """Return the history of these completions, oldest first: of the last WINDOW of them.

        >>> History.of([6, 6, 6]).quantiles[2] == math.log(7)
        True
        """
        logs = np.log1p(np.sort(np.array(list(output_tokens)[-WINDOW:], np.float64)))
        count = len(logs)
        return cls.of_lengths(Distribution(logs, np.full(count, 1 / max(count, 1)), count, 0.0))

    @classmethod
    def of_lengths(cls, lengths: Distribution) -> History:
        """Return the history that a distribution of lengths makes."""
        if not len(lengths.logs):
            return cls()
        [row] = summaries(lengths.logs[None], lengths.weights[None]).tolist()
        mean, sd, a, b, c, d, e, f, g = row
        return cls(mean, sd, (a, b, c, d, e, f, g), min(lengths.completions, WINDOW))


class PromptInput(NamedTuple):
    """A request as a model is told of it: its prompt (None: not told), length and history."""

    text: Text | None
    prompt_tokens: int
    history: History


class _Seen(NamedTuple):
    """The features of a text, and what they were made with."""

    embeddings: features.Embeddings
    prompt_tokens: int
    features: NDArray[np.float32]


class Run:
    """A run of a model that another thread can end."""

    def __init__(self) -> None:
        self.options = onnxruntime().RunOptions()

    def end(self) -> None:
        """Let the run fail at its next node, or the next round of a loop."""
        self.options.terminate = True


class Predictor:
    """A model directory, loaded and checked. Any thread may ask it."""

    def __init__(
        self, version: str, wide: Quantiles, embeddings: features.Embeddings, session: Any
    ) -> None:
        """Use Predictor.load."""
        self.version = version
        self.non_commercial = version.startswith(RESEARCH)
        self.wide = wide  # output tokens of the rows that it was trained on
        self._embeddings = embeddings
        row_of, rows, _ = embeddings.arrays
        self._name = hashlib.sha256(row_of.tobytes() + rows.tobytes()).hexdigest()[:8]
        self._session = session

    @classmethod
    def load(cls, directory: Path, run: Run | None = None) -> Self:
        """Load a model and check that it answers as it did where it was exported.

        `run`: see predict. Raises ModelError that names the file and what is wrong with it.
        """
        for name in FILES:
            _check_size(directory / name)
        config = _read_json(directory / "config.json")
        version, wide = _checked(config, directory / "config.json")
        embeddings = _read_embeddings(directory / "embeddings.bin", config)
        width = embeddings.width + 1 + HISTORY_FIELDS
        predictor = cls(version, wide, embeddings, _session(directory / "model.onnx", width))
        predictor._check_reference(directory, run)
        return predictor

    def predict(self, prompts: Sequence[PromptInput], run: Run | None = None) -> list[Quantiles]:
        """Return quantiles of output tokens at QUANTILE_LEVELS for each prompt, ascending.

        Another thread may end `run`. Raises ValueError if the model says what is no length, and
        onnxruntime's own errors.
        """
        if not prompts:
            return []
        options = None if run is None else run.options
        [logs] = self._session.run(None, {"inputs": self.inputs(prompts)}, options)
        tokens = np.expm1(np.maximum.accumulate(logs.astype(np.float64), axis=1))
        if tokens.shape != (len(prompts), len(QUANTILE_LEVELS)):
            raise ValueError(f"the model's answer has the shape {tokens.shape}")
        if not np.all((tokens >= 0) & (tokens < ABSURD_TOKENS)):  # false for NaN
            raise ValueError("the model's answer is no length")
        return list(map(tuple, np.minimum(tokens, MOST_TOKENS).tolist()))

    def inputs(self, prompts: Sequence[PromptInput]) -> NDArray[np.float32]:
        """Return the inputs of the network for each prompt: rows of features and history."""
        width = self._embeddings.width
        rows = np.zeros((len(prompts), width + 1 + HISTORY_FIELDS), np.float32)
        for row, (text, prompt_tokens, history) in zip(rows, prompts, strict=True):
            if text is None:
                row[width - features.STATS] = math.log1p(max(prompt_tokens, 0))
            else:
                row[:width] = self._features(text, prompt_tokens)
                row[width] = 1
            row[width + 1 :] = (history.mean, history.sd, *history.quantiles, history.count)
        return rows

    def sketch(self, text: Text, prompt_tokens: int) -> str:
        """Return the sketch of a prompt, from which a model with the same embeddings can learn."""
        features = self._features(text, prompt_tokens)
        return sketched(features, self._embeddings.arrays[2], self._name)

    def _features(self, text: Text, prompt_tokens: int) -> NDArray[np.float32]:
        """Return the features of a prompt, which its text keeps."""
        seen = text.seen
        if isinstance(seen, _Seen) and seen[:2] == (self._embeddings, prompt_tokens):
            return seen.features
        features = np.zeros(self._embeddings.width, np.float32)
        self._embeddings.embed(text.data, prompt_tokens, features)
        text.seen = _Seen(self._embeddings, prompt_tokens, features)
        return features

    def seen(self, sketch: str) -> NDArray[np.float32] | None:
        """Return the features that a sketch stands for, None if it is of other embeddings."""
        return features_of(sketch, self._embeddings.arrays[2], self._name)

    @property
    def width(self) -> int:
        """How many numbers the features of a prompt are."""
        return self._embeddings.width

    @property
    def embeddings(self) -> tuple[NDArray[np.float32], NDArray[np.uint16]]:
        """The embeddings, (rows, dims), and the row of each bucket."""
        row_of, rows, scales = self._embeddings.arrays
        return rows * scales, row_of

    def _check_reference(self, directory: Path, run: Run | None) -> None:
        file = directory / "reference.json"
        examples = _read_json(file)
        try:
            prompts = [_prompt(example) for example in examples["examples"]]
            wanted = np.log1p([example["quantiles"] for example in examples["examples"]])
            got = np.log1p(self.predict(prompts, run))
            worst = float(np.abs(got - wanted).max())
        except Exception as problem:  # noqa: BLE001 - of any kind: file and model are a guest's
            raise ModelError(file, f"cannot be checked: {problem!r}") from None
        if not worst <= TOLERANCE:
            raise ModelError(
                file, f"the model answers otherwise than where it was exported, by {worst:.2g}"
            )


def _prompt(example: dict[str, Any]) -> PromptInput:
    text, told = example["text"], example["history"]
    a, b, c, d, e, f, g = map(float, told["quantiles"])
    history = History(float(told["mean"]), float(told["sd"]), (a, b, c, d, e, f, g), told["count"])
    return PromptInput(
        None if text is None else Text.of(text), int(example["prompt_tokens"]), history
    )


def _check_size(file: Path) -> None:
    try:
        size = file.stat().st_size
    except OSError as problem:
        raise ModelError(file, str(problem.strerror)) from None
    if size > MOST_BYTES:
        raise ModelError(file, f"{size:,} bytes, of {MOST_BYTES:,} at most")


def _read_json(file: Path) -> dict[str, Any]:
    try:
        values = json.loads(file.read_bytes())
    except (OSError, ValueError, RecursionError) as problem:
        raise ModelError(file, f"cannot be read: {problem}") from None
    if not isinstance(values, dict):
        raise ModelError(file, "one JSON object is wanted")
    return values


def seeing() -> dict[str, int]:
    """Return how prompts are seen here; a model that was trained otherwise cannot be served."""
    return {
        "version": features.VERSION,
        "buckets": features.BUCKETS,
        "groups": features.GROUPS,
        "stats": features.STATS,
        "head_bytes": features.HEAD,
        "tail_bytes": features.TAIL,
    }


def _checked(config: dict[str, Any], file: Path) -> tuple[str, Quantiles]:
    """Return version and width of a config that can be served."""
    for key, wanted in (
        ("format", FORMAT),
        ("features", seeing()),
        ("levels", list(QUANTILE_LEVELS)),
        ("window", WINDOW),
    ):
        if config.get(key) != wanted:
            raise ModelError(file, f"{key} is {config.get(key)!r}, not {wanted!r}")
    version = config.get("version")
    if not isinstance(version, str) or not 1 <= len(version) <= 100:
        raise ModelError(file, "version: a name of 1 to 100 letters is wanted")
    try:
        a, b, c, d, e, f, g = map(float, config["wide"])
    except (KeyError, TypeError, ValueError):
        raise ModelError(file, "wide: seven lengths are wanted") from None
    return version, (a, b, c, d, e, f, g)


def _read_embeddings(file: Path, config: dict[str, Any]) -> features.Embeddings:
    rows, dims, data = config.get("rows"), config.get("dims"), file.read_bytes()
    buckets = features.BUCKETS
    if not isinstance(rows, int) or not isinstance(dims, int) or min(rows, dims) < 1:
        raise ModelError(file.with_name("config.json"), "rows and dims: at least 1")
    if len(data) != 2 * buckets + 4 * dims + rows * dims:
        raise ModelError(file, f"{len(data):,} bytes do not hold {rows:,} rows of {dims}")
    row_of = np.frombuffer(data, "<u2", buckets)
    scales = np.frombuffer(data, "<f4", dims, 2 * buckets)
    table = np.frombuffer(data, np.int8, rows * dims, 2 * buckets + 4 * dims)
    try:
        return features.Embeddings(row_of, table.reshape(rows, dims), scales)
    except ValueError as problem:
        raise ModelError(file, str(problem)) from None


def _session(file: Path, width: int) -> Any:
    """Return an onnxruntime session of one thread: the callers are the threads."""
    runtime = onnxruntime()
    options = runtime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    options.log_severity_level = 4
    try:
        session = runtime.InferenceSession(
            file.read_bytes(), options, providers=["CPUExecutionProvider"]
        )
    except Exception as problem:  # noqa: BLE001 - onnxruntime's errors have no base of their own
        raise ModelError(file, f"onnxruntime refuses it: {problem}") from None
    shapes = [
        [port.name, port.shape[1:]] for port in (*session.get_inputs(), *session.get_outputs())
    ]
    wanted = [["inputs", [width]], ["quantiles", [len(QUANTILE_LEVELS)]]]
    if shapes != wanted:
        raise ModelError(file, f"inputs and outputs are {shapes}, not {wanted}")
    return session
