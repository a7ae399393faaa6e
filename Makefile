# `make quickstart` and `make test` set up all they need in a virtual environment of their own.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin

.PHONY: quickstart test lint types clean

quickstart: $(VENV)/installed
	$(BIN)/python examples/quickstart.py

test: $(VENV)/installed
	$(BIN)/python -m pytest --numprocesses auto --maxprocesses 8

lint: $(VENV)/installed
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .

# mypy follows folders, not the package-dir mapping: show it the import name as a tree of links.
types: $(VENV)/installed
	@rm -rf build/types && mkdir -p build/types/sinklm
	@for folder in models data train eval cli configs; do ln -s ../../../$$folder build/types/sinklm/$$folder; done
	MYPYPATH=build/types $(BIN)/mypy --namespace-packages -p sinklm

$(VENV)/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade "pip>=25.1"
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --group dev --editable .
	@touch $@

clean:
	rm -rf $(VENV) build quickstart
