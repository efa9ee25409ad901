"""The configuration: read once, checked as a whole, silent about secrets."""

import re
from dataclasses import fields
from urllib.parse import quote_plus

import pytest

from config import Config, ConfigError, export
from conftest import HERE, config


def test_defaults() -> None:
    """Only the registry has to be named."""
    assert repr(config()) == (
        "MLFLOW_TRACKING_URI='http://127.0.0.1:9' MODEL_URI='models:/fraud-detector@champion' MODEL_LOAD_TIMEOUT=30 "
        "MODEL_POLL_SECONDS=0 MODEL_MEMORY_MB=1024 MODEL_SHA256=None MODEL_ALLOW_UNSAFE=False FRAUD_THRESHOLD=None "
        "MAX_BATCH_SIZE=10000 MAX_BODY_BYTES=4194304 MAX_LINE_BYTES=65536 API_KEYS=[] ALLOW_ANONYMOUS=False "
        "LOG_DECISIONS=False RECORD_KEY=None HOST='127.0.0.1' PORT=8000 WEB_CONCURRENCY=2 "
        "MAX_CONNECTIONS=1000 SLOW_SECONDS=10 MAX_WAIT_MS=1000 DRAIN_SECONDS=1 GRACEFUL_TIMEOUT=30 "
        "LOG_LEVEL='info' MEMORY_DIR='/dev/shm'"
    )


def test_every_problem_is_named_at_once() -> None:
    """One message for all variables at fault, with what was expected."""
    with pytest.raises(ConfigError) as raised:
        Config.from_environ(
            {"MODEL_URI": "fraud-detector", "PORT": "eighty", "FRAUD_THRESHOLD": "1.5", "LOG_LEVEL": "loud"}
        )
    assert str(raised.value) == (
        "bad configuration: "
        "MLFLOW_TRACKING_URI is not set, expected an http://, https:// or sqlite:/// address; "
        "MODEL_URI is 'fraud-detector', expected models:/<name>@<alias> or models:/<name>/<number>; "
        "FRAUD_THRESHOLD is '1.5', expected a number from 0 to 1, such as 0.35; "
        "PORT is 'eighty', expected a whole number from 1 to 65535; "
        "LOG_LEVEL is 'loud', expected one of debug, info, warning, error, critical"
    )


@pytest.mark.parametrize(
    ("variable", "value"),
    [
        ("port", "65536"),
        ("port", "0"),
        ("port", "-1"),
        ("port", "٣"),
        ("fraud_threshold", "nan"),
        ("fraud_threshold", "1.01"),
        ("max_batch_size", "0"),
        ("model_uri", "models:/fraud-detector/latest"),
        ("model_uri", "models:/fraud-detector"),
        ("mlflow_tracking_uri", "file:///tmp"),
        ("host", "localhost"),
        ("host", "0.0.0.0"),
        ("host", "::"),
        ("model_sha256", "abc"),
        ("model_allow_unsafe", "yes"),
        ("drain_seconds", "29"),
        ("api_keys", "schl\u00fcssel"),
        ("api_keys", "two words"),
        ("api_keys", "one,,three"),
        ("api_keys", "one:two:three"),
        ("api_keys", "payments:"),
        ("api_keys", "p_yments:one"),
        ("model_memory_mb", "63"),
        ("record_key", "too short"),
        ("memory_dir", "shm"),
        ("memory_dir", "/nowhere"),
    ],
)
def test_bad_values(variable: str, value: str) -> None:
    """A value outside its range is refused, not bent."""
    with pytest.raises(ConfigError, match=f"^bad configuration: {variable.upper()} is "):
        config(**{variable: value})


def test_decisions_are_logged_or_not() -> None:
    """From `warning` on, the decisions of single requests would not be on record, and those of batches would."""
    found = "bad configuration: LOG_LEVEL is 'warning', expected debug or info with LOG_DECISIONS=true"
    with pytest.raises(ConfigError, match=f"^{found}$"):
        config(log_decisions="true", log_level="WARNING")


def test_values_are_typed_and_empty_is_not_set() -> None:
    read = config(fraud_threshold="0.35", port=" 9000 ", host="::1", model_sha256="", slow_seconds="", log_level="INFO")
    assert (read.fraud_threshold, read.port, read.host, read.model_sha256, read.slow_seconds, read.log_level) == (
        *(0.35, 9000, "::1"),
        *(None, 10, "info"),
    )


def test_secrets_are_masked() -> None:
    """Neither `repr` nor the log shows a key, credentials in an address, or what MLflow and boto3 take as a secret."""
    secrets = {
        "mlflow_tracking_username": "s3cret-user",
        "mlflow_tracking_password": "s3cret-password",
        "mlflow_tracking_token": "s3cret-token",
        "mlflow_of_a_later_version_secret": "s3cret-mlflow",
        "aws_access_key_id": "s3cret-id",
        "aws_secret_access_key": "s3cret-key",
        "aws_session_token": "s3cret-session",
        "api_keys": "payments:s3cret-first,s3cret-second",
        "record_key": "s3cret-of-the-record",
    }
    open_ones = {"aws_default_region": "eu-central-1", "mlflow_s3_endpoint_url": "http://minio:9000", "my_token": "x"}
    read = config(mlflow_tracking_uri="https://user:s3cret/uri@mlflow.example/", **secrets, **open_ones)
    assert "s3cret" not in repr(read)
    assert "MLFLOW_TRACKING_URI='https://mlflow.example/'" in repr(read)
    assert "API_KEYS=['payments:***', '-:***']" in repr(read)
    assert "RECORD_KEY='***'" in repr(read)
    assert read.mask(f"tried {read.mlflow_tracking_uri} with {' '.join(secrets.values())}") == (
        "tried https://mlflow.example/ with *** *** *** *** *** *** *** payments:***,*** ***"
    )
    assert read.mask(" ".join(open_ones.values())) == "eu-central-1 http://minio:9000 x"


@pytest.mark.parametrize("secret", ["pa\\ss'wo\"rd", "e", "tab\t", "https://x"])
def test_odd_secrets_are_masked(secret: str) -> None:
    """Whatever is in it, and whatever else it is part of; encoded for a URL as well."""
    longer = f"{secret}-and-more/"
    read = config(mlflow_tracking_password=secret, mlflow_tracking_token=longer)
    assert read.mask(f"[{secret}] [{longer}] [{quote_plus(longer)}]") == "[***] [***] [***]"


def test_errors_show_no_credentials() -> None:
    with pytest.raises(ConfigError) as raised:
        config(mlflow_tracking_uri="postgresql://user:s3cret@db/mlflow")
    assert str(raised.value) == (
        "bad configuration: MLFLOW_TRACKING_URI is 'postgresql://db/mlflow', "
        "expected an http://, https:// or sqlite:/// address"
    )


def test_a_bad_secret_is_not_shown() -> None:
    with pytest.raises(ConfigError) as raised:
        config(api_keys="s3cret key", record_key="s3cret")
    assert str(raised.value) == (
        "bad configuration: API_KEYS is ***, expected keys of letters, digits and -._~+/=, "
        "each with an optional name and a colon before it, separated by commas; "
        "RECORD_KEY is ***, expected at least 16 characters"
    )


def test_who_may_ask() -> None:
    """This machine alone, unless there are keys or the operator says so."""
    assert config(api_keys="one, back-office2:two/2==").api_keys == (("-", "one"), ("back-office2", "two/2=="))
    assert config(host="0.0.0.0", api_keys="one").host == config(host="0.0.0.0", allow_anonymous="True").host
    assert config(host="127.3.2.1").host == "127.3.2.1"
    with pytest.raises(ConfigError) as raised:
        config(host="0.0.0.0", allow_anonymous="false")
    assert str(raised.value) == (
        "bad configuration: "
        "HOST is '0.0.0.0', expected a loopback address, unless API_KEYS or ALLOW_ANONYMOUS=true is set"
    )
    hosts = ["127.0.0.1", "::1", "0.0.0.0", "::", "10.0.0.1"]
    assert [config().may_listen_on(host) for host in hosts] == [True, True, False, False, False]


def test_export() -> None:
    """Defaults for the libraries, which the operator's values override; no telemetry; no empty variable."""
    environ = {
        "AWS_DEFAULT_REGION": "",
        "OMP_NUM_THREADS": "3",
        "DO_NOT_TRACK": "false",
        "MLFLOW_TRACKING_TOKEN": "t",
        "UNRELATED": "",
    }
    export(environ)
    assert environ == {
        "DO_NOT_TRACK": "true",
        "JE_ARROW_MALLOC_CONF": "background_thread:false",
        "MLFLOW_DISABLE_TELEMETRY": "true",
        "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
        "MLFLOW_HTTP_REQUEST_BACKOFF_FACTOR": "1",
        "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "2",
        "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
        "MLFLOW_TRACKING_TOKEN": "t",
        "OMP_NUM_THREADS": "3",
        "OPENBLAS_NUM_THREADS": "1",
        "UNRELATED": "",
    }


def test_env_example_is_in_step() -> None:
    """`.env.example` and the README have every variable, the example with its default."""
    listed = re.findall(r"^(?:# )?([A-Z][A-Z0-9_]+)=(.*)$", (HERE / ".env.example").read_text(), re.M)
    defaults = {item.name.upper(): item.metadata["default"] for item in fields(Config) if item.metadata}
    assert dict(listed) == defaults | {"MLFLOW_TRACKING_URI": "sqlite:///.mlflow/mlflow.db"}
    table = (HERE / "README.md").read_text().partition("| variable |")[2]
    assert {name for name in defaults if f"`{name}`" not in table} == set()


def test_the_environment_is_read_in_one_place() -> None:
    """No other module reads it; bulk.py sets variables for MLflow."""
    reads = re.compile(r"^(?! *os\.environ\[\S+\] = ).*os\.(environ|getenv)", re.M)
    readers = [path.name for path in HERE.glob("*.py") if reads.search(path.read_text())]
    assert readers == ["config.py"]
