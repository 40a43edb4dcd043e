# A fresh machine needs git, make and Python >= 3.11 with venv; every target installs what it misses into .venv.
# Another interpreter: make PYTHON=python3.12 test

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
BENCHMARKS := train_step sample cache data preprocess evaluate checkpoint scaling scaling_check

.DEFAULT_GOAL := help
.PHONY: help quickstart study test test-slow test-gpu faults bench lint clean

help:  ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "make %-11s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

quickstart: $(INSTALLED)  ## the whole pipeline on handwritten digits: minutes on 2 CPU cores, ends with a picture
	@PATH="$(CURDIR)/$(BIN):$$PATH" bash examples/digits/run.sh

study: $(INSTALLED)  ## five ways to train on digits, three seeds each, table and plot: half an hour on 2 CPU cores
	$(BIN)/python -m examples.digits.study

test: $(INSTALLED)  ## the tests: minutes on 2 CPU cores, no GPU
	$(BIN)/python -m pytest

test-slow: $(INSTALLED)  ## the tests of full-size networks and long runs
	$(BIN)/python -m pytest -m slow

test-gpu: $(INSTALLED)  ## the acceptance suite of a GPU: ends with a table, and a file in benchmarks/results/
	$(BIN)/python -m pytest tests/gpu -m gpu

faults: $(INSTALLED)  ## every script killed at random moments and started again: nothing may be lost; seven minutes
	$(BIN)/python -m tests.faults

bench: $(INSTALLED)  ## the benchmarks at this machine's size; results in benchmarks/results/
	set -e; for name in $(BENCHMARKS); do echo; echo "== $$name =="; $(BIN)/python -m benchmarks.$$name; done

lint: $(INSTALLED)  ## ruff: rules and format
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

clean:  ## remove build/ and caches; data, runs and .venv stay
	rm -rf build .pytest_cache .ruff_cache .hypothesis
	find . -path ./$(VENV) -prune -o -name __pycache__ -type d -prune -exec rm -rf {} +

# pip is upgraded first: the one that venv brings may be too old for the wheels of the pinned versions.
$(INSTALLED): requirements.txt requirements-dev.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || \
		{ echo "make: $(PYTHON) is missing or older than Python 3.11; name another: make PYTHON=python3.12 ..." >&2; exit 1; }
	@$(BIN)/python -m pip --version >/dev/null 2>&1 || \
		{ echo "Making $(VENV) with $$($(PYTHON) --version)"; $(PYTHON) -m venv $(VENV); }
	@echo "Installing the pinned requirements into $(VENV): about 5 GB, a minute or two"
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --upgrade pip
	@$(BIN)/python -m pip install --quiet -r requirements-dev.txt
	@touch $@
