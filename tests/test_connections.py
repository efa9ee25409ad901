"""HTTP as RFC 9110 and RFC 9112 define it: methods, the Host header, and which connections are kept."""

import http.client
import json
import time
from collections.abc import Iterator
from contextlib import ExitStack, closing, suppress

import pytest

from conftest import BODY, Service, running

GET = ["/", "/health", "/health/live", "/health/ready", "/metrics", "/openapi.json", "/version"]
POST = ["/predict", "/predict/batch"]
CHANGING = {"date", "content-length"}  # /health and /metrics have counts in them

Answer = tuple[int, dict[str, str], bytes]


@pytest.fixture
def connection(service: Service) -> Iterator[http.client.HTTPConnection]:
    with closing(http.client.HTTPConnection("127.0.0.1", service.port, timeout=20)) as connected:
        yield connected


def ask(connection: http.client.HTTPConnection, method: str, path: str, **headers: str) -> Answer:
    connection.request(method, path, headers={"X-Request-ID": "r-1"} | headers)
    answer = connection.getresponse()
    return answer.status, {name.lower(): value for name, value in answer.getheaders()}, answer.read()


@pytest.mark.parametrize("path", GET)
def test_head_is_get_without_a_body(connection: http.client.HTTPConnection, path: str) -> None:
    """Same status and same headers, and the connection goes on where the body would have been."""
    status, headers, body = ask(connection, "GET", path)
    assert (status, headers["content-length"]) == (200, str(len(body)))
    status, of_head, body = ask(connection, "HEAD", path)
    assert (status, body) == (200, b"")
    assert of_head.keys() == headers.keys()
    assert {name: of_head[name] for name in of_head.keys() - CHANGING} == {
        name: headers[name] for name in headers.keys() - CHANGING
    }
    assert int(of_head["content-length"]) > 0
    assert ask(connection, "GET", path)[0] == 200


@pytest.mark.parametrize("path", [*GET, *POST])
def test_allow(service: Service, path: str) -> None:
    """`OPTIONS` and 405 name the same methods, and those are the ones that the route has."""
    expected = {"GET", "HEAD", "OPTIONS"} if path in GET else {"POST", "OPTIONS"}
    for method in ("OPTIONS", *sorted({"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE"} - expected)):
        with closing(http.client.HTTPConnection("127.0.0.1", service.port, timeout=20)) as connection:
            status, headers, _ = ask(connection, method, path)
        assert status in (200, 204) if method == "OPTIONS" else status == 405
        assert {*headers["allow"].split(", ")} == expected, method


# -- raw requests ------------------------------------------------------------------------------------------------------


def exchange(service: Service, *parts: bytes) -> tuple[bytes, bytes]:
    """The first answer on a connection, head and body, after these parts have been sent as far as they are taken.

    An answer that says `Connection: close` ends with the connection. After any other one the connection is in use: it
    answers one more request.
    """
    with service.connect() as connection:
        with suppress(BrokenPipeError, ConnectionResetError):  # refused before all was sent; the answer has to come
            for part in parts:
                connection.sendall(part)
        received = bytearray()
        while b"\r\n\r\n" not in received:
            data = connection.recv(2**16)
            assert data, f"closed after {bytes(received)!r}"
            received += data
        head, _, body = bytes(received).partition(b"\r\n\r\n")
        length = int(dict(fields(head))["content-length"])
        while len(body) < length:
            body += connection.recv(2**16)
        if dict(fields(head)).get("connection") == "close":
            with suppress(ConnectionResetError):  # part of the request was not read
                assert connection.recv(1) == b"", "it says close, and goes on"
        else:
            connection.sendall(b"GET /health/live HTTP/1.1\r\nHost: x\r\n\r\n")
            assert connection.recv(2**16).startswith(b"HTTP/1.1 200 OK\r\n"), "it does not say close, and is closed"
    assert len(body) == length
    return head, body


def fields(head: bytes) -> list[tuple[str, str]]:
    lines = [line.partition(": ") for line in head.decode().split("\r\n")[1:]]
    return [(name.lower(), value.lower()) for name, _, value in lines]


def test_a_request_without_host(service: Service) -> None:
    """400 in HTTP/1.1 (RFC 9112, section 3.2), as a problem; HTTP/1.0 has no such header."""
    head, body = exchange(service, b"GET /health/live HTTP/1.1\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 400 Bad Request\r\n")
    assert dict(fields(head))["content-type"] == "application/problem+json"
    assert json.loads(body)["status"] == 400
    with service.connect() as connection:
        connection.sendall(b"GET /health/live HTTP/1.0\r\n\r\n")
        assert connection.recv(2**16).split(b"\r\n")[0].endswith(b" 200 OK")


@pytest.fixture(scope="module")
def guarded(champion: str) -> Iterator[Service]:
    with running(champion, api_keys="a-key", web_concurrency="1") as service:
        yield service


@pytest.mark.parametrize(
    ("asked", "status"),
    [
        (b"GET /health/live HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n", b"200"),
        (b"POST /nothing HTTP/1.1\r\nHost: x\r\nContent-Length: 4\r\n\r\nbody", b"404"),  # with a body that is not read
    ],
)
def test_clients_that_close_late(guarded: Service, asked: bytes, status: bytes) -> None:
    """They keep the connection open after their answer. gunicorn may wait for them; others are served at once."""
    with ExitStack() as stack:
        started = time.monotonic()
        for _ in range(20):
            connection = stack.enter_context(guarded.connect())
            connection.sendall(asked)
            assert connection.recv(2**16).startswith(b"HTTP/1.1 " + status)
        assert time.monotonic() - started < 10  # gunicorn waits up to 2 s for each


JSON, TEXT, KEY = (
    "Content-Type: application/json\r\n",
    "Content-Type: text/plain\r\n",
    "Authorization: Bearer a-key\r\n",
)
UNREAD = {
    401: ("POST", "/predict", JSON),
    404: ("POST", "/nothing", JSON + KEY),
    405: ("PUT", "/predict", JSON + KEY),
    413: ("POST", "/predict", JSON + KEY),
    415: ("POST", "/predict", TEXT + KEY),
}
SIZES = [len(BODY), 1_000_000, 6_000_000]


@pytest.mark.parametrize("framing", ["length", "chunks"])
@pytest.mark.parametrize(
    ("status", "size"), [(status, size) for status in UNREAD for size in (SIZES if status != 413 else SIZES[-1:])]
)
def test_a_body_that_was_not_read(guarded: Service, status: int, size: int, framing: str) -> None:
    """The answer comes, and says `Connection: close` if and only if the connection is then closed."""
    method, path, headers = UNREAD[status]
    body = BODY.ljust(size)
    if framing == "length":
        headers += f"Content-Length: {size}\r\n"
    else:
        headers += "Transfer-Encoding: chunked\r\n"
        body = b"%X\r\n%s\r\n0\r\n\r\n" % (size, body)
    head, answer = exchange(guarded, f"{method} {path} HTTP/1.1\r\nHost: x\r\n{headers}\r\n".encode(), body)
    assert head.startswith(b"HTTP/1.1 %d " % status)
    assert json.loads(answer)["status"] == status
