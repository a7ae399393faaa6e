# All targets install what they need in a separate virtual environment.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin

.PHONY: quickstart test long-test lint types docs clean

quickstart: $(VENV)/installed
	$(BIN)/python examples/quickstart.py

test: $(VENV)/installed
	$(BIN)/python -m pytest --numprocesses auto --maxprocesses 8 --dist worksteal

long-test: $(VENV)/installed
	$(BIN)/python -m pytest -m long --numprocesses auto --maxprocesses 8 --dist worksteal

lint: $(VENV)/installed
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .

types: $(VENV)/installed
	$(BIN)/mypy -p sinklm

docs: $(VENV)/docs-installed
	$(BIN)/python docs/site.py
	$(BIN)/zensical build --clean --strict
	@echo "The site is in build/site/index.html"

$(VENV)/docs-installed: $(VENV)/installed
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --group docs
	@touch $@

$(VENV)/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade "pip>=25.1"
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --group dev --editable ".[all]"
	@touch $@

clean:
	rm -rf $(VENV) .ci/venvs .ci/dist .ci/node build quickstart
