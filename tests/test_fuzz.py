"""What no honest client sends, over real sockets: a 4xx or a closed connection, and the next request works."""

import random
import re
import socket
from collections import Counter
from collections.abc import Iterator

import pytest

from chaos import Chaos
from conftest import BODY, LINE, TRANSACTION, Service, running

TYPE = b"Content-Type: application/json\r\n"
HOST = b"Host: x\r\n"


def post(body: bytes, more: bytes = TYPE, path: bytes = b"/predict", length: int | None = None) -> bytes:
    """A request to post `body`, whose length is said to be `length`."""
    size = b"Content-Length: %d\r\n" % (len(body) if length is None else length)
    return b"POST " + path + b" HTTP/1.1\r\n" + HOST + more + size + b"\r\n" + body


def chunked(body: bytes, more: bytes = TYPE, path: bytes = b"/predict") -> bytes:
    return b"POST " + path + b" HTTP/1.1\r\n" + HOST + more + b"Transfer-Encoding: chunked\r\n\r\n" + body


SMUGGLED = b"GET /health HTTP/1.1\r\nHost: smuggled\r\n\r\n"

# name: bytes to send, and the statuses that may come back, in order; after the last the connection is closed.
CORPUS: dict[str, tuple[bytes, list[int]]] = {
    "deep arrays": (post(b"[" * 60_000), [400]),
    "deep objects": (post(b'{"a":' * 12_000), [400]),
    "deep in a field that is ignored": (post(BODY[:-1] + b', "x": ' + b"[" * 30_000 + b"]" * 30_000 + b"}"), [400]),
    "deep in a batch": (post(b'{"transactions": ' + b"[" * 100_000, path=b"/predict/batch"), [400]),
    "a long string": (post(BODY.replace(b"grocery", b"g" * 60_000)), [422]),
    "a long number": (post(BODY.replace(b"150.5", b"1" * 60_000)), [422]),
    "beyond MAX_LINE_BYTES": (post(b" " * 5_000_000), [413]),
    "a batch beyond MAX_BODY_BYTES": (post(b" " * 5_000_000, path=b"/predict/batch"), [413]),
    "a length beyond MAX_LINE_BYTES": (post(b"{}", length=10**12), [413]),
    "many fields": (post(BODY[:-1] + b"".join(b', "x%d": 1' % n for n in range(4000)) + b"}"), [200]),
    "a field twice": (post(BODY[:-1] + b', "amount": 1}'), [200]),
    "nothing": (post(b""), [400]),
    "no UTF-8": (post(b"\xff\xfe" + BODY), [400]),
    "UTF-16": (post(BODY.decode().encode("utf-16")), [400]),
    "a byte order mark": (post(b"\xef\xbb\xbf" + BODY), [400]),
    "gzip": (post(b"\x1f\x8b" + BODY, TYPE + b"Content-Encoding: gzip\r\n"), [415]),
    "gzip as a transfer coding": (chunked(b"", TYPE + b"Transfer-Encoding: gzip\r\n"), [400]),
    "form": (post(BODY, b"Content-Type: application/x-www-form-urlencoded\r\n"), [415]),
    "a header of 100 kB": (post(BODY, TYPE + b"X: " + b"x" * 100_000 + b"\r\n"), [400]),
    "a thousand headers": (post(BODY, TYPE + b"".join(b"X-%d: x\r\n" % n for n in range(1000))), [400]),
    "a target of 100 kB": (b"GET /" + b"x" * 100_000 + b" HTTP/1.1\r\nHost: x\r\n\r\n", [400]),
    "a header without a colon": (post(BODY, TYPE + b"nonsense\r\n"), [400]),
    "a header with a space before its colon": (post(BODY, TYPE + b"X : x\r\n"), [400]),
    "a null in a header": (post(BODY, TYPE + b"X: \0\r\n"), [400]),
    "an unknown version": (b"GET /health/live HTTP/9.9\r\n\r\n", [400]),
    "an unknown method": (b"!!! / HTTP/1.1\r\nHost: x\r\n\r\n", [400]),
    "a method that Falcon refuses": (b"WEBSOCKET / HTTP/1.1\r\nHost: x\r\n\r\n", [400]),
    "a stream with a broken chunk": (
        chunked(b"zz\r\n" + SMUGGLED, b"Content-Type: application/x-ndjson\r\n", b"/predict/batch"),
        [400],
    ),
    "TLS": (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + b"x" * 500 + b"\r\n\r\n", [400]),
    "HTTP/2": (b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", [400]),
    "lengths that differ": (post(BODY, TYPE + b"Content-Length: 3\r\n") + SMUGGLED, [400]),
    "a length and chunks": (chunked(b"0\r\n\r\n" + SMUGGLED, TYPE + b"Content-Length: 5\r\n"), [400]),
    "a negative length": (post(BODY, length=-1) + SMUGGLED, [400]),
    "a length in words": (
        b"POST /predict HTTP/1.1\r\n" + HOST + TYPE + b"Content-Length: +5\r\n\r\n" + SMUGGLED,
        [400],
    ),
    "a length of 5000 digits": (
        b"POST /predict HTTP/1.1\r\n" + HOST + b"Content-Length: " + b"9" * 5000 + b"\r\n\r\n",
        [400],
    ),
    "chunks, obscured": (post(BODY, TYPE + b"Transfer-Encoding: xchunked\r\n") + SMUGGLED, [400]),
    "chunks, twice": (chunked(b"0\r\n\r\n" + SMUGGLED, TYPE + b"Transfer-Encoding: chunked\r\n"), [400]),
    "a chunk shorter than it says": (chunked(b"FF\r\n" + BODY + b"\r\n0\r\n\r\n" + SMUGGLED), [400]),
    "a chunk longer than it says": (chunked(b"5\r\n" + BODY + b"\r\n0\r\n\r\n" + SMUGGLED), [400]),
    "a chunk of no size": (chunked(b"\r\n" + BODY + SMUGGLED), [400]),
    "a chunk of 2**64": (chunked(b"FFFFFFFFFFFFFFFFF\r\n" + BODY), [400]),
    "a chunk of negative size": (chunked(b"-5\r\n" + BODY), [400]),
    "chunks where none are expected": (chunked(b"zz", b"Content-Type: text/plain\r\n"), [415]),
    "nothing at all": (b"", []),
    "half a request": (post(BODY)[:-20], [400]),
    "half a head": (post(BODY)[:40], []),
}


def exchange(service: Service, sent: bytes) -> bytes:
    """What comes back on a connection on which all is sent and then no more."""
    with service.connect() as connection:
        received = bytearray()
        try:
            connection.sendall(sent)
            connection.shutdown(socket.SHUT_WR)
        except OSError:  # it was refused before all of it was sent
            pass
        try:
            while data := connection.recv(2**16):
                received += data
        except ConnectionError:
            pass
    return bytes(received)


def statuses(received: bytes) -> list[int]:
    return [int(status) for status in re.findall(rb"^HTTP/1\.1 (\d+) ", received, re.M)]


def works(service: Service) -> bool:
    return service.post("/predict", TRANSACTION)["transaction_id"] == "tx_12345"


@pytest.fixture(scope="module", params=["auto", "python"])
def target(champion: str, request: pytest.FixtureRequest) -> Iterator[Service]:
    """With gunicorn's parser in C, where it is installed, and with the one in Python."""
    if request.param == "auto":
        yield request.getfixturevalue("service")
    else:
        with running(champion, gunicorn_cmd_args=f"--http-parser {request.param}") as service:
            yield service


@pytest.mark.parametrize("name", CORPUS)
def test_corpus(target: Service, name: str) -> None:
    """The status that is due, or a closed connection; what is smuggled in behind is never answered; it goes on."""
    sent, expected = CORPUS[name]
    received = exchange(target, sent)
    assert statuses(received) == expected
    assert b"registry_version" not in received
    assert b"nonsense" not in received
    assert received.count(b"application/problem+json") == len([status for status in expected if status >= 400])
    assert works(target)


def test_pipelined_requests(target: Service) -> None:
    """Several at once are answered in order (RFC 9112, section 9.3.2)."""
    bodies = [BODY.replace(b"tx_12345", b"tx_%d" % number) for number in range(5)]
    received = exchange(target, b"".join(post(body) for body in bodies))
    assert re.findall(rb'"transaction_id":"(tx_\d)"', received) == [b"tx_%d" % number for number in range(5)]


# -- generated ---------------------------------------------------------------------------------------------------------


def mutated(random: random.Random, data: bytes) -> bytes:
    """A few bytes changed, left out, doubled, or put in."""
    for _ in range(random.choice([1, 1, 1, 2, 5, 20])):
        at, length = random.randrange(len(data) + 1), random.choice([0, 1, 1, 2, 8, 40])
        new = random.choice([b"", data[at : at + length] * 2, random.randbytes(length), random.choice(PIECES)])
        data = data[:at] + new + data[at + length :]
    return data


PIECES = [
    b"\r\n",
    b"\r\n\r\n",
    b"\n",
    b"\0",
    b'"',
    b"{",
    b"}",
    b"[",
    b"]",
    b",",
    b":",
    b"\\u0000",
    b"\\ud800",
    b"1e999",
]
PIECES += [
    b"-0",
    b"NaN",
    b"null",
    b"true",
    b"99999999999999999999",
    b"Content-Length: 7\r\n",
    b"HTTP/1.0",
    b"%00",
    b"\xff",
]
PIECES += [
    b"Transfer-Encoding: chunked\r\n",
    b"Expect: 100-continue\r\n",
    b"Connection: close\r\n",
    b"application/x-ndjson",
]
BATCH = b'{"transactions": [' + BODY + b", " + BODY + b"]}"
SEEDS = [
    post(BODY),
    post(BATCH, path=b"/predict/batch"),
    post(LINE * 3, b"Content-Type: application/x-ndjson\r\n", b"/predict/batch"),
    chunked(b"%X\r\n%s\r\n0\r\n\r\n" % (len(BODY), BODY)),
    chunked(b"%X\r\n%s\r\n0\r\n\r\n" % (len(LINE), LINE), b"Content-Type: application/x-ndjson\r\n", b"/predict/batch"),
    b"GET /health/ready HTTP/1.1\r\nHost: x\r\n\r\n",
]


def test_generated_requests(target: Service, chaos: Chaos, request: pytest.FixtureRequest) -> None:
    """6,000 for each parser, whole ones with another body and broken ones: no 5xx, no worker lost, no more memory."""
    workers, counts, total = target.workers(), Counter(), 0
    generator = random.Random(4)
    sizes = []
    for number in chaos.rounds("generated requests"):
        for _ in range(6_000 if number == 0 else 1000):
            seed = generator.choice(SEEDS)
            head, _, body = seed.partition(b"\r\n\r\n")
            if generator.random() < 0.5 and body and b"chunked" not in head:
                path, kind = seed.split()[1], re.search(rb"Content-Type: .*\r\n", head)[0]
                seed = post(mutated(generator, body), kind, path)
            else:
                seed = mutated(generator, seed)
            counts.update(statuses(exchange(target, seed)) or ["closed"])
            total += 1
            if total % 2500 == 0:
                sizes.append(target.memory())
    assert [status for status in counts if status != "closed" and status >= 500] == []
    assert counts[200] > 500
    assert counts[422] > 100
    assert counts[400] > 500
    assert target.workers() == workers
    assert sizes[-1] - sizes[0] < 30 * 1024
    assert "Traceback" not in target.log
    assert works(target)
    parser = request.node.callspec.params["target"]
    shown = ", ".join(f"{count:,} × {status}" for status, count in sorted(counts.items(), key=str))
    chaos.report(f"{total:,} requests changed at random, parser: {parser}", shown, "0 workers, no 5xx")
