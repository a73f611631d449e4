# Every target installs what it needs: .venv is created on first use, and updated when this file or
# pyproject.toml has changed. Another interpreter: make test PYTHON=python3.12

PYTHON ?= python3
# Pinned, so that results are reproducible. pip prefers the build for CPUs, 2.13.0+cpu, if one of its
# indexes has it. Another version: make demo TORCH=torch
TORCH := torch==2.13.0

VENV := .venv
BIN := $(VENV)/bin
WITH_TORCH := $(VENV)/.torch-installed
DEMO := $(VENV)/.demo-installed
STAMP := $(VENV)/.installed
MODELS := $(VENV)/.models-installed

.DEFAULT_GOAL := help
.PHONY: help test test-slow test-models test-bounds lint docs demo clean

help: ## Show this list
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/  make \1\t\2/p' Makefile | expand -t 20

test: lint docs ## Check everything: ruff, mypy, documentation, tests
	$(BIN)/pytest -q -n 2

test-slow: lint docs ## The same with slow tests, and more examples of each property
	HYPOTHESIS_PROFILE=thorough $(BIN)/pytest -q -n 2 --runslow

test-models: $(MODELS) ## Train models of transformers, timm, torchvision and stable-baselines3
	$(BIN)/pytest -q -rs --runslow tests/models

test-bounds: ## The core of the tests with the oldest and the newest torch, and every installed Python
	$(PYTHON) tests/bounds.py

lint: $(STAMP) ## ruff check, ruff format --check, mypy --strict
	$(BIN)/ruff check -q .
	$(BIN)/ruff format -q --check .
	$(BIN)/mypy --strict

docs: $(STAMP) ## Build the documentation into docs/_build/html; warnings are errors
	$(BIN)/sphinx-build -q -W --keep-going docs docs/_build/html
	$(BIN)/python -m tests.publishing.remote docs/_build/html

demo: $(DEMO) ## Train the digit-pair example
	$(BIN)/python examples/digit_pairs.py

clean: ## Delete the virtual environments, caches and build outputs
	rm -rf $(VENV) .venv-bounds build dist docs/_build .mypy_cache .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# The sizes are those of 2026-11, Python 3.11 on Linux. Every later command repeats the pin so that
# no dependency can replace torch.
$(WITH_TORCH): Makefile
	$(PYTHON) -m venv $(VENV)
	@if $(BIN)/pip show -q torch 2>/dev/null; then \
	  echo 'torch is already installed: pip checks that it is $(TORCH).'; \
	elif [ "$$(uname -s)" != Linux ] || \
	    $(BIN)/pip index versions torch 2>/dev/null | grep -qF '$(patsubst torch==%,%,$(TORCH))+cpu'; then \
	  echo 'Downloading $(TORCH), the build for CPUs: 0.2 GB.'; \
	else \
	  echo 'Downloading $(TORCH) with CUDA: 2.7 GB. The build for CPUs (0.2 GB) is enough for everything here.'; \
	  echo 'To use it, press Ctrl-C, run the following line, and start again:'; \
	  echo '    export PIP_EXTRA_INDEX_URL=https://download.pytorch.org/whl/cpu'; \
	fi
	$(BIN)/pip install '$(TORCH)'
	@touch $@

$(DEMO): $(WITH_TORCH) pyproject.toml
	@echo 'Downloading what the examples need (geotorch, scikit-learn, matplotlib, rich): 0.1 GB.'
	$(BIN)/pip install '$(TORCH)' -e '.[examples]'
	@touch $@

$(STAMP): $(WITH_TORCH) pyproject.toml
	@echo 'Downloading what development needs (100 packages): 0.2 GB.'
	$(BIN)/pip install '$(TORCH)' -e '.[dev]'
	@touch $(DEMO) $@

$(MODELS): $(STAMP)
	$(BIN)/pip install '$(TORCH)' -e '.[models]'
	@touch $@
