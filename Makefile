# One entry for people and for CI. Everything runs in .venv; data and models go to $ECHOX_CACHE (~/.cache/echox).
PYTHON ?= python3
UV_VERSION := 0.13.9
VENV := .venv
BIN := $(CURDIR)/$(VENV)/bin
STAMP := $(VENV)/.installed

export PATH := $(BIN):$(PATH)
export VIRTUAL_ENV := $(CURDIR)/$(VENV)
# Container images like to set it. A run has a dozen processes, and without a cache each compiles 4,000 modules: 20 s.
unexport PYTHONDONTWRITEBYTECODE

.DEFAULT_GOAL := help
.PHONY: help env demo small test test-slow chaos mutate check clean

help: ## this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-10s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

env: $(STAMP) ## make .venv with the tested versions; does nothing when it is up to date

# A virtual environment breaks when its folder is moved or its Python goes away, so an unusable one is made again.
$(STAMP): requirements.lock pyproject.toml
	@$(BIN)/python -c "import sys" 2>/dev/null || rm -rf $(VENV)
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet uv==$(UV_VERSION)
	$(BIN)/uv pip install --quiet -r requirements.lock
	$(BIN)/uv pip install --quiet --no-deps --no-build-isolation -e .
	@touch $@

demo: env ## fetch models, build the corpus, train the three stages on this machine, evaluate, report
	$(BIN)/python -m launch.demo

small: env ## the demo with three times the sentences: about two hours on two cores
	$(BIN)/python -m launch.demo --scale small

# Two processes: tests that start clusters run one at a time, and so do those that start ranks.
test: env ## the default tests; the first run downloads the demo's models
	$(BIN)/python -m pytest -n 2

test-slow: env ## all tests, also those that need long minutes or much memory
	$(BIN)/python -m pytest -m "slow or not slow"

chaos: env ## kill a rank of a training run 50 times, and compare with a run that nobody killed
	$(BIN)/python tests/engine/chaos.py --kills 50

MUTATE ?= --limit 200
mutate: env ## change the science at 200 places, one at a time, and list what no test notices (a quarter of an hour)
	$(BIN)/python -m tests.mutation.run $(MUTATE)

check: env ## what CI runs: lint, format, types, tests
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy --strict echox launch shards
	$(BIN)/python -m pytest -n 2

clean: ## remove .venv and tool caches; runs and downloads stay
	rm -rf $(VENV) build .mypy_cache .pytest_cache .ruff_cache *.egg-info
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
