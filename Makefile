# Every target makes its own virtual environment first: Python 3.11 or newer, git and make are all it needs.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

.DEFAULT_GOAL := help
.PHONY: help install demo kafka kafka-stop test lint types unit bench bench-kafka bench-smoke chaos lock clean

help:  ## say what can be made
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "make %-12s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

$(STAMP): pyproject.toml requirements.lock
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "Python 3.11 or newer is needed: make PYTHON=/path/to/python3 …" >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --require-hashes -r requirements.lock
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation --editable .
	@touch $@

install: $(STAMP)  ## make .venv and install what the lock file names

demo: $(STAMP)  ## run the whole pipeline on generated traffic and show where every record ended; KAFKA=1: on Kafka
	$(if $(KAFKA),$(BIN)/python deploy/kafka/broker.py demo,$(BIN)/streamveil demo)

kafka: $(STAMP)  ## start an Apache Kafka on loopback and say how to connect; PLAINTEXT=1: for benchmarks only
	@$(BIN)/python deploy/kafka/broker.py start $(if $(PLAINTEXT),--plaintext)

kafka-stop: $(STAMP)  ## stop it; its data stays
	@$(BIN)/python deploy/kafka/broker.py stop

test: lint types unit  ## check lint, layers and types, and run every test

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports --no-cache

types: $(STAMP)
	$(BIN)/mypy

unit: $(STAMP)
	$(BIN)/python -m pytest -n auto --dist loadfile --no-loadscope-reorder

bench: $(STAMP)  ## measure every stage, the whole pipeline, the log, reveal and memory
	$(BIN)/python -m benchmarks

bench-kafka: $(STAMP)  ## measure passing through, the whole pipeline, fixed rates and memory on a real broker: half an hour
	$(BIN)/python -m benchmarks kafka

bench-smoke: $(STAMP)
	$(BIN)/python -m benchmarks --smoke

MINUTES ?= 30
chaos: $(STAMP)  ## break brokers, workers, network, disk and key store again and again, and check everything; MINUTES=30
	$(BIN)/python -m tests.chaos --minutes $(MINUTES) $(if $(STREAMVEIL_CHAOS_SEED),--seed $(STREAMVEIL_CHAOS_SEED))

lock: $(STAMP)  ## write requirements.lock anew from pyproject.toml
	$(BIN)/python -m pip install --quiet uv
	$(BIN)/uv pip compile pyproject.toml --extra dev --universal --python-version 3.11 --generate-hashes --no-emit-index-url --no-header --quiet --output-file requirements.lock

clean:
	rm -rf $(VENV) build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis
