"""Unread: answers that were given and that their clients have not taken.

gRPC keeps such an answer in memory for as long as its client likes, and counts it nowhere. Small
ones are not counted here either: the places in a connection bound them.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Hashable
from threading import Lock
from typing import Any

import grpc

from odma_service.errors import CallerLimitError
from odma_service.service.door.access import CALLER
from odma_service.service.door.calls import keep, kept

SMALL_BYTES = 16 * 1024
MOST_BYTES = 4 * 1024 * 1024
"""Of one caller: an identity, or a connection where callers need none. More are not begun."""
MOST_BYTES_OF_ALL = 64 * 1024 * 1024
"""Beyond it the oldest are cut."""

Serialise = Callable[[Any], bytes]


class Unread:
    """The answers that wait for their clients, by caller."""

    def __init__(self) -> None:
        self._lock = Lock()
        self._waiting: dict[grpc.ServicerContext, tuple[Hashable, int]] = {}  # oldest first
        self._bytes: Counter[Hashable] = Counter()

    def insist_room(self, context: grpc.ServicerContext) -> None:
        """Begin a call in this thread. Raises CallerLimitError."""
        if self._bytes and (count := self._bytes[_caller_of(context)]) > MOST_BYTES:
            raise CallerLimitError(f"{count:,} bytes of answers are unread")
        keep(context)

    def counting(self, serialise: Serialise) -> Serialise:
        """Return `serialise`, with its result counted until the call of this thread is over."""

        def counted(answer: Any) -> bytes:
            content = serialise(answer)
            if len(content) > SMALL_BYTES and (context := kept()):
                self._count(context, _caller_of(context), len(content))
            return content

        return counted

    def _count(self, context: grpc.ServicerContext, caller: Hashable, count: int) -> None:
        def taken() -> None:
            with self._lock:
                self._forget(context)

        cut = []
        with self._lock:
            self._waiting[context] = caller, count
            self._bytes[caller] += count
            while self._bytes.total() > MOST_BYTES_OF_ALL:
                cut.append(oldest := next(iter(self._waiting)))
                self._forget(oldest)
        if not context.add_callback(taken):
            taken()
        for oldest in cut:
            oldest.cancel()

    def _forget(self, context: grpc.ServicerContext) -> None:
        """Count an answer no more. The lock is held."""
        caller, count = self._waiting.pop(context, (None, 0))
        self._bytes[caller] -= count
        if not self._bytes[caller]:
            del self._bytes[caller]


def _caller_of(context: grpc.ServicerContext) -> Hashable:
    identity = CALLER.get()
    return identity.who if identity else context.peer()
