# Every routine of the project. `make` alone lists them.

PYTHON ?= python3
BIN := .venv/bin
UV := $(or $(shell command -v uv),$(BIN)/uv)
# Settings: the environment (and `make PORT=9000`) before .env before .env.example.
WITH_ENV := $(UV) run --quiet --no-project --env-file .env.example $(if $(wildcard .env),--env-file .env) --
LOCK := $(UV) pip compile --quiet --universal --python-version 3.11 --generate-hashes --no-header $(if $(UPGRADE),--upgrade)

SYNC := $(UV) pip sync --python $(BIN)/python --require-hashes --compile-bytecode
# gunicorn's parser in C is the one package that comes as source; without a compiler gunicorn uses its own in Python.
WITHOUT_C := awk '/^gunicorn-h1c==/ {skip = 1} !skip {print} !/\\$$/ {skip = 0}'

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
	@awk -F ':.*## ' '/^[a-z-]+:.*## /{printf "make %-10s %s\n", $$1, $$2}' Makefile

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
chaos: install ## kill, cut off, overload and confuse it for 5 minutes and write what was lost into README.md
	$(BIN)/python -m pytest --quiet --capture=sys --chaos 25

.PHONY: lint
lint: install ## check style and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

.PHONY: bench
bench: install ## measure it against its peers (7 minutes, needs wrk) and write the table into README.md
	@$(WITH_ENV) $(BIN)/python -m bench.bench

.PHONY: lock
lock: ## pin what requirements*.in ask for, with hashes; UPGRADE=1 takes the newest
	$(LOCK) requirements-dev.in --output-file requirements-dev.txt
	$(LOCK) --constraint requirements-dev.txt requirements.in --output-file requirements.txt

.PHONY: clean
clean: ## remove the environment, the local registry and caches
	rm -rf .venv .mlflow mlruns .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -prune -exec rm -rf {} +
