#!/bin/bash
# Test the manifests in a cluster made by kind: deploy MLflow and the service, then delete a pod and release another
# model version while requests are sent through the Service. No request may fail.
# Needs docker 28 or newer (`docker save --platform`), kind, kubectl and .venv. `make end-to-end` runs it.
set -euo pipefail
cd "$(dirname "$0")/../.."

cluster=fraud-api-e2e
work=$(mktemp -d)
export KUBECONFIG=$work/kubeconfig
say() { printf '%(%H:%M:%S)T %s\n' -1 "$*"; }
finish() {
    status=$?
    if [ "$status" != 0 ]; then
        kubectl get pods -A || true
        kubectl -n fraud-api describe pods | tail -40 || true
        kubectl -n fraud-api logs -l app.kubernetes.io/name=fraud-api --tail=40 || true
    fi
    kill "${forward:-}" 2> /dev/null || true
    kind delete cluster --name $cluster || true
    rm -rf "$work"
    exit "$status"
}
trap finish EXIT

say "images"
if [ -n "${DIGEST:-}" ]; then # test the image that the pipeline has pushed
    pushed=$(echo "${IMAGE:?}" | tr '[:upper:]' '[:lower:]')@$DIGEST
    docker pull --quiet "$pushed"
    docker tag "$pushed" fraud-api:e2e
else
    make --silent image IMAGE=fraud-api TAG=e2e
fi
mkdir "$work/mlflow"
# Without gunicorn-h1c, the one package that needs a compiler.
sed '/^gunicorn-h1c==/,/[^\]$/d' requirements-dev.txt > "$work/mlflow/requirements.txt"
base=$(sed -n 's/^ARG PYTHON_IMAGE=//p' Dockerfile)
docker build --quiet --tag mlflow:e2e --build-arg PYTHON_IMAGE="$base" --file tests/cluster/mlflow.Dockerfile "$work/mlflow"

say "cluster"
kind create cluster --name $cluster --wait 180s
# Not `kind load docker-image`: it fails on images with attestations in Docker's containerd image store (kind#3795).
platform=$(docker version --format '{{.Server.Os}}/{{.Server.Arch}}')
docker save --platform "$platform" --output "$work/images.tar" fraud-api:e2e mlflow:e2e
kind load image-archive --name $cluster "$work/images.tar"

say "MLflow with two model versions"
kubectl apply -f tests/cluster/mlflow.yaml
kubectl -n mlflow rollout status deployment/mlflow --timeout=180s
kubectl -n mlflow port-forward service/mlflow 5000 > "$work/forward" &
forward=$!
timeout 60 sh -c "until grep -q Forwarding '$work/forward'; do sleep 0.2; done"
for release in v1 v2; do
    MLFLOW_TRACKING_URI=http://localhost:5000 .venv/bin/python train.py --rows 20000 --budget 1 --release $release \
        --seed "${release#v}" --promote always
done

say "the service"
key=$(openssl rand -hex 16)
mkdir "$work/tests" && cp -r k8s "$work/" && cp -r tests/cluster "$work/tests/"
release() { sed -i "s|^\(MODEL_URI=models:/[^/@]*\)[/@].*|\1/$1|" "$work/k8s/service.env"; }
release 1
kubectl apply -f k8s/namespace.yaml
kubectl -n fraud-api create secret generic fraud-api --from-literal=API_KEYS="$key"
kubectl apply -k "$work/tests/cluster"
kubectl -n fraud-api rollout status deployment/fraud-api --timeout=180s
kubectl -n fraud-api wait deployment/fraud-api --for=jsonpath='{.status.availableReplicas}'=2 --timeout=180s

say "requests through the Service, from a namespace that the network policy allows"
kubectl create namespace ingress
timeout 60 sh -c "until kubectl -n ingress get serviceaccount default; do sleep 0.5; done" > /dev/null 2>&1
kubectl -n ingress run load --image=fraud-api:e2e --restart=Never --env=KEY="$key" --command -- \
    python -c "$(cat tests/cluster/load.py)" 120
kubectl -n ingress wait pod/load --for=condition=Ready --timeout=60s
timeout 60 sh -c "until kubectl -n ingress logs load | grep counting; do sleep 0.5; done"

say "delete a pod"
pod=$(kubectl -n fraud-api get pods -o jsonpath='{.items[0].metadata.name}')
kubectl -n fraud-api delete pod "$pod"
kubectl -n fraud-api rollout status deployment/fraud-api --timeout=120s

say "release version 2"
release 2
kubectl apply -k "$work/tests/cluster"
kubectl -n fraud-api rollout status deployment/fraud-api --timeout=180s

kubectl -n ingress wait pod/load --for=jsonpath='{.status.phase}'=Succeeded --timeout=180s
outcomes=$(kubectl -n ingress logs load --tail=1)
say "outcomes of the requests: $outcomes"
python3 -c 'import json, sys; found = json.loads(sys.argv[1]); sys.exit({*found} != {"v1", "v2"})' "$outcomes"
say "no request failed, both versions answered"
