"""Clients of the service: seq, retries, reconnection and typed errors.

    with Client("127.0.0.1:50051") as service:
        pool = service.open_pool("main", moves=Moves.ANY, planes=[PlaneGroup(56, 1024)],
                                 capacity_tokens=111_104)
        answer = pool.apply(ops=[Allocate("request-1", prompt_tokens=700)])

An engine asks and is answered in the values of `odma_service.values`, as with an embedded pool.
What only reports (the response to OpenPool, GetPool, ListPools, ListRegions, Predict, Watch,
KeepAlive, Recalibrate, the policy after a change) is a message of the service.

A call that gets no answer (the service restarts, the network hangs), or for which there is no room
(BusyError, CallerLimitError, StreamLimitError), is sent again, unchanged, until `retry_seconds` are
over. The service recognises it, so its work is done once. All other failures are raised at once, as
the errors of `odma_service.errors`.

A Client may be shared between threads. A PoolClient speaks for the pool's owner and belongs to
one thread.

sync      Client and PoolClient
aio       the same calls for asyncio
stream    Apply over a stream
owner     how a pool is opened, and how far its batches are
channel   the connection, and who calls
failures  the errors of failed calls, and for how long to ask again
local     a server of one's own
"""

from odma_service.client.aio import AsyncClient, AsyncPoolClient
from odma_service.client.channel import Tls
from odma_service.client.owner import open_request
from odma_service.client.sync import Client, PoolClient
from odma_service.keys import KeyChain, chained_keys
from odma_service.values import (
    Allocate,
    Answer,
    Copy,
    End,
    Extend,
    Free,
    Freed,
    Moves,
    Place,
    PlaneGroup,
    PolicyChange,
    Reason,
    Refusal,
    TenantShare,
    Trim,
    Used,
)

__all__ = [
    "Allocate",
    "Answer",
    "AsyncClient",
    "AsyncPoolClient",
    "Client",
    "Copy",
    "End",
    "Extend",
    "Free",
    "Freed",
    "KeyChain",
    "Moves",
    "Place",
    "PlaneGroup",
    "PolicyChange",
    "PoolClient",
    "Reason",
    "Refusal",
    "TenantShare",
    "Tls",
    "Trim",
    "Used",
    "chained_keys",
    "open_request",
]
