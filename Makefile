# The two commands of the README, and the checks that `make test` is made of.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

.PHONY: run test lint types imports tests clean

run: $(VENV)/installed
	$(BIN)/python -m pruneflow

test: lint types imports tests

lint: $(VENV)/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(VENV)/installed
	$(BIN)/mypy

imports: $(VENV)/installed
	$(BIN)/lint-imports --no-cache

tests: $(VENV)/installed
	$(BIN)/python -m pytest --numprocesses auto --dist loadfile

$(VENV)/installed: pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; assert sys.version_info >= (3, 11), "pruneflow needs Python 3.11 or newer"'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --disable-pip-version-check --constraint constraints.txt --editable '.[dev,deploy]'
	touch $@

clean:
	rm -rf $(VENV) dist build outputs
