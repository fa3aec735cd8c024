"""Models: exchanges the model that predicts for a new one while the service runs.

Every other second it looks at the directory. A symbolic link that points elsewhere is a new
model; so are changed files that have not changed since the last look. A new model is loaded and
checked aside; then it replaces the old one at once. A model that cannot be used is refused with
a line in the log, and the old one stays.

A model is a guest. What it does wrong while it serves is counted, and histograms take its place
in that answer. One that does not come to an end is stopped and not asked again.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from threading import Event, Lock, Thread
from time import monotonic

import structlog

from odma_service.errors import ModelError
from odma_service.learning.predictor import Predictor, PromptInput, Run
from odma_service.service.watch.lines import Seldom
from odma_service.values import Quantiles, Text

LOOK_SECONDS = 2.0
REFUSED_SECONDS = 30.0
"""Until a model that was refused is loaded again: the trouble may have been the system's."""
LOAD_SECONDS = 60.0
PREDICT_SECONDS = 5.0
"""For so long a model may run before it is stopped."""
LONGEST_REASON = 500
FAILURES = ("failed", "too_slow")

log = structlog.get_logger()

Look = tuple[str, tuple[tuple[str, int, int], ...]]
"""Where a directory really is, and the name, size and change time of each of its files."""


class Watchdog:
    """Ends the runs of models that last too long. One thread, whatever the number of runs."""

    def __init__(self) -> None:
        self._lock = Lock()
        self._until: dict[Run, float] = {}
        self._thread: Thread | None = None
        self._stopped = Event()

    @contextmanager
    def watching(self, run: Run, seconds: float) -> Iterator[None]:
        """End a run that is not over after so many seconds."""
        with self._lock:
            self._until[run] = monotonic() + seconds
            if self._thread is None:
                self._thread = Thread(target=self._watch, name="watchdog", daemon=True)
                self._thread.start()
        try:
            yield
        finally:
            with self._lock:
                del self._until[run]

    def stop(self) -> None:
        """Stop looking."""
        self._stopped.set()

    def _watch(self) -> None:
        while not self._stopped.wait(PREDICT_SECONDS / 10):
            with self._lock:
                now = monotonic()
                over = [run for run, until in self._until.items() if until < now]
            for run in over:
                run.end()


class Guest:
    """A model that serves, with all that it does wrong kept from those that ask."""

    def __init__(self, model: Predictor, watchdog: Watchdog, failures: Counter[str]) -> None:
        self._model = model
        self._watchdog = watchdog
        self._failures = failures
        self._seldom = Seldom(1, 60.0)
        self._too_slow = False

    @property
    def version(self) -> str:
        """Its name and version."""
        return self._model.version

    def predict(self, prompts: Sequence[PromptInput]) -> list[Quantiles]:
        """Return what the model says. Raises ModelFailedError."""
        if self._too_slow:
            self._failures["too_slow"] += 1
            raise ModelFailedError("the model was stopped, as it came to no end")
        run, begun = Run(), monotonic()
        try:
            with self._watchdog.watching(run, PREDICT_SECONDS):
                return self._model.predict(prompts, run)
        except Exception as error:
            self._too_slow = monotonic() - begun > PREDICT_SECONDS
            self._note("too_slow" if self._too_slow else "failed", error)
            raise ModelFailedError(str(error)) from error

    def sketch(self, text: Text, prompt_tokens: int) -> str | None:
        """Return the sketch of a prompt, None if the model fails."""
        try:
            return self._model.sketch(text, prompt_tokens)
        except Exception as error:  # noqa: BLE001 - a guest's
            self._note("failed", error)
            return None

    def _note(self, kind: str, error: Exception) -> None:
        self._failures[kind] += 1
        left_out = self._seldom.let()
        if self._too_slow or left_out is not None:
            log.error(
                "the model failed; histograms take its place",
                version=self.version,
                kind=kind,
                reason=str(error)[:LONGEST_REASON],
                others=left_out or 0,
            )


class ModelFailedError(Exception):
    """The model gave no answer that can be used."""


class Models:
    """The model of a directory, None: no model. Any thread may ask for `now`."""

    def __init__(self, directory: Path | None, *, non_commercial: bool = False) -> None:
        """Load the first model. Raises InvalidError if it cannot be used.

        non_commercial: whether a model trained on non-commercial data may serve.
        """
        self._directory = directory
        self._non_commercial = non_commercial
        self._stopped = Event()
        self._watchdog = Watchdog()
        self._failures: Counter[str] = Counter()
        self._loaded = self._seen = _look(directory) if directory else None
        self._refused: Look | None = None
        self._again_at = 0.0
        self._model = self._load(directory) if directory else None

    def now(self) -> Guest | None:
        """Return the model of the moment."""
        return self._model

    def failures(self) -> Counter[str]:
        """Return how often a model was of no use, by FAILURES."""
        return self._failures

    def start(self) -> None:
        """Look for new models from now on, until stop."""
        if self._model is not None:
            log.info("model", directory=str(self._directory), version=self._model.version)
            Thread(target=self._keep_looking, name="models", daemon=True).start()

    def stop(self) -> None:
        """Stop looking."""
        self._stopped.set()
        self._watchdog.stop()

    def _keep_looking(self) -> None:
        while not self._stopped.wait(LOOK_SECONDS):
            try:
                self.refresh()
            except Exception:
                log.exception("looking for a new model failed; it goes on")

    def refresh(self) -> None:
        """Look once."""
        assert self._directory is not None
        before, self._seen = self._seen, _look(self._directory)
        if self._seen in (None, self._loaded) or self._seen != before:
            return  # gone, known, or still being written
        if self._seen == self._refused and monotonic() < self._again_at:
            return
        try:
            model = self._load(self._directory.resolve())
        except Exception as error:  # noqa: BLE001 - its files are a guest's
            if self._seen != self._refused:
                log.error("new model refused", directory=str(self._directory), reason=str(error))
            self._refused, self._again_at = self._seen, monotonic() + REFUSED_SECONDS
            return
        self._loaded = self._seen
        old, self._model = self._model, model
        log.info(
            "model exchanged",
            directory=str(self._directory),
            version=model.version,
            before=old.version if old else "",
        )

    def _load(self, directory: Path) -> Guest:
        run = Run()
        with self._watchdog.watching(run, LOAD_SECONDS):
            model = Predictor.load(directory, run)
        if model.non_commercial and not self._non_commercial:
            raise ModelError(
                directory / "config.json",
                f"{model.version} was trained on non-commercial data: --non-commercial-model",
            )
        return Guest(model, self._watchdog, self._failures)


def _look(directory: Path) -> Look | None:
    try:
        real = directory.resolve()
        found = sorted((file.name, file.stat()) for file in real.iterdir())
    except (OSError, RuntimeError):  # RuntimeError: links in a circle
        return None
    return str(real), tuple((name, one.st_size, one.st_mtime_ns) for name, one in found)
