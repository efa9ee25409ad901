"""The configuration of the service. Nothing else in this project reads the environment.

Every variable is one field of `Config`: its name in lower case, how its text is parsed, its default and its meaning.
`python config.py` prints them all as `.env.example`.
"""

import ipaddress
import os
import re
import sys
import textwrap
from collections.abc import Callable, Mapping, MutableMapping
from dataclasses import dataclass, field, fields
from typing import Any
from urllib.parse import urlsplit

MASK = "***"

# What the libraries are told unless the operator says otherwise, and why.
LIBRARY_DEFAULTS = {
    "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",  # a log is no terminal
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "2",  # 7, MLflow's default, takes four minutes to say that nobody is there
    "MLFLOW_HTTP_REQUEST_BACKOFF_FACTOR": "1",
    "OMP_NUM_THREADS": "1",  # processes, not threads, use the cores; and a process that forks should have one thread
    "OPENBLAS_NUM_THREADS": "1",
    "JE_ARROW_MALLOC_CONF": "background_thread:false",  # where pyarrow is installed
}


class ConfigError(ValueError):
    """The environment is wrong; the message names every variable at fault and what was expected."""


def _text(value: str) -> str:
    return value


def _number(low: int, high: int) -> Callable[[str], int]:
    def parse(value: str) -> int:
        if re.fullmatch(r"[0-9]+", value) and low <= int(value) <= high:
            return int(value)
        raise ValueError(f"a whole number from {low} to {high}")

    return parse


def _probability(value: str) -> float:
    if re.fullmatch(r"[01]|[01]?\.[0-9]+", value) and float(value) <= 1:
        return float(value)
    raise ValueError("a number from 0 to 1, such as 0.35")


def _choice(*choices: str) -> Callable[[str], str]:
    def parse(value: str) -> str:
        if value.lower() in choices:
            return value.lower()
        raise ValueError("one of " + ", ".join(choices))

    return parse


def _matching(pattern: str, expected: str) -> Callable[[str], str]:
    def parse(value: str) -> str:
        if re.fullmatch(pattern, value):
            return value
        raise ValueError(expected)

    return parse


def _host(value: str) -> str:
    try:
        return str(ipaddress.ip_address(value))
    except ValueError:
        raise ValueError("an IP address, such as 127.0.0.1, 0.0.0.0 or ::1") from None


def _variable(parse: Callable[[str], Any], meaning: str, default: str | None = "", secret: bool = False) -> Any:
    """A field of `Config`. A default of None makes it required; an empty default means "not set", None in Config."""
    return field(metadata={"parse": parse, "meaning": meaning, "default": default, "secret": secret})


_http_url = _matching(r"https?://[^\s]+", "an http:// or https:// address")


@dataclass(frozen=True, kw_only=True, slots=True, repr=False)
class Config:
    """What the operator decided. `repr` masks secrets and the credentials in addresses."""

    mlflow_tracking_uri: str = _variable(
        _matching(r"(https?|sqlite)://[^\s]+", "an http://, https:// or sqlite:/// address"),
        "The MLflow server with the model registry; sqlite:/// is for a laptop (needs the full mlflow package).",
        default=None,
    )
    mlflow_tracking_username: str | None = _variable(_text, "User name for the MLflow server.")
    mlflow_tracking_password: str | None = _variable(_text, "Password for the MLflow server.", secret=True)
    mlflow_tracking_token: str | None = _variable(_text, "Bearer token for the MLflow server.", secret=True)
    mlflow_s3_endpoint_url: str | None = _variable(_http_url, "Address of an S3 store that is not AWS, such as MinIO.")
    aws_access_key_id: str | None = _variable(_text, "S3 access key, for s3:// artifacts.", secret=True)
    aws_secret_access_key: str | None = _variable(_text, "S3 secret key.", secret=True)
    aws_session_token: str | None = _variable(_text, "S3 session token, for temporary keys.", secret=True)
    aws_default_region: str | None = _variable(_text, "S3 region.")
    model_uri: str = _variable(
        _matching(r"models:/[^/@\s]+(@[^/@\s]+|/[1-9][0-9]*)", "models:/<name>@<alias> or models:/<name>/<number>"),
        "The model to serve, resolved once at start.",
        default="models:/fraud-detector@champion",
    )
    model_load_timeout: int = _variable(
        _number(1, 3600), "Seconds from start until the model is in memory; the service ends if it takes longer.", "30"
    )
    fraud_threshold: float | None = _variable(
        _probability, "Probability from which a transaction is fraud, instead of the model's own threshold."
    )
    max_batch_size: int = _variable(_number(1, 1_000_000), "Transactions in one batch.", "10000")
    max_body_bytes: int = _variable(_number(1024, 2**30), "Bytes in the body of one request.", str(4 * 2**20))
    host: str = _variable(_host, "Address to listen on.", "127.0.0.1")
    port: int = _variable(_number(0, 65535), "Port to listen on; 0 takes a free one.", "8000")
    web_concurrency: int = _variable(_number(1, 256), "Worker processes; about one a core.", "2")
    threads: int = _variable(_number(1, 64), "Threads in each worker.", "4")
    log_level: str = _variable(
        _choice("debug", "info", "warning", "error", "critical"), "How much is logged to standard error.", "info"
    )
    memory_dir: str = _variable(
        _matching(r"/.*", "an absolute path"), "Folder in memory (tmpfs) for the model's files.", "/dev/shm"
    )

    @classmethod
    def from_environ(cls, environ: Mapping[str, str] = os.environ) -> "Config":
        """Read and check everything; raise one `ConfigError` that names all that is wrong. Empty counts as not set."""
        values: dict[str, Any] = {}
        problems = []
        for item in fields(cls):
            name = item.name.upper()
            text = environ.get(name, "").strip() or item.metadata["default"]
            try:
                values[item.name] = item.metadata["parse"](text or "") if text != "" else None
            except ValueError as expected:
                found = "is not set" if text is None else f"is {MASK if item.metadata['secret'] else repr(text)}"
                problems.append(f"{name} {found}, expected {expected}")
        if problems:
            raise ConfigError("bad configuration: " + "; ".join(problems))
        return cls(**values)

    def export(self, environ: MutableMapping[str, str] = os.environ) -> None:
        """Put into `environ` what MLflow, boto3 and the numeric libraries read from it, before they are imported."""
        for item in fields(self):
            if item.name.startswith(("mlflow_", "aws_")):
                environ.pop(item.name.upper(), None)  # an empty variable is not an absent one to boto3
                if value := getattr(self, item.name):
                    environ[item.name.upper()] = value
        for name, value in LIBRARY_DEFAULTS.items():
            environ.setdefault(name, value)
        environ.update(MLFLOW_DISABLE_TELEMETRY="true", DO_NOT_TRACK="true")

    def masked(self) -> dict[str, Any]:
        """Every variable and its value, fit for a log."""
        return {item.name.upper(): self._shown(item.name, item.metadata["secret"]) for item in fields(self)}

    def _shown(self, name: str, secret: bool) -> Any:
        value = getattr(self, name)
        if isinstance(value, str) and secret:
            return MASK
        return without_credentials(value) if isinstance(value, str) and "://" in value else value

    def mask(self, text: str) -> str:
        """`text` without any secret of this configuration, for messages written by libraries."""
        secrets = [getattr(self, item.name) for item in fields(self) if item.metadata["secret"]]
        for uri in (self.mlflow_tracking_uri, self.mlflow_s3_endpoint_url or ""):
            secrets.append(urlsplit(uri).password)
        for secret in filter(None, secrets):
            text = text.replace(secret, MASK)
        return text

    def __repr__(self) -> str:
        return "Config(" + ", ".join(f"{name}={value!r}" for name, value in self.masked().items()) + ")"


def prepare(program: str) -> Config:
    """The configuration, exported for libraries still to be imported; a wrong one ends the program with one line."""
    try:
        config = Config.from_environ()
    except ConfigError as error:
        sys.exit(f"{program}: {error}")
    config.export()
    return config


def without_credentials(uri: str) -> str:
    """The address without user name and password (RFC 3986, section 3.2.1)."""
    return re.sub(r"//[^/]*@", "//", uri)


def example() -> str:
    """The text of `.env.example`."""
    lines = ["# Every variable the service reads, with its default. Copy to .env, which `make` loads."]
    for item in fields(Config):
        default = item.metadata["default"]
        note = " Required." if default is None else " A secret." if item.metadata["secret"] else ""
        lines += ["", *textwrap.wrap(item.metadata["meaning"] + note, 110, initial_indent="# ", subsequent_indent="# ")]
        value = "sqlite:///.mlflow/mlflow.db" if default is None else default
        lines.append(f"{item.name.upper()}={value}" if value else f"# {item.name.upper()}=")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    print(example(), end="")
