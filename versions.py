"""Versions of the model in the MLflow registry: register, find, load, promote and roll back."""

import shutil
import threading
import time
from argparse import Namespace
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import mlflow
import msgspec
import numpy as np
import pandas as pd
from mlflow import MlflowClient
from mlflow.models import ModelSignature
from mlflow.types import ColSpec, Schema
from sklearn.pipeline import Pipeline

from config import Config
from data import FEWEST_IN_PART, DataError, Sample, Split
from model import SIGNATURE, TRUSTED_TYPES, Golden, Metadata, Model, ModelError, fetch, load, new_folder
from report import CHAMPION

PREVIOUS = "previous"
GOLDEN_ROWS = 8
EVERY = 5  # seconds between two lines of progress


def say(text: str) -> None:
    print(f"{time.strftime('%H:%M:%S')} {text}", flush=True)


@contextmanager
def still() -> Iterator[None]:
    """Print a line every few seconds that says for how long the program has been running."""
    done, started = threading.Event(), time.monotonic()

    def tell() -> None:
        while not done.wait(EVERY):
            say(f"still running, {time.monotonic() - started:.0f} s")

    thread = threading.Thread(target=tell, daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()


def use_experiment(name: str, tracking_uri: str) -> None:
    """Log to the experiment `name`; with a local database, keep the artifacts beside it."""
    if tracking_uri.startswith("sqlite:///"):
        database = Path(tracking_uri.removeprefix("sqlite:///")).absolute()
        if not database.exists():  # renamed when complete: MLflow cannot use a half-made one
            MlflowClient(f"sqlite:///{database}.new").search_experiments()
            Path(f"{database}.new").rename(database)
        if mlflow.get_experiment_by_name(name) is None:
            mlflow.create_experiment(name, artifact_location=database.with_name("artifacts").as_uri())
    mlflow.set_experiment(name)


def aliases(name: str) -> dict[str, str]:
    """The aliases of a registered model and their version numbers; {} where there is no such model."""
    found = MlflowClient().search_registered_models(f"name='{name}'")
    return {alias: str(number) for model in found for alias, number in model.aliases.items()}


def register(
    model: Pipeline, rows: pd.DataFrame, name: str, tags: dict[str, str] | None = None, about: str = "", **known: Any
) -> str:
    """Log a model with the signature and the metadata that the service needs, register it, return its version number.

    The metadata are what is `known` and golden rows, spread from the lowest to the highest score.
    """
    scores = model.predict_proba(rows)[:, 1]
    chosen = np.argsort(scores)[np.linspace(0, len(scores) - 1, GOLDEN_ROWS).astype(int)]
    golden = [Golden(**rows.iloc[index].to_dict(), fraud_probability=float(scores[index])) for index in chosen]
    logged = mlflow.sklearn.log_model(
        model,
        name="model",
        signature=ModelSignature(Schema([ColSpec(kind, column) for column, kind in SIGNATURE])),
        metadata=msgspec.to_builtins(Metadata(golden, **known)),
        pyfunc_predict_fn="predict_proba",
        serialization_format="skops",
        skops_trusted_types=sorted(TRUSTED_TYPES),
        pip_requirements=mlflow.sklearn.get_default_pip_requirements(include_skops=True),  # guessing them takes seconds
    )
    version = str(mlflow.register_model(logged.model_uri, name, tags=tags).version)
    MlflowClient().update_model_version(name, version, about)
    return version


def promote(name: str, version: str, champion: str | None) -> None:
    """Move the alias from the champion that the version was compared with. Raises `ModelError` if it has moved."""
    now = aliases(name).get(CHAMPION)
    if now != champion:
        raise ModelError(f"version {version} is not promoted: the champion is version {now} by now, not {champion}")
    if champion:
        MlflowClient().set_registered_model_alias(name, PREVIOUS, champion)
    MlflowClient().set_registered_model_alias(name, CHAMPION, version)
    say(f"{name}: champion is version {version}" + (f", previous is version {champion}" if champion else ""))


def rollback(name: str) -> int:
    """Exchange champion and previous; return the exit status. Raises `ModelError` if one is missing."""
    found = aliases(name)
    if CHAMPION not in found or found.get(PREVIOUS) in (None, found[CHAMPION]):
        raise ModelError(f"{name} has no version to roll back to: its aliases are {found or 'none'}")
    MlflowClient().set_registered_model_alias(name, CHAMPION, found[PREVIOUS])  # first: it counts most
    MlflowClient().set_registered_model_alias(name, PREVIOUS, found[CHAMPION])
    say(f"{name}: champion is version {found[PREVIOUS]}, previous is version {found[CHAMPION]}")
    return 0


def as_served(name: str, number: str, config: Config) -> Model:
    """Fetch, check and load a version as the service does. Raises `ModelError`."""
    wanted = replace(config, model_sha256=None, fraud_threshold=None)
    folder = new_folder(config.memory_dir)
    try:
        return load(fetch(wanted, folder / number, name, number, None), wanted)
    finally:
        shutil.rmtree(folder)


def champion_of(options: Namespace, config: Config, held_out: Sample) -> tuple[str | None, Model | None, Sample]:
    """The champion's number, the champion if it can be compared with, and the rows to compare on. Raises `ModelError`.

    These rows are held out by the new version and were not used to train the champion.
    """
    number = aliases(options.name).get(CHAMPION)
    if number is None:
        return None, None, held_out
    try:
        if not (tag := MlflowClient().get_model_version(options.name, number).tags.get("split")):
            raise DataError("it has no record of the rows it was trained on (tag split)")
        both = held_out.take(msgspec.json.decode(tag, type=Split).unseen(held_out))
        if both.labels.sum() < FEWEST_IN_PART:
            raise DataError(f"of {len(both):,} rows that neither has seen {both.labels.sum()} are fraud")
        say(f"comparing with version {number} on {len(both):,} of {len(held_out):,} rows held out, unseen by both")
        return number, as_served(options.name, number, config), both
    except (ModelError, DataError) as error:
        why = f"version {number}, the champion, cannot be compared with: {error}"
        if options.promote == "if-better":
            raise ModelError(f"{why}; see --promote") from None
        say(why)
        return number, None, held_out


def check_release(options: Namespace) -> None:
    """Raise `ModelError` if another version has this release: predictions name it, so it must be unique."""
    same = f"name='{options.name}' and tags.release='{options.release}'"
    if options.release and (found := MlflowClient().search_model_versions(same)):
        raise ModelError(f"release {options.release} is version {found[0].version} of {options.name} already")
