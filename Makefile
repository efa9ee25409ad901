# Commands for development, training and releases. `make` lists them.

PYTHON ?= python3
BIN := .venv/bin
UV := $(or $(shell command -v uv),$(BIN)/uv)
# Settings come from the environment and the command line (`make run PORT=9000`), then .env, then .env.example.
WITH_ENV := $(UV) run --quiet --no-project --env-file .env.example $(if $(wildcard .env),--env-file .env) --
SYNC = $(UV) pip sync --python $(BIN)/python --require-hashes --build-constraints requirements-build.txt \
	--compile-bytecode
LOCK := $(UV) pip compile --quiet --universal --python-version 3.11 --generate-hashes --no-header \
	$(if $(UPGRADE),--upgrade)

# `make image` builds IMAGE:TAG with BUILDER. Layers get the time of the commit, so that one commit gives one image.
# podman: without cache, as cached layers have the time of another commit. docker: add rewrite-timestamp=true to OUTPUT;
# this needs a builder of type docker-container.
IMAGE ?= fraud-api
TAG ?= latest
BUILDER ?= $(shell docker info > /dev/null 2>&1 && echo docker || echo podman)
OUTPUT ?= type=docker
EPOCH = $(shell git log -1 --format=%ct)
BUILD_docker = docker buildx build --output $(OUTPUT) --build-arg SOURCE_DATE_EPOCH=$(EPOCH)
BUILD_podman = podman build --no-cache --format docker --network host --timestamp $(EPOCH)
CA = --secret id=ca,src="$(SSL_CERT_FILE)"

export PYTHONDONTWRITEBYTECODE := 1
export MLFLOW_DISABLE_TELEMETRY := true

.PHONY: help install run model serve test bulk-test lint size checkov chaos bench bench-models bench-bulk
.PHONY: image image-test end-to-end release-model lock clean

help: ## list the commands
	@awk -F ':.*## ' '/^[a-z-]+:.*## /{printf "make %-14s %s\n", $$1, $$2}' Makefile

install: .venv/installed ## create .venv with the packages of requirements-dev.txt

# gunicorn-h1c, gunicorn's HTTP parser in C, is the only package that needs a compiler. Without one, install the others;
# gunicorn then uses its parser in Python.
.venv/installed: requirements-dev.txt
	@$(PYTHON) -c 'import sys; sys.exit("Python 3.11 or newer is needed" if sys.version_info < (3, 11) else 0)'
	@test ! -L .venv || { echo ".venv is a link, whose target would be emptied: remove the link" >&2; exit 1; }
	$(PYTHON) -m venv --clear .venv
	@command -v uv >/dev/null || $(BIN)/python -m pip install --disable-pip-version-check uv
	$(SYNC) requirements-dev.txt || \
		{ sed '/^gunicorn-h1c==/,/[^\]$$/d' requirements-dev.txt > .venv/without-c.txt && $(SYNC) .venv/without-c.txt; }
	@touch $@

run: install ## train and register a model if there is none, then serve it
	@$(WITH_ENV) $(BIN)/python train.py --if-missing
	@$(WITH_ENV) sh -c 'echo "Wait for \"Listening\", then open http://$$HOST:$$PORT or send the request in README.md"'
	@$(WITH_ENV) $(BIN)/gunicorn

model: install ## train and register a model, and promote it if it is better; ARGS="--help" lists the options
	@$(WITH_ENV) $(BIN)/python train.py $(ARGS)

serve: install ## serve the registered model
	@$(WITH_ENV) $(BIN)/gunicorn

test: install ## run all tests
	$(BIN)/python -m pytest --numprocesses 3 --dist loadfile

# Spark takes 450 MB, so it is not in .venv but in a folder of its own, which Python searches as well.
.venv-bulk/installed: .venv/installed requirements-bulk.txt
	rm -rf .venv-bulk
	mkdir .venv-bulk
	sed -n '/^py\(4j\|spark\)==/,/[^\]$$/p' requirements-bulk.txt > .venv-bulk/spark.txt
	$(UV) pip install --python $(BIN)/python --target .venv-bulk --requirements .venv-bulk/spark.txt --no-deps \
		--require-hashes --build-constraints requirements-build.txt --compile-bytecode
	@touch $@

bulk-test: ## test bulk.py on a local Spark; needs Java 17 or newer
	@found=$$("$${JAVA_HOME:+$$JAVA_HOME/bin/}java" -XshowSettings:properties -version 2>&1 \
		| sed -n 's/^ *java.specification.version = //p'); \
	if test "$${found:-0}" -ge 17 2> /dev/null; then \
		$(MAKE) --no-print-directory .venv-bulk/installed && \
		PYTHONPATH="$(CURDIR)/.venv-bulk" $(BIN)/python -m pytest tests/test_bulk.py; \
	else echo "no Java 17 or newer: bulk.py was not tested"; fi

lint: install ## check style and types of code, scripts, Dockerfile and workflows
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/shellcheck .ci/run tests/*/*.sh
	$(BIN)/hadolint --no-color Dockerfile tests/cluster/mlflow.Dockerfile
	$(BIN)/zizmor --offline --no-progress --quiet --strict-collection .github

size: ## count the lines of code that serve the API
	@$(PYTHON) tests/size.py

checkov: install ## check Dockerfile, workflows and manifests against Checkov's policies; needs kubectl
	@set -e; folder=$$(mktemp -d); trap 'rm -rf "$$folder"' EXIT; \
	cp -r Dockerfile .github "$$folder"; kubectl kustomize k8s > "$$folder/k8s.yaml"; \
	$(UV) tool run --quiet --python $(BIN)/python --from checkov==3.3.30 checkov --directory "$$folder" --quiet --compact \
		--skip-download --framework kubernetes dockerfile github_actions \
		--skip-check CKV_GHA_7 # forbids inputs of workflows: release-model's is a version number, and it builds nothing

chaos: install ## test under faults and overload (7 minutes) and write the results into k8s/README.md
	$(BIN)/python -m pytest --quiet --capture=sys --chaos 25

bench: install ## compare the speed with other servers (8 minutes, needs wrk) and write the results into README.md and bench/results.md
	@$(WITH_ENV) $(BIN)/python -m bench.bench

bench-models: install ## compare the models with LightGBM and logistic regression (10 minutes) and write the results into README.md
	@$(WITH_ENV) $(BIN)/python -m bench.models

bench-bulk: .venv-bulk/installed ## compare bulk.py with MLflow's Spark UDF (4 minutes, needs Java) and write the results into README.md
	@PYTHONPATH="$(CURDIR)/.venv-bulk" $(WITH_ENV) $(BIN)/python -m bench.bulk $(ARGS)

# Docker and podman read the build arguments from the environment; one that is not set keeps its default in Dockerfile.
# The settings of a package index and of proxies are passed as secrets, so they stay out of the image.
image: export COMMIT = $(shell git rev-parse HEAD)
image: export VERSION = $(shell git describe --tags --always)
image: export SOURCE = $(shell git config remote.origin.url | sed 's|//.*@|//|')
image: ## build the image with docker or podman
	@secrets=$$(mktemp); trap 'rm -f "$$secrets"' EXIT; \
	env | grep -E '^(PIP_INDEX_URL|UV_DEFAULT_INDEX|HTTPS?_PROXY|NO_PROXY)=' > "$$secrets"; \
	$(BUILD_$(BUILDER)) --tag $(IMAGE):$(TAG) \
		--secret id=env,src="$$secrets" $(if $(SSL_CERT_FILE),$(CA)) \
		$(addprefix --build-arg ,COMMIT VERSION SOURCE BUILD PYTHON_IMAGE BUILD_PACKAGES) $(OPTIONS) .

image-test: install ## build the image and run it with the restrictions of Kubernetes; needs podman and root
	tests/image/run.sh

end-to-end: install ## deploy to a cluster made by kind and test rollouts; needs docker, kind and kubectl
	tests/cluster/run.sh

release-model: ## commit the number of the model version to serve: make release-model VERSION=7
	@expr "$$VERSION" : '[1-9][0-9]*$$' > /dev/null \
		|| { echo "VERSION: expected a version's number, such as VERSION=7" >&2; exit 2; }
	@git var GIT_AUTHOR_IDENT > /dev/null # fails if git does not know the author, before anything has changed
	@sed -i "s|^\(MODEL_URI=models:/[^/@]*\)[/@].*|\1/$$VERSION|" k8s/service.env
	@git diff --quiet HEAD -- k8s/service.env || git commit --quiet k8s/service.env \
		--message "Release $$(sed -n 's|^MODEL_URI=models:/||p' k8s/service.env | tr / ' ')"

lock: ## pin the packages in requirements*.in with hashes; UPGRADE=1 takes the newest versions
	$(LOCK) requirements-dev.in --output-file requirements-dev.txt
	$(LOCK) --constraint requirements-dev.txt requirements.in --output-file requirements.txt
	$(LOCK) --constraint requirements-dev.txt requirements-build.in --output-file requirements-build.txt
	$(LOCK) --constraint requirements-dev.txt requirements-bulk.in --output-file requirements-bulk.txt

clean: ## remove the environment, the local registry and caches
	rm -rf .venv .venv-bulk .mlflow mlruns .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -prune -exec rm -rf {} +
