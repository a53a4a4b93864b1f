# Everything runs in a virtual environment of its own; constraints.txt pins what was tested.
PYTHON ?= python3
VENV ?= .venv
DEMO ?= demo
JOBS ?= 2
RUNS ?= 20000
ENVIRONMENTS ?= build/bench
BENCH ?=
TARGETS ?= manifest recipe data path
BIN = $(VENV)/bin
REVIEWS = hf_bucket/default/reviews.jsonl
LADDER = --buckets auto --n-buckets 6

export HF_HUB_OFFLINE = 1

.PHONY: help demo install test house lint types check fuzz architectures bench bench-environments bench-overhead clean

help:
	@echo "make demo            compile the bundled model, compare it with torch, draw the charts (in $(DEMO)/)"
	@echo "make test            install what tests need and run them all"
	@echo "make house           rooms, public names and import time only"
	@echo "make lint            ruff: lint and format"
	@echo "make types           mypy --strict on the package"
	@echo "make check           lint, types and test, as continuous integration does"
	@echo "make fuzz            atheris on the readers and on the path from text to result (RUNS=$(RUNS) of each)"
	@echo "make architectures   every model type of transformers, compared with torch (an hour or two; resumes)"
	@echo "make bench           hf_bucket and its rivals in turns (hours; needs HF_BUCKET_TEST_ASSETS; BENCH=arguments)"
	@echo "make bench-environments  build the rivals' environments in $(ENVIRONMENTS)/"
	@echo "make bench-overhead  what routing and padding cost (needs a model: MODEL=, DATA=)"
	@echo "make clean           remove the virtual environment and caches"

demo: $(VENV)/.demo
	@mkdir -p $(DEMO)
	@echo "1. Plan six bucket lengths for $(REVIEWS)"
	@$(BIN)/hf-bucket plan $(REVIEWS) --tokenizer default --n-buckets 6 --max-length 512 --chart $(DEMO)/plan.png --force
	@echo "2. Compile the bundled classifier for them, and check every bucket against torch"
	@$(BIN)/hf-bucket compile default $(LADDER) --calibration $(REVIEWS) --output $(DEMO)/model --force
	@echo "3. Compare the bucketed model with plain torch and with transformers' pipeline"
	@$(BIN)/hf-bucket eval --data $(REVIEWS) --model default $(LADDER) --rounds 5 \
		--output $(DEMO)/evaluation.json --chart $(DEMO)/evaluation.png --force
	@echo "Charts: $(DEMO)/plan.png, $(DEMO)/evaluation.png. Compiled model: $(DEMO)/model. Try:"
	@echo "    echo 'a dull, endless film' | $(BIN)/hf-bucket predict $(DEMO)/model --kind text"

install: $(VENV)/.installed

$(BIN)/python:
	$(PYTHON) -m venv $(VENV) || { \
		echo "A virtual environment cannot be made; on Debian: apt install python3-venv" >&2; rm -rf $(VENV); exit 1; }

$(VENV)/.demo: pyproject.toml constraints.txt | $(BIN)/python
	@echo "installing into $(VENV); a few minutes the first time"
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[eval,plot]"
	touch $@

$(VENV)/.installed: pyproject.toml constraints.txt | $(BIN)/python
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[dev]"
	touch $@ $(VENV)/.demo

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

$(VENV)/.fuzz: $(VENV)/.installed
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[fuzz]"
	touch $@

fuzz: $(VENV)/.fuzz  ## what is found lies in build/fuzz/<target>/crash-*
	@mkdir -p build/fuzz
	@for target in $(TARGETS); do \
		log=build/fuzz/$$target.log; \
		$(BIN)/python fuzz/fuzz_$$target.py -runs=$(RUNS) > $$log 2>&1 || { tail -n 40 $$log; exit 1; }; \
		printf '%-9s' $$target; grep 'DONE' $$log; \
	done

architectures: install
	$(BIN)/python scripts/architectures.py --jobs $(JOBS)

bench: install
	$(BIN)/python benchmarks/bench.py --environments $(ENVIRONMENTS) --page docs/benchmarks.md $(BENCH)

bench-environments: install  ## each is gigabytes; one that cannot be built costs its rows only
	$(BIN)/python benchmarks/bench_environments.py --environments $(ENVIRONMENTS)

bench-overhead: install
	$(BIN)/python benchmarks/overhead.py --model $(MODEL) --data-dir $(DATA)

clean:
	rm -rf $(VENV) $(DEMO) .pytest_cache .mypy_cache .ruff_cache .hypothesis build *.egg-info
