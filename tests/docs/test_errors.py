"""Every error has its status, its details and its row in docs/reference/errors.md."""

from __future__ import annotations

import grpc
import pytest
from google.rpc import error_details_pb2 as details_pb
from google.rpc.status_pb2 import Status
from paths import DOCS

from odma_service import errors
from odma_service.client.failures import error_of
from odma_service.errors import OdmaError
from odma_service.rpc.v1 import types_pb2 as types
from odma_service.service.rpc.statuses import INTERNAL, status_of
from odma_service.values import Reason, Refusal

TABLE = DOCS / "reference" / "errors.md"

SAMPLES = (
    errors.InvalidError("field", "a rule"),
    errors.PoolNotFoundError("main"),
    errors.PoolOwnedError("main", 1.5),
    errors.PoolForeignError("main"),
    errors.PoolOpenError("main"),
    errors.EpochError("main", 7),
    errors.FencedError("main", 3),
    errors.UnfencedError("main", 1),
    errors.LateError(3, 5),
    errors.StaleOpenError("main", 1, 2, "7.3"),
    errors.NotCompletedError(1, 2),
    errors.SeqChangedError(3),
    errors.SeqOldError(3, 5),
    errors.SeqGapError(9, 5),
    errors.VersionError(1, 2),
    errors.NothingLearntError("fewer than 32 completions"),
    errors.RefusedError(Refusal(Reason.NO_SPACE, free_tokens=16)),
    errors.HandleError(5, "it is dead"),
    errors.PoolLimitError("all 64 pools are open"),
    errors.BooksSpaceError("no room for 6,103,040 bytes"),
    errors.StreamLimitError("all streams are open"),
    errors.CallerLimitError("512 calls of this caller are being answered already"),
    errors.StreamReplacedError("main"),
    errors.IdentityError("no token"),
    errors.RoleError("Apply", "operator"),
    errors.BusyError("too many calls"),
    errors.MessageSizeError("too large"),
    errors.UnimplementedError("no such rpc"),
    errors.UnavailableError("draining"),
    errors.BooksLockedError("locked"),
    errors.BooksUnavailableError("no descriptor is left"),
    errors.BooksError("broken"),
    errors.BooksForeignError("of another user"),
    errors.BooksMismatchError("of another layout"),
    errors.BooksCorruptError("broken"),
)
STATUSES = [INTERNAL, *map(status_of, SAMPLES)]

NOT_TOLD = {OdmaError, errors.ModelError, errors.ServiceError, errors.UnfitModelError}
"""A base; what only who runs a server, a command or an engine sees; a client's own."""


def subclasses(kind: type) -> set[type]:
    return {kind}.union(*map(subclasses, kind.__subclasses__()))


def rows() -> list[list[str]]:
    """Return the page's table of our errors: reason, status, details, metadata, what to do."""
    ours, _, _ = TABLE.read_text().partition("\n## ")
    lines = [line for line in ours.splitlines() if line.startswith("| ")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[2:]]


def names(cell: str) -> list[str]:
    return [name.strip() for name in cell.split(",") if name.strip()]


def row_of(status: Status) -> tuple[str, str, list[str], list[str]]:
    """Return the row that a status should have."""
    info = details_pb.ErrorInfo()
    assert status.details[0].Unpack(info)
    assert info.domain == "odma"
    code = next(code for code in grpc.StatusCode if code.value[0] == status.code)
    kinds = [detail.type_url.rpartition(".")[2] for detail in status.details[1:]]
    return info.reason, code.name, kinds, list(info.metadata)


def test_every_kind_of_error_is_sampled_here():
    ours = {kind for kind in subclasses(OdmaError) if kind.__module__ == errors.__name__}
    assert ours - NOT_TOLD == {type(sample) for sample in SAMPLES}


def test_the_table_tells_of_every_error_and_of_no_other():
    written = {
        (reason, code, *map(tuple, (names(details), sorted(names(metadata)))))
        for reason, code, details, metadata, _ in rows()
    }
    told = {
        (reason, code, tuple(details), tuple(sorted(metadata)))
        for reason, code, details, metadata in map(row_of, STATUSES)
    }
    assert written == told
    assert len(rows()) == len(written)


def test_every_row_says_what_to_do():
    assert all(advice for *_, advice in rows())


@pytest.mark.parametrize("sample", SAMPLES, ids=lambda sample: type(sample).__name__)
def test_a_client_makes_the_same_error_of_it(sample):
    status = status_of(sample)
    made = error_of(grpc.StatusCode.UNKNOWN, sample.args[0], status)
    unavailable = (
        errors.BooksLockedError,
        errors.BooksUnavailableError,
        errors.UnavailableError,
    )
    if isinstance(sample, unavailable):
        assert type(made) is errors.UnavailableError
    elif isinstance(sample, errors.BooksError):
        assert type(made) is errors.BooksError
    else:
        assert type(made) is type(sample)
        assert str(made) == str(sample)


def test_a_retry_delay_is_the_same_in_both_places():
    status = status_of(errors.RefusedError(Refusal(Reason.NO_SPACE)))
    refusal, retry = types.Refusal(), details_pb.RetryInfo()
    assert any(detail.Unpack(refusal) for detail in status.details)
    assert any(detail.Unpack(retry) for detail in status.details)
    assert retry.retry_delay.ToMilliseconds() == refusal.retry_after_ms > 0
