"""Limits the number of clients that are connected, and disconnects a client that sends or reads data too slowly."""

import asyncio
import json

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

from infer.serve import Refused

CONNECTIONS = 512  # maximum number of connections at a time
PATIENCE = 10.0  # seconds within which a request must arrive completely, or a client must read the data sent to it
LINGER = 1.0  # seconds between the last answer and closing the connection


class Connection(H11Protocol):
    """uvicorn's HTTP protocol with deadlines. A deadline is not extended when only part of the data arrives."""

    arriving: asyncio.TimerHandle | None = None  # deadline of the request that is being received
    stalled: asyncio.TimerHandle | None = None  # deadline for a client to read the data sent to it
    over = False  # whether the last answer was sent; further data from the client is then ignored

    def connection_made(self, transport: asyncio.Transport) -> None:
        super().connection_made(transport)
        if len(self.connections) > CONNECTIONS:
            self.end(Refused(429, f"{CONNECTIONS} clients are connected already", code="rate_limit_exceeded"))
        else:
            self.arriving = self.loop.call_later(PATIENCE, self.late)

    def data_received(self, data: bytes) -> None:
        if self.over:
            return
        if self.arriving is None:
            self.arriving = self.loop.call_later(PATIENCE, self.late)
        super().data_received(data)
        if self.conn.their_state not in (h11.IDLE, h11.SEND_BODY):  # the request is complete
            self.arriving = _stop(self.arriving)

    def connection_lost(self, exc: Exception | None) -> None:
        self.arriving, self.stalled = _stop(self.arriving), _stop(self.stalled)
        super().connection_lost(exc)

    def pause_writing(self) -> None:
        super().pause_writing()
        self.stalled = self.loop.call_later(PATIENCE, self.transport.abort)

    def resume_writing(self) -> None:
        super().resume_writing()
        self.stalled = _stop(self.stalled)

    def late(self) -> None:
        if self.cycle and self.cycle.response_started and not self.cycle.response_complete:
            self.transport.abort()
        else:
            self.end(Refused(408, f"the request did not arrive within {PATIENCE:g} seconds"))

    def send_400_response(self, msg: str) -> None:
        self.end(Refused(400, "this is not a valid HTTP request"))

    def end(self, e: Refused) -> None:
        """Sends a last answer, and closes the connection LINGER seconds later. Closing it at once, with bytes from the
        client still unread, would reset the connection, and the client might not receive the answer."""
        body = json.dumps(e.content).encode()
        retry = "Retry-After: 1\r\n" if e.status == 429 else ""
        head = f"HTTP/1.1 {e.status} \r\nContent-Type: application/json\r\n{retry}Content-Length: {len(body)}\r\n"
        self.over = True
        self.transport.write(head.encode() + b"Connection: close\r\n\r\n" + body)
        self.transport.write_eof()
        _stop(self.arriving)
        self.arriving = self.loop.call_later(LINGER, self.transport.close)


def _stop(timer: asyncio.TimerHandle | None) -> None:
    if timer:
        timer.cancel()
