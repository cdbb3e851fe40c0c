# make demo      both training stages and their probes on generated video
# make test      what a contributor runs before a commit: everything but the slow tests
# make test-all  everything
# make lint      ruff and mypy
# Each target makes the environment first. VENV=/elsewhere keeps it outside the clone, so that clones can share it.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
# The environment is made anew when what it was made from changes.
STAMP := $(VENV)/.made-from-$(shell cat pyproject.toml constraints.txt | cksum | cut -d' ' -f1)
# Test files are shared out among processes whole, because the tests of a file share fixtures.
PARALLEL := -n auto --dist loadfile

.PHONY: setup demo test test-slow test-all lint

setup: $(STAMP)

$(STAMP):
	$(PYTHON) -c 'import sys; sys.exit(0 if sys.version_info >= (3, 11) else "Python 3.11 or newer is needed: make PYTHON=python3.12 setup")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	rm -f $(VENV)/.made-from-*
	touch $@

demo: setup
	$(BIN)/python -m salt_wds.demo

test: setup
	$(BIN)/python -m pytest $(PARALLEL) -m "not slow"

test-slow: setup
	$(BIN)/python -m pytest $(PARALLEL) -m slow

test-all: setup
	$(BIN)/python -m pytest $(PARALLEL)

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
