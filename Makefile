# Every target sets itself up: `make demo` in a fresh clone is enough.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.complete

.PHONY: setup demo test check bench lock clean

setup: $(STAMP)

# --clear: nothing stays of another Python or an older lock. The lock is complete, so nothing is resolved:
# --no-deps makes a forgotten pin fail here, not later.
$(STAMP): requirements.lock pyproject.toml
	@echo "setting up $(VENV) (about a minute)"
	@$(PYTHON) -c 'import sys; sys.exit(0 if (3, 11) <= sys.version_info[:2] < (3, 14) else "knode needs Python 3.11 to 3.13, this is %d.%d: make PYTHON=python3.13" % sys.version_info[:2])'
	@$(PYTHON) -m venv --clear $(VENV)
	@$(BIN)/pip install --quiet --disable-pip-version-check --no-deps --require-hashes -r requirements.lock
	@$(BIN)/pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation -e .
	@rm -rf $(VENV)/lib/python*/site-packages/trio-stubs  # of an old trio, brought by libp2p: they hide its own types
	@touch $@

demo: setup
	@$(BIN)/python -m knode.testnet.demo

test: setup
	@$(BIN)/python -m pytest

check: setup
	@$(BIN)/ruff format --check --quiet . || { echo "format: run 'ruff format .'"; exit 1; }
	@$(BIN)/ruff check --quiet .
	@$(BIN)/mypy --no-error-summary
	@$(BIN)/lint-imports --no-cache | tail -n 3

bench: setup
	@$(BIN)/python -m benchmarks

# Pins every dependency with the hashes of its files, for every supported Python, from the index that pip uses.
lock: setup
	@$(BIN)/pip install --quiet --disable-pip-version-check uv==0.13.9
	@UV_DEFAULT_INDEX="$$($(BIN)/pip config get global.index-url 2>/dev/null)" $(BIN)/uv pip compile --quiet --universal \
	    --extra dev --generate-hashes --no-emit-index-url --custom-compile-command "make lock" --output-file requirements.lock pyproject.toml

clean:
	@rm -rf $(VENV) build *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis
