# Every habit is one target. The virtual environment makes itself. Benchmarks: python -m benchmarks
VENV    := .venv
PYTHON  ?= python3
PY      := $(VENV)/bin/python
PREFILL ?= 1
DECODE  ?= 1
MIXED   ?= 0
SCHEDULER ?= 1
MODEL   ?=
PORT    ?= 8000
# Clients that the suite of clients tries: each folder has an environment of its own.
CLIENTS := .venv-clients
# `make compose-test SHORT=1`: only the API, its errors, and what a stranger can do.
SHORT   ?=

DEFAULT := -m "not full and not gpu and not compose"
PARTS   := $(DEFAULT) --ignore tests/e2e --numprocesses 3 --dist loadfile

.DEFAULT_GOAL := help
.PHONY: help install up test test-full coverage compose-test clients lint fmt clean

help: ## list the targets
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "  %-20s %s\n", $$1, $$2}'
	@echo "  make up takes PREFILL=n DECODE=n MIXED=n SCHEDULER=n MODEL=folder-file-or-hub-id PORT=n"

install: $(VENV)/ready-dev ## install everything, for development too

$(VENV)/bin/python:
	@echo "[make] creating the virtual environment"
	$(PYTHON) -m venv $(VENV)

# torch first and alone: whatever else is resolved later then fits the pinned build.
$(VENV)/ready: $(VENV)/bin/python constraints.txt pyproject.toml
	@echo "[make] installing torch"
	$(VENV)/bin/pip install --disable-pip-version-check --progress-bar on -c constraints.txt torch
	@echo "[make] installing FlowKV"
	$(VENV)/bin/pip install --disable-pip-version-check --quiet -c constraints.txt -e '.[engine]'
	@touch $@

$(VENV)/ready-dev: $(VENV)/ready
	@echo "[make] installing what tests and linters need"
	$(VENV)/bin/pip install --disable-pip-version-check --quiet -c constraints.txt -e '.[engine,otel,dev]'
	@touch $@

up: $(VENV)/ready ## start NATS and all services as processes; Ctrl-C drains and stops them
	@$(PY) -m flowkv up --prefill $(PREFILL) --decode $(DECODE) --mixed $(MIXED) --scheduler $(SCHEDULER) --model "$(MODEL)" --port $(PORT)

test: $(VENV)/ready-dev ## the tests: real NATS, real model, real processes
	@$(PY) -m flowkv_engine.engine.fetch
	$(PY) -m pytest $(PARTS)
	$(PY) -m pytest $(DEFAULT) tests/e2e

test-full: $(VENV)/ready-dev ## the tests and the long matrices
	$(PY) -m pytest -m "not gpu and not compose"

coverage: $(VENV)/ready-dev ## the tests but for whole clusters; fails when they run less than 93 % of the lines
	@$(PY) -m flowkv_engine.engine.fetch
	$(PY) -m pytest $(PARTS) --cov

compose-test: $(VENV)/ready-dev ## the composed system on a Docker Engine: built, scaled, broken, taken down
	@$(PY) -m flowkv_engine.engine.fetch
	$(PY) -m pytest -m compose $(if $(SHORT),tests/compose/test_suites.py tests/compose/test_security.py -k "not identity",tests/compose)

$(CLIENTS)/%/ready: tests/clients/%/requirements.txt
	@echo "[make] installing the clients of $<"
	$(PYTHON) -m venv $(CLIENTS)/$*
	$(CLIENTS)/$*/bin/pip install --disable-pip-version-check --quiet -r $<
	@touch $@

# lm_eval compares with transformers: it sees FlowKV's own, and torch, which takes a gigabyte.
$(CLIENTS)/lm_eval/ready: tests/clients/lm_eval/requirements.txt $(VENV)/ready-dev
	@echo "[make] installing the clients of $<"
	$(PY) -m venv $(CLIENTS)/lm_eval
	$(PY) -c 'import sysconfig; print(sysconfig.get_path("purelib"))' > $(CLIENTS)/lm_eval/flowkv.pth
	mv $(CLIENTS)/lm_eval/flowkv.pth $(CLIENTS)/lm_eval/lib/python3*/site-packages
	$(CLIENTS)/lm_eval/bin/pip install --disable-pip-version-check --quiet -r $<
	@touch $@

tests/clients/%/node_modules: tests/clients/%/package-lock.json
	cd $(@D) && npm ci --no-audit --no-fund
	@touch $@

clients: $(VENV)/ready-dev $(CLIENTS)/current/ready $(CLIENTS)/openai2/ready $(CLIENTS)/lm_eval/ready tests/clients/node/node_modules tests/clients/agents/node_modules ## unmodified clients (openai, anthropic, LangChain, AI SDK, ...) against a cluster
	$(PY) -m tests.clients

lint: $(VENV)/ready-dev ## ruff, mypy --strict, import boundaries
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy
	$(VENV)/bin/lint-imports
	$(VENV)/bin/codespell

fmt: $(VENV)/ready-dev ## format the code
	$(VENV)/bin/ruff check --fix .
	$(VENV)/bin/ruff format .

clean: ## remove the virtual environment and all that was built
	rm -rf $(VENV) $(CLIENTS) tests/clients/*/node_modules .run .coverage .mypy_cache .pytest_cache .ruff_cache .hypothesis
