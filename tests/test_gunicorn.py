"""What the service takes from gunicorn beyond its documentation: listed in one place, and there in this version."""

import ast
import inspect
import re
from collections.abc import Iterator
from typing import Any

import pytest
from gunicorn import SERVER_SOFTWARE
from gunicorn.arbiter import Arbiter
from gunicorn.http.message import Request
from gunicorn.http.parser import RequestParser
from gunicorn.http.unreader import Unreader
from gunicorn.workers.gthread import TConn, ThreadWorker

from conftest import HERE

# What is used beyond the documentation: methods and functions; attributes.
PRIVATE = {
    ThreadWorker: (
        "accept handle handle_error is_parent_alive notify run",
        "PIPE alive keepalived_conns wait_fds",
    ),
    TConn: ("close", "data_ready parser sock"),
    RequestParser: ("", "unreader"),
    Unreader: ("take_buffered unread", ""),
    Request: ("force_close", ""),
    Arbiter: ("manage_workers handle_hup handle_term", "WORKERS WORKER_BOOT_ERROR num_workers"),
}
# What gunicorn's documentation shows its hooks to use: https://gunicorn.org/reference/settings/#server-hooks
DOCUMENTED = {
    ThreadWorker: {"__init__", "age", "cfg", "log", "pid", "ppid", "sockets"},
    Arbiter: {"LISTENERS", "cfg", "log"},
    Request: {"method", "path"},
}
FILES = ("server.py", "gunicorn.conf.py")
# Expressions in classes and functions, and what of gunicorn they hold.
HOOK = {"server": Arbiter, "worker": ThreadWorker}
HOLDS = {
    "Worker": {
        "self": ThreadWorker,
        "conn": TConn,
        "conn.parser": RequestParser,
        "conn.parser.unreader": Unreader,
    },
    "close_connection": {"current.request": Request},
    "Supervisor": {"server": Arbiter, "self.server": Arbiter, "worker": ThreadWorker},
}


def names_of(owner: Any) -> set[str]:
    """The methods and attributes of a class of gunicorn, those that it assigns to itself included."""
    source = "".join(map(inspect.getsource, owner.__mro__[:-1]))
    return {*dir(owner)} - {*dir(object)} | {"__init__"} | {*re.findall(r"\bself\.(\w+) = ", source)}


def listed(owner: Any) -> set[str]:
    return {*" ".join(PRIVATE.get(owner, ())).split()}


def uses() -> Iterator[tuple[Any, str]]:
    """Every name of gunicorn's that these files override, read or set, and what it belongs to."""
    definitions = [node for file in FILES for node in ast.parse((HERE / file).read_text()).body]
    for definition in definitions:
        if isinstance(definition, ast.ClassDef | ast.FunctionDef):
            holds = HOLDS.get(definition.name, HOOK)
            for node in ast.walk(definition):
                if isinstance(node, ast.FunctionDef) and "self" in holds:
                    yield holds["self"], node.name
                if isinstance(node, ast.Attribute) and (owner := holds.get(ast.unparse(node.value))):
                    yield owner, node.attr


@pytest.mark.parametrize("owner", PRIVATE)
def test_the_names_are_there(owner: Any) -> None:
    """An update of gunicorn that renames one of them is noticed here, and not by clients."""
    for name in listed(owner):
        assert name in names_of(owner), f"{SERVER_SOFTWARE} has no {owner.__name__}.{name}, which server.py uses"


def test_every_name_is_listed() -> None:
    used = {(owner, name) for owner, name in uses() if name in names_of(owner) - DOCUMENTED.get(owner, set())}
    missing = sorted(f"{owner.__name__}.{name}" for owner, name in used if name not in listed(owner))
    assert not missing, f"the service uses {', '.join(missing)}, which PRIVATE does not list"


def test_nothing_else_is_listed() -> None:
    idle = sorted(
        f"{owner.__name__}.{name}" for owner in PRIVATE for name in listed(owner) - {n for o, n in uses() if o is owner}
    )
    assert not idle, f"PRIVATE lists {', '.join(idle)}, which the service does not use"
