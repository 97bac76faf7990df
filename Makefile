# `make demo` and `make test` do all the set-up themselves, in a virtual environment of their own.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
# One thread a process: the tests run in as many processes as there are cores.
TEST_ENV := OMP_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false

.PHONY: setup demo test test-fast test-slow lint types format bench docs clean

$(VENV)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable ".[dev,demo]"
	touch $@

setup: $(VENV)/.installed

demo: setup
	$(BIN)/python recipes/demo.py

test: test-fast test-slow

test-fast: setup
	$(TEST_ENV) $(BIN)/python -m pytest -q -n auto --dist worksteal -m "not slow and not gpu and not network"

test-slow: setup
	$(TEST_ENV) $(BIN)/python -m pytest -q -n auto --dist worksteal -m "slow and not gpu"

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: setup
	$(BIN)/pyright

format: setup
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: setup
	$(BIN)/python benchmarks/bench_decode_attention.py
	$(BIN)/python benchmarks/bench_blockwise_attention.py

docs: setup
	$(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable ".[docs]"
	$(BIN)/mkdocs build --strict

clean:
	rm -rf $(VENV) .cache site .pytest_cache .ruff_cache .hypothesis
