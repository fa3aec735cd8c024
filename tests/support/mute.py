"""A client that asks and takes no answer: HTTP/2 by hand, with a window of no bytes."""

from __future__ import annotations

import socket
import ssl
import struct
import threading
from contextlib import suppress

from google.protobuf.message import Message

from odma_service.client import Tls

PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
DATA, HEADERS, RST_STREAM, SETTINGS = 0, 1, 3, 4
END_STREAM, END_HEADERS, ACK = 1, 4, 1
INITIAL_WINDOW_SIZE = 4


class Mute:
    """A connection that is told of the ends of its calls and never of their answers."""

    def __init__(self, target: str, *, token: str | None = None, tls: Tls | None = None) -> None:
        host, _, port = target.rpartition(":")
        self._socket = socket.create_connection((host, int(port)))
        if tls:
            context = ssl.create_default_context(cafile=tls.ca)
            context.load_cert_chain(tls.cert, tls.key)
            context.set_alpn_protocols(["h2"])
            self._socket = context.wrap_socket(self._socket, server_hostname=host)
        self._headers = {"authorization": f"Bearer {token}"} if token else {}
        self._last = -1
        self.begun: set[int] = set()
        """Calls whose answer began: it waits for the client."""
        self.refused: set[int] = set()
        """Calls that ended without an answer."""
        self.cut: set[int] = set()
        """Calls that were cut."""
        self._socket.sendall(PREFACE + _frame(SETTINGS, 0, 0, _setting(INITIAL_WINDOW_SIZE, 0)))
        threading.Thread(target=self._hear, daemon=True).start()

    def ask(self, rpc: str, request: Message) -> int:
        """Begin a call; return its number."""
        self._last += 2
        content = request.SerializeToString()
        named = {
            ":method": "POST",
            ":scheme": "http",
            ":path": rpc,
            ":authority": "localhost",
            "content-type": "application/grpc",
            "te": "trailers",
            **self._headers,
        }
        headers = b"".join(b"\0" + _text(name) + _text(value) for name, value in named.items())
        self._socket.sendall(
            _frame(HEADERS, END_HEADERS, self._last, headers)
            + _frame(DATA, END_STREAM, self._last, struct.pack("!BI", 0, len(content)) + content)
        )
        return self._last

    def close(self) -> None:
        """Drop the connection."""
        with suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)
        self._socket.close()

    def _hear(self) -> None:
        with suppress(OSError), self._socket.makefile("rb") as stream:
            while len(head := stream.read(9)) == 9:
                high, low, kind, flags, call = struct.unpack("!BHBBI", head)
                stream.read(high << 16 | low)
                if kind == HEADERS:
                    (self.refused if flags & END_STREAM else self.begun).add(call)
                elif kind == RST_STREAM:
                    self.cut.add(call)
                elif kind == SETTINGS and not flags & ACK:
                    self._socket.sendall(_frame(SETTINGS, ACK, 0, b""))


def _frame(kind: int, flags: int, call: int, content: bytes) -> bytes:
    length = len(content)
    return struct.pack("!BHBBI", length >> 16, length & 0xFFFF, kind, flags, call) + content


def _setting(name: int, value: int) -> bytes:
    return struct.pack("!HI", name, value)


def _text(text: str) -> bytes:
    """Return a text of less than 127 bytes as HPACK has it in plain."""
    return bytes([len(text)]) + text.encode()
