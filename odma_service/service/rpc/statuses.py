"""The only map from errors to status codes and their details.

Every error carries an ErrorInfo of the domain "odma", whose reason and metadata are enough to
build the same error again in a client. BadRequest, ResourceInfo, RetryInfo and the Refusal tell
the same to clients that look for those.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import wraps
from typing import NoReturn, TypeVar

import grpc
import structlog
from google.protobuf.any_pb2 import Any as AnyMessage
from google.protobuf.duration_pb2 import Duration
from google.protobuf.message import Message
from google.rpc import error_details_pb2 as details_pb
from google.rpc.status_pb2 import Status
from grpc_status import rpc_status

from odma_service import errors
from odma_service.errors import OdmaError
from odma_service.values import Reason, Refusal
from odma_service.wire import DOMAIN, refusal_to

RETRY_AFTER_MS = 50
LONGEST_TEXT = 200
"""Five copies of four bytes a character stay below the 8 KiB that gRPC takes of all headers."""

Servicer = TypeVar("Servicer")
Request = TypeVar("Request")
Answer = TypeVar("Answer")

log = structlog.get_logger()

_CODES = {
    errors.InvalidError: grpc.StatusCode.INVALID_ARGUMENT,
    errors.PoolNotFoundError: grpc.StatusCode.NOT_FOUND,
    errors.PoolOwnedError: grpc.StatusCode.ALREADY_EXISTS,
    errors.PoolOpenError: grpc.StatusCode.FAILED_PRECONDITION,
    errors.EpochError: grpc.StatusCode.FAILED_PRECONDITION,
    errors.FencedError: grpc.StatusCode.FAILED_PRECONDITION,
    errors.UnfencedError: grpc.StatusCode.FAILED_PRECONDITION,
    errors.LateError: grpc.StatusCode.ABORTED,
    errors.StaleOpenError: grpc.StatusCode.ABORTED,
    errors.NotCompletedError: grpc.StatusCode.FAILED_PRECONDITION,
    errors.SeqChangedError: grpc.StatusCode.ALREADY_EXISTS,
    errors.SeqOldError: grpc.StatusCode.OUT_OF_RANGE,
    errors.SeqGapError: grpc.StatusCode.FAILED_PRECONDITION,
    errors.VersionError: grpc.StatusCode.FAILED_PRECONDITION,
    errors.NothingLearntError: grpc.StatusCode.FAILED_PRECONDITION,
    errors.RefusedError: grpc.StatusCode.RESOURCE_EXHAUSTED,
    errors.HandleError: grpc.StatusCode.NOT_FOUND,
    errors.PoolLimitError: grpc.StatusCode.RESOURCE_EXHAUSTED,
    errors.StreamLimitError: grpc.StatusCode.RESOURCE_EXHAUSTED,
    errors.StreamReplacedError: grpc.StatusCode.ABORTED,
    errors.IdentityError: grpc.StatusCode.UNAUTHENTICATED,
    errors.RoleError: grpc.StatusCode.PERMISSION_DENIED,
    errors.PoolForeignError: grpc.StatusCode.PERMISSION_DENIED,
    errors.CallerLimitError: grpc.StatusCode.RESOURCE_EXHAUSTED,
    errors.BusyError: grpc.StatusCode.RESOURCE_EXHAUSTED,
    errors.MessageSizeError: grpc.StatusCode.RESOURCE_EXHAUSTED,
    errors.UnimplementedError: grpc.StatusCode.UNIMPLEMENTED,
    errors.UnavailableError: grpc.StatusCode.UNAVAILABLE,
    errors.BooksLockedError: grpc.StatusCode.UNAVAILABLE,
    errors.BooksUnavailableError: grpc.StatusCode.UNAVAILABLE,
    errors.BooksError: grpc.StatusCode.DATA_LOSS,
}


def reports_errors(
    method: Callable[[Servicer, Request, grpc.ServicerContext], Answer],
) -> Callable[[Servicer, Request, grpc.ServicerContext], Answer]:
    """Turn the errors that an rpc raises into its status."""

    @wraps(method)
    def reporting(self: Servicer, request: Request, context: grpc.ServicerContext) -> Answer:
        try:
            return method(self, request, context)
        except Exception as error:  # noqa: BLE001  told to the client, and logged
            status = told(error, method.__name__)
        abort(context, status)

    return reporting


def told(error: Exception, rpc: str) -> Status:
    """Return the status that tells an error of any kind; a bug of ours is logged."""
    if isinstance(error, OdmaError):
        return status_of(error)
    if isinstance(error, (OSError, MemoryError)):
        reason = "no memory is left" if isinstance(error, MemoryError) else str(error)
        return status_of(errors.BooksUnavailableError(reason))
    log.error("a call failed inside", rpc=rpc, exc_info=error)
    return INTERNAL


def status_of(error: OdmaError) -> Status:
    """Return the status that tells `error`, with its details."""
    code = next(_CODES[kind] for kind in type(error).__mro__ if kind in _CODES)
    metadata = {name: _short(str(getattr(error, name))) for name, _ in error.fields}
    return _status(code, error.reason, _short(str(error)), metadata, _details(error))


def _status(
    code: grpc.StatusCode,
    reason: str,
    message: str,
    metadata: Mapping[str, str],
    details: Sequence[Message],
) -> Status:
    info = details_pb.ErrorInfo(domain=DOMAIN, reason=reason, metadata=metadata)
    return Status(
        code=_number(code),
        message=message,
        details=[_packed(detail) for detail in (info, *details)],
    )


def _details(error: OdmaError) -> Sequence[Message]:
    match error:
        case errors.InvalidError():
            violation = details_pb.BadRequest.FieldViolation(
                field=_short(error.field), description=_short(error.rule)
            )
            refusal = Refusal(Reason.INVALID, field=_short(str(error)))
            return [details_pb.BadRequest(field_violations=[violation]), refusal_to(refusal)]
        case (
            errors.PoolNotFoundError()
            | errors.PoolOwnedError()
            | errors.PoolForeignError()
            | errors.PoolOpenError()
            | errors.EpochError()
            | errors.FencedError()
            | errors.UnfencedError()
            | errors.StaleOpenError()
            | errors.StreamReplacedError()
        ):
            return [details_pb.ResourceInfo(resource_type="pool", resource_name=error.name)]
        case errors.HandleError():
            return [
                details_pb.ResourceInfo(resource_type="region", resource_name=str(error.handle))
            ]
        case errors.RefusedError():
            refusal_pb = refusal_to(error.refusal)
            refusal_pb.retry_after_ms = RETRY_AFTER_MS
            return [refusal_pb, _retry_info()]
        case (
            errors.BooksLockedError()
            | errors.BooksUnavailableError()
            | errors.UnavailableError()
            | errors.BusyError()
            | errors.CallerLimitError()
            | errors.StreamLimitError()
        ):
            return [_retry_info()]
        case _:
            return []


def _short(text: str) -> str:
    """Return a text as a header may hold it several times: some of it is what a caller sent."""
    return text if len(text) <= LONGEST_TEXT else text[: LONGEST_TEXT - 3] + "..."


def _retry_info() -> details_pb.RetryInfo:
    return details_pb.RetryInfo(retry_delay=Duration(nanos=RETRY_AFTER_MS * 1_000_000))


def _packed(detail: Message) -> AnyMessage:
    packed = AnyMessage()
    packed.Pack(detail)
    return packed


def _number(code: grpc.StatusCode) -> int:
    number: int = code.value[0]
    return number


INTERNAL = _status(grpc.StatusCode.INTERNAL, "INTERNAL", "internal error", {}, ())
"""What is told of a bug of the service. The log has the rest."""


def abort(context: grpc.ServicerContext, status: Status) -> NoReturn:
    """End the call with a status and its details."""
    context.abort_with_status(rpc_status.to_status(status))
    raise AssertionError("abort_with_status always raises")
