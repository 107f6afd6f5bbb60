# Two commands do everything on a fresh machine: `make demo` and `make test`. `make help` lists the rest.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
PIP := $(BIN)/pip --disable-pip-version-check --quiet
DEMO ?=
TESTS ?=
JOBS ?= 2
DATA ?=
CHAOS ?=

.DEFAULT_GOAL := help
.PHONY: help demo test chaos lint format bench lock clean

help: ## Show this list
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## /\1\t/' | expand -t 12

demo: $(VENV)/.runtime ## Train, push, sort, watch: the whole loop on this machine (options: DEMO="--seconds 60 --report report.json")
	@$(BIN)/sortline demo $(DEMO)

test: $(VENV)/.dev lint ## Lint, types and the default tests (TESTS="-m slow" is passed to pytest; JOBS=0 runs them one by one)
	@$(BIN)/python -m pytest -q -n $(JOBS) --dist loadfile $(TESTS)

lint: $(VENV)/.dev ## Style and types only
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy

format: $(VENV)/.dev ## Rewrite the sources in the project's format
	@$(BIN)/ruff check --fix .
	@$(BIN)/ruff format .

bench: $(VENV)/.dev ## Benchmarks, quick form (DATA=folder adds the cross-validation of a labelled folder)
	@test -z "$(DATA)" || $(BIN)/python -m benchmarks.apples --quick --data "$(DATA)"
	@$(BIN)/python -m benchmarks.broker --quick
	@$(BIN)/python -m benchmarks.delivery --quick
	@$(BIN)/python -m benchmarks.trust --quick
	@$(BIN)/python -m benchmarks.fleet --quick
	@$(BIN)/python -m benchmarks.line --quick

chaos: $(VENV)/.dev ## Kill, cut, flood and fill at random, then balance the books, some minutes (CHAOS="--long" for hours)
	@$(BIN)/python -m tests.chaos $(CHAOS)

# Each lock lists every package with the hashes of its files and names no index.
$(VENV)/.runtime: requirements/runtime.lock pyproject.toml
	@echo "Making the environment in $(VENV) (once; downloads about 250 MB) ..."
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Sortline needs Python 3.11 or newer, this is " + sys.version.split()[0])'
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@$(PIP) install --require-hashes -r requirements/runtime.lock
	@$(PIP) install --no-deps --no-build-isolation -e .
	@touch $@

$(VENV)/.dev: $(VENV)/.runtime requirements/dev.lock
	@echo "Adding the tools for tests ..."
	@$(PIP) install --require-hashes -r requirements/dev.lock
	@touch $@

lock: $(VENV)/.dev ## Renew the locks after a change of dependencies (needs uv)
	@for set in "agent:--extra agent --extra build" "devices:--extra industrial --extra gpio -c requirements/agent.lock" \
	  "runtime:--extra agent --extra control-plane --extra postgresql --extra build" "dev:--extra dev"; do \
	  uv pip compile --quiet --universal --python-version 3.11 --generate-hashes --no-emit-index-url --no-emit-find-links \
	    --no-header $${set#*:} pyproject.toml -o requirements/$${set%%:*}.lock || exit 1; done

clean: ## Remove the environment and caches
	rm -rf $(VENV) .mypy_cache .ruff_cache .pytest_cache .hypothesis
