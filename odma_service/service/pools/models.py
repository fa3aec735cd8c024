"""Models: exchanges the model that predicts for a new one while the service runs.

Every other second it looks at the directory. A symbolic link that points elsewhere is a new
model; so are changed files that have not changed since the last look. A new model is loaded and
checked aside; then it replaces the old one at once. A model that cannot be used is refused with
a line in the log, and the old one stays.
"""

from __future__ import annotations

from pathlib import Path
from threading import Event, Thread

import structlog

from odma_service.errors import ModelError, OdmaError
from odma_service.learning.predictor import Predictor

LOOK_SECONDS = 2.0

log = structlog.get_logger()

Look = tuple[str, tuple[tuple[str, int, int], ...]]
"""Where a directory really is, and the name, size and change time of each of its files."""


class Models:
    """The model of a directory, None: no model. Any thread may ask for `now`."""

    def __init__(self, directory: Path | None, *, non_commercial: bool = False) -> None:
        """Load the first model. Raises InvalidError if it cannot be used.

        non_commercial: whether a model trained on non-commercial data may serve.
        """
        self._directory = directory
        self._non_commercial = non_commercial
        self._stopped = Event()
        self._loaded = self._seen = _look(directory) if directory else None
        self._model = self._load(directory) if directory else None

    def now(self) -> Predictor | None:
        """Return the model of the moment."""
        return self._model

    def start(self) -> None:
        """Look for new models from now on, until stop."""
        if self._model is not None:
            log.info("model", directory=str(self._directory), version=self._model.version)
            Thread(target=self._keep_looking, name="models", daemon=True).start()

    def stop(self) -> None:
        """Stop looking."""
        self._stopped.set()

    def _keep_looking(self) -> None:
        while not self._stopped.wait(LOOK_SECONDS):
            self.refresh()

    def refresh(self) -> None:
        """Look once."""
        assert self._directory is not None
        before, self._seen = self._seen, _look(self._directory)
        if self._seen in (None, self._loaded) or self._seen != before:
            return  # gone, known, or still being written
        self._loaded = self._seen
        try:
            model = self._load(self._directory.resolve())
        except (OdmaError, OSError) as error:
            log.error("new model refused", directory=str(self._directory), reason=str(error))
            return
        old, self._model = self._model, model
        log.info(
            "model exchanged",
            directory=str(self._directory),
            version=model.version,
            before=old.version if old else "",
        )

    def _load(self, directory: Path) -> Predictor:
        model = Predictor.load(directory)
        if model.non_commercial and not self._non_commercial:
            raise ModelError(
                directory / "config.json",
                f"{model.version} was trained on non-commercial data: --non-commercial-model",
            )
        return model


def _look(directory: Path) -> Look | None:
    try:
        real = directory.resolve()
        found = sorted((file.name, file.stat()) for file in real.iterdir())
    except OSError:
        return None
    return str(real), tuple((name, one.st_size, one.st_mtime_ns) for name, one in found)
