"""What a real service puts on record is computed again, to the last digit."""

import json
import signal
import sys
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import cast

from mlflow import MlflowClient

from conftest import HERE, NAME, Process, Service, running, wait_until
from data import generate

ALIAS = "recorded"
ROWS = 900
TABLE = generate(ROWS, seed=11).rows
TABLE = TABLE.assign(transaction_id=[f"tx_{row}" for row in range(ROWS)])
Rows = list[dict[str, object]]
TRANSACTIONS: Rows = json.loads(TABLE.to_json(orient="records", double_precision=15))


def stream(service: Service, rows: Rows, halfway: Callable[[], None] = lambda: None) -> list[dict[str, object]]:
    """The answers to a stream of transactions; something happens in the middle of it."""

    def body() -> Iterator[bytes]:
        for row in rows[: len(rows) // 2]:
            yield json.dumps(row).encode() + b"\n"
        halfway()
        for row in rows[len(rows) // 2 :]:
            yield json.dumps(row).encode() + b"\n"

    request = urllib.request.Request(f"{service.url}/predict/batch", body(), {"Content-Type": "application/x-ndjson"})
    with urllib.request.urlopen(request, timeout=30) as answer:
        return [json.loads(line) for line in answer]


def ask(service: Service, rows: Rows, halfway: Callable[[], None] = lambda: None) -> list[object]:
    """The versions that answer rows one by one, in a batch and in a stream."""
    answers = [service.post("/predict", row) for row in rows[:20]]
    answers += cast(Rows, service.post("/predict/batch", {"transactions": rows[20:220]})["predictions"])
    answers += stream(service, rows[220:], halfway)
    return [answer["model_version"] for answer in answers]


def decisions(service: Process) -> list[str]:
    return [line for line in service.output_lines if '"fraud_probability"' in line]


def test_a_record_over_a_roll(champion: str, second: str, tmp_path: Path) -> None:
    """A version is rolled in the middle of a stream; then the other answers. There is not one difference."""
    client, key = MlflowClient(champion), "a key of the record"
    client.set_registered_model_alias(NAME, ALIAS, "1")
    options = {"model_uri": f"models:/{NAME}@{ALIAS}", "log_decisions": "true", "record_key": key}
    with running(champion, **options) as service:

        def roll() -> None:
            client.set_registered_model_alias(NAME, ALIAS, second)
            service.popen.send_signal(signal.SIGHUP)
            wait_until(lambda: "verified, replacing workers for" in service.log, "the roll has begun")

        assert ask(service, TRANSACTIONS[:500], roll) == ["v1.2.3"] * 500
        wait_until(lambda: f"] serving {NAME} v2, " in service.log, "v2 is announced")
        assert ask(service, TRANSACTIONS[400:]) == ["v2"] * 500
        wait_until(lambda: len(decisions(service)) == 1000, "every decision is on record")
        record = [*service.output_lines]
    client.delete_registered_model_alias(NAME, ALIAS)

    (tmp_path / "log.ndjson").write_text("".join(f"{line}\n" for line in record))
    TABLE.to_csv(tmp_path / "data.csv", index=False)
    words = ("--decisions", "log.ndjson", "--data", "data.csv")
    environ = {"MLFLOW_TRACKING_URI": champion, "RECORD_KEY": key}
    replayed = Process(sys.executable, str(HERE / "replay.py"), *words, environ=environ, cwd=tmp_path)
    status = replayed.wait(120)
    [total, first, last, verdict] = replayed.output_lines
    replayed.stop()
    assert (status, verdict) == (0, "EQUAL: 1,000 decisions, to 1e-09")
    assert total == "log.ndjson: 1,000 decisions, 0 without data, 100 repeated"
    for line, name in ((first, f"{NAME} version 1 (v1.2.3, "), (last, f"{NAME} version {second} (v2, ")):
        assert line.startswith(name)
        assert line.endswith("): 500 decisions, largest difference 0.0e+00, 0 decided otherwise")
