"""SIGTERM: not ready any longer, requests in flight finish, idle connections are closed, exit 0 in time."""

import http.client
import signal
import time
from contextlib import ExitStack, closing

from chaos import Chaos, Load
from conftest import BODY, LINE, TRANSACTION, Service, get, running, wait_until

HEAD = b"POST /predict HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n" % len(BODY)
STREAM = (
    b"POST /predict/batch HTTP/1.1\r\nHost: x\r\nContent-Type: application/x-ndjson\r\n"
    b"Transfer-Encoding: chunked\r\n\r\n"
)


def kept(service: Service) -> http.client.HTTPConnection:
    """A connection on which a request has been answered, and which the service keeps."""
    connection = http.client.HTTPConnection("127.0.0.1", service.port, timeout=20)
    assert not says_close(connection)
    return connection


def says_close(connection: http.client.HTTPConnection) -> bool:
    """Whether the answer to one more request on it, which must be 200, says `Connection: close`."""
    connection.request("POST", "/predict", BODY, {"Content-Type": "application/json"})
    answer = connection.getresponse()
    assert answer.status == 200
    assert answer.read()
    return answer.getheader("Connection") == "close"


def test_drain(champion: str) -> None:
    """From SIGTERM on readiness is 503 and every answer says `Connection: close`.

    After DRAIN_SECONDS new connections are refused. Then a request half sent at SIGTERM is still answered, an idle
    connection has a few seconds for one more request, and one without a request is closed, not reset.
    """
    with running(champion, drain_seconds="1", graceful_timeout="20") as service, service.connect() as half:
        with closing(kept(service)) as first, closing(kept(service)) as second, closing(kept(service)) as idle:
            half.sendall(HEAD + BODY[:50])
            stopped = time.monotonic()
            service.popen.send_signal(signal.SIGTERM)
            wait_until(lambda: get(f"{service.url}/health/ready") == 503, "it is not ready")
            assert says_close(first)
            with closing(http.client.HTTPConnection("127.0.0.1", service.port, timeout=20)) as new:
                assert says_close(new)
            wait_until(lambda: get(f"{service.url}/health/live") == 0, "new connections are refused")
            assert time.monotonic() - stopped >= 1
            assert says_close(second)
            half.sendall(BODY[50:])
            answer = b"".join(iter(lambda: half.recv(2**16), b""))
            assert idle.sock.recv(100) == b""
        assert answer.startswith(b"HTTP/1.1 200 OK\r\n")
        assert b"\r\nConnection: close\r\n" in answer
        assert answer.endswith(b"}")
        assert service.wait(30) == 0
        assert "ERROR" not in service.log


def test_stop_at_once(champion: str) -> None:
    """SIGINT (Ctrl-C) does not wait for connections, idle or in the middle of a request."""
    with running(champion) as service, closing(kept(service)), service.connect() as half:
        half.sendall(HEAD + BODY[:50])
        started = time.monotonic()
        service.popen.send_signal(signal.SIGINT)
        assert service.wait(20) == 0
        assert time.monotonic() - started < 5  # of the 28 that a stop may take
        assert "Traceback" not in service.log


def test_stop_under_load(champion: str, service: Service, chaos: Chaos) -> None:
    """A pod stops and another takes over: no request is lost, on kept connections or new ones.

    Clients open new connections to the other pod a moment after readiness has become 503, as behind a Kubernetes
    Service, and use the connections that they have for as long as these last.
    """
    requests = stops = 0
    for _ in chaos.rounds("pods stopped"):
        with (
            running(champion, drain_seconds="2") as pod,
            Load(pod.port, TRANSACTION, clients=4, paced=12) as load,
        ):
            load.wait_for(200)
            pod.popen.send_signal(signal.SIGTERM)
            wait_until(lambda url=pod.url: get(f"{url}/health/ready") == 503, "it is not ready")
            load.wait_for(50)
            load.port = service.port
            assert pod.wait() == 0
            load.wait_for(50)
        assert load.lost == []
        assert load.dropped == 0
        requests, stops = requests + len(load.answers), stops + 1
    chaos.report(f"{stops} stops under load while another pod takes over", f"{requests:,} requests", "0")


def test_clients_that_never_finish(champion: str) -> None:
    """They do not hold up the end beyond GRACEFUL_TIMEOUT, nor make it a failure."""
    with running(champion, drain_seconds="0", graceful_timeout="3", web_concurrency="1") as service:
        with ExitStack() as stack:
            body, head, stream, lines, _ = (stack.enter_context(service.connect()) for _ in range(5))
            body.sendall(HEAD + BODY[:50])
            head.sendall(HEAD[:30])
            stream.sendall(HEAD.replace(b"Content-Length: %d" % len(BODY), b"Transfer-Encoding: chunked"))
            lines.sendall(STREAM + b"%X\r\n%s\r\n" % (len(LINE) * 10, LINE * 10))
            lines.recv(1)  # the first answers
            wait_until(lambda: get(f"{service.url}/health/live") == 200, "it serves")
            service.popen.send_signal(signal.SIGTERM)
            assert service.wait(30) == 0  # GRACEFUL_TIMEOUT and a margin for a busy machine
        assert "Traceback" not in service.log
        known = [(line["path"], line["status"], "rows" in line) for line in service.requests]
        assert known.count(("/predict/batch", 200, True)) == 1
        assert known.count(("/predict", 400, False)) >= 1
