"""Manifests, image, pipeline and scripts agree with each other and with the service. No cluster is needed."""

import json
import math
import os
import re
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import fields
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import kubernetes_validate
import numpy as np
import pytest
import yaml
from webtest import TestApp

from config import MASKED_NAMES, SECRET_SETTINGS, Config, ConfigError
from conftest import HERE, config, free_port

K8S = HERE / "k8s"
NAME = "app.kubernetes.io/name"
# Kinds without a schema in Kubernetes itself.
CUSTOM = {"HTTPRoute", "ServiceMonitor", "PrometheusRule", "AppProject", "Application"}
KUBERNETES = "1.34"
COMING_FROM = ("ingress", "monitoring")
WORKFLOWS = sorted((HERE / ".github/workflows").glob("*.yml"))
DOCKERFILE = (HERE / "Dockerfile").read_text()


def kustomize(folder: Path) -> list[dict[str, Any]]:
    """The manifests that `kubectl apply -k` would apply."""
    command = next(
        ([*words] for words in (("kubectl", "kustomize"), ("kustomize", "build")) if shutil.which(words[0])), None
    )
    if command is None:
        pytest.skip("neither kubectl nor kustomize is installed: k8s/ is not rendered")
    done = subprocess.run([*command, str(folder)], capture_output=True, text=True, check=True)
    return [document for document in yaml.safe_load_all(done.stdout) if document]


@pytest.fixture(scope="module")
def rendered() -> dict[str, dict[str, Any]]:
    """{kind: manifest}; there is one of each kind."""
    documents = kustomize(K8S)
    kinds = {document["kind"]: document for document in documents}
    assert len(kinds) == len(documents)
    return kinds


@pytest.fixture(scope="module")
def extended(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    """The same with both components, added as kustomization.yaml says."""
    folder = shutil.copytree(K8S, tmp_path_factory.mktemp("k8s"), dirs_exist_ok=True)
    file = folder / "kustomization.yaml"
    file.write_text(file.read_text() + "components: [components/monitoring, components/httproute]\n")
    return {document["kind"]: document for document in kustomize(folder)}


@pytest.fixture(scope="module")
def pod(rendered: dict[str, Any]) -> dict[str, Any]:
    return dict(rendered["Deployment"]["spec"]["template"]["spec"])


@pytest.fixture(scope="module")
def container(pod: dict[str, Any]) -> dict[str, Any]:
    [container] = pod["containers"]
    return dict(container)


def settings(rendered: dict[str, Any]) -> dict[str, str]:
    return dict(rendered["ConfigMap"]["data"])


def secrets() -> dict[str, str]:
    return dict(yaml.safe_load((K8S / "secret.example.yaml").read_text())["stringData"])


def read_config(rendered: dict[str, Any]) -> Config:
    """The configuration that the service reads from ConfigMap and Secret."""
    return Config.from_environ(settings(rendered) | secrets() | {"API_KEYS": "k3y"})


def each(value: object, key: str) -> Iterator[Any]:
    """Every value under this key, at any depth."""
    if isinstance(value, dict):
        if key in value:
            yield value[key]
        for inner in value.values():
            yield from each(inner, key)
    elif isinstance(value, list):
        for inner in value:
            yield from each(inner, key)


# -- manifests ---------------------------------------------------------------------------------------------------------


def test_schemas(rendered: dict[str, Any], extended: dict[str, Any]) -> None:
    """Every manifest fits the schema of its kind, without unknown fields; other kinds are not applied by default."""
    by_hand = [yaml.safe_load(path.read_text()) for path in (K8S / "argocd").glob("*.yaml")]
    secret = yaml.safe_load((K8S / "secret.example.yaml").read_text())
    for document in [*rendered.values(), *extended.values(), *by_hand, secret]:
        try:
            kubernetes_validate.validate(document, KUBERNETES, strict=True)
        except kubernetes_validate.SchemaNotFoundError:
            assert document["kind"] in CUSTOM
    assert {*rendered} & CUSTOM == set()
    assert "Ingress" not in extended


def test_settings(rendered: dict[str, Any]) -> None:
    """ConfigMap and Secret set every variable once, secrets in the Secret, to values that the service accepts."""
    names = {item.name.upper() for item in fields(Config)} - {"SECRETS"}
    found = {*settings(rendered), *secrets()}
    assert names - found == set()
    assert all(name.startswith(("MLFLOW_", "AWS_")) for name in found - names)
    assert {*secrets()} == {name for name in found if name in SECRET_SETTINGS or MASKED_NAMES.fullmatch(name)}
    assert {*secrets()} & {*settings(rendered)} == set()
    with pytest.raises(ConfigError, match="API_KEYS"):  # the placeholder is not a key
        Config.from_environ(settings(rendered) | secrets())
    read, usual = read_config(rendered), config(api_keys="k3y")
    differs = {item.name: getattr(read, item.name) for item in fields(Config)}
    differs = {name: value for name, value in differs.items() if value != getattr(usual, name)}
    assert re.fullmatch(r"models:/[\w-]+/\d+", differs.pop("model_uri")), "a number that a commit changes, not an alias"
    assert {*differs} == {"mlflow_tracking_uri", "host", "model_memory_mb"}


def test_settings_reach_the_pod(rendered: dict[str, Any], container: dict[str, Any]) -> None:
    """The pod refers to the ConfigMap by its generated name, so that changing a setting starts a rollout."""
    name = rendered["ConfigMap"]["metadata"]["name"]
    assert re.fullmatch(r"fraud-api-[a-z0-9]{10}", name)
    assert container["envFrom"] == [{"configMapRef": {"name": name}}, {"secretRef": {"name": "fraud-api"}}]
    assert "env" not in container


def test_probes_are_routes(container: dict[str, Any], app: TestApp) -> None:
    paths = {name: container[name]["httpGet"]["path"] for name in ("startupProbe", "readinessProbe", "livenessProbe")}
    assert paths == {
        "startupProbe": "/health/ready",
        "readinessProbe": "/health/ready",
        "livenessProbe": "/health/live",
    }
    assert all(app.get(path).status_code == 200 for path in paths.values())


def test_public_paths_are_routes(rendered: dict[str, Any], extended: dict[str, Any], app: TestApp) -> None:
    """Ingress and HTTPRoute open the same paths: all routes except /metrics."""
    [ingress] = each(rendered["Ingress"], "paths")
    [matches] = each(extended["HTTPRoute"], "matches")
    paths = [(path["path"], path["pathType"].removesuffix("Prefix")) for path in ingress]
    route = [(match["path"]["value"], match["path"]["type"].removesuffix("PathPrefix")) for match in matches]
    assert paths == route
    assert all(app.get(path, expect_errors=True).status_code in (200, 405) for path, _ in paths)
    routes = json.loads(app.get("/openapi.json").body)["paths"]
    assert {path for path in routes if not any(path == one or path.startswith(f"{one}/") for one, _ in paths)} == {
        "/metrics"
    }


def test_ports_agree(rendered: dict[str, Any], extended: dict[str, Any], container: dict[str, Any]) -> None:
    """The port's number is in the settings; everything else uses its name."""
    [port] = container["ports"]
    assert (port["name"], str(port["containerPort"])) == ("http", settings(rendered)["PORT"])
    [service] = rendered["Service"]["spec"]["ports"]
    assert (service["name"], service["targetPort"]) == ("http", "http")
    assert {*each([container[name] for name in container if name.endswith("Probe")], "port")} == {"http"}
    assert all(
        backend["port"] == {"name": "http"} for backend in each(list(each(rendered["Ingress"], "backend")), "service")
    )
    assert [ref["port"] for refs in each(extended["HTTPRoute"], "backendRefs") for ref in refs] == [service["port"]]
    endpoints = extended["ServiceMonitor"]["spec"]["endpoints"]
    assert [(one["port"], one["path"]) for one in endpoints] == [("http", "/metrics")]
    [[incoming]] = [rule["ports"] for rule in rendered["NetworkPolicy"]["spec"]["ingress"]]
    assert incoming["port"] == "http"
    assert re.search(r"^EXPOSE 8000$", DOCKERFILE, re.M)


def test_egress_is_what_the_settings_name(rendered: dict[str, Any]) -> None:
    """DNS, and the namespaces, pods and ports in the addresses of MLflow and the object store."""
    allowed = set()
    for rule in rendered["NetworkPolicy"]["spec"]["egress"]:
        [peer] = rule["to"]
        [space] = peer["namespaceSelector"]["matchLabels"].values()
        [name] = peer["podSelector"]["matchLabels"].values()
        allowed |= {(space, name, port["port"]) for port in rule["ports"]}
    assert allowed - {("kube-system", "kube-dns", 53)} == {
        (space, name, int(port))
        for address in (settings(rendered)["MLFLOW_TRACKING_URI"], settings(rendered)["MLFLOW_S3_ENDPOINT_URL"])
        for name, space, port in re.findall(r"//([^.]+)\.([^.]+)\.svc\.cluster\.local:(\d+)", address)
    }
    assert {*rendered["NetworkPolicy"]["spec"]["policyTypes"]} == {"Ingress", "Egress"}
    [incoming] = rendered["NetworkPolicy"]["spec"]["ingress"]
    spaces = [{"namespaceSelector": {"matchLabels": {"kubernetes.io/metadata.name": name}}} for name in COMING_FROM]
    assert incoming["from"] == spaces


def test_times_nest(rendered: dict[str, Any], pod: dict[str, Any], container: dict[str, Any]) -> None:
    """A pod has time to stop, a failing start exits by itself first, and a busy pod is not restarted."""
    found = read_config(rendered)
    before = container["lifecycle"]["preStop"]["sleep"]["seconds"]
    assert pod["terminationGracePeriodSeconds"] >= before + found.graceful_timeout + 5
    assert found.drain_seconds + 2 <= found.graceful_timeout
    patience = {
        name: container[f"{name}Probe"]["periodSeconds"] * container[f"{name}Probe"]["failureThreshold"]
        for name in ("startup", "readiness", "liveness")
    }
    assert patience["startup"] > 2 * found.model_load_timeout + 10  # to fetch, and for a worker to load
    assert before >= 5
    assert patience["liveness"] >= 60 > patience["readiness"]
    assert rendered["Deployment"]["spec"]["strategy"]["rollingUpdate"] == {"maxUnavailable": 0, "maxSurge": 1}


def test_selectors_match(rendered: dict[str, Any], extended: dict[str, Any], pod: dict[str, Any]) -> None:
    labels = rendered["Deployment"]["spec"]["template"]["metadata"]["labels"]
    selectors = [rendered["Service"]["spec"]["selector"]]
    selectors += [rendered[kind]["spec"]["selector"]["matchLabels"] for kind in ("Deployment", "PodDisruptionBudget")]
    selectors += [rendered["NetworkPolicy"]["spec"]["podSelector"]["matchLabels"]]
    selectors += [constraint["labelSelector"]["matchLabels"] for constraint in pod["topologySpreadConstraints"]]
    assert all(selector == {NAME: "fraud-api"} and selector.items() <= labels.items() for selector in selectors)
    monitored = extended["ServiceMonitor"]["spec"]["selector"]["matchLabels"]
    assert monitored.items() <= rendered["Service"]["metadata"]["labels"].items()
    target = rendered["HorizontalPodAutoscaler"]["spec"]["scaleTargetRef"]
    assert (target["kind"], target["name"]) == ("Deployment", rendered["Deployment"]["metadata"]["name"])
    assert "replicas" not in rendered["Deployment"]["spec"], "the HorizontalPodAutoscaler owns them"
    assert (
        rendered["HorizontalPodAutoscaler"]["spec"]["minReplicas"]
        > rendered["PodDisruptionBudget"]["spec"]["maxUnavailable"]
    )
    assert pod["serviceAccountName"] == rendered["ServiceAccount"]["metadata"]["name"]


def test_image_is_a_digest(container: dict[str, Any]) -> None:
    assert re.fullmatch(r"[\w./-]+@sha256:[0-9a-f]{64}", container["image"])


def test_nothing_is_root(rendered: dict[str, Any], pod: dict[str, Any], container: dict[str, Any]) -> None:
    """The restricted Pod Security Standard and more; the user is that of the image."""
    assert pod["securityContext"] == {
        "runAsNonRoot": True,
        "runAsUser": 10001,
        "runAsGroup": 10001,
        "seccompProfile": {"type": "RuntimeDefault"},
    }
    assert container["securityContext"] == {
        "allowPrivilegeEscalation": False,
        "readOnlyRootFilesystem": True,
        "capabilities": {"drop": ["ALL"]},
    }
    assert not {"hostNetwork", "hostPID", "hostIPC", "initContainers"} & {*pod}
    assert [*each(rendered, "automountServiceAccountToken")] == [False, False]
    assert pod["enableServiceLinks"] is False
    assert rendered["Namespace"]["metadata"]["labels"]["pod-security.kubernetes.io/enforce"] == "restricted"
    assert re.findall(r"^USER (.*)$", DOCKERFILE, re.M) == ["10001:10001"]


def test_memory(rendered: dict[str, Any], pod: dict[str, Any], container: dict[str, Any]) -> None:
    """The service writes to memory, and the container's limit includes it."""
    [mount], [volume] = container["volumeMounts"], pod["volumes"]
    assert (mount["name"], mount["mountPath"]) == (volume["name"], settings(rendered)["MEMORY_DIR"])
    assert volume["emptyDir"]["medium"] == "Memory"
    sizes = volume["emptyDir"]["sizeLimit"], container["resources"]["requests"]["memory"]
    assert sizes == ("256Mi", "512Mi")
    assert container["resources"]["limits"] == {"memory": "1Gi"}


def test_scaling(rendered: dict[str, Any], container: dict[str, Any]) -> None:
    """Scale by the share of the requested CPU, up faster than down; a node can always be drained."""
    scaler, budget = (rendered[kind]["spec"] for kind in ("HorizontalPodAutoscaler", "PodDisruptionBudget"))
    assert container["resources"]["requests"]["cpu"] == "1"
    [metric] = scaler["metrics"]
    assert metric["resource"] == {"name": "cpu", "target": {"type": "Utilization", "averageUtilization": 70}}
    up, down = scaler["behavior"]["scaleUp"], scaler["behavior"]["scaleDown"]
    assert up == {
        "stabilizationWindowSeconds": 15,
        "policies": [{"type": "Percent", "value": 100, "periodSeconds": 30}],
    }
    assert down == {"stabilizationWindowSeconds": 600, "policies": [{"type": "Pods", "value": 1, "periodSeconds": 120}]}
    assert scaler["minReplicas"] == 2 < scaler["maxReplicas"]
    assert (budget["maxUnavailable"], budget["unhealthyPodEvictionPolicy"]) == (1, "AlwaysAllow")


def test_ingress_is_encrypted(rendered: dict[str, Any]) -> None:
    spec = rendered["Ingress"]["spec"]
    [rule], [tls] = spec["rules"], spec["tls"]
    assert tls == {"hosts": [rule["host"]], "secretName": "fraud-api-tls"}
    assert spec["ingressClassName"] == "public"
    assert "annotations" not in rendered["Ingress"]["metadata"]


def test_argo_cd(rendered: dict[str, Any], extended: dict[str, Any]) -> None:
    """The project allows exactly the kinds in k8s/; the application uses its project, repository and namespace."""
    project, application = (
        yaml.safe_load((K8S / f"argocd/{name}.yaml").read_text()) for name in ("project", "application")
    )
    kinds = rendered | extended
    of_group = {(document["apiVersion"].rpartition("/")[0], kind) for kind, document in kinds.items()}
    whitelists = [project["spec"][f"{scope}ResourceWhitelist"] for scope in ("cluster", "namespace")]
    assert {(item["group"], item["kind"]) for items in whitelists for item in items} == of_group
    assert [item["kind"] for item in whitelists[0]] == ["Namespace"]
    assert application["spec"]["project"] == project["metadata"]["name"]
    assert project["spec"]["sourceRepos"] == [application["spec"]["source"]["repoURL"]]
    assert project["spec"]["destinations"] == [application["spec"]["destination"]]
    assert application["spec"]["destination"]["namespace"] == rendered["Namespace"]["metadata"]["name"]
    assert (HERE / application["spec"]["source"]["path"]).samefile(K8S)
    assert application["spec"]["source"]["targetRevision"] == "main"
    sync = application["spec"]["syncPolicy"]
    assert sync["automated"] == {"prune": True, "selfHeal": True, "allowEmpty": False}
    assert sync["syncOptions"] == ["ServerSideApply=true", "PruneLast=true"]
    assert sync["retry"]["backoff"]["factor"] == 2
    assert {document["metadata"].get("namespace", "fraud-api") for document in kinds.values()} == {"fraud-api"}


def test_guide_names_everything() -> None:
    """k8s/README.md names every manifest and, in its run book, every alert."""
    guide = (K8S / "README.md").read_text()
    manifests = [path.relative_to(K8S).as_posix() for path in K8S.rglob("*") if path.suffix in (".yaml", ".env")]
    assert [path for path in manifests if path not in guide] == []
    alerts = {*each(yaml.safe_load((K8S / "components/monitoring/rules.yaml").read_text()), "alert")}
    assert {*re.findall(r"^\| `(Fraud\w+)`", guide, re.M)} == alerts


def number(text: str) -> float:
    return float(text.replace(",", ""))


def test_guide_scales_by_what_was_measured(rendered: dict[str, Any]) -> None:
    """A pod's requests/s are those at which the measured CPU reaches the autoscaler's target; pods follow from them."""
    guide = " ".join((K8S / "README.md").read_text().split())
    [(cores, rates)] = re.findall(r"Measured were (.*?) of a core at (.*?) requests/s", guide)
    points = [sorted(map(number, re.findall(r"\d[\d,.]*\d", text))) for text in (cores, rates)]
    [target] = each(rendered["HorizontalPodAutoscaler"], "averageUtilization")
    table = re.findall(r"\| ([\d,]+) \w+/s(?: \([^|]*)? \| ([\d,]+) \w+/s: (\d+)", guide)
    assert number(table[0][0]) == pytest.approx(np.interp(target / 100, *points), rel=0.01)
    assert [math.ceil(number(wanted) / number(one)) for one, wanted, _ in table] == [int(pods) for *_, pods in table]
    assert len(table) == 3


# -- releases of a model -----------------------------------------------------------------------------------------------


def environment(folder: Path, **environ: str) -> dict[str, str]:
    """An environment with an author, and without the settings of Git on this machine."""
    author = {f"GIT_{who}_{what}": "x@example.com" for who in ("AUTHOR", "COMMITTER") for what in ("NAME", "EMAIL")}
    return {"PATH": os.environ["PATH"], "HOME": str(folder)} | author | environ


def git(folder: Path, *words: str) -> str:
    return subprocess.run(
        ["git", *words], cwd=folder, env=environment(folder), capture_output=True, text=True, check=True
    ).stdout


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A repository with the files that a release changes."""
    folder = tmp_path / "checkout"
    shutil.copytree(K8S, folder / "k8s")
    shutil.copy(HERE / "Makefile", folder)
    file = folder / "k8s/service.env"  # independent of the version that is released here
    file.write_text(re.sub("(?m)^MODEL_URI=.*$", "MODEL_URI=models:/fraud-detector/1", file.read_text()))
    git(tmp_path, "init", "-q", "checkout")
    git(folder, "add", "-A")
    git(folder, "commit", "-qm", "all")
    return folder


def make(folder: Path, *words: str, **environ: str) -> subprocess.CompletedProcess[str]:
    environ = environment(folder, **environ)
    return subprocess.run(["make", *words], cwd=folder, env=environ, capture_output=True, text=True, check=False)


def test_model_release(checkout: Path) -> None:
    """The commit changes the number and nothing else, which starts a rollout; `git revert` goes back."""
    before = kustomize(checkout / "k8s")
    assert make(checkout, "release-model", "VERSION=7").returncode == 0
    assert git(checkout, "log", "-1", "--format=%s").strip() == "Release fraud-detector 7"
    changes = [line for line in git(checkout, "show", "--format=", "-U0").splitlines() if re.match(r"[-+]\w", line)]
    assert changes == ["-MODEL_URI=models:/fraud-detector/1", "+MODEL_URI=models:/fraud-detector/7"]
    after = kustomize(checkout / "k8s")
    names = [
        [*each([found for found in documents if found["kind"] == "Deployment"], "configMapRef")]
        for documents in (before, after)
    ]
    assert names[0] != names[1]
    git(checkout, "revert", "--no-edit", "HEAD")
    assert kustomize(checkout / "k8s") == before


@pytest.mark.parametrize("version", ["", "v7", "0", "champion", "7 8", "7/../8", "$(id)"])
def test_model_release_of_no_number(checkout: Path, version: str) -> None:
    done = make(checkout, "release-model", f"VERSION={version}")
    assert done.returncode != 0
    assert "VERSION: expected a version's number, such as VERSION=7" in done.stderr
    assert git(checkout, "status", "--porcelain") == ""
    assert git(checkout, "rev-list", "--count", "HEAD").strip() == "1"


def test_model_release_is_of_nothing_else(checkout: Path) -> None:
    """Other changes, staged or not, stay out of the commit; releasing the same version again makes no commit."""
    (checkout / "Makefile").write_text((checkout / "Makefile").read_text() + "# more\n")
    git(checkout, "add", "Makefile")
    assert make(checkout, "release-model", "VERSION=7").returncode == 0
    assert git(checkout, "show", "--format=", "--name-only").split() == ["k8s/service.env"]
    assert make(checkout, "release-model", "VERSION=7").returncode == 0
    assert git(checkout, "rev-list", "--count", "HEAD").strip() == "2"


def test_model_release_without_a_name(checkout: Path) -> None:
    """Where git does not know the author, nothing changes."""
    done = make(checkout, "release-model", "VERSION=7", GIT_AUTHOR_NAME="", GIT_AUTHOR_EMAIL="", EMAIL="")
    assert done.returncode != 0
    assert git(checkout, "status", "--porcelain") == ""


def step(workflow: str, job: str, name: str) -> str:
    """The shell commands of a step."""
    steps = yaml.safe_load((HERE / ".github/workflows" / workflow).read_text())["jobs"][job]["steps"]
    [found] = [str(step["run"]) for step in steps if step.get("name") == name]
    return found


def run_step(folder: Path, commands: str, **environ: str) -> subprocess.CompletedProcess[str]:
    """Run them as GitHub's runners do."""
    words, environ = ["bash", "-e", "-c", commands], environment(folder, **environ)
    return subprocess.run(words, cwd=folder, env=environ, capture_output=True, text=True, check=False)


@pytest.fixture
def tools(tmp_path: Path) -> str:
    """A PATH with replacements: `kustomize edit set image` that writes the digest, and a `gh` that does nothing."""
    folder = tmp_path / "bin"
    folder.mkdir()
    (folder / "kustomize").write_text(
        '#!/bin/sh\necho "$@" >> ../called\nsed -i "s|^- digest: .*|- digest: ${4#*@}|" kustomization.yaml\n'
    )
    (folder / "gh").write_text("#!/bin/sh\n")
    for tool in folder.iterdir():
        tool.chmod(0o755)
    return f"{folder}:{os.environ['PATH']}"


def test_image_release(checkout: Path, tools: str) -> None:
    """The pipeline commits the digest and nothing else; the image's name is in lower case, as registries require."""
    commands, digest = step("ci-cd.yml", "deploy", "Commit the digest"), f"sha256:{'1' * 64}"
    environ = {"PATH": tools, "GITHUB_REPOSITORY": "Owner/Fraud-API"}
    for wrong in ("", "sha256:1", f"{digest}1", f"latest@{digest}"):
        done = run_step(checkout, commands, DIGEST=wrong, **environ)
        assert (done.returncode, done.stderr) == (1, f"unexpected digest: '{wrong}'\n")
    for _ in range(2):  # the second time nothing has changed
        done = run_step(checkout, commands, DIGEST=digest, **environ)
        assert done.returncode == 0, done.stderr
    called = (checkout / "called").read_text()
    assert called == f"edit set image fraud-api=ghcr.io/owner/fraud-api@{digest}\n" * 2
    assert git(checkout, "log", "--format=%s").splitlines() == [f"Deploy {digest}", "all"]
    assert git(checkout, "show", "--format=", "--name-only").split() == ["k8s/kustomization.yaml"]


def test_push_comes_after_what_others_pushed(checkout: Path, tools: str, tmp_path: Path) -> None:
    """Both workflows rebase their commit onto newer ones, and never force."""
    name = "Push to main, on top of newer commits"
    commands = step("ci-cd.yml", "deploy", name)
    assert commands == step("release-model.yml", "release", name)
    git(tmp_path, "clone", "-q", "--bare", "checkout", "server.git")
    git(tmp_path, "clone", "-q", "server.git", "other")
    other = tmp_path / "other"
    (other / "theirs").touch()
    git(other, "add", "theirs")
    git(other, "commit", "-qm", "theirs")
    git(other, "push", "-q", "origin", "HEAD:main")
    git(checkout, "branch", "-M", "main")
    assert make(checkout, "release-model", "VERSION=7").returncode == 0
    git(checkout, "remote", "add", "origin", f"{tmp_path}/server.git")
    done = run_step(checkout, commands, PATH=tools)
    assert done.returncode == 0, done.stderr
    subjects = git(tmp_path / "server.git", "log", "main", "--format=%s").splitlines()
    assert subjects == ["Release fraud-detector 7", "theirs", "all"]


# -- the image ---------------------------------------------------------------------------------------------------------


def copied() -> set[str]:
    """The files that the Dockerfile copies from the folder."""
    lines = re.findall(r"^COPY (?!--from)(.*) \./$", DOCKERFILE, re.M)
    return {name for line in lines for name in line.split()}


def test_image_has_what_the_service_is() -> None:
    """The image has the modules that serve and the files they read, and none that only train or test."""
    modules, seen = {"gunicorn.conf.py"}, set()
    while modules - seen:
        name = (modules - seen).pop()
        seen.add(name)
        imports = re.findall(r"^\s*(?:import|from) (\w+)", (HERE / name).read_text(), re.M)
        modules |= {f"{module}.py" for module in imports if (HERE / f"{module}.py").exists()}
    files = {
        name for module in modules for name in re.findall(r'"(\w+\.(?:json|html|txt))"', (HERE / module).read_text())
    }
    assert copied() == modules | (files - {"schema.json", "version.json"}) | {
        "requirements.txt",
        "requirements-build.txt",
    }
    allowed = {line[1:] for line in (HERE / ".dockerignore").read_text().splitlines() if line.startswith("!")}
    assert allowed == copied()


def test_image_says_what_it_is(app: TestApp) -> None:
    assert re.search(r"^ARG PYTHON_IMAGE=[\w./-]+:[\w.-]+@sha256:[0-9a-f]{64}$", DOCKERFILE, re.M)
    assert {*re.findall(r"^FROM (\S+)", DOCKERFILE, re.M)} == {"${PYTHON_IMAGE}"}
    assert re.findall(r"^(?:CMD|ENTRYPOINT) (.*)$", DOCKERFILE, re.M) == ['["gunicorn"]']
    assert re.search(r"^STOPSIGNAL SIGTERM$", DOCKERFILE, re.M)
    assert "--require-hashes" in DOCKERFILE
    assert re.search(r"^ENV .* HOST=0\.0\.0\.0$", DOCKERFILE, re.M)
    [path] = re.findall(r"HEALTHCHECK.*\n.*'8000'\)\}(/[a-z/]+)", DOCKERFILE)
    assert app.get(path).status_code == 200
    names = re.findall(r'"(\w+)"', re.findall(r"names = (.*);", DOCKERFILE)[0])
    assert names == [*app.get("/version").json] == ["source", "version", "commit", "build"]
    assert re.search(r'"\$SOURCE" "\$VERSION" "\$COMMIT" "\$BUILD" > version.json', DOCKERFILE)


# -- the scripts that need docker, kind or podman ----------------------------------------------------------------------


@pytest.mark.parametrize("path", [HERE / ".ci/run", *HERE.glob("tests/*/*.sh")], ids=lambda path: path.name)
def test_scripts_read_pipes_to_the_end(path: Path) -> None:
    """With `pipefail`, a command that stops reading early fails the script by SIGPIPE (status 141) now and then."""
    script = path.read_text()
    assert "set -euo pipefail" in script
    assert re.findall(r"\| *(?:head|grep (?:-\S+ )*-\w*[qm]|sed \S*q)\b.*", script) == []


def test_cluster_loads_one_platform() -> None:
    """`kind load docker-image` fails on images with attestations (kind#3795); an archive of one platform loads."""
    script = (HERE / "tests/cluster/run.sh").read_text()
    saved = re.findall(r'^docker save --platform "\$platform" --output (\S+) fraud-api:e2e mlflow:e2e$', script, re.M)
    assert re.findall(r"^kind load .*", script, re.M) == [f"kind load image-archive --name $cluster {saved[0]}"]


class Predicts(BaseHTTPRequestHandler):
    """Answer /health/live, and to /predict: a prediction, a 503 and a closed connection, in turn."""

    requests = 0

    def do_GET(self) -> None:
        self.answer(200)

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers["Content-Length"]))
        Predicts.requests += 1
        if Predicts.requests % 3:
            self.answer((200, 503)[Predicts.requests % 3 - 1])

    def answer(self, status: int) -> None:
        body = b'{"model_version": "v1"}'
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        pass


def test_cluster_counts_once_the_service_answers() -> None:
    """Connections refused before that are not counted; every later failure is, with its message."""
    port = free_port()
    words = [sys.executable, "-c", (HERE / "tests/cluster/load.py").read_text(), "1", f"http://127.0.0.1:{port}"]
    load = subprocess.Popen(words, env={"KEY": "k3y"}, stdout=subprocess.PIPE, text=True)
    with pytest.raises(subprocess.TimeoutExpired):  # nothing listens yet
        load.wait(1)
    with ThreadingHTTPServer(("127.0.0.1", port), Predicts) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        lines = load.communicate(timeout=30)[0].splitlines()
        server.shutdown()
    assert lines[0] == "counting"
    closed = "RemoteDisconnected: Remote end closed connection without response"
    assert {*json.loads(lines[-1])} == {"v1", "status 503", closed}
    assert sum(json.loads(lines[-1]).values()) == Predicts.requests


@pytest.mark.parametrize("variable", ["CONTAINERS_CONF_OVERRIDE", "CONTAINERS_CONF"])
def test_podman_keeps_the_configuration_of_the_system(variable: str, tmp_path: Path) -> None:
    """CONTAINERS_CONF would replace it, so it is set only where podman does not know CONTAINERS_CONF_OVERRIDE."""
    podman = tmp_path / "podman"
    podman.write_text(f"#!/bin/sh\n# {variable}\n")
    podman.chmod(0o755)
    script = (HERE / "tests/image/run.sh").read_text()
    part = script[script.index("printf '[containers]") : script.index("if [ -z")]
    environ = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "work": str(tmp_path)}
    done = subprocess.run(["bash", "-ec", f"{part}env"], env=environ, capture_output=True, text=True, check=True)
    found = {line for line in done.stdout.splitlines() if line.startswith("CONTAINERS")}
    assert found == {f"{variable}={tmp_path}/containers.conf"}


def test_gunicorn_is_bounded() -> None:
    """The worker uses private names of gunicorn: only one minor version is allowed, and that one is locked."""
    text = (HERE / "requirements.in").read_text()
    [(lower, upper)] = re.findall(r"^gunicorn\[fast\]>=(\d+\.\d+),<(\d+\.\d+)$", text, re.M)
    major, minor = lower.split(".")
    assert upper == f"{major}.{int(minor) + 1}"
    for lock in ("requirements.txt", "requirements-dev.txt"):
        assert re.search(rf"^gunicorn=={major}\.{minor}\.\d+ ", (HERE / lock).read_text(), re.M)


# -- the pipeline ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.name)
def test_workflow(path: Path) -> None:
    """Only jobs have permissions, each with a reason; actions are pinned to a commit; credentials are not kept."""
    text = path.read_text()
    workflow = yaml.safe_load(text)
    assert workflow["permissions"] == {}
    assert workflow["concurrency"]
    for grants in re.findall(r"^    permissions:\n((?: {6}.*\n)+)", text, re.M):
        assert all(re.search(r": (?:read|write) # \w+", line) for line in grants.splitlines()), (
            "each grant has a reason"
        )
    assert all(re.fullmatch(r"[\w./-]+@[0-9a-f]{40} # v[\d.]+", use) for use in re.findall(r"uses: (.*)", text))
    for job in workflow["jobs"].values():
        needs = job.get("needs", [])
        assert {*([needs] if isinstance(needs, str) else needs)} <= {*workflow["jobs"]}
        assert job["timeout-minutes"]
        for step in job["steps"]:
            if "checkout" in step.get("uses", ""):
                assert step["with"]["persist-credentials"] is False
            assert "${{" not in step.get("run", ""), "the value would be run as code"


def test_commands_exist() -> None:
    """Every `make` command in a guide, a workflow or a script is a target, and `make` lists every target."""
    targets = {*re.findall(r"^make ([a-z-]+)", make(HERE, "help").stdout, re.M)}
    assert targets == {*" ".join(re.findall(r"^\.PHONY: (.*)$", (HERE / "Makefile").read_text(), re.M)).split()}
    scripts = [HERE / ".ci/run", *WORKFLOWS, *HERE.glob("tests/*/*.sh")]
    used = [(file, r"(?:^\s*|run: |sudo )make") for file in scripts]
    used += [(file, r"(?:`|^\$ .*)make") for file in (HERE / "README.md", K8S / "README.md")]
    for file, start in used:
        found = re.findall(rf"{start}(?: --silent)?((?: [a-z][a-z-]*)+)", file.read_text(), re.M)
        assert {target for words in found for target in words.split()} <= targets, file


MAIN = "github.ref == 'refs/heads/main'"
READ = {"contents": "read"}
PIPELINE = {  # job: its permissions, the jobs it needs, and its steps but for setting up, each with its condition
    "test": (
        READ,
        [],
        [("kubectl version --client", None), ("make lint test", None), ("make bulk-test", "matrix.python == '3.11'")],
    ),
    "checkov": (READ, [], [("make checkov", None)]),
    "image": (
        READ | dict.fromkeys(("packages", "id-token", "attestations", "artifact-metadata"), "write"),
        ["test", "checkov"],
        [
            ("Name the image, in lower case as registries require", None),
            ("make image", None),
            ("Fail on serious vulnerabilities that have a fix", None),
            ("Push the image with SBOM and provenance", MAIN),
            ("Sign the image as this workflow", MAIN),
            ("actions/attest", MAIN),
        ],
    ),
    "image-test": (READ, ["test", "checkov"], [("sudo make image-test", None)]),
    "end-to-end": (READ | {"packages": "read"}, ["image"], [("make end-to-end", None)]),
    "deploy": (
        {"contents": "write"},
        ["test", "checkov", "image", "image-test", "end-to-end"],
        [("Commit the digest", None), ("Push to main, on top of newer commits", None)],
    ),
}
SETTING_UP = ("checkout", "setup-", "login", "cosign-installer", "download-grype", "kind-action")


def done_by(job: dict[str, Any]) -> list[tuple[str, str | None]]:
    steps = [
        (step.get("name") or step.get("run") or step["uses"].partition("@")[0], step.get("if")) for step in job["steps"]
    ]
    return [(what, where) for what, where in steps if not any(word in what for word in SETTING_UP)]


def test_pipeline() -> None:
    """Tests run on every supported Python; deploy runs on main, after all other jobs, one at a time."""
    workflow = yaml.safe_load((HERE / ".github/workflows/ci-cd.yml").read_text())
    jobs = workflow["jobs"]
    assert {name: (job["permissions"], job.get("needs", []), done_by(job)) for name, job in jobs.items()} == PIPELINE
    assert jobs["test"]["strategy"]["matrix"]["python"] == ["3.11", "3.12", "3.13", "3.14"]
    assert jobs["deploy"]["if"] == f"github.event_name == 'push' && {MAIN}"
    assert jobs["deploy"]["concurrency"] == {"group": "deploy", "cancel-in-progress": False}
    ignored = workflow[True]["push"]["paths-ignore"]  # YAML 1.1 reads `on` as true
    assert {"k8s/kustomization.yaml", "k8s/service.env"} <= {*ignored}, "the commit of a release starts no build"
    for job in ("deploy", "end-to-end"):
        [digest] = each(jobs[job]["steps"], "DIGEST")
        assert digest == "${{ needs.image.outputs.digest }}"
    assert "--fail-on high --only-fixed" in step(
        "ci-cd.yml", "image", "Fail on serious vulnerabilities that have a fix"
    )
    push = step("ci-cd.yml", "image", "Push the image with SBOM and provenance")
    assert "OUTPUT=type=image,push=true,rewrite-timestamp=true" in push
    assert "--sbom=true --provenance=mode=max" in push


def test_release_of_a_model_by_hand() -> None:
    workflow = yaml.safe_load((HERE / ".github/workflows/release-model.yml").read_text())
    assert [*workflow[True]] == ["workflow_dispatch"]
    [job] = workflow["jobs"].values()
    assert (job["permissions"], done_by(job)) == (
        {"contents": "write"},
        [("make release-model", None), ("Push to main, on top of newer commits", None)],
    )


def test_dependabot() -> None:
    updates = yaml.safe_load((HERE / ".github/dependabot.yml").read_text())["updates"]
    assert {update["package-ecosystem"] for update in updates} == {"github-actions", "pip"}
    assert all(update["cooldown"]["default-days"] >= 7 for update in updates)
