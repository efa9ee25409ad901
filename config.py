"""The configuration of the service. No other file of this project reads the environment.

Every variable is a field of `Config`: its name in lower case, its rule, its default. `.env.example` explains them.
MLflow and boto3 read their own variables (`MLFLOW_*`, `AWS_*`); `export` prepares the environment for them.
"""

import ipaddress
import os
import re
import sys
from collections.abc import Callable, Iterator, Mapping, MutableMapping
from contextlib import suppress
from dataclasses import dataclass, field, fields
from typing import Any
from urllib.parse import quote_plus

MASK = "***"
SECRET_SETTINGS = {"API_KEYS", "RECORD_KEY"}
MASKED_NAMES = re.compile("RECORD_KEY|(MLFLOW|AWS)_.*(KEY|PASSWORD|SECRET|TOKEN|USERNAME).*")
LOOPBACK_ONLY = "a loopback address, unless API_KEYS or ALLOW_ANONYMOUS=true is set"
API_KEY = r"([A-Za-z0-9-]+:)?[\w.~+/-]+=*"  # an optional name, and a bearer token (RFC 6750, section 2.1)

# Defaults for the libraries; the operator's own values win.
LIBRARY_DEFAULTS = {
    "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",  # the log is not a terminal
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "2",  # with MLflow's default of 7, a missing server takes 4 minutes to fail
    "MLFLOW_HTTP_REQUEST_BACKOFF_FACTOR": "1",
    "OMP_NUM_THREADS": "1",  # the service uses processes, and a process that forks should have one thread
    "OPENBLAS_NUM_THREADS": "1",
    "JE_ARROW_MALLOC_CONF": "background_thread:false",  # pyarrow, where it is installed
}
NO_TELEMETRY = {"MLFLOW_DISABLE_TELEMETRY": "true", "DO_NOT_TRACK": "true"}
NO_ADDRESS_IN_LOG = {"MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true"}  # MLflow prints it with its credentials


class ConfigError(ValueError):
    """The environment is wrong; the message names every variable at fault and what was expected."""


def _rule(
    expected: str, pattern: str = ".+", convert: Callable[[str], Any] = str, valid: Callable[[Any], bool] = bool
) -> Callable[[str], Any]:
    """A parser that converts text that matches and is valid, and raises `ValueError(expected)` for any other."""

    def parse(text: str) -> Any:
        with suppress(ValueError):
            if re.fullmatch(pattern, text) and valid(value := convert(text)):
                return value
        raise ValueError(expected)

    return parse


def _whole(low: int, high: int) -> Callable[[str], Any]:
    return _rule(f"a whole number from {low} to {high}", "[0-9]+", int, lambda number: low <= number <= high)


_registry = _rule("an http://, https:// or sqlite:/// address", r"(https?|sqlite)://\S+")
_model = _rule("models:/<name>@<alias> or models:/<name>/<number>", r"models:/[^/@\s]+(@[^/@\s]+|/[1-9][0-9]*)")
_probability = _rule("a number from 0 to 1, such as 0.35", r"0?\.[0-9]+|[01](\.0*)?", float, lambda number: number <= 1)
_level = _rule("one of debug, info, warning, error, critical", "(?i)debug|info|warning|error|critical", str.lower)
_sha256 = _rule("64 hexadecimal digits", "[0-9a-fA-F]{64}", str.lower)
_switch = _rule("true or false", "(?i)true|false", lambda text: text.lower() == "true", lambda _: True)
_address = _rule("an IP address, such as 0.0.0.0 or ::1", convert=lambda text: str(ipaddress.ip_address(text)))
_folder = _rule("the absolute path of a folder", valid=lambda text: os.path.isabs(text) and os.path.isdir(text))
_keys = _rule(
    "keys of letters, digits and -._~+/=, each with an optional name and a colon before it, separated by commas",
    f"(?a){API_KEY}( *, *{API_KEY})*",
    lambda text: tuple((name or "-", key) for name, _, key in (one.rpartition(":") for one in re.split(" *, *", text))),
)


def _variable(parse: Callable[[str], Any], default: str | None = "") -> Any:
    """A field of `Config`. Without a default it is None where the variable is not set; a default of None: required."""
    return field(metadata={"parse": parse, "default": default})


@dataclass(frozen=True, kw_only=True, slots=True, repr=False)
class Config:
    """What the operator decided. `repr` shows no secret."""

    mlflow_tracking_uri: str = _variable(_registry, None)
    model_uri: str = _variable(_model, "models:/fraud-detector@champion")
    model_load_timeout: int = _variable(_whole(1, 3600), "30")
    model_poll_seconds: int = _variable(_whole(0, 86400), "0")
    model_memory_mb: int = _variable(_whole(64, 1_000_000), "1024")
    model_sha256: str | None = _variable(_sha256)
    model_allow_unsafe: bool = _variable(_switch, "false")
    fraud_threshold: float | None = _variable(_probability)
    max_batch_size: int = _variable(_whole(1, 1_000_000), "10000")
    max_body_bytes: int = _variable(_whole(1024, 2**30), "4194304")
    max_line_bytes: int = _variable(_whole(1024, 2**20), "65536")
    api_keys: tuple[tuple[str, str], ...] = _variable(_keys)
    allow_anonymous: bool = _variable(_switch, "false")
    log_decisions: bool = _variable(_switch, "false")
    record_key: str | None = _variable(_rule("at least 16 characters", ".{16,}"))
    host: str = _variable(_address, "127.0.0.1")
    port: int = _variable(_whole(1, 65535), "8000")
    web_concurrency: int = _variable(_whole(1, 256), "2")
    max_connections: int = _variable(_whole(100, 100_000), "1000")
    slow_seconds: int = _variable(_whole(1, 600), "10")
    max_wait_ms: int = _variable(_whole(10, 10_000), "1000")
    drain_seconds: int = _variable(_whole(0, 600), "1")
    graceful_timeout: int = _variable(_whole(2, 3600), "30")
    log_level: str = _variable(_level, "info")
    memory_dir: str = _variable(_folder, "/dev/shm")
    secrets: tuple[str, ...] = ()  # what is masked in the log; no variable, so it comes last

    @classmethod
    def from_environ(cls, environ: Mapping[str, str] = os.environ) -> "Config":
        """Read and check everything; raise one `ConfigError` that names all that is wrong. Empty counts as not set."""
        values: dict[str, Any] = {}
        problems = []
        for item in fields(cls)[:-1]:
            name, default = item.name.upper(), item.metadata["default"]
            text = environ.get(name, "").strip() or default
            try:
                values[item.name] = item.metadata["parse"](text or "") if text != "" else None
            except ValueError as expected:
                shown = MASK if name in SECRET_SETTINGS else without_credentials(repr(text))
                problems.append(f"{name} {'is not set' if text is None else f'is {shown}'}, expected {expected}")
        if not problems:
            found = [value for name, value in environ.items() if MASKED_NAMES.fullmatch(name)]
            secrets = {*found, *map(str.strip, found), *(key for _, key in values["api_keys"] or ())} - {""}
            config = cls(**values, secrets=tuple(secrets))
            problems = list(config._contradictions())
        if problems:
            raise ConfigError("bad configuration: " + "; ".join(problems))
        return config

    def _contradictions(self) -> Iterator[str]:
        if not self.may_listen_on(self.host):
            yield f"HOST is {self.host!r}, expected {LOOPBACK_ONLY}"
        if self.drain_seconds > self.graceful_timeout - 2:
            yield f"DRAIN_SECONDS is '{self.drain_seconds}', expected at least 2 less than GRACEFUL_TIMEOUT"
        if self.log_decisions and self.log_level not in ("debug", "info"):
            yield f"LOG_LEVEL is '{self.log_level}', expected debug or info with LOG_DECISIONS=true"

    def may_listen_on(self, host: str) -> bool:
        """Without keys the service listens on loopback only, unless the operator says otherwise."""
        return bool(self.api_keys) or self.allow_anonymous or ipaddress.ip_address(host).is_loopback

    def mask(self, text: str) -> str:
        """`text` without secrets and credentials in addresses: for what libraries log."""
        for secret in sorted({*self.secrets, *map(quote_plus, self.secrets)}, key=len, reverse=True):
            text = text.replace(secret, MASK)
        return without_credentials(text)

    def __repr__(self) -> str:
        shown = {item.name: getattr(self, item.name) for item in fields(self)[:-1]}
        keys = [f"{name}:{MASK}" for name, _ in self.api_keys or ()]
        shown |= {"api_keys": keys, "record_key": self.record_key and MASK}
        return without_credentials(" ".join(f"{name.upper()}={value!r}" for name, value in shown.items()))


def without_credentials(text: str) -> str:
    """The text, its addresses without user name and password (RFC 3986, section 3.2.1)."""
    return re.sub(r"://\S*@", "://", text)


def export(environ: MutableMapping[str, str] = os.environ) -> None:
    """Prepare the environment for MLflow, boto3 and the numeric libraries, before they are imported."""
    for name in [name for name, value in environ.items() if not value and name.startswith(("MLFLOW_", "AWS_"))]:
        del environ[name]  # boto3 takes an empty variable for a value
    environ.update({name: value for name, value in LIBRARY_DEFAULTS.items() if name not in environ})
    environ.update(NO_TELEMETRY | NO_ADDRESS_IN_LOG)


def prepare(program: str) -> Config:
    """The configuration, and an environment ready for the libraries; a wrong one ends the program with one line."""
    try:
        config = Config.from_environ()
    except ConfigError as error:
        sys.exit(f"{program}: {error}")
    export()
    return config
