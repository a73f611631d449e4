# Every target sets itself up: .venv is made on first use and brought up to date when this file or
# pyproject.toml has changed. Another interpreter: make test PYTHON=python3.12

PYTHON ?= python3
# Pinned, because an unpinned torch may come with several gigabytes of CUDA packages.
TORCH := torch==2.13.0

VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

.DEFAULT_GOAL := help
.PHONY: help test test-slow lint docs demo clean

help: ## Show this list
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/  make \1\t\2/p' Makefile | expand -t 20

test: lint docs ## Check everything: ruff, mypy, documentation, tests
	$(BIN)/pytest -q -n 2

test-slow: lint docs ## The same, slow tests included
	$(BIN)/pytest -q -n 2 --runslow

lint: $(STAMP) ## ruff check, ruff format --check, mypy --strict
	$(BIN)/ruff check -q .
	$(BIN)/ruff format -q --check .
	$(BIN)/mypy --strict

docs: $(STAMP) ## Build the documentation into docs/_build/html; warnings are errors
	$(BIN)/sphinx-build -q -W --keep-going docs docs/_build/html

demo: $(STAMP) ## Train the digit-pair example
	$(BIN)/python examples/digit_pairs.py

clean: ## Delete the virtual environment, caches and build outputs
	rm -rf $(VENV) build dist docs/_build .mypy_cache .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# The second command repeats the pin so that no dependency can replace torch.
$(STAMP): pyproject.toml Makefile
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install -q '$(TORCH)'
	$(BIN)/pip install -q '$(TORCH)' -e '.[dev]'
	@touch $@
