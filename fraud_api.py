"""The HTTP service: bytes → `Transaction` → probability → `Prediction` → bytes."""

import logging
import re
import time
import uuid
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from typing import Any, TypeVar

import falcon
import msgspec
from msgspec import UNSET, UnsetType

from config import Config
from model import Model, Snapshot, Transaction, TransactionId, load

log = logging.getLogger("gunicorn.error")

JSON = "application/json"
Body = TypeVar("Body")
App = falcon.App[falcon.Request, falcon.Response]

# What a body can do to the decoder: break JSON, break UTF-8, nest without end.
MALFORMED = (msgspec.DecodeError, UnicodeDecodeError, RecursionError)

RULES = {
    name: schema["description"]
    for name, schema in msgspec.json.schema(Transaction)["$defs"]["Transaction"]["properties"].items()
}
BATCH_RULES = {"transactions": "a list of transactions"}

# The snapshot that this process and the workers forked from it serve; `gunicorn.conf.py` sets it in the master.
snapshot: Snapshot | None = None


class Prediction(msgspec.Struct, frozen=True, gc=False):
    """The answer to one transaction."""

    transaction_id: str
    is_fraud: bool
    fraud_probability: float
    confidence: float
    model_version: str
    prediction_time: datetime


class Problem(msgspec.Struct, frozen=True, kw_only=True):
    """An error as RFC 9457 has it. `index` and `transaction_id` say which row of a batch it is about."""

    index: int | UnsetType = UNSET
    transaction_id: str | UnsetType = UNSET
    type: str = "about:blank"
    title: str
    status: int
    detail: str | UnsetType = UNSET
    field: str | UnsetType = UNSET
    request_id: str | UnsetType = UNSET


class Batch(msgspec.Struct, frozen=True):
    """The body of a batch. Rows stay raw here, so that each can fail on its own."""

    transactions: list[msgspec.Raw]


class Predictions(msgspec.Struct, frozen=True):
    """The answer to a batch: every row is in one of the two lists, in the order of the input."""

    predictions: list[Prediction]
    errors: list[Problem]


class Identified(msgspec.Struct):
    """As much of a bad row as it takes to say which one it was."""

    transaction_id: TransactionId


class BodyError(Exception):
    """The body of a request is not what it should be."""

    def __init__(self, problem: Problem) -> None:
        super().__init__(problem.detail)
        self.problem = problem


encode = msgspec.json.encode
decode_transaction = msgspec.json.Decoder(Transaction).decode
decode_batch = msgspec.json.Decoder(Batch).decode
decode_identified = msgspec.json.Decoder(Identified).decode


def create_app(config: Config, model: Model) -> App:
    """The WSGI application that serves `model`. It reads nothing but its arguments."""
    app = falcon.App(media_type=JSON)
    app.add_route("/predict", Predict(config, model))
    app.add_route("/predict/batch", PredictBatch(config, model))
    health = Health(model)
    app.add_route("/health", health)
    app.add_route("/health/live", health, suffix="live")
    app.add_route("/health/ready", health, suffix="ready")
    app.add_error_handler(Exception, _unexpected)
    app.add_error_handler(falcon.HTTPError, _http_error)
    app.add_error_handler(BodyError, _body_error)
    return app


def get_app() -> App:
    """What gunicorn calls in each worker: the application on the snapshot that the master acquired."""
    if snapshot is None:
        raise RuntimeError("start with gunicorn and gunicorn.conf.py, without --preload")
    config = Config.from_environ()
    return create_app(config, load(snapshot, config))


class Predict:
    """`POST /predict`"""

    def __init__(self, config: Config, model: Model) -> None:
        self.limit = config.max_body_bytes
        self.model = model

    def on_post(self, req: falcon.Request, resp: falcon.Response) -> None:
        transaction = decode(decode_transaction, read_json(req, self.limit), RULES)
        resp.data = encode(predict(self.model, [transaction])[0])


class PredictBatch:
    """`POST /predict/batch`"""

    def __init__(self, config: Config, model: Model) -> None:
        self.limit = config.max_body_bytes
        self.rows = config.max_batch_size
        self.model = model

    def on_post(self, req: falcon.Request, resp: falcon.Response) -> None:
        batch = decode(decode_batch, read_json(req, self.limit), BATCH_RULES)
        if len(batch.transactions) > self.rows:
            raise falcon.HTTPContentTooLarge(description=f"more than {self.rows} transactions")
        transactions, errors = decode_rows(batch.transactions)
        resp.data = encode(Predictions(predict(self.model, transactions), errors))


class Health:
    """`GET /health`: what is served. `/health/live` touches nothing; `/health/ready` scores a row."""

    def __init__(self, model: Model) -> None:
        self.model = model
        self.started = time.monotonic()

    def on_get(self, req: falcon.Request, resp: falcon.Response) -> None:
        model = self.model
        resp.data = encode(
            {
                "status": "ok",
                "model_name": model.snapshot.name,
                "model_version": model.snapshot.version,
                "registry_version": model.snapshot.number,
                "registry_uri": model.snapshot.registry_uri,
                "threshold": model.threshold,
                "scorer": model.scorer,
                "loaded_at": model.loaded_at,
                "uptime_seconds": round(time.monotonic() - self.started, 3),
            }
        )

    def on_get_live(self, req: falcon.Request, resp: falcon.Response) -> None:
        resp.data = encode({"status": "ok"})

    def on_get_ready(self, req: falcon.Request, resp: falcon.Response) -> None:
        try:
            self.model.score(self.model.golden[:1])
        except Exception:
            log.exception("the model does not score")
            raise falcon.HTTPServiceUnavailable(description="this worker cannot score") from None
        resp.data = encode({"status": "ok"})


def predict(model: Model, transactions: Sequence[Transaction]) -> list[Prediction]:
    """Score transactions in one call; predictions come in the same order."""
    if not transactions:
        return []
    now = datetime.now(UTC).replace(microsecond=0)
    version, threshold = model.snapshot.version, model.threshold
    return [
        Prediction(row.transaction_id, p >= threshold, p, max(p, 1 - p), version, now)
        for row, p in zip(transactions, model.score(transactions).tolist(), strict=True)
    ]


def decode_rows(raws: Sequence[msgspec.Raw]) -> tuple[list[Transaction], list[Problem]]:
    """Decode each row on its own: the good ones, and a problem for each of the others, both in order."""
    transactions: list[Transaction] = []
    errors: list[Problem] = []
    for index, raw in enumerate(raws):
        try:
            transactions.append(decode_transaction(raw))
        except MALFORMED as error:
            errors.append(
                msgspec.structs.replace(problem(error, raw, RULES), index=index, transaction_id=readable_id(raw))
            )
    return transactions, errors


def decode(decoder: Callable[[bytes], Body], body: bytes, rules: dict[str, str]) -> Body:
    """Decode a whole body, or raise `BodyError` with what is wrong."""
    try:
        return decoder(body)
    except MALFORMED as error:
        raise BodyError(problem(error, body, rules)) from None


def readable_id(raw: msgspec.Raw) -> str | UnsetType:
    """The `transaction_id` of a bad row, if that much of it is good."""
    try:
        return str(decode_identified(raw).transaction_id)
    except MALFORMED:
        return UNSET


def read_json(req: falcon.Request, limit: int) -> bytes:
    """The body, of which no more than `limit` + 1 bytes are read, whatever its length is said to be."""
    if (req.content_type or "").partition(";")[0].strip().lower() != JSON:
        raise falcon.HTTPUnsupportedMediaType(description=f"expected {JSON}")
    if (req.content_length or 0) <= limit:
        body = req.stream.read(limit + 1)  # ends with the body: gunicorn frames it (wsgi.input_terminated)
        if len(body) <= limit:
            return bytes(body)
    raise falcon.HTTPContentTooLarge(description=f"more than {limit} bytes")


def problem(error: Exception, body: bytes | msgspec.Raw, rules: dict[str, str]) -> Problem:
    """What is wrong with a body, in our own words: msgspec names the field, the schema's description is the rule."""
    if not (isinstance(error, msgspec.ValidationError) and well_formed(body)):
        return Problem(title="Bad Request", status=400, detail="malformed JSON")
    found = re.search(r"`\$\.(\w+)|required field `(\w+)`", str(error))
    field = (found[1] or found[2]) if found else ""
    if field not in rules:
        return Problem(title="Unprocessable Entity", status=422, detail="expected a JSON object")
    return Problem(title="Unprocessable Entity", status=422, detail=f"{field}: expected {rules[field]}", field=field)


def well_formed(body: bytes | msgspec.Raw) -> bool:
    """Whether it is JSON to its end: the decoder stops at the first thing that is wrong."""
    try:
        msgspec.json.decode(body, type=msgspec.Raw)
    except MALFORMED:
        return False
    return True


def send_problem(resp: falcon.Response, body: Problem) -> None:
    resp.status = body.status
    resp.content_type = "application/problem+json"
    resp.data = encode(body)


def _http_error(req: Any, resp: falcon.Response, error: falcon.HTTPError, params: Any) -> None:
    """What Falcon and the handlers raise on purpose."""
    if error.headers:
        resp.set_headers(error.headers)
    title = falcon.code_to_http_status(error.status_code).partition(" ")[2]
    send_problem(resp, Problem(title=title, status=error.status_code, detail=error.description or UNSET))


def _body_error(req: Any, resp: falcon.Response, error: BodyError, params: Any) -> None:
    send_problem(resp, error.problem)


def _unexpected(req: falcon.Request, resp: falcon.Response, error: Exception, params: Any) -> None:
    """A mistake of ours: details in the log, the request's id to the client."""
    request_id = uuid.uuid4().hex
    log.error("request %s: %s %s failed", request_id, req.method, req.path, exc_info=error)
    send_problem(resp, Problem(title="Internal Server Error", status=500, request_id=request_id))
