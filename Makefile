# Every habit is one target. The virtual environment makes itself.
VENV    := .venv
PYTHON  ?= python3
PY      := $(VENV)/bin/python
PREFILL ?= 1
DECODE  ?= 1
MIXED   ?= 0
SCHEDULER ?= 1
MODEL   ?=
PORT    ?= 8000
TRACE   ?=
TRANSFER ?=
OVERLAP ?=
SIMULATE ?=
REQUESTS ?= 100000
SHIFT   ?=
OVERLOAD ?=
SUSTAIN ?=
SIMULATED ?=
ENGINE  ?=
GPU     ?=
SERVING ?=
DISTURBED ?=
VLLM    ?=
LLAMACPP ?=
GGUF    ?=

.DEFAULT_GOAL := help
.PHONY: help install up test test-full compose-test compose-test-short bench-transfer bench-peers-install bench-fragmentation bench-overlap bench-disconnects bench-shift bench-overload bench-burst bench-simulated bench-real bench-sustain bench-engine bench-gpu bench-gpu-serving bench-gpu-transfer bench-serving bench-disturbed lint fmt clean

help: ## list the targets
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "  %-20s %s\n", $$1, $$2}'
	@echo "  make up takes PREFILL=n DECODE=n MIXED=n SCHEDULER=n MODEL=folder-or-hub-id PORT=n"

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
	$(VENV)/bin/pip install --disable-pip-version-check --quiet -c constraints.txt -e '.[engine,dev]'
	@touch $@

up: $(VENV)/ready ## start NATS and all services as processes; Ctrl-C drains and stops them
	@$(PY) -m flowkv up --prefill $(PREFILL) --decode $(DECODE) --mixed $(MIXED) --scheduler $(SCHEDULER) --model "$(MODEL)" --port $(PORT)

test: $(VENV)/ready-dev ## the tests: real NATS, real model, real processes
	@$(PY) -m flowkv_engine.engine.fetch
	$(PY) -m pytest -m "not full and not gpu and not compose" --ignore tests/e2e --numprocesses 2 --dist loadfile
	$(PY) -m pytest -m "not full and not gpu and not compose" tests/e2e

test-full: $(VENV)/ready-dev ## the tests and the long matrices
	$(PY) -m pytest -m "not gpu and not compose"

compose-test: $(VENV)/ready-dev ## the composed system on a Docker Engine: built, scaled, broken, taken down
	@$(PY) -m flowkv_engine.engine.fetch
	$(PY) -m pytest tests/compose -m compose

compose-test-short: $(VENV)/ready-dev ## of these: the API, its errors, and what a stranger can do
	@$(PY) -m flowkv_engine.engine.fetch
	$(PY) -m pytest tests/compose/test_suites.py tests/compose/test_security.py -m compose -k "not identity"

lint: $(VENV)/ready-dev ## ruff, mypy --strict, import boundaries
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy
	$(VENV)/bin/lint-imports
	$(VENV)/bin/codespell

fmt: $(VENV)/ready-dev ## format the code
	$(VENV)/bin/ruff check --fix .
	$(VENV)/bin/ruff format .

bench-transfer: $(VENV)/ready-dev ## what each idea is worth in KV transfers; TRANSFER="--quick"
	@mkdir -p .run
	$(PY) -m benchmarks.transfer --json .run/transfer.json $(TRANSFER)

bench-peers-install: $(VENV)/ready-dev ## the libraries that bench-transfer measures beside; Mooncake's needs libibverbs1
	$(VENV)/bin/pip install --disable-pip-version-check -c constraints.txt matplotlib
	$(VENV)/bin/pip install --disable-pip-version-check -c constraints.txt nixl-cu12 mooncake-transfer-engine-non-cuda

bench-fragmentation: $(VENV)/ready-dev ## copies per request in pools long in use; TRACE=file REQUESTS=n
	@mkdir -p .run
	$(PY) -m benchmarks.fragmentation --json .run/fragmentation.json --requests $(REQUESTS) $(addprefix --trace ,$(TRACE))

bench-overlap: $(VENV)/ready-dev ## time to the second token, overlap off and on, beside one node; OVERLAP="--repeat 3"
	@mkdir -p .run
	$(PY) -m benchmarks.overlap --json .run/overlap.json $(OVERLAP)

bench-disconnects: $(VENV)/ready-dev ## how long blocks stay held after a client has left
	@mkdir -p .run
	$(PY) -m benchmarks.disconnects --json .run/disconnects.json

bench-shift: $(VENV)/ready-dev ## load that shifts between the sides, lending off and on; SHIFT="--nodes 2"
	@mkdir -p .run
	$(PY) -m benchmarks.paced.shift --json .run/shift.json $(SHIFT)

bench-overload: $(VENV)/ready-dev ## three times what the cluster can do; OVERLOAD="--seconds 20"
	@mkdir -p .run
	$(PY) -m benchmarks.paced.overload --json .run/overload.json $(OVERLOAD)

bench-burst: $(VENV)/ready-dev ## many requests at once, foreseen waits beside real ones; BURST="--real --nodes 1"
	@mkdir -p .run
	$(PY) -m benchmarks.paced.burst --json .run/burst.json $(BURST)

bench-simulated: $(VENV)/ready-dev ## the simulator beside paced nodes on the same requests; SIMULATED="--trace azure.csv"
	@mkdir -p .run
	$(PY) -m benchmarks.paced.simulated --json .run/simulated.json $(SIMULATED)

bench-real: $(VENV)/ready-dev ## the simulator beside 1P1D with the real model; REAL="--trace azure.csv --rates 0.2"
	@mkdir -p .run
	$(PY) -m benchmarks.paced.real --json .run/real.json $(REAL)

bench-sustain: $(VENV)/ready-dev ## the steps per second that one process of paced nodes keeps; SUSTAIN="--nodes 4"
	@mkdir -p .run
	$(PY) -m benchmarks.paced.sustain --json .run/sustain.json $(SUSTAIN)

bench-engine: $(VENV)/ready-dev ## the bare engine beside transformers; VLLM=its-python LLAMACPP=folder GGUF=file; ENGINE="--jobs 1x512"
	@mkdir -p .run
	$(PY) -m benchmarks.engine --json .run/engine.json $(addprefix --vllm ,$(VLLM)) $(addprefix --llamacpp ,$(LLAMACPP)) $(addprefix --gguf ,$(GGUF)) $(ENGINE)

bench-gpu: $(VENV)/ready-dev ## the bare engine on a GPU, Llama-3.1-8B's shape; GPU="--batches 1 16"
	@mkdir -p .run
	$(PY) -m benchmarks.gpu_engine --json .run/gpu-engine.json $(GPU)

bench-gpu-serving: $(VENV)/ready-dev ## chats beside long prompts on one GPU: 1P1D, and one node; GPU="--chunks 512"
	@mkdir -p .run
	$(PY) -m benchmarks.gpu_serving --json .run/gpu-serving.json $(GPU)

bench-gpu-transfer: $(VENV)/ready-dev ## what moving KV costs on one GPU; GPU="--tokens 1000"
	@mkdir -p .run
	$(PY) -m benchmarks.gpu_transfer --json .run/gpu-transfer.json $(GPU)

bench-serving: $(VENV)/ready-dev ## over HTTP beside vLLM: VLLM=its-python; SERVING="--threads 1 --pinned --bare"
	@mkdir -p .run
	$(PY) -m benchmarks.serving --json .run/serving.json $(addprefix --vllm ,$(VLLM)) $(SERVING)

bench-disturbed: $(VENV)/ready-dev ## chats disturbed by long prompts: 1P1D beside one node's chunk sizes; DISTURBED="--repeat 3"
	@mkdir -p .run
	$(PY) -m benchmarks.disturbed --json .run/disturbed.json $(DISTURBED)

clean: ## remove the virtual environment and all that was built
	rm -rf $(VENV) .run .mypy_cache .pytest_cache .ruff_cache .hypothesis
