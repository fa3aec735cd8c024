"""Servers, pools and registries that tests ask for by name: see `support`."""

from __future__ import annotations

import uuid

import pytest
from registries import Clock, registry_of
from servers import Server, Wire, open_pool

from odma_service.client import Client


@pytest.fixture
def servers(tmp_path):
    """Return a function that starts servers; those that still run are killed at the end."""
    started = []

    def start(*flags, name="server", **options):
        started.append(Server(tmp_path / name, flags, **options).start())
        return started[-1]

    yield start
    for server in started:
        server.kill()


@pytest.fixture(scope="session")
def server(tmp_path_factory):
    """Return a server that all tests share; their pools have names of their own."""
    running = Server(
        tmp_path_factory.mktemp("server"), ("--max-pools", "1024", "--max-pool-bytes", str(2**40))
    ).start()
    yield running
    running.kill()


@pytest.fixture(scope="session")
def service(server):
    """Return a client of the shared server."""
    with Client(server.target) as client:
        yield client


@pytest.fixture
def name():
    """Return a name that no pool has."""
    return f"pool-{uuid.uuid4().hex[:12]}"


@pytest.fixture
def pool(service, name):
    """Return a new pool of 4,096 tokens whose engine can do everything."""
    return open_pool(service, name)


@pytest.fixture
def wire(server):
    wire = Wire(server.target)
    yield wire
    wire.close()


@pytest.fixture
def clock():
    """Return the clock of the test's registries."""
    return Clock()


@pytest.fixture
def registry(tmp_path, clock):
    """Return an empty registry."""
    registry = registry_of(tmp_path, clock)
    yield registry
    registry.close()
