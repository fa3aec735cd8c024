"""What the browser asks for: three files, and a look at the service once a second.

The service is read over gRPC, as any client reads it. Nothing is loaded from elsewhere, nothing can
be changed, and only requests that name this machine are answered: another site's page gets nothing.
"""

from __future__ import annotations

from collections import deque
from pathlib import Path
from threading import Thread
from typing import Any

from google.protobuf.json_format import MessageToDict
from google.protobuf.message import Message
from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.requests import Request
from starlette.responses import FileResponse, JSONResponse, Response
from starlette.routing import Route

from odma_service.client import Client
from odma_service.errors import OdmaError, PoolNotFoundError
from odma_service.rpc.v1 import pool_service_pb2 as pb

PAGE = Path(__file__).parent / "page"
FILES = {"/": "index.html", "/page.css": "page.css", "/page.js": "page.js"}
LOCAL = ["127.0.0.1", "localhost", "[::1]"]
EVENTS_KEPT = 100
HEADERS = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; "
    "connect-src 'self'; frame-ancestors 'none'; base-uri 'none'; form-action 'none'",
    "Cache-Control": "no-store",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
}
Facts = dict[str, Any]


def application(service: Client, watcher: Client, target: str) -> Starlette:
    """Return the page of the service at `target`.

    `service` is asked for looks and gives up at once; `watcher` follows events and should not.
    """
    events: deque[Facts] = deque(maxlen=EVENTS_KEPT)
    Thread(target=_follow, args=(watcher, events), name="events", daemon=True).start()

    def file(request: Request) -> Response:
        return FileResponse(PAGE / FILES[request.url.path], headers=HEADERS)

    def look(request: Request) -> Response:
        try:
            told = _look(service, request.query_params.get("pool", ""))
        except OdmaError as error:
            return JSONResponse({"target": target, "error": str(error)}, 503, HEADERS)
        return JSONResponse({"target": target, "events": list(events), **told}, headers=HEADERS)

    return Starlette(
        routes=[*(Route(path, file) for path in FILES), Route("/api/look", look)],
        middleware=[Middleware(TrustedHostMiddleware, allowed_hosts=LOCAL, www_redirect=False)],
    )


def _look(service: Client, mapped: str) -> Facts:
    """Return every pool, and the regions of the one that is mapped, or of none."""
    pools = []
    for summary in service.list_pools().pools:
        try:
            pools.append(_object_of(service.get_pool(summary.pool.name)))
        except PoolNotFoundError:
            continue  # gone since
    try:
        regions = service.list_regions(mapped) if mapped else []
    except PoolNotFoundError:
        regions = []
    return {"pools": pools, "regions": [_short(region) for region in regions]}


def _short(region: pb.Region) -> list[int]:
    """Return a region as numbers, of which a pool may have 65,536: see page.js."""
    place = region.place
    used = region.used_tokens if region.state == pb.REGION_STATE_LIVE else 0
    return [place.start_token, place.length_tokens, used, region.state, place.handle]


def _follow(watcher: Client, events: deque[Facts]) -> None:
    """Keep the last events, for as long as the caller may watch."""
    try:
        for answer in watcher.watch():
            if answer.HasField("event"):
                events.append(_object_of(answer.event))
    except OdmaError as error:
        events.append({"kind": "", "reason": f"no events any more: {error}"})


def _object_of(message: Message) -> Facts:
    return MessageToDict(
        message, preserving_proto_field_name=True, always_print_fields_with_no_presence=True
    )
