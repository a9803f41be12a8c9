PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check install --quiet

.PHONY: demo test test-all test-tiers test-torch browser regress baseline format bench docs clean \
  demo-vllm test-vllm gpu wheels

# Simulate two engines with two ranks each against a real server.
demo: $(VENV)/.light
	$(BIN)/kvctl bench run scenarios/quickstart.toml

# The gate of every change: style, types, tests, without torch or a GPU. Three
# processes for two cores, since the system tests wait more than they work.
test: $(VENV)/.test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/python -m pytest --numprocesses 3 --dist worksteal

# The same with the long tests and the full number of random examples.
test-all: $(VENV)/.test
	.ci/sizes --check
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/python -m pytest --hypothesis-profile full --timeout 600 --numprocesses 3 --dist worksteal \
	  -m 'not gpu and not torch and not vllm and not soak and not tiers and not browser'

# The tiers over real stores, each started and killed by its tests: Valkey, Redis, an S3
# server, Mooncake Store, which two servers on two hosts share as well. And eviction
# beside libCacheSim's. Fails where one of them cannot be installed.
test-tiers: $(VENV)/.tiers
	$(BIN)/python -m pytest -m tiers tests/tiers tests/system tests/storage

# What needs torch, Triton and NVIDIA's bindings, but no GPU: kernels interpreted and
# compiled for Hopper, the device over a stub of the driver.
test-torch: $(VENV)/.torch
	.ci/stub $(BIN)/python -m pytest -m 'torch or (gpu and not card)' \
	  --numprocesses 2 --dist worksteal

# Open the report in a real browser: desktop, phone, dark mode, print.
browser: $(VENV)/.test
	.ci/chromium
	$(BIN)/python -m pytest -m browser

# vLLM for CPUs in a virtual environment of its own, 3.4 GB, made once.
VLLM_VENV ?= .venv-vllm
$(VLLM_VENV)/.ready: .ci/vllm pyproject.toml
	PYTHON=$(PYTHON) .ci/vllm $(VLLM_VENV)
	@touch $@

# Prompts to a real vLLM: without the server, with it, and again in a new process.
demo-vllm: $(VLLM_VENV)/.ready
	$(VLLM_VENV)/bin/python -m kvctl bench run scenarios/vllm.toml

# The connector in real engines: three kinds of model, kills, ranks, noise. Two at a
# time, of some 1.5 GB each.
test-vllm: $(VLLM_VENV)/.ready
	$(VLLM_VENV)/bin/python -m pytest tests/vllm_engine -m vllm --numprocesses 2 --dist worksteal

# Everything that needs a card, on this host and without a network, in 8 minutes.
# make gpu TRACE=mooncake_conversation.jsonl.zst
gpu:
	PYTHON=$(PYTHON) TRACE=$(TRACE) RESULTS=$(RESULTS) .ci/gpu

# What a GPU host without a network lacks, to be carried there.
wheels:
	.ci/wheels

format: $(VENV)/.test
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: $(VENV)/.test
	$(BIN)/python -m pytest tests/benchmarks

# The working tree against a commit, both installed and run in turns:
# make regress BASE=main. Counts are held against results/baselines as well.
BASE ?= HEAD
REPEAT ?= 20
regress: $(VENV)/.light
	$(BIN)/kvctl bench regress --base $(BASE) --repeat $(REPEAT)

# Accept new counts: look at the difference before committing it.
baseline: $(VENV)/.light
	rm -rf results/runs/baseline
	$(BIN)/kvctl bench run scenarios/regress.toml --out results/runs/baseline
	mkdir -p results/baselines
	cp results/runs/baseline/regress-*.json results/baselines/regress.json

# Everything in docs/ that is derived from the code.
docs: $(VENV)/.light
	$(BIN)/kvctl inspect protocol --markdown > docs/protocol.md
	$(BIN)/kvctl inspect result --schema > docs/result.schema.json
	$(BIN)/kvctl inspect scenario --schema > docs/scenario.schema.json

clean:
	rm -rf $(VENV)

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "$(PYTHON) is older than 3.11: make PYTHON=python3.11 ..." >&2; exit 2; }
	$(PYTHON) -m venv $(VENV)

$(VENV)/.light: pyproject.toml | $(BIN)/python
	$(PIP) --editable .
	@touch $@

$(VENV)/.test: pyproject.toml | $(BIN)/python
	$(PIP) --editable '.[test]'
	@touch $@ $(VENV)/.light

$(VENV)/.torch: pyproject.toml | $(BIN)/python
	$(PIP) --editable '.[test-torch]'
	@touch $@ $(VENV)/.test $(VENV)/.light

$(VENV)/.tiers: pyproject.toml | $(BIN)/python
	.ci/tiers
	$(PIP) --editable '.[test-tiers]'
	@touch $@ $(VENV)/.test $(VENV)/.light
