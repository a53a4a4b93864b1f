# Everything runs in a virtual environment of its own; constraints.txt pins what was tested.
PYTHON ?= python3
VENV ?= .venv
BIN = $(VENV)/bin
JOBS ?= 2

export HF_HUB_OFFLINE = 1

.PHONY: help install test house lint types check bench-overhead clean

help:
	@echo "make test            install what tests need and run them all"
	@echo "make house           rooms, public names and import time only"
	@echo "make lint            ruff: lint and format"
	@echo "make types           mypy --strict on the package"
	@echo "make check           lint, types and test, as continuous integration does"
	@echo "make bench-overhead  what routing and padding cost (needs a model: MODEL=, DATA=)"
	@echo "make clean           remove the virtual environment and caches"

install: $(VENV)/.installed

$(VENV)/.installed: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[dev]"
	touch $@

test: install
	$(BIN)/python -m pytest -n $(JOBS) $(ARGS)

house: install  ## rooms, public names, import time
	$(BIN)/python -m pytest tests/test_house.py

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: install
	$(BIN)/mypy

check: lint types test

bench-overhead: install
	$(BIN)/python benchmarks/overhead.py --model $(MODEL) --data-dir $(DATA)

clean:
	rm -rf $(VENV) .pytest_cache .mypy_cache .ruff_cache .hypothesis build *.egg-info
