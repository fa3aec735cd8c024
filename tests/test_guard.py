"""What one caller sends stops nobody else: the server goes on, and every answer fits a header."""

from __future__ import annotations

import grpc
from descriptors import RPCS, error_info, invoke
from grpc_health.v1 import health_pb2, health_pb2_grpc
from wire_fuzz import ALL, fuzz

from odma_service.client import Client
from odma_service.rpc.v1 import emulator_service_pb2 as emulator_pb
from odma_service.rpc.v1 import types_pb2 as types

SELDOM = ("/Recalibrate", "/Predict", "/Watch")
"""What a short run need not bring to an end that is OK."""

Code = grpc.StatusCode


def test_health_watchers_that_come_and_go_freeze_nothing(servers):
    server = servers()
    request = health_pb2.HealthCheckRequest()
    for _ in range(20):
        with grpc.insecure_channel(server.target) as channel:
            stub = health_pb2_grpc.HealthStub(channel)
            for i in range(20):
                watch = stub.Watch(request)
                if i % 2:
                    next(watch)
                watch.cancel()
    with Client(server.target) as client:
        assert client.is_serving()
        assert list(client.list_pools().pools) == []
    assert server.terminate() == 0


def test_many_health_watchers_leave_room_for_checks(server):
    request = health_pb2.HealthCheckRequest()
    with grpc.insecure_channel(server.target) as channel, Client(server.target) as client:
        stub = health_pb2_grpc.HealthStub(channel)
        watches = [stub.Watch(request) for _ in range(10)]
        for watch in watches:
            assert next(watch).status == health_pb2.HealthCheckResponse.SERVING
        assert client.is_serving()
        for watch in watches:
            watch.cancel()


def test_an_error_is_short_whatever_was_sent(server):
    preset = "\N{PILE OF POO}" * 100_000
    request = emulator_pb.EstimateAccessRequest(device=types.Device(preset=preset))
    with grpc.insecure_channel(server.target) as channel:
        error = invoke(channel, "/odma.v1.EmulatorService/EstimateAccess", [request])
    assert error.code() == Code.INVALID_ARGUMENT
    assert error_info(error).metadata["field"] == "device.preset"
    assert len(error.details()) <= 200


def test_random_and_mutated_messages_find_nothing():
    result = fuzz(seed=1, calls=1500)
    assert result["bad"] == []
    assert set(result["outcomes"]) == set(ALL)
    succeeded = {rpc for rpc, codes in result["outcomes"].items() if codes.get("OK")}
    assert succeeded >= {rpc for rpc in RPCS if not rpc.endswith(SELDOM)}
    assert result["coverage"]["total"] > 70
