"""SIGTERM: not ready any longer, requests in flight finish, idle connections are closed, exit 0 in time."""

import http.client
import signal
import time
from contextlib import ExitStack, closing

from conftest import BODY, LINE, TRANSACTION, get, running, wait_until

HEAD = b"POST /predict HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n" % len(BODY)
STREAM = (
    b"POST /predict/batch HTTP/1.1\r\nHost: x\r\nContent-Type: application/x-ndjson\r\n"
    b"Transfer-Encoding: chunked\r\n\r\n"
)


def test_drain(champion: str) -> None:
    """A request half sent at SIGTERM is answered, an idle connection is closed with nothing on it, readiness is 503."""
    with running(champion, drain_seconds="1", graceful_timeout="20") as service, service.connect() as half:
        idle = http.client.HTTPConnection("127.0.0.1", service.port, timeout=20)
        with closing(idle):
            idle.request("GET", "/health/live")
            idle.getresponse().read()
            half.sendall(HEAD + BODY[:50])
            stopped = time.monotonic()
            service.popen.send_signal(signal.SIGTERM)
            wait_until(lambda: get(f"{service.url}/health/ready") == 503, "it is not ready", seconds=1)
            assert get(f"{service.url}/health/live") == 200
            assert service.post("/predict", TRANSACTION)["model_version"] == "v1.2.3"
            assert idle.sock.recv(100) == b""  # closed, not reset
            assert time.monotonic() - stopped >= 1
            wait_until(lambda: get(f"{service.url}/health/ready") == 0, "nobody new is let in")
            half.sendall(BODY[50:])
            answer = b"".join(iter(lambda: half.recv(2**16), b""))
        assert answer.startswith(b"HTTP/1.1 200 OK\r\n")
        assert answer.endswith(b"}")
        assert service.wait() == 0
        assert time.monotonic() - stopped < 10
        assert "ERROR" not in service.log


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
            stopped = time.monotonic()
            service.popen.send_signal(signal.SIGTERM)
            assert service.wait() == 0
            assert time.monotonic() - stopped < 3
        assert "Traceback" not in service.log
        known = [(line["path"], line["status"], "rows" in line) for line in service.requests]
        assert known.count(("/predict/batch", 200, True)) == 1
        assert known.count(("/predict", 499, False)) == 1
