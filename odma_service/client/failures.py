"""Failed calls: what errors they stand for, and how long to go on asking."""

from __future__ import annotations

import random
import time
from collections.abc import Sequence
from typing import Any, cast

import grpc
from google.rpc import error_details_pb2
from google.rpc.status_pb2 import Status
from grpc_status import rpc_status

from odma_service.errors import (
    BooksLockedError,
    BooksUnavailableError,
    BusyError,
    CallerLimitError,
    OdmaError,
    RefusedError,
    ServiceError,
    StreamLimitError,
    UnavailableError,
)
from odma_service.rpc.v1 import types_pb2 as types
from odma_service.wire import DOMAIN, refusal_from

FIRST_PAUSE_SECONDS = 0.02
LONGEST_PAUSE_SECONDS = 0.5

NO_ANSWER = {
    grpc.StatusCode.UNAVAILABLE,
    grpc.StatusCode.DEADLINE_EXCEEDED,
    grpc.StatusCode.CANCELLED,  # by a service that stopped waiting for it at shutdown
}
NOT_BEGUN = (BusyError, CallerLimitError, StreamLimitError)
"""There was no room for a call: it was not begun, and may be sent again."""
PERHAPS_DONE = NO_ANSWER | {grpc.StatusCode.INTERNAL, grpc.StatusCode.UNKNOWN}


class Patience:
    """For how long something is asked again while nobody answers or has room, and how often.

    The `retry_seconds` begin now. The longest pause doubles, up to half a second; each is drawn
    between half of it and all of it, so that many clients do not come back at once. A service
    that tells how long to wait (RetryInfo) is waited for so long.
    """

    def __init__(self, retry_seconds: float, pause_seconds: float = FIRST_PAUSE_SECONDS) -> None:
        self._give_up = time.monotonic() + retry_seconds
        self._pause_seconds = pause_seconds

    def pause_after(self, error: grpc.RpcError) -> float:
        """Return for how many seconds to wait before asking again.

        Raises the OdmaError that `error` stands for if it is an answer, or time is up.
        """
        told_seconds = _retry_delay_seconds(error)
        pause_seconds = max(told_seconds, self._pause_seconds * random.uniform(0.5, 1))
        failed = error_from(error)
        again = error.code() in NO_ANSWER or isinstance(failed, NOT_BEGUN)
        if not again or time.monotonic() + pause_seconds > self._give_up:
            raise failed from None
        self._pause_seconds = min(2 * self._pause_seconds, LONGEST_PAUSE_SECONDS)
        return pause_seconds


def _retry_delay_seconds(error: grpc.RpcError) -> float:
    """Return the pause that a service asks for, 0 without one."""
    status = rpc_status.from_call(cast("grpc.Call", error))
    info = error_details_pb2.RetryInfo()
    if status is None or not any(detail.Unpack(info) for detail in status.details):
        return 0.0
    return float(info.retry_delay.ToTimedelta().total_seconds())


def _refused(details: Sequence[Any]) -> OdmaError:
    message = types.Refusal()
    if not any(detail.Unpack(message) for detail in details):
        return ServiceError("refused, without a reason")
    return RefusedError(refusal_from(message))


def _by_reason(kind: type[OdmaError]) -> dict[str, type[OdmaError]]:
    """Return the kinds of errors by reason; of kinds that share one, the most general."""
    kinds: dict[str, type[OdmaError]] = {}
    for each in kind.__subclasses__():
        kinds |= _by_reason(each)
    return kinds | {kind.reason: kind}


_KINDS = _by_reason(OdmaError) | {
    kind.reason: UnavailableError for kind in (BooksLockedError, BooksUnavailableError)
}


def error_from(error: grpc.RpcError) -> OdmaError:
    """Return the error that a failed call stands for."""
    status = rpc_status.from_call(cast("grpc.Call", error))
    return error_of(error.code(), error.details() or "", status)


def error_of(code: grpc.StatusCode, text: str, status: Status | None) -> OdmaError:
    """Return the error that a status, its message and its details stand for."""
    info = error_details_pb2.ErrorInfo()
    if status is not None and any(detail.Unpack(info) for detail in status.details):
        if info.reason == RefusedError.reason:
            return _refused(status.details)
        if info.domain == DOMAIN and info.reason and info.reason in _KINDS:
            kind = _KINDS[info.reason]
            try:
                values = [read(info.metadata[name]) for name, read in kind.fields]
            except ValueError:
                return ServiceError(f"{code.name}: {text} (details without a number)")
            return kind(*values or [text])
    unknown = UnavailableError if code in PERHAPS_DONE else ServiceError
    return unknown(f"{code.name}: {text}")
