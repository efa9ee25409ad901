#!/bin/bash
# Build the image twice and compare the layers. Run it twice, by `podman run` and as the rendered Deployment, with the
# restrictions that Kubernetes applies. Stop the registry, kill a worker, then stop the container.
# Needs root, podman, runc, catatonit, kubectl, curl and .venv. Where Docker Hub cannot be reached it also needs
# mmdebstrap, to make a replacement for the base image from Debian packages. `make image-test` runs it.
set -euo pipefail
cd "$(dirname "$0")/../.."

work=$(mktemp -d)
image=localhost/fraud-api:test pod=""
commit=$(git rev-parse HEAD)
transaction='{"transaction_id": "tx_12345", "amount": 150.50, "merchant_category": "grocery_stores", "hour": 14,
    "day_of_week": 2, "user_age": 35, "account_balance": 2500.00}'

finish() {
    status=$?
    if [ "$status" != 0 ]; then
        { tail -n 30 "$work"/*.log; podman logs --tail 20 single; podman logs --tail 20 "$pod"; } 2>&1 || true
    fi
    kill -- -"${registry:-}" 2> /dev/null || true
    podman rm --force --time 0 single > /dev/null 2>&1 || true
    podman kube play --down "$work/pod.yaml" > /dev/null 2>&1 || true
    rm -rf "$work"
    exit "$status"
}
trap finish EXIT

ok() { echo "ok   $*"; }
fail() { echo "FAIL $*" >&2; exit 1; }
check() { "${@:2}" > /dev/null || fail "$1"; ok "$1"; }
is() { test "$2" = "$3" || fail "$1: '$2', expected '$3'"; ok "$1: '$3'"; }
await() {
    local end=$((SECONDS + 60))
    until "${@:2}" > /dev/null 2>&1; do ((SECONDS < end)) || fail "$1"; sleep 0.2; done
    ok "$1"
}
port() { python3 -c 'import socket; s = socket.socket(); s.bind(("", 0)); print(s.getsockname()[1])'; }
fetch() { curl --fail --silent --show-error --max-time 5 "$@"; }
predicts() {
    fetch "$url/predict" -H 'Content-Type: application/json' -H 'Authorization: Bearer k3y' -d "$transaction" |
        grep '"model_version":"v1.2.3"'
}
workers() { podman exec "$container" cat /proc/1/task/1/children | xargs -n 1 | sort; }
replaced() {
    test "$(workers | wc -l)" = 2 && test "$(comm -12 <(workers) <(echo "$before") | wc -l)" = 1 && predicts
}

# podman's default ulimits fail with "error setting rlimit" where root may not raise them (in another container).
printf '[containers]\ndefault_ulimits = ["nofile=%s:%s", "nproc=4096:4096"]\n' "$(ulimit -Hn)" "$(ulimit -Hn)" \
    > "$work/containers.conf"
# CONTAINERS_CONF_OVERRIDE adds to the system's configuration. Old versions (4.3, for one) only know CONTAINERS_CONF,
# which replaces it; without the system's configuration podman 5 fails on GitHub's runners (runner-images#14473).
if grep -q CONTAINERS_CONF_OVERRIDE "$(command -v podman)"; then
    export CONTAINERS_CONF_OVERRIDE=$work/containers.conf
else
    export CONTAINERS_CONF=$work/containers.conf
fi

if [ -z "${PYTHON_IMAGE:-}" ]; then
    PYTHON_IMAGE=$(sed -n 's/^ARG PYTHON_IMAGE=//p' Dockerfile)
    if ! podman pull --quiet "$PYTHON_IMAGE" > /dev/null 2>&1; then
        PYTHON_IMAGE=localhost/python-standin:3.13
        export BUILD_PACKAGES="gcc libc6-dev libpython3-dev"
        # Leave out /dev: podman would give the owner of the image's /dev/shm to the volume mounted there.
        podman image exists $PYTHON_IMAGE || mmdebstrap --quiet --variant=apt --include=python3-venv,ca-certificates \
            --skip=output/dev --dpkgopt='path-exclude=/usr/share/doc/*' --dpkgopt='path-exclude=/usr/share/locale/*' \
            trixie - | podman import --quiet - $PYTHON_IMAGE > /dev/null
    fi
fi
export PYTHON_IMAGE
make --silent image BUILDER=podman IMAGE=localhost/fraud-api TAG=test > "$work/build.log" 2>&1
size() { podman image inspect "$1" --format '{{.Size}}' | numfmt --to=si; }
ok "the image builds on $PYTHON_IMAGE: $(size $image) bytes, $(size "$PYTHON_IMAGE") of them in the base image"
layers() { podman image inspect $image --format '{{.RootFS.Layers}}' | sha256sum | cut -c 1-16; }
first=$(layers)
make --silent image BUILDER=podman IMAGE=localhost/fraud-api TAG=test > "$work/again.log" 2>&1
is "a second build gives the same layers" "$(layers)" "$first"
# shellcheck disable=SC2016
check "the image has no compiler, installer, test tool or full MLflow" \
    podman run --rm --network=none --no-healthcheck $image sh -c '! python -c "import sqlalchemy" 2> /dev/null &&
        for name in cc gcc pip pip3 uv pytest; do ! command -v $name || exit 1; done'

registry_port=$(port) single_port=$(port) pod_port=$(port)
MLFLOW_SERVER_ENABLE_JOB_EXECUTION=false MLFLOW_DISABLE_TELEMETRY=true setsid .venv/bin/python -m mlflow server \
    --host 0.0.0.0 --port "$registry_port" --allowed-hosts '*' --workers 1 \
    --backend-store-uri "sqlite:///$work/mlflow.db" --artifacts-destination "$work/artifacts" > "$work/mlflow.log" 2>&1 &
registry=$!
await "the registry answers" fetch "http://127.0.0.1:$registry_port/health"
MLFLOW_TRACKING_URI=http://127.0.0.1:$registry_port check "a model is registered" \
    .venv/bin/python train.py --rows 20000 --trees 30 --budget 1 --release v1.2.3 2> "$work/train.log"

podman run --detach --name single --network=host --no-healthcheck --read-only --read-only-tmpfs=false --user 10001 \
    --cap-drop=ALL --security-opt=no-new-privileges --memory 1g --env HOST=127.0.0.1 --env PORT="$single_port" \
    --env MLFLOW_TRACKING_URI="http://127.0.0.1:$registry_port" $image > /dev/null
kubectl kustomize k8s | .venv/bin/python tests/image/pod.py $image "$registry_port" "$pod_port" > "$work/pod.yaml"
podman kube play "$work/pod.yaml" > "$work/kube.log" 2>&1
pod=$(podman ps --format '{{.Names}}' --filter name='fraud-api-pod.*-fraud-api$')
await "podman run: ready as user 10001, without capabilities, read-only" fetch "http://127.0.0.1:$single_port/health/ready"
await "podman kube play: the rendered Deployment is ready" fetch "http://127.0.0.1:$pod_port/health/ready"
found=$(fetch "http://127.0.0.1:$pod_port/version" | sed 's/.*"commit": *"\([^"]*\)".*/\1/')
is "the commit in /version" "$found" "$commit"
healthcheck=$(podman image inspect $image --format '{{index .Config.Healthcheck.Test 3}}')
kill -- -"$registry" && registry=""
while read -r container url; do
    before=$(workers)
    podman exec "$container" sh -c "kill -9 ${before%%[!0-9]*}"
    await "$container: without the registry, a killed worker is replaced and /predict answers" replaced
    check "$container: the image's HEALTHCHECK" podman exec "$container" python -c "$healthcheck"
    is "$container: files written" "$(podman diff "$container" | grep -vx 'C /etc')" "" # podman writes /etc/hosts
    podman stop --time 35 "$container" > /dev/null 2>&1
    is "$container: exit status after SIGTERM" "$(podman inspect "$container" --format '{{.State.ExitCode}}')" 0
done << E2
single http://127.0.0.1:$single_port
$pod http://127.0.0.1:$pod_port
E2
