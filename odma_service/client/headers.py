"""What every call says besides its message: who calls, and which trace it belongs to."""

from __future__ import annotations

import sys

Headers = tuple[tuple[str, str], ...]


class Caller:
    """Who calls. Without a token nobody in particular."""

    def __init__(self, token: str | None) -> None:
        self._token: Headers = (("authorization", f"Bearer {token}"),) if token else ()

    @property
    def metadata(self) -> Headers | None:
        """The metadata of a call made now."""
        return (*self._token, *_trace()) or None


def _trace() -> Headers:
    """Return the headers of the current span, for those who trace with OpenTelemetry."""
    if "opentelemetry.trace" not in sys.modules:
        return ()
    from opentelemetry import propagate

    headers: dict[str, str] = {}
    propagate.inject(headers)
    return tuple(headers.items())
