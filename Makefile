# Every target that needs the environment makes it first; after `make setup` nothing here needs a network.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.changeover-installed
JARS := $(VENV)/.changeover-jars
ARGS ?=

.DEFAULT_GOAL := help
.PHONY: help setup java second demo quick units test majors chaos stress check docs bench contract wheel clean

help: ## Show the targets
	@awk -F ':.*## ' '/^[a-z]+:.*## /{printf "  make %-8s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

setup: $(STAMP) java second $(JARS) ## Make .venv, find or install Java and a second PostgreSQL, fetch Spark's archives

$(STAMP): pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || { \
	  echo "changeover needs Python 3.11 or later, and $(PYTHON) is none: install it, or run make with PYTHON=/path/to/python3" >&2; exit 2; }
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV) || { \
	  echo "$(PYTHON) can't make a virtual environment: on Debian run \`apt-get install -y python3-venv\` and then make again" >&2; \
	  rm -rf $(VENV); exit 2; }
	$(BIN)/python -m pip install --quiet --upgrade-strategy only-if-needed -e '.[dev,demo]'
	@touch $@

java: $(STAMP)
	@$(BIN)/python -m changeover.spark.java --install >/dev/null

second: $(STAMP)
	@$(BIN)/python -m tests.majors --second

$(JARS): $(STAMP) src/changeover/spark/jars.py | java
	@$(BIN)/python -m changeover.spark.jars
	@touch $@

demo: setup ## Move a live table end to end; ARGS="--rows 50000 --keep"
	@$(BIN)/changeover demo $(ARGS)

quick: setup ## Lint, types, and all tests without a server and Spark, in a minute; ARGS="-k spec -x"
	@$(MAKE) --no-print-directory --jobs=2 --output-sync=target check units

units:
	@$(BIN)/python -m pytest -q --part quick $(ARGS)

test: setup ## Run all tests, in two parts side by side; ARGS="-k ghost -x" runs those alone
	@$(BIN)/python -m $(if $(ARGS),pytest $(ARGS),tests.parts)

majors: setup ## Capture, copy, gate, fence and the hostile matrix on each PostgreSQL; ARGS="14 16 -x"
	@$(BIN)/python -m tests.majors $(ARGS)

chaos: setup ## Kill everything at random for minutes; ARGS="--chaos-seconds 600"
	@$(BIN)/python -m pytest -s tests/scenarios/test_chaos.py --chaos-seconds 300 $(ARGS)

stress: setup ## Everybody on one gated table at once, 500 trials; ARGS="--mutant all" without each rule
	@$(BIN)/python -m tests.stress $(ARGS)

check: setup ## Lint, format check and types
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy

docs: setup ## Make the reference pages anew, check all prose, build the site into docs/_build/html
	@$(BIN)/python docs/generate.py
	@$(BIN)/python docs/prose.py
	@$(BIN)/python -m sphinx -q -n -W --keep-going -b html -d docs/_build/doctrees docs docs/_build/html

bench: setup ## Run the benchmarks; ARGS="copy --rows 2000000 --json"
	@$(BIN)/python benchmarks/run.py $(ARGS)

contract: setup ## Ask LaunchDarkly's contract tests of migrations of the router; HARNESS=path/to/sdk-test-harness
	@HARNESS="$(HARNESS)" $(BIN)/python -m tests.contract $(ARGS)

wheel: setup ## Build the wheel and the sdist into dist/
	@$(BIN)/python -m build --no-isolation --outdir dist .

clean: ## Delete what was built; keeps .venv
	@rm -rf build dist docs/_build src/*.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis spark-warehouse
