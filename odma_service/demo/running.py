"""The requests that an engine runs, as columns, so that a decode step is a few numpy calls.

Entries [0, count) are in use, in no order: removing one puts the last in its place.
"""

from __future__ import annotations

import numpy as np

from odma_service.demo.device import Ids, Move
from odma_service.demo.load import Request


class Running:
    """One entry for each running request and its region.

    numbers   the requests'
    starts    of the regions, as the last answer says
    lengths   of the regions
    written   tokens in them; 0 until the prefill
    totals    tokens at which the requests stop
    births    order of admission
    """

    numbers: Ids
    starts: Ids
    lengths: Ids
    written: Ids
    totals: Ids
    births: Ids

    def __init__(self, room: int) -> None:
        self.requests: list[Request] = []
        self.handles: list[int] = []
        self._entries: dict[int, int] = {}
        self._columns = np.zeros((6, room), np.int64)
        self._births = 0
        self._resize(0)

    def entry(self, handle: int) -> int:
        """Return where the request with this region is."""
        return self._entries[handle]

    def add(self, request: Request, handle: int, start: int, length: int) -> None:
        """Add a request that has just got its region."""
        self._births += 1
        self._entries[handle] = self.count
        self.requests.append(request)
        self.handles.append(handle)
        self._resize(self.count + 1)
        column = (request.number, start, length, 0, request.total_tokens, self._births)
        self._columns[:, self.count - 1] = column

    def place(self, entry: int, start: int, length: int) -> Move | None:
        """Note where a region lies now; return the move if written tokens had to follow."""
        number, old, written = (
            int(column[entry]) for column in (self.numbers, self.starts, self.written)
        )
        self.starts[entry] = start
        self.lengths[entry] = length
        return Move(number, old, start, written) if written and start != old else None

    def remove(self, entry: int) -> None:
        """Remove an entry; the last one takes its place."""
        last = self.count - 1
        del self._entries[self.handles[entry]]
        if entry != last:
            self.requests[entry] = self.requests[last]
            self.handles[entry] = self.handles[last]
            self._entries[self.handles[entry]] = entry
            self._columns[:, entry] = self._columns[:, last]
        self.requests.pop()
        self.handles.pop()
        self._resize(last)

    def _resize(self, count: int) -> None:
        self.count = count
        columns = self._columns[:, :count]
        self.numbers, self.starts, self.lengths, self.written, self.totals, self.births = columns
