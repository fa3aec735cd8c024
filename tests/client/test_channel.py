"""What a client says, to whom, and when it asks again."""

from __future__ import annotations

import asyncio

import grpc
import pytest
from google.rpc import error_details_pb2
from google.rpc.status_pb2 import Status

from odma_service.client import Client, Tls
from odma_service.client.aio import AsyncClient
from odma_service.client.channel import is_local
from odma_service.client.failures import (
    FIRST_PAUSE_SECONDS,
    LONGEST_PAUSE_SECONDS,
    Patience,
    error_of,
)
from odma_service.errors import OdmaError, SeqGapError, ServiceError
from odma_service.wire import DOMAIN

FAR = ("10.0.0.1:50051", "odma:50051", "dns:///odma.example:50051", "[2001:db8::1]:50051")
FAR += ("ipv4:192.0.2.1:50051", "localhost.example:50051", "127.0.0.1.example:50051")
NEAR = ("127.0.0.1:50051", "127.8.8.8:1", "[::1]:50051", "localhost:50051", "unix:/run/odma.sock")
NEAR += ("dns:///localhost:50051", "ipv4:127.0.0.1:50051", "unix-abstract:odma")


@pytest.mark.parametrize("target", NEAR)
def test_a_target_on_this_machine_is_local(target):
    assert is_local(target)


@pytest.mark.parametrize("target", FAR)
def test_no_token_goes_over_a_network_in_plain(target):
    assert not is_local(target)
    with pytest.raises(OdmaError, match="in plain"):
        Client(target, token="t" * 16)

    async def connect() -> None:
        AsyncClient(target, token="t" * 16)

    with pytest.raises(OdmaError, match="in plain"):
        asyncio.run(connect())
    Client(target, token="t" * 16, tls=Tls()).close()
    Client(target).close()


class Unavailable(grpc.RpcError):
    """A call that nobody answered, as grpcio raises it."""

    def __init__(self, *details) -> None:
        status = Status(code=grpc.StatusCode.UNAVAILABLE.value[0], message="busy")
        for detail in details:
            status.details.add().Pack(detail)
        self._metadata = (("grpc-status-details-bin", status.SerializeToString()),)

    def code(self):
        return grpc.StatusCode.UNAVAILABLE

    def details(self):
        return "busy"

    def trailing_metadata(self):
        return self._metadata


def test_pauses_grow_and_differ():
    patience = Patience(1e6)
    pauses = [patience.pause_after(Unavailable()) for _ in range(200)]
    assert FIRST_PAUSE_SECONDS / 2 <= pauses[0] <= FIRST_PAUSE_SECONDS
    assert all(LONGEST_PAUSE_SECONDS / 2 <= pause <= LONGEST_PAUSE_SECONDS for pause in pauses[9:])
    assert len(set(pauses[9:])) > 100


def test_the_service_says_how_long_to_wait():
    told = error_details_pb2.RetryInfo()
    told.retry_delay.FromSeconds(7)
    assert Patience(1e6).pause_after(Unavailable(told)) == 7


@pytest.mark.parametrize("expected", ["many", ""])
def test_details_without_their_number_are_still_an_error_of_ours(expected):
    status = Status()
    metadata = {"seq": "7", "expected": expected} if expected else {}
    info = error_details_pb2.ErrorInfo(reason=SeqGapError.reason, domain=DOMAIN, metadata=metadata)
    status.details.add().Pack(info)
    error = error_of(grpc.StatusCode.FAILED_PRECONDITION, "a gap", status)
    assert type(error) is ServiceError
    assert "a gap" in str(error)
