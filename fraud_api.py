"""The HTTP service: bytes → `Transaction` → probability → `Prediction` → bytes."""

import errno
import hmac
import logging
import re
import sys
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping, MutableSequence, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime
from hashlib import sha256
from itertools import chain, repeat
from pathlib import Path
from random import getrandbits
from threading import Lock
from typing import Any, cast

import falcon
import msgspec
from msgspec import UNSET, UnsetType
from prometheus_client import CONTENT_TYPE_PLAIN_0_0_4

from config import Config
from model import RULES, Explanation, Model, Snapshot, Transaction, TransactionId, columns_of, digest, load, values_of
from telemetry import LOG_FIELDS, MOST_LINES, ROUTE, Metrics, ScoreCounter

log = logging.getLogger("gunicorn.error")

App = falcon.App[falcon.Request, falcon.Response]
JSON = "application/json"
NDJSON = "application/x-ndjson"
PROBLEM = "application/problem+json"
HERE = Path(__file__).parent
OK = b'{"status":"ok"}'
SAFE = {"X-Content-Type-Options": "nosniff", "Referrer-Policy": "no-referrer", "X-Frame-Options": "DENY"}
# A stream is read in pieces that grow from the first size to the last, so that the first answers come at once.
FIRST_READ, LAST_READ = 2**10, 2**17
BODIES_AT_A_TIME = 16  # of JSON batches, each of up to MAX_BODY_BYTES
REQUEST_ID = re.compile(r"[A-Za-z0-9._:/+=-]{1,128}")
# An escape in JSON text: a valid one (group 1), or half of a surrogate pair. For one of those msgspec refuses a whole
# batch. It is replaced by the byte FF, which `Raw` takes, so that only the row with this byte is refused.
HALF_PAIR = re.compile(rb"\\(?:(u[dD][89abAB]..\\u[dD][c-fC-F]..|(?!u[dD][89a-fA-F]).)|u[dD]...)", re.S)
# What msgspec raises for broken JSON, broken UTF-8 and endless nesting.
MALFORMED = (msgspec.DecodeError, ValueError, RecursionError)
BODY_READ = "fraud_api.body_read"  # in the WSGI environment if the body has been read, or is read as a stream


@dataclass
class Process:
    """State and functions of the process that the application uses. `gunicorn.conf.py` sets them, tests need not."""

    snapshot: Snapshot | None = None
    stopping: MutableSequence[int] = field(default_factory=lambda: bytearray(1))  # shared by all processes
    metrics: Metrics = field(default_factory=Metrics)
    log_line: Callable[[dict[str, Any]], None] = lambda line: None
    write_log: Callable[[], None] = lambda: None  # what log_line has queued
    close_connection: Callable[[], None] = lambda: None  # after the answer


process = Process()


class Prediction(msgspec.Struct, frozen=True, gc=False):
    """The answer to one transaction."""

    transaction_id: str
    is_fraud: bool
    fraud_probability: float
    confidence: float
    model_version: str
    prediction_time: datetime
    explanation: Explanation | UnsetType = UNSET


class Problem(msgspec.Struct, frozen=True, kw_only=True):
    """An error as in RFC 9457. `index` and `transaction_id` name the row of a batch."""

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


class Identified(msgspec.Struct, frozen=True):
    """As much of a bad row as it takes to name it."""

    transaction_id: TransactionId | UnsetType = UNSET


encode = msgspec.json.encode
encode_lines = msgspec.json.Encoder().encode_lines
decode_transaction = msgspec.json.Decoder(Transaction).decode
decode_batch = msgspec.json.Decoder(Batch).decode
decode_identified = msgspec.json.Decoder(Identified).decode

# field: the rule in words, from the schema
EXPECTED = {"transactions": "a list of transactions"} | {name: rule["description"] for name, rule in RULES.items()}


def problem(status: int, detail: str | UnsetType = UNSET, **more: Any) -> Problem:
    """A problem with the title of its status; a detail of `<field>: <rule>` gives its field."""
    title = falcon.code_to_http_status(status).partition(" ")[2]
    name = detail.partition(":")[0] if detail and ":" in detail else UNSET
    return Problem(title=title, status=status, detail=detail, field=name, **more)


# -- bytes → transactions ----------------------------------------------------------------------------------------------


def decode(decoder: Callable[[Any], Any], body: bytes | msgspec.Raw) -> Any:
    """What the decoder makes of a body, or the `Problem` with it: 400 if it is not JSON, else 422 with the field.

    Nothing is raised here: an exception's traceback would keep the body in memory.
    """
    try:
        return decoder(body)
    except MALFORMED as error:
        message = str(error) if isinstance(error, msgspec.ValidationError) else ""
    try:
        msgspec.json.decode(body, type=msgspec.Raw)  # the other decoder stopped at the first wrong field
    except MALFORMED:
        message = ""
    found = re.search(r"`(?:\$\.)?(\w+)`$", message)  # "Expected `int` - at `$.hour`", "missing required field `hour`"
    if not message:
        return problem(400, "malformed JSON")
    if not found or found[1] not in EXPECTED:
        return problem(422, "expected a JSON object")
    return problem(422, f"{found[1]}: expected {EXPECTED[found[1]]}")


def decode_rows(rows: Sequence[Any], first: int = 0, longest: int = sys.maxsize) -> Sequence[Transaction | Problem]:
    """The rows of a batch, numbered from `first`: a transaction, or what is wrong with it."""
    with suppress(*MALFORMED):
        if all(len(row) <= longest for row in rows):
            return list(map(decode_transaction, rows))
    return [decode_row(row, index, longest) for index, row in enumerate(rows, first)]


def decode_row(row: Any, index: int, longest: int) -> Transaction | Problem:
    if len(row) > longest:
        return problem(413, f"more than {longest} bytes", index=index)
    found: Transaction | Problem = decode(decode_transaction, row)
    if isinstance(found, Transaction):
        return found
    return msgspec.structs.replace(found, index=index, transaction_id=decode(decode_identified, row).transaction_id)


def read_json(req: falcon.Request, max_bytes: int) -> bytes:
    """The body, of which no more than `max_bytes` + 1 are read, whatever its length is said to be."""
    if media_type(req) != JSON:
        raise falcon.HTTPUnsupportedMediaType(description=f"expected {JSON} (or, for a stream of rows, {NDJSON})")
    if (req.content_length or 0) <= max_bytes:
        body = read(req.stream, max_bytes + 1)
        if req.content_length not in (None, len(body)):
            raise falcon.HTTPBadRequest(description="the body is shorter than its Content-Length")
        if len(body) <= max_bytes:
            req.env[BODY_READ] = True
            return body
    raise falcon.HTTPContentTooLarge(description=f"more than {max_bytes} bytes")


def read(stream: Any, size: int) -> bytes:
    """Up to `size` bytes; fewer only at the end of the body, which gunicorn knows (`wsgi.input_terminated`)."""
    try:
        return bytes(stream.read(size))
    except Exception as error:  # what gunicorn's parsers raise has no common type
        log.debug("broken body: %s", type(error).__name__)
        raise falcon.HTTPBadRequest(description="the body is broken or incomplete") from None


def media_type(req: falcon.Request) -> str:
    """The media type of the body, which must not be compressed (RFC 9110, sections 8.3 and 8.4)."""
    if req.env.get("HTTP_CONTENT_ENCODING", "identity").lower() != "identity":
        raise falcon.HTTPUnsupportedMediaType(
            description="expected a body that is not compressed", headers={"Accept-Encoding": "identity"}
        )
    return (req.content_type or "").partition(";")[0].strip().lower()


def read_lines(stream: Any, longest: int) -> Iterator[list[bytes]]:
    """The lines of a stream, a piece at a time. Of a line beyond `longest`, enough is kept to see that it is."""
    rest, size = b"", FIRST_READ
    while data := read(stream, size):
        *lines, rest = (rest + data).split(b"\n")
        yield lines
        rest = rest[: longest + 1]
        size = min(2 * size, LAST_READ)
    if rest:
        yield [rest]


# -- transactions → predictions ----------------------------------------------------------------------------------------


class Predictor:
    """Turns transactions into predictions, and counts them."""

    def __init__(self, config: Config, model: Model, process: Process) -> None:
        self.model, self.counter = model, ScoreCounter(model.metadata.reference, process.metrics)
        self.process, self.log_decisions = process, config.log_decisions
        self.record_key = (config.record_key or "").encode()

    def __call__(self, rows: Sequence[Transaction], explain: bool = False) -> list[Prediction]:
        """Score transactions in one call; predictions come in the same order."""
        columns = columns_of(rows)
        explanations: Iterable[Any] = repeat(UNSET)
        if explain:
            probabilities, explanations = self.model.explain(columns)
        else:
            probabilities = self.model.scorer(columns)
        now = datetime.now(UTC).replace(microsecond=0)
        version, scores = self.model.snapshot.version, probabilities.tolist()
        thresholds = map(self.model.threshold_for, columns[0])
        predictions = [
            Prediction(row.transaction_id, p >= threshold, p, p if p > 0.5 else 1 - p, version, now, explanation)
            for row, p, threshold, explanation in zip(rows, scores, thresholds, explanations, strict=False)
        ]
        self.counter.count(columns, scores, sum(prediction.is_fraud for prediction in predictions))
        return predictions

    def predict_rows(self, rows: Sequence[Transaction | Problem], explain: bool, logged: dict[str, Any]) -> Any:
        """Predictions for the transactions among the rows of a batch, in order; its counts are logged."""
        transactions = [row for row in rows if isinstance(row, Transaction)]
        predictions = self(transactions, explain) if transactions else []
        invalid, fraud = len(rows) - len(predictions), sum(prediction.is_fraud for prediction in predictions)
        self.counter.count_invalid(invalid)
        if self.log_decisions:
            self.log_rows(rows, predictions, logged)
        for name, count in (("rows", len(rows)), ("fraud", fraud), ("invalid", invalid)):
            logged[name] = logged.get(name, 0) + count
        return predictions

    def decision(self, row: Transaction, prediction: Prediction) -> dict[str, Any]:
        """What is logged of a decision: enough to find it, and to compute it again from the same transaction."""
        found = {
            "transaction_id": prediction.transaction_id,
            "is_fraud": prediction.is_fraud,
            "fraud_probability": prediction.fraud_probability,
            "threshold": self.model.threshold_for(row.amount),
            "model_name": self.model.snapshot.name,
            "registry_version": self.model.snapshot.number,
            "sha256": self.model.snapshot.sha256[:12],
        }
        return found | {"digest": digest(self.record_key, values_of(row))} if self.record_key else found

    def log_rows(self, rows: Sequence[Transaction | Problem], predictions: Sequence[Prediction], logged: Any) -> None:
        """Log every decision in a batch and write the lines: a batch is no faster than the reader of the log."""
        head = {"time": datetime.now(UTC), "level": "info", "logger": "decision", "request_id": logged["request_id"]}
        head |= {"model_version": logged["model_version"], "client": logged["client"]}
        following = iter(predictions)
        first = logged.get("rows", 0)  # after the earlier pieces of a stream
        for index, row in enumerate(rows, first):
            if isinstance(row, Transaction):
                self.process.log_line({**head, "index": index, **self.decision(row, next(following))})
            if (index + 1) % (MOST_LINES // 2) == 0:  # the queue of lines is bounded
                self.process.write_log()
        self.process.write_log()

    def asked_to_explain(self, req: falcon.Request) -> bool:
        asked = req.get_param("explain", default="false") if req.query_string else "false"
        if asked not in ("true", "false"):
            raise falcon.HTTPUnprocessableEntity(description="explain: expected true or false")
        if asked == "true" and self.model.metadata.reference is None:
            raise falcon.HTTPUnprocessableEntity(description="explain: this model has no reference transaction")
        return asked == "true"


# -- resources ---------------------------------------------------------------------------------------------------------


class Turns:
    """Lets `at_a_time` threads work, in the order in which they come.

    A thread that comes never overtakes one that waits, as it may with `threading.Semaphore`.
    """

    def __init__(self, wait_ms: int, at_a_time: int = 1) -> None:
        self.seconds, self.at_a_time = wait_ms / 1000, at_a_time
        self.lock, self.queue = Lock(), list[Any]()  # its first `at_a_time` threads have their turn, others wait

    @contextmanager
    def take(self, however_long: bool = False) -> Iterator[None]:
        """Wait for a turn. Raises `HTTPServiceUnavailable` if it takes longer than `wait_ms`."""
        turn = Lock()
        with self.lock:
            self.queue.append(turn)
            if len(self.queue) > self.at_a_time:
                turn.acquire()
        try:
            if not turn.acquire(timeout=-1 if however_long else self.seconds):
                raise falcon.HTTPServiceUnavailable(retry_after=1)
            yield
        finally:
            with self.lock:
                place = self.queue.index(turn)
                del self.queue[place]
                if place < self.at_a_time <= len(self.queue):
                    self.queue[self.at_a_time - 1].release()


class Predict:
    """`POST /predict`"""

    def __init__(self, config: Config, predictor: Predictor) -> None:
        self.max_bytes, self.predictor, self.turns = config.max_line_bytes, predictor, Turns(config.max_wait_ms)

    def on_post(self, req: falcon.Request, resp: falcon.Response) -> None:
        explain = self.predictor.asked_to_explain(req)
        transaction = decode(decode_transaction, read_json(req, self.max_bytes))
        if isinstance(transaction, Problem):
            send(req, resp, transaction)
            return
        with self.turns.take():
            [prediction] = self.predictor([transaction], explain)
        req.env[LOG_FIELDS] |= self.predictor.decision(transaction, prediction)
        resp.data = encode(prediction)


class PredictBatch:
    """`POST /predict/batch`: a JSON document, or a stream of JSON lines.

    Each worker decodes and scores one batch, or one piece of a stream, at a time: single requests are not delayed, and
    a body can take 36 times its size in memory while it is decoded. It reads few bodies at a time, which bounds memory.
    """

    def __init__(self, config: Config, predictor: Predictor, process: Process) -> None:
        self.config, self.predictor, self.process = config, predictor, process
        self.bodies, self.turns = Turns(config.max_wait_ms, BODIES_AT_A_TIME), Turns(config.max_wait_ms)

    def on_post(self, req: falcon.Request, resp: falcon.Response) -> None:
        explain = self.predictor.asked_to_explain(req)
        if media_type(req) == NDJSON:
            req.env[BODY_READ] = True
            answers = self.answer_stream(req.stream, explain, req.env[LOG_FIELDS])
            # The first piece is computed here, so that an error in it has a status of its own.
            resp.content_type, resp.stream = NDJSON, chain([next(answers, b"")], answers)
            return
        with self.bodies.take():
            body = read_json(req, self.config.max_body_bytes)
            with self.turns.take():
                self.answer_document(body, explain, req, resp)

    def answer_document(self, body: bytes, explain: bool, req: falcon.Request, resp: falcon.Response) -> None:
        batch = decode(decode_batch, body)
        if isinstance(batch, Problem) and batch.status == 400:
            batch = decode(decode_batch, HALF_PAIR.sub(lambda found: found[0] if found[1] else b"\xff", body))
        if isinstance(batch, Problem):
            send(req, resp, batch)
        elif len(batch.transactions) > self.config.max_batch_size:
            send(req, resp, problem(413, f"more than {self.config.max_batch_size} transactions"))
        else:
            rows = decode_rows(batch.transactions)
            predictions = self.predictor.predict_rows(rows, explain, req.env[LOG_FIELDS])
            resp.data = encode(Predictions(predictions, [row for row in rows if isinstance(row, Problem)]))

    def answer_stream(self, stream: Any, explain: bool, logged: dict[str, Any]) -> Iterator[bytes]:
        """JSON lines in, as they come; for each a line out, a prediction or a problem, in order, in constant memory."""
        started = False
        try:
            for lines in read_lines(stream, self.config.max_line_bytes):
                with self.turns.take(however_long=started):
                    rows = decode_rows(lines, logged.get("rows", 0), self.config.max_line_bytes)
                    predictions = iter(self.predictor.predict_rows(rows, explain, logged))
                    answers = encode_lines([row if isinstance(row, Problem) else next(predictions) for row in rows])
                if answers:
                    started = True
                    yield answers
        except Exception as error:
            self.process.close_connection()
            if not started:  # the error handlers answer
                raise
            logged["detail"] = "the stream was cut off"
            if not isinstance(error, (falcon.HTTPError, OSError)):
                report(logged, error)
            raise ConnectionResetError(errno.ECONNRESET, "the stream failed") from None  # gunicorn closes it quietly


class Get:
    """A resource that needs no key. HEAD is answered like GET; gunicorn leaves out the body."""

    public = True

    def __init__(self, render: Callable[[falcon.Request], bytes], media_type: str = JSON) -> None:
        self.render, self.media_type = render, media_type

    def on_get(self, req: falcon.Request, resp: falcon.Response) -> None:
        resp.content_type, resp.data = self.media_type, self.render(req)
        resp.set_headers(SAFE)

    on_head = on_get


def health(model: Model, known: bool) -> bytes:
    """What is served. A client that is not known gets no more than its name and version."""
    facts = {"status": "ok", **model.facts()}
    return encode(facts if known else {name: facts[name] for name in ("status", "model_name", "model_version")})


def readiness(model: Model, stopping: Sequence[int]) -> bytes:
    """Whether this worker can score: it scores a row."""
    if stopping[0]:
        raise falcon.HTTPServiceUnavailable(description="the service is stopping")
    model.score(model.metadata.golden[:1])
    return OK


# -- every request -----------------------------------------------------------------------------------------------------


class Keys:
    """The API keys, taken as bearer tokens (RFC 6750)."""

    def __init__(self, keys: Sequence[tuple[str, str]]) -> None:
        self.digests = [(name, sha256(key.encode()).digest()) for name, key in keys]

    def client(self, auth: str | None) -> str | None:
        """The name of the key, `-` for one without a name or where no keys are set; None if the key is not known.

        The time it takes does not depend on the key.
        """
        scheme, _, token = (auth or "").partition(" ")
        given = sha256(token.strip().encode()).digest()
        names = [name for name, digest in self.digests if hmac.compare_digest(given, digest)]
        if not self.digests:
            return "-"
        return names[0] if names and scheme.lower() == "bearer" else None


class Middleware:
    """What happens to every request: an id, the key's check, and the connection's end where it cannot be kept."""

    def __init__(self, model: Model, keys: Keys, process: Process) -> None:
        self.version, self.keys, self.process = model.snapshot.version, keys, process

    def process_request(self, req: falcon.Request, resp: falcon.Response) -> None:
        environ = req.env
        log_fields(environ)["model_version"] = self.version
        resp.set_header("X-Request-ID", environ[LOG_FIELDS]["request_id"])
        if "HTTP_HOST" not in environ and environ.get("SERVER_PROTOCOL") == "HTTP/1.1":
            raise falcon.HTTPBadRequest(description="Host: expected this header")

    def process_resource(self, req: falcon.Request, resp: falcon.Response, resource: Any, params: Any) -> None:
        """Check the key by the resource that was routed to, whatever the path looked like."""
        req.env[ROUTE] = req.uri_template
        if not getattr(resource, "public", False):
            client = self.keys.client(req.auth)
            if client is None:
                error = ', error="invalid_token"' if req.auth else ""
                challenge = f'Bearer realm="fraud-api"{error}'
                raise falcon.HTTPUnauthorized(description="expected an API key as bearer token", challenges=[challenge])
            req.env[LOG_FIELDS]["client"] = client

    def process_response(self, req: falcon.Request, resp: falcon.Response, resource: Any, succeeded: bool) -> None:
        if req.method == "OPTIONS" and succeeded:
            resp.set_header("Allow", f"{resp.get_header('Allow')}, OPTIONS")
        has_body = req.content_length or "HTTP_TRANSFER_ENCODING" in req.env
        if self.process.stopping[0] or (has_body and BODY_READ not in req.env):
            self.process.close_connection()


def request_id(given: str | None) -> str:
    """The client's own id if it is well-formed, else a new one."""
    if given is not None and REQUEST_ID.fullmatch(given):
        return given
    return f"{getrandbits(128):032x}"  # os.urandom releases the GIL, and another thread would take it


def log_fields(environ: dict[str, Any]) -> dict[str, Any]:
    """What is logged of a request. Falcon refuses some before the middleware has seen them."""
    if LOG_FIELDS not in environ:
        environ[LOG_FIELDS] = {"request_id": request_id(environ.get("HTTP_X_REQUEST_ID"))}
    return cast(dict[str, Any], environ[LOG_FIELDS])


def send(req: falcon.Request, resp: falcon.Response, found: Problem) -> None:
    """Answer with a problem."""
    logged = log_fields(req.env)
    resp.status, resp.content_type = found.status, PROBLEM
    resp.data = encode(msgspec.structs.replace(found, request_id=logged["request_id"]))
    if found.detail:
        logged["detail"] = found.detail  # which has no data of the client in it


def _expected(req: falcon.Request, resp: falcon.Response, error: falcon.HTTPError, params: Any) -> None:
    """What Falcon and the handlers raise on purpose."""
    resp.set_headers(error.headers or {})
    send(req, resp, problem(error.status_code, error.description or UNSET))


def _unexpected(req: falcon.Request, resp: falcon.Response, error: Exception, params: Any) -> None:
    """A mistake of ours: details in the log, the request's id to the client."""
    report(log_fields(req.env), error)
    send(req, resp, problem(500))


def report(logged: Mapping[str, Any], error: Exception) -> None:
    """Log what failed and where, but not the error's own words, which may quote a transaction."""
    trace = "".join(traceback.format_tb(error.__traceback__))
    log.error("request %s failed: %s\n%s", logged["request_id"], type(error).__name__, trace)


def create_app(config: Config, model: Model, process: Process) -> App:
    """The WSGI application that serves `model`. It reads nothing but its arguments and the files beside it."""
    keys = Keys(config.api_keys or ())
    predictor = Predictor(config, model, process)
    page, openapi, version = (
        HERE.joinpath(name).read_bytes() for name in ("page.html", "openapi.json", "version.json")
    )
    routes = {
        "/": Get(lambda _: page, "text/html; charset=utf-8"),
        "/predict": Predict(config, predictor),
        "/predict/batch": PredictBatch(config, predictor, process),
        "/health": Get(lambda req: health(model, known=keys.client(req.auth) is not None)),
        "/health/live": Get(lambda _: OK),
        "/health/ready": Get(lambda _: readiness(model, process.stopping)),
        "/metrics": Get(lambda _: process.metrics.text(model), CONTENT_TYPE_PLAIN_0_0_4),
        "/openapi.json": Get(lambda _: openapi),
        "/version": Get(lambda _: version),
    }
    app = falcon.App(media_type=JSON, middleware=[Middleware(model, keys, process)])
    for path, resource in routes.items():
        app.add_route(path, resource)
    app.add_error_handler(Exception, _unexpected)
    app.add_error_handler(falcon.HTTPError, _expected)
    return app


def get_app() -> App:
    """What gunicorn calls in each worker: the application on the snapshot that the master has fetched."""
    if process.snapshot is None:
        raise RuntimeError("start with gunicorn and gunicorn.conf.py, without --preload")
    config = Config.from_environ()
    return create_app(config, load(process.snapshot, config), process)
