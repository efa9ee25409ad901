# Every routine of the project. `make` alone lists them.

PYTHON ?= python3
BIN := .venv/bin
UV := $(or $(shell command -v uv),$(BIN)/uv)
# Settings: the environment (and `make PORT=9000`) before .env before .env.example.
WITH_ENV := $(UV) run --quiet --no-project --env-file .env.example $(if $(wildcard .env),--env-file .env) --
LOCK := $(UV) pip compile --quiet --universal --python-version 3.11 --generate-hashes --no-header $(if $(UPGRADE),--upgrade)

SYNC := $(UV) pip sync --python $(BIN)/python --require-hashes --build-constraints requirements-build.txt --compile-bytecode
# gunicorn's parser in C is the one package that comes as source; without a compiler gunicorn uses its own in Python.
WITHOUT_C := awk '/^gunicorn-h1c==/ {skip = 1} !skip {print} !/\\$$/ {skip = 0}'

# $(call COMMIT,file,message): this file and nothing else, if it has changed
COMMIT = git diff --quiet HEAD -- $(1) || git commit --quiet --message "$(2)" -- $(1)

# The image: IMAGE:TAG, built by the first of docker, podman and buildah that works; OPTIONS go to it as they are.
IMAGE ?= fraud-api
NAME = $(shell echo '$(IMAGE)' | tr '[:upper:]' '[:lower:]')
TAG ?= latest
BUILDER ?= $(shell docker info > /dev/null 2>&1 && echo docker || basename "$$(command -v podman || command -v buildah)")
OUTPUT ?= type=docker
EPOCH = $(shell git log -1 --format=%ct)
# Only a builder of its own (docker buildx create --use) can give files in layers the commit's time.
REWRITE = $(shell docker buildx inspect 2> /dev/null | grep -q docker-container && echo ,rewrite-timestamp=true)
BUILD_docker = docker buildx build --output $(OUTPUT)$(REWRITE) --build-arg SOURCE_DATE_EPOCH=$(EPOCH)
# From nothing: layers in a cache have the time of another commit.
BUILD_podman = podman build --no-cache --format docker --network host --timestamp $(EPOCH)
BUILD_buildah = buildah build --format docker --network host --timestamp $(EPOCH)

export PYTHONDONTWRITEBYTECODE := 1
export MLFLOW_DISABLE_TELEMETRY := true

define TRY
curl -X POST http://%s:%s/predict -H 'Content-Type: application/json' -d '{"transaction_id": "tx_12345", \
"amount": 150.50, "merchant_category": "grocery_stores", "hour": 14, "day_of_week": 2, "user_age": 35, \
"account_balance": 2500.00}'
endef
export TRY

.PHONY: help
help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## /{printf "make %-14s %s\n", $$1, $$2}' Makefile

.PHONY: install
install: .venv/installed ## make .venv with what is locked in requirements-dev.txt

.venv/installed: requirements-dev.txt
	@$(PYTHON) -c 'import sys; sys.exit("Python 3.11 or newer is needed" if sys.version_info < (3, 11) else 0)'
	@test ! -L .venv || { echo ".venv is a link: remove it, or what it points to would be emptied" >&2; exit 1; }
	$(PYTHON) -m venv --clear .venv
	@command -v uv >/dev/null || $(BIN)/python -m pip install --disable-pip-version-check uv
	$(SYNC) requirements-dev.txt || { $(WITHOUT_C) requirements-dev.txt > .venv/without-c.txt && $(SYNC) .venv/without-c.txt; }
	@touch $@

.PHONY: run
run: install ## train and register a model if there is none, then serve it; PORT=9000 moves it
	@$(WITH_ENV) $(BIN)/python train.py --if-missing
	@$(WITH_ENV) sh -c 'printf "\nWhen it says \"Listening\", try:\n\n$$TRY\n\n" "$$HOST" "$$PORT"'
	@$(WITH_ENV) $(BIN)/gunicorn

.PHONY: model
model: install ## train, register and, if it is better, promote a model; ARGS="--help" shows the options
	@$(WITH_ENV) $(BIN)/python train.py $(ARGS)

.PHONY: serve
serve: install ## serve the registered model
	@$(WITH_ENV) $(BIN)/gunicorn

.PHONY: test
test: install ## run all tests, most of them two at a time
	$(BIN)/python -m pytest -m "not alone" --numprocesses 2 --dist loadfile
	$(BIN)/python -m pytest -m alone

.PHONY: chaos
chaos: install ## kill, cut off, overload and confuse it for 10 minutes and write what was lost into README.md
	$(BIN)/python -m pytest --quiet --capture=sys --chaos 25

.PHONY: lint
lint: install ## check style and types, of scripts, image and workflows too
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/shellcheck .ci/run tests/*/*.sh
	$(BIN)/hadolint --no-color Dockerfile tests/cluster/mlflow.Dockerfile
	$(BIN)/zizmor --offline --no-progress --quiet --strict-collection .github

.PHONY: checkov
checkov: install ## check image, workflows and what kubectl renders against Checkov's policies
	@set -e; folder=$$(mktemp -d); trap 'rm -rf "$$folder"' EXIT; \
	cp -r Dockerfile .github "$$folder"; kubectl kustomize k8s > "$$folder/k8s.yaml"; \
	$(UV) tool run --quiet --python $(BIN)/python --from checkov==3.3.30 checkov --directory "$$folder" --quiet --compact \
		--skip-download --framework kubernetes dockerfile github_actions \
		--skip-check CKV_GHA_7 # no inputs of workflows: release-model takes a version's number, and builds nothing

.PHONY: bench
bench: install ## measure it against its peers (7 minutes, needs wrk) and write the table into README.md
	@$(WITH_ENV) $(BIN)/python -m bench.bench

.PHONY: image
image: ## build the image with docker, podman or buildah, whichever is there
	@set -e; secrets=$$(mktemp); trap 'rm -f "$$secrets"' EXIT; \
	env | grep -E '^(PIP_INDEX_URL|UV_DEFAULT_INDEX|HTTPS?_PROXY|NO_PROXY)=' > "$$secrets" || true; \
	if [ -n "$$SSL_CERT_FILE" ]; then \
		printf '%s=/run/secrets/ca\n' SSL_CERT_FILE PIP_CERT >> "$$secrets"; ca="--secret id=ca,src=$$SSL_CERT_FILE"; \
	fi; \
	set -- --secret "id=env,src=$$secrets" $$ca --build-arg "COMMIT=$$(git rev-parse HEAD)" \
		--build-arg "VERSION=$$(git describe --tags --always)" \
		--build-arg "SOURCE=$$(git config remote.origin.url | sed 's|//.*@|//|')" \
		--build-arg "BUILD=$${GITHUB_RUN_ID:+$$GITHUB_SERVER_URL/$$GITHUB_REPOSITORY/actions/runs/$$GITHUB_RUN_ID}"; \
	if [ -n "$$PYTHON_IMAGE" ]; then set -- "$$@" --build-arg PYTHON_IMAGE; fi; \
	if [ -n "$$BUILD_PACKAGES" ]; then set -- "$$@" --build-arg BUILD_PACKAGES; fi; \
	$(or $(BUILD_$(BUILDER)),$(error needs docker, podman or buildah)) "$$@" --tag "$(NAME):$(TAG)" $(OPTIONS) .

.PHONY: image-test
image-test: install ## build and run the image as Kubernetes would, by podman, and break it; needs root
	tests/image/run.sh

.PHONY: image-scan
image-scan: ## fail on what is known, serious and mended elsewhere; needs grype
	$(or $(GRYPE),grype) $(NAME):$(TAG) --fail-on high --only-fixed

.PHONY: image-push
image-push: ## build and push it with SBOM and provenance, and say its digest; needs docker buildx
	@docker buildx version > /dev/null || { echo "needs docker buildx" >&2; exit 2; }
	@set -e; built=$$(mktemp); trap 'rm -f "$$built"' EXIT; \
	$(MAKE) --silent image BUILDER=docker OUTPUT=type=image,push=true \
		OPTIONS="--sbom=true --provenance=mode=max --metadata-file $$built" >&2; \
	python3 -c 'import json, sys; print("digest=" + json.load(open(sys.argv[1]))["containerimage.digest"])' "$$built"; \
	echo name=$(NAME)

.PHONY: image-sign
image-sign: ## sign IMAGE@DIGEST with the identity of who runs it, no key; needs cosign
	cosign sign --yes $(NAME)@$(DIGEST)

.PHONY: manifests
manifests: install ## render k8s/ and check it, the image and the pipeline against each other; needs kubectl or kustomize
	@kubectl version --client > /dev/null || kustomize version > /dev/null
	$(BIN)/python -m pytest tests/test_ship.py

.PHONY: end-to-end
end-to-end: install ## the whole of it in a cluster made by kind; needs docker, kind and kubectl
	tests/cluster/run.sh

.PHONY: release-model
release-model: ## commit that VERSION of the model is what is served: make release-model VERSION=7
	@expr "$$VERSION" : '[1-9][0-9]*$$' > /dev/null \
		|| { echo "VERSION: expected a version's number, such as VERSION=7" >&2; exit 2; }
	@git var GIT_AUTHOR_IDENT > /dev/null
	@sed -i "s|^\(MODEL_URI=models:/[^/@]*\)[/@].*|\1/$$VERSION|" k8s/service.env
	@$(call COMMIT,k8s/service.env,Release $$(sed -n 's|^MODEL_URI=models:/||p' k8s/service.env | tr / ' '))

.PHONY: release-image
release-image: ## commit that DIGEST of IMAGE is what runs; needs kustomize
	@expr "$$DIGEST" : 'sha256:[0-9a-f]\{64\}$$' > /dev/null \
		|| { echo "DIGEST: expected sha256: and 64 hexadecimal digits" >&2; exit 2; }
	@git var GIT_AUTHOR_IDENT > /dev/null && kustomize version > /dev/null
	@cd k8s && kustomize edit set image fraud-api=$(NAME)@$$DIGEST
	@$(call COMMIT,k8s/kustomization.yaml,Deploy $$DIGEST)

.PHONY: push
push: ## push what the pipeline has committed to main, after what others have
	@set -e; url="https://x-access-token:$$GITHUB_TOKEN@$${GITHUB_SERVER_URL#https://}/$$GITHUB_REPOSITORY"; \
	git pull --quiet --rebase "$$url" main; git push --quiet "$$url" HEAD:main

.PHONY: lock
lock: ## pin what requirements*.in ask for, with hashes; UPGRADE=1 takes the newest
	$(LOCK) requirements-dev.in --output-file requirements-dev.txt
	$(LOCK) --constraint requirements-dev.txt requirements.in --output-file requirements.txt
	$(LOCK) --constraint requirements-dev.txt requirements-build.in --output-file requirements-build.txt

.PHONY: clean
clean: ## remove the environment, the local registry and caches
	rm -rf .venv .mlflow mlruns .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -prune -exec rm -rf {} +
