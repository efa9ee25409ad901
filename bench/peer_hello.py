"""The floor: a bare WSGI application under the same gunicorn, that reads a body and sends one of the same size."""

from collections.abc import Callable
from typing import Any

BODY = b"x" * 181  # as long as a prediction
HEADERS = [("Content-Type", "application/json"), ("Content-Length", str(len(BODY)))]


def app(environ: dict[str, Any], start_response: Callable[..., Any]) -> list[bytes]:
    environ["wsgi.input"].read()
    start_response("200 OK", HEADERS)
    return [BODY]
