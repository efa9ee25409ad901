"""The configuration of the service. Nothing else in this project reads the environment.

Every variable is a field of `Config`: its name in lower case, what it may be, its default. `.env.example` says what
each of them means.
"""

import ipaddress
import os
import re
import signal
import sys
from collections.abc import Callable, Mapping, MutableMapping
from dataclasses import dataclass, field, fields
from typing import Any
from urllib.parse import quote_plus

MASK = "***"
LOOPBACK_ONLY = "a loopback address, unless API_KEYS or ALLOW_ANONYMOUS=true is set"

# What ends a start that has not come to serving yet.
INTERRUPTS = {signal.SIGHUP, signal.SIGINT, signal.SIGQUIT, signal.SIGTERM}

OPENMP = "OMP_NUM_THREADS"
# What the libraries are told unless the operator says otherwise, and why.
LIBRARY_DEFAULTS = {
    "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",  # a log is no terminal
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "2",  # 7, MLflow's default, takes four minutes to say that nobody is there
    "MLFLOW_HTTP_REQUEST_BACKOFF_FACTOR": "1",
    OPENMP: "1",  # processes, not threads, use the cores; and a process that forks should have one thread
    "OPENBLAS_NUM_THREADS": "1",
    "JE_ARROW_MALLOC_CONF": "background_thread:false",  # where pyarrow is installed
}


class ConfigError(ValueError):
    """The environment is wrong; the message names every variable at fault and what was expected."""


def _variable(parse: Callable[[str], Any], default: str | None = "", secret: bool = False) -> Any:
    """A field of `Config`. Without a default it is None where not set; a default of None makes it required."""
    return field(metadata={"parse": parse, "default": default, "secret": secret})


def _matching(pattern: str, expected: str, convert: Callable[[str], Any] = str) -> Callable[[str], Any]:
    def parse(text: str) -> Any:
        if re.fullmatch(pattern, text):
            return convert(text)
        raise ValueError(expected)

    return parse


def _whole(low: int, high: int) -> Callable[[str], int]:
    def parse(text: str) -> int:
        if re.fullmatch("[0-9]+", text) and low <= int(text) <= high:
            return int(text)
        raise ValueError(f"a whole number from {low} to {high}")

    return parse


_registry = _matching(r"(https?|sqlite)://\S+", "an http://, https:// or sqlite:/// address")
_http = _matching(r"https?://\S+", "an http:// or https:// address")
_model = _matching(r"models:/[^/@\s]+(@[^/@\s]+|/[1-9][0-9]*)", "models:/<name>@<alias> or models:/<name>/<number>")
_probability = _matching(r"0?\.[0-9]+|[01](\.0*)?", "a number from 0 to 1, such as 0.35", float)
_level = _matching("(?i)debug|info|warning|error|critical", "one of debug, info, warning, error, critical", str.lower)
_sha256 = _matching("[0-9a-fA-F]{64}", "64 hexadecimal digits", str.lower)
_switch = _matching("(?i)true|false", "true or false", lambda text: text.lower() == "true")
_keys = _matching(  # what a bearer token is made of: RFC 6750, section 2.1
    r"(?a)[\w.~+/-]+=*( *, *[\w.~+/-]+=*)*",
    "keys of letters, digits and -._~+/=, separated by commas",
    lambda text: tuple(re.split(" *, *", text)),
)


def _address(text: str) -> str:
    try:
        return str(ipaddress.ip_address(text))
    except ValueError:
        raise ValueError("an IP address, such as 127.0.0.1, 0.0.0.0 or ::1") from None


def _folder(text: str) -> str:
    if os.path.isabs(text) and os.path.isdir(text):
        return text
    raise ValueError("the absolute path of a folder")


@dataclass(frozen=True, kw_only=True, slots=True, repr=False)
class Config:
    """What the operator decided. `repr` masks secrets and the credentials in addresses."""

    mlflow_tracking_uri: str = _variable(_registry, None)
    mlflow_tracking_username: str | None = _variable(str, secret=True)
    mlflow_tracking_password: str | None = _variable(str, secret=True)
    mlflow_tracking_token: str | None = _variable(str, secret=True)
    mlflow_s3_endpoint_url: str | None = _variable(_http)
    aws_access_key_id: str | None = _variable(str, secret=True)
    aws_secret_access_key: str | None = _variable(str, secret=True)
    aws_session_token: str | None = _variable(str, secret=True)
    aws_default_region: str | None = _variable(str)
    model_uri: str = _variable(_model, "models:/fraud-detector@champion")
    model_load_timeout: int = _variable(_whole(1, 3600), "30")
    model_poll_seconds: int = _variable(_whole(0, 86400), "0")
    model_sha256: str | None = _variable(_sha256)
    model_allow_unsafe: bool = _variable(_switch, "false")
    fraud_threshold: float | None = _variable(_probability)
    max_batch_size: int = _variable(_whole(1, 1_000_000), "10000")
    max_body_bytes: int = _variable(_whole(1024, 2**30), "4194304")
    max_line_bytes: int = _variable(_whole(1024, 2**20), "65536")
    api_keys: tuple[str, ...] | None = _variable(_keys, secret=True)
    allow_anonymous: bool = _variable(_switch, "false")
    host: str = _variable(_address, "127.0.0.1")
    port: int = _variable(_whole(1, 65535), "8000")
    web_concurrency: int = _variable(_whole(1, 256), "2")
    threads: int = _variable(_whole(1, 64), "4")
    max_connections: int = _variable(_whole(100, 100_000), "1000")
    slow_seconds: int = _variable(_whole(1, 600), "10")
    max_wait_ms: int = _variable(_whole(10, 10_000), "1000")
    drain_seconds: int = _variable(_whole(0, 600), "1")
    graceful_timeout: int = _variable(_whole(2, 3600), "30")
    log_level: str = _variable(_level, "info")
    memory_dir: str = _variable(_folder, "/dev/shm")

    @classmethod
    def from_environ(cls, environ: Mapping[str, str] = os.environ) -> "Config":
        """Read and check everything; raise one `ConfigError` that names all that is wrong. Empty counts as not set."""
        values: dict[str, Any] = {}
        problems = []
        for item in fields(cls):
            name, default = item.name.upper(), item.metadata["default"]
            text = environ.get(name, "").strip() or default
            try:
                values[item.name] = None if text == "" else item.metadata["parse"](text or "")
            except ValueError as expected:
                shown = MASK if item.metadata["secret"] else without_credentials(repr(text))
                found = "is not set" if text is None else f"is {shown}"
                problems.append(f"{name} {found}, expected {expected}")
        if not problems:
            config = cls(**values)
            problems = config._contradictions()
        if problems:
            raise ConfigError("bad configuration: " + "; ".join(problems))
        return config

    def _contradictions(self) -> list[str]:
        problems = []
        if not self.may_listen_on(self.host):
            problems.append(f"HOST is {self.host!r}, expected {LOOPBACK_ONLY}")
        if self.drain_seconds > self.graceful_timeout - 2:
            problems.append(f"DRAIN_SECONDS is '{self.drain_seconds}', expected at least 2 less than GRACEFUL_TIMEOUT")
        return problems

    def may_listen_on(self, host: str) -> bool:
        """Without keys only this machine may ask, unless the operator says so."""
        try:
            local = host == "localhost" or ipaddress.ip_address(host).is_loopback
        except ValueError:
            local = False
        return bool(self.api_keys) or self.allow_anonymous or local

    def export(self, environ: MutableMapping[str, str] = os.environ, every_core: bool = False) -> None:
        """Put into `environ` what MLflow, boto3 and the numeric libraries read from it, before they are imported."""
        defaults = {name: value for name, value in LIBRARY_DEFAULTS.items() if not (every_core and name == OPENMP)}
        for name, value in ((item.name.upper(), getattr(self, item.name)) for item in fields(self)):
            if name.startswith(("MLFLOW_", "AWS_")):
                environ.pop(name, None)  # an empty variable is not an absent one to boto3
                environ.update({name: value} if value else {})
        environ.update({name: value for name, value in defaults.items() if name not in environ})
        environ.update(MLFLOW_DISABLE_TELEMETRY="true", DO_NOT_TRACK="true")
        environ.update(MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT="true")  # with its credentials

    def mask(self, text: str) -> str:
        """`text` without secrets of this configuration and credentials in addresses: for what libraries say."""
        secrets = [getattr(self, item.name) or "" for item in fields(self) if item.metadata["secret"]]
        each = {secret for value in secrets for secret in ([value] if isinstance(value, str) else value)} - {""}
        for secret in sorted({*each, *map(quote_plus, each)}, key=len, reverse=True):
            text = text.replace(secret, MASK)
        return without_credentials(text)

    def __repr__(self) -> str:
        shown = {item.name: getattr(self, item.name) for item in fields(self)}
        shown |= {item.name: MASK for item in fields(self) if item.metadata["secret"] and shown[item.name]}
        return without_credentials(" ".join(f"{name.upper()}={value!r}" for name, value in shown.items()))


def without_credentials(text: str) -> str:
    """The text, its addresses without user name and password (RFC 3986, section 3.2.1)."""
    return re.sub(r"://\S*@", "://", text)


def share_metrics(folder: str) -> None:
    """Tell prometheus_client where all processes have their metrics; it looks for that in the environment only."""
    os.environ["PROMETHEUS_MULTIPROC_DIR"] = folder


def prepare(program: str, every_core: bool = False) -> Config:
    """The configuration, exported for libraries still to be imported; a wrong one ends the program with one line."""
    try:
        config = Config.from_environ()
    except ConfigError as error:
        sys.exit(f"{program}: {error}")
    config.export(every_core=every_core)
    return config
