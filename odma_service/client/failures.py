"""Failed calls: what errors they stand for, and how long to go on asking."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, cast

import grpc
from google.rpc import error_details_pb2
from google.rpc.status_pb2 import Status
from grpc_status import rpc_status

from odma_service import errors
from odma_service.errors import OdmaError, ServiceError, UnavailableError
from odma_service.rpc.v1 import types_pb2 as types
from odma_service.wire import refusal_from

DOMAIN = "odma"
FIRST_PAUSE_SECONDS = 0.02
LONGEST_PAUSE_SECONDS = 0.5

NO_ANSWER = {
    grpc.StatusCode.UNAVAILABLE,
    grpc.StatusCode.DEADLINE_EXCEEDED,
    grpc.StatusCode.CANCELLED,  # by a service that stopped waiting for it at shutdown
}
PERHAPS_DONE = NO_ANSWER | {grpc.StatusCode.INTERNAL, grpc.StatusCode.UNKNOWN}


class Patience:
    """For how long something is asked again while nobody answers, and after what pauses.

    The `retry_seconds` begin now. Each pause is twice as long as the one before it, up to half a
    second.
    """

    def __init__(self, retry_seconds: float, pause_seconds: float = FIRST_PAUSE_SECONDS) -> None:
        self._give_up = time.monotonic() + retry_seconds
        self._pause_seconds = pause_seconds

    def pause_after(self, error: grpc.RpcError) -> float:
        """Return for how many seconds to wait before asking again.

        Raises the OdmaError that `error` stands for if it is an answer, or time is up.
        """
        pause_seconds = self._pause_seconds
        if error.code() not in NO_ANSWER or time.monotonic() + pause_seconds > self._give_up:
            raise error_from(error) from None
        self._pause_seconds = min(2 * pause_seconds, LONGEST_PAUSE_SECONDS)
        return pause_seconds


def _refused(details: Sequence[Any]) -> OdmaError:
    message = types.Refusal()
    if not any(detail.Unpack(message) for detail in details):
        return ServiceError("refused, without a reason")
    return errors.RefusedError(refusal_from(message))


_ERRORS: dict[str, Callable[[Mapping[str, str], str], OdmaError]] = {
    "INVALID": lambda m, _: errors.InvalidError(m["field"], m["rule"]),
    "POOL_NOT_FOUND": lambda m, _: errors.PoolNotFoundError(m["name"]),
    "POOL_OWNED": lambda m, _: errors.PoolOwnedError(m["name"], float(m["idle_seconds"])),
    "EPOCH_OVER": lambda m, _: errors.EpochError(m["name"], int(m["epoch"])),
    "SEQ_CHANGED": lambda m, _: errors.SeqChangedError(int(m["seq"])),
    "SEQ_OLD": lambda m, _: errors.SeqOldError(int(m["seq"]), int(m["expected"]) - 1),
    "SEQ_GAP": lambda m, _: errors.SeqGapError(int(m["seq"]), int(m["expected"]) - 1),
    "VERSION": lambda m, _: errors.VersionError(int(m["expected"]), int(m["actual"])),
    "HANDLE": lambda m, _: errors.HandleError(int(m["handle"]), m["rule"]),
    "NOTHING_LEARNT": lambda _, text: errors.NothingLearntError(text),
    "POOL_LIMIT": lambda _, text: errors.PoolLimitError(text),
    "STREAM_LIMIT": lambda _, text: errors.StreamLimitError(text),
    "STREAM_REPLACED": lambda m, _: errors.StreamReplacedError(m["name"]),
    "IDENTITY": lambda _, text: errors.IdentityError(text),
    "ROLE": lambda m, _: errors.RoleError(m["rpc"], m["role"]),
    "POOL_FOREIGN": lambda m, _: errors.PoolForeignError(m["name"]),
    "BUSY": lambda _, text: errors.BusyError(text),
    "MESSAGE_SIZE": lambda _, text: errors.MessageSizeError(text),
    "UNIMPLEMENTED": lambda _, text: errors.UnimplementedError(text),
    "BOOKS": lambda _, text: errors.BooksError(text),
    "BOOKS_LOCKED": lambda _, text: UnavailableError(text),
    "DRAINING": lambda _, text: UnavailableError(text),
}
"""How to build an error again from the reason, metadata and message of its ErrorInfo."""


def error_from(error: grpc.RpcError) -> OdmaError:
    """Return the error that a failed call stands for."""
    status = rpc_status.from_call(cast("grpc.Call", error))
    return error_of(error.code(), error.details() or "", status)


def error_of(code: grpc.StatusCode, text: str, status: Status | None) -> OdmaError:
    """Return the error that a status, its message and its details stand for."""
    info = error_details_pb2.ErrorInfo()
    if status is not None and any(detail.Unpack(info) for detail in status.details):
        if info.reason == "REFUSED":
            return _refused(status.details)
        if info.domain == DOMAIN and info.reason in _ERRORS:
            return _ERRORS[info.reason](info.metadata, text)
    kind = UnavailableError if code in PERHAPS_DONE else ServiceError
    return kind(f"{code.name}: {text}")
