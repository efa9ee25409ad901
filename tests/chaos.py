"""What the tests of reliability are made of: load that counts, a registry that can be cut off, a table of losses."""

import http.client
import json
import random
import select
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
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


class Load:
    """Clients that post one transaction over and over, each on a connection that it keeps, and never send one twice.

    Like any connection pool, a client opens a new connection when the last answer said `Connection: close`, or when it
    finds the old one closed before it sends. `dropped` counts the second kind: the service closed a kept connection
    without having said so. Of the clients, `paced` ones wait 0.2 s between requests, so that their connections are
    idle most of the time. New connections go to `port`, which may change meanwhile.
    """

    def __init__(self, port: int, transaction: dict[str, object], clients: int = 8, paced: int = 0) -> None:
        self.port, self.body = port, json.dumps(transaction)
        self.answers: list[Answer] = []
        self.dropped = 0
        self.over = threading.Event()
        pauses = [0.0] * clients + [0.2] * paced
        self.threads = [threading.Thread(target=self.client, args=(pause,)) for pause in pauses]

    def __enter__(self) -> "Load":
        for thread in self.threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.over.set()
        for thread in self.threads:
            thread.join()

    def client(self, pause: float) -> None:
        self.over.wait(pause * random.random())
        with closing(http.client.HTTPConnection("127.0.0.1", self.port, timeout=20)) as connection:
            while not self.over.is_set():
                self.answers.append(self.ask(connection))
                if pause:
                    self.over.wait(pause)

    def ask(self, connection: http.client.HTTPConnection) -> Answer:
        if connection.sock and select.select([connection.sock], [], [], 0)[0]:
            self.dropped += 1
            connection.close()
        connection.port, started = self.port, time.monotonic()
        try:
            connection.request("POST", "/predict", self.body, {"Content-Type": "application/json"})
            answer = connection.getresponse()  # closes the connection if it says `Connection: close`
            body = answer.read()
        except (OSError, http.client.HTTPException):
            connection.close()
            return Answer(started, time.monotonic(), 0, None)
        ended = time.monotonic()
        if answer.status != 200:
            return Answer(started, ended, answer.status, None)
        prediction = json.loads(body)
        return Answer(started, ended, 200, (prediction["model_version"], prediction["fraud_probability"]))

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

    @property
    def long(self) -> bool:
        """Whether this is `make chaos`, which has the machine to itself: only then times are bounded."""
        return self.seconds > 10

    def rounds(self, what: str, enough: Callable[[], bool] = lambda: True) -> Iterator[int]:
        """Numbers from 0 until the time is over; at least one.

        A long run goes on until it is `enough`, with a line that says how far it is.
        """
        started, number = time.monotonic(), 0
        while number == 0 or time.monotonic() - started < self.seconds or (self.long and not enough()):
            if self.long:
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
