"""What runs from the registry is decided here, not by the artifact: poisoned versions in a real registry."""

import functools
import json
import pickle
import shutil
import subprocess
import sys
import urllib.request
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlflow
import numpy as np
import pytest
import skops.io
import yaml
from sklearn.feature_extraction.text import CountVectorizer
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import FunctionTransformer, StandardScaler

from conftest import NAME, TRANSACTION, config, failure, running
from model import SKOPS_PROTOCOL, ModelError, Snapshot, acquire

SEE = "(MODEL_ALLOW_UNSAFE; README: A model of your own)"
A_PICKLE = "serialization_format is pickle, expected skops; pickled_model is model.pkl, expected model.skops"
Poison = Callable[[Path, dict[str, Any], str], None]
Poisoned = Callable[[Poison], tuple[str, Path]]


class Evil:
    """Unpickled, it leaves a file."""

    def __init__(self, canary: str) -> None:
        self.canary = canary

    def __reduce__(self) -> tuple[object, ...]:
        return subprocess.call, (["touch", self.canary],)


def write_pickle(folder: Path, flavors: dict[str, Any], model: object) -> None:
    (folder / "model.pkl").write_bytes(pickle.dumps(model))
    flavors["sklearn"] |= {"serialization_format": "pickle", "pickled_model": "model.pkl"}


def a_pickle(folder: Path, flavors: dict[str, Any], canary: str) -> None:
    write_pickle(folder, flavors, Evil(canary))


def a_pickle_by_default(folder: Path, flavors: dict[str, Any], canary: str) -> None:
    (folder / "model.skops").write_bytes(pickle.dumps(Evil(canary)))
    del flavors["sklearn"]["serialization_format"]


def a_pickle_that_scores(folder: Path, flavors: dict[str, Any], canary: str) -> None:
    """The champion itself, with something in it that runs when it is unpickled."""
    model = mlflow.sklearn.load_model(str(folder))
    model.evil = Evil(canary)
    write_pickle(folder, flavors, model)


def no_scikit_learn_model(folder: Path, flavors: dict[str, Any], canary: str) -> None:
    del flavors["sklearn"]


def a_path_elsewhere(folder: Path, flavors: dict[str, Any], canary: str) -> None:
    flavors["sklearn"]["pickled_model"] = "../../model.skops"


def a_foreign_type(folder: Path, flavors: dict[str, Any], canary: str) -> None:
    """In a file of skops, trusted by the artifact itself."""
    transformer = FunctionTransformer(subprocess.getoutput, kw_args={"encoding": canary})
    skops.io.dump(transformer, folder / "model.skops")
    flavors["sklearn"]["skops_trusted_types"] = ["subprocess.getoutput"]


def a_foreign_type_unasked(folder: Path, flavors: dict[str, Any], canary: str) -> None:
    a_foreign_type(folder, flavors, canary)
    flavors["sklearn"]["skops_trusted_types"] = ["functools.partial"]


def a_reader_of_files(folder: Path, flavors: dict[str, Any], canary: str) -> None:
    """What skops trusts by itself: its category would be the path of a file that it reads."""
    reader = CountVectorizer(input="filename", vocabulary=["x"])
    flatten = FunctionTransformer(functools.partial(np.asarray))
    skops.io.dump(make_pipeline(flatten, reader), folder / "model.skops")
    flavors["sklearn"]["skops_trusted_types"] = ["functools.partial"]


def an_old_protocol(folder: Path, flavors: dict[str, Any], canary: str) -> None:
    """skops reads a function's name from another place in files that claim an older protocol."""
    change_schema(folder / "model.skops", {"protocol": 0})


def a_name_that_is_no_text(folder: Path, flavors: dict[str, Any], canary: str) -> None:
    """Half of a surrogate pair, which cannot be encoded."""
    change_schema(folder / "model.skops", {"__class__": "\ud800"})


def change_schema(path: Path, changes: dict[str, Any]) -> None:
    with zipfile.ZipFile(path) as archive:
        files = {name: archive.read(name) for name in archive.namelist()}
    schema = json.loads(files["schema.json"]) | changes
    files["schema.json"] = json.dumps(schema).encode()
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in files.items():
            archive.writestr(name, data)


def a_type_asked_for(folder: Path, flavors: dict[str, Any], canary: str) -> None:
    flavors["sklearn"]["skops_trusted_types"] = ["functools.partial", "os.system"]


def a_method(folder: Path, flavors: dict[str, Any], canary: str) -> None:
    """A method of a trusted type, called on what is scored."""
    skops.io.dump(FunctionTransformer(StandardScaler().fit), folder / "model.skops")


def a_loader_of_its_own(folder: Path, flavors: dict[str, Any], canary: str) -> None:
    """Of the flavor `python_function`, as `mlflow.pyfunc.load_model` would run it."""
    (folder / "code").mkdir()
    (folder / "code" / "evil_loader.py").write_text(
        f"open({canary!r}, 'w').close()\nfrom mlflow.sklearn import _load_pyfunc\n"
    )
    flavors["python_function"] |= {"loader_module": "evil_loader", "code": "code"}


def code_paths(folder: Path, flavors: dict[str, Any], canary: str) -> None:
    """Put before everything else on the path: a module of the artifact's instead of a library's."""
    (folder / "code").mkdir()
    (folder / "code" / "skops.py").write_text(f"open({canary!r}, 'w')\n")
    flavors["sklearn"]["code"] = "code"


@pytest.fixture
def poisoned(champion: str, snapshot: Snapshot, tmp_path: Path) -> Poisoned:
    """Registers the champion's files with something done to them: the version's URI, and the file that must not be."""

    def register(poison: Poison) -> tuple[str, Path]:
        folder, canary = tmp_path / "model", tmp_path / "canary"
        shutil.copytree(snapshot.path, folder, ignore=shutil.ignore_patterns("registered_model_meta"))
        mlmodel = yaml.safe_load((folder / "MLmodel").read_text())
        poison(folder, mlmodel["flavors"], str(canary))
        (folder / "MLmodel").write_text(yaml.safe_dump(mlmodel))
        with mlflow.start_run() as run:
            mlflow.log_artifacts(str(folder), "model")
        version = mlflow.register_model(f"runs:/{run.info.run_id}/model", "poisoned").version
        return f"models:/poisoned/{version}", canary

    return register


@pytest.mark.parametrize(
    ("poison", "found"),
    [
        (a_pickle, A_PICKLE),
        (a_pickle_by_default, "serialization_format is None, expected skops"),
        (a_path_elsewhere, "pickled_model is ../../model.skops, expected model.skops"),
        (a_foreign_type, "skops_trusted_types is ['subprocess.getoutput'], expected none"),
        (a_foreign_type_unasked, "it has subprocess.getoutput in it"),
        (a_reader_of_files, "it has numpy.asarray in it; it has sklearn.feature_extraction.text.CountVectorizer in it"),
        (a_method, "it has MethodNode in it"),
        (an_old_protocol, "it has skops protocol 0 in it"),
        (a_name_that_is_no_text, "it has sklearn.pipeline.? in it"),
        (a_type_asked_for, "skops_trusted_types is ['os.system'], expected none"),
        (code_paths, "code_paths is code, expected none"),
    ],
)
def test_refused(champion: str, poisoned: Poisoned, tmp_path: Path, poison: Poison, found: str) -> None:
    """With a sentence that names what was found, and before anything of it runs."""
    uri, canary = poisoned(poison)
    with pytest.raises(ModelError) as raised:
        acquire(config(mlflow_tracking_uri=champion, model_uri=uri), tmp_path)
    reason = f"version {uri.rpartition('/')[2]} is not safe to load: {found} {SEE}"
    assert str(raised.value) == f"{uri} at {champion}: {reason}"
    assert not canary.exists()


def test_other_flavors_are_not_read(
    champion: str, poisoned: Poisoned, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The model is the one of the flavor `sklearn`. What another flavor names runs where that is loaded, not here."""
    uri, canary = poisoned(a_loader_of_its_own)
    assert acquire(config(mlflow_tracking_uri=champion, model_uri=uri), tmp_path).unsafe == []
    assert not canary.exists()
    monkeypatch.setattr(sys, "path", [*sys.path])
    mlflow.pyfunc.load_model(uri)
    assert canary.exists()


def test_no_scikit_learn_model(champion: str, poisoned: Poisoned, tmp_path: Path) -> None:
    """It is not served, whatever the operator says."""
    uri, _ = poisoned(no_scikit_learn_model)
    with pytest.raises(ModelError) as raised:
        acquire(config(mlflow_tracking_uri=champion, model_uri=uri, model_allow_unsafe="true"), tmp_path)
    reason = "it is no scikit-learn model: its MLmodel file has no flavor sklearn"
    assert str(raised.value) == f"{uri} at {champion}: {reason}"


def test_protocol() -> None:
    """The one protocol that is accepted is the one that the installed skops writes."""
    assert SKOPS_PROTOCOL == skops.io._protocol.PROTOCOL


def test_refused_at_start(champion: str, poisoned: Poisoned) -> None:
    uri, canary = poisoned(a_pickle)
    status, _, lines = failure(champion, model_uri=uri)
    reason = f"is not safe to load: {A_PICKLE} {SEE}"
    assert (status, lines) == (1, [f"cannot serve {uri} at {champion}: version {uri.rpartition('/')[2]} {reason}"])
    assert not canary.exists()


def test_the_poison_is_real(champion: str, poisoned: Poisoned) -> None:
    """What the tests above keep from running does run where the operator says so, and the service says so too."""
    uri, canary = poisoned(a_pickle_that_scores)
    found = A_PICKLE.split("; ")
    with running(champion, model_uri=uri, model_allow_unsafe="true") as service:
        assert canary.exists()
        assert service.post("/predict", TRANSACTION)["transaction_id"] == "tx_12345"
        with urllib.request.urlopen(f"{service.url}/health") as answer:
            assert json.load(answer)["unsafe"] == found
        warning = f"[WARNING] MODEL_ALLOW_UNSAFE: this model may run code of its own: {'; '.join(found)}"
        assert service.log.count(warning) == 1


@pytest.mark.parametrize("poison", [a_pickle, a_pickle_by_default])
def test_pickle_runs_when_loaded(champion: str, poisoned: Poisoned, tmp_path: Path, poison: Poison) -> None:
    uri, canary = poisoned(poison)
    with pytest.raises(ModelError):  # what it unpickles is no model
        acquire(config(mlflow_tracking_uri=champion, model_uri=uri, model_allow_unsafe="true"), tmp_path)
    assert canary.exists()


def test_pinned_hash(champion: str, snapshot: Snapshot, tmp_path: Path) -> None:
    uri = f"models:/{NAME}/1"
    pinned = config(mlflow_tracking_uri=champion, model_uri=uri, model_sha256=snapshot.sha256.upper())
    assert acquire(pinned, tmp_path).sha256 == snapshot.sha256
    with pytest.raises(ModelError) as raised:
        acquire(config(mlflow_tracking_uri=champion, model_uri=uri, model_sha256="0" * 64), tmp_path)
    reason = f"the SHA-256 of version 1 is {snapshot.sha256}, expected {'0' * 64} (MODEL_SHA256)"
    assert str(raised.value) == f"{uri} at {champion}: {reason}"
