"""What the tests of reliability are made of: load that counts, a registry that can be cut off, a table of losses."""

import http.client
import json
import socket
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import closing, suppress
from dataclasses import dataclass, field
from urllib.parse import urlsplit


@dataclass(frozen=True)
class Answer:
    """What became of one request: `status` 0 if there was no answer, `model` the version and probability it gave."""

    started: float
    ended: float
    status: int
    model: tuple[str, float] | None
    reconnected: bool


class Load:
    """Clients that post one transaction over and over, each on a connection that it keeps.

    A kept connection may have been closed at any time (RFC 9112, section 9.5): with `retry` a request that got no
    answer on one is sent once more on a new one.
    """

    def __init__(self, port: int, transaction: dict[str, object], clients: int = 8, retry: bool = True) -> None:
        self.port, self.body, self.retry = port, json.dumps(transaction), retry
        self.answers: list[Answer] = []
        self.over = threading.Event()
        self.threads = [threading.Thread(target=self.client) for _ in range(clients)]

    def __enter__(self) -> "Load":
        for thread in self.threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.over.set()
        for thread in self.threads:
            thread.join()

    def client(self) -> None:
        with closing(http.client.HTTPConnection("127.0.0.1", self.port, timeout=20)) as connection:
            while not self.over.is_set():
                self.answers.append(self.ask(connection))

    def ask(self, connection: http.client.HTTPConnection) -> Answer:
        started, reconnected = time.monotonic(), False
        while True:
            kept = connection.sock is not None
            try:
                connection.request("POST", "/predict", self.body, {"Content-Type": "application/json"})
                answer = connection.getresponse()
                body = json.loads(answer.read())
            except (OSError, http.client.HTTPException):
                connection.close()
                if kept and self.retry and not reconnected:
                    reconnected = True
                    continue
                return Answer(started, time.monotonic(), 0, None, reconnected)
            model = (body["model_version"], body["fraud_probability"]) if answer.status == 200 else None
            return Answer(started, time.monotonic(), answer.status, model, reconnected)

    def wait_for(self, more: int) -> None:
        """Until so many more requests have come to an end."""
        goal = len(self.answers) + more
        while len(self.answers) < goal:
            time.sleep(0.01)

    @property
    def lost(self) -> list[Answer]:
        return [answer for answer in self.answers if answer.status != 200]


class Relay:
    """Between a service and its registry: passes everything on, or answers nothing, or is not there."""

    def __init__(self, url: str) -> None:
        self.target = ("127.0.0.1", urlsplit(url).port)
        self.sockets: list[socket.socket] = []
        self.port = 0
        self.silent = False
        self.restore()
        self.url = f"http://127.0.0.1:{self.port}"

    def restore(self) -> None:
        self.silent = False
        self.listener = socket.create_server(("127.0.0.1", self.port))
        self.port = self.listener.getsockname()[1]
        threading.Thread(target=self.accept, args=(self.listener,), daemon=True).start()

    def cut(self) -> None:
        """Nobody listens any longer, and what was connected is so no more."""
        for one in (self.listener, *self.sockets):
            with suppress(OSError):
                one.shutdown(socket.SHUT_RDWR)
            one.close()
        self.sockets.clear()

    def accept(self, listener: socket.socket) -> None:
        with suppress(OSError):
            while True:
                client, _ = listener.accept()
                self.sockets.append(client)
                if not self.silent:
                    server = socket.create_connection(self.target)
                    self.sockets.append(server)
                    for pair in ((client, server), (server, client)):
                        threading.Thread(target=self.pump, args=pair, daemon=True).start()

    def pump(self, source: socket.socket, sink: socket.socket) -> None:
        with suppress(OSError):
            while data := source.recv(2**16):
                sink.sendall(data)
            sink.shutdown(socket.SHUT_WR)


@dataclass
class Chaos:
    """How long to go on, and the table of what was done and what was lost."""

    seconds: float
    rows: list[tuple[str, str, str]] = field(default_factory=list)

    def rounds(self, what: str) -> Iterator[int]:
        """Numbers from 0 until the time is over; at least one. In a long run, with a line that says how far it is."""
        started, number = time.monotonic(), 0
        while number == 0 or time.monotonic() - started < self.seconds:
            if self.seconds > 10:
                print(
                    f"\r{what}: {time.monotonic() - started:.0f} of {self.seconds:.0f} s ", end="", file=sys.__stderr__
                )
                sys.__stderr__.flush()
            yield number
            number += 1

    def report(self, what: str, done: str, lost: str) -> None:
        self.rows.append((what, done, lost))

    def table(self) -> str:
        head = [("what was done", "what came of it", "what was lost"), ("---", "---", "---")]
        return "\n".join(f"| {' | '.join(row)} |" for row in (*head, *self.rows))
