# One virtual environment, made when first needed. Everything below runs in it.
PYTHON ?= python3
VENV   ?= .venv
PIP_ARGS ?=
BIN    := $(VENV)/bin
READY  := $(VENV)/.ready

.PHONY: help setup train test test-cluster parity lint format bench cluster-files lock clean
.DEFAULT_GOAL := help

help:  ## this list
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 15

setup: $(READY)  ## install the package and its pinned dependencies into .venv

$(READY): pyproject.toml requirements.lock
	@$(PYTHON) -c 'import sys; sys.exit("Python 3.11 or later is needed: make PYTHON=python3.11 ..." if sys.version_info < (3, 11) else 0)'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet $(PIP_ARGS) --constraint requirements.lock --editable '.[dev,cluster]'
	@touch $@

train: $(READY)  ## the demo: a tiny DeepSeek-V3-shaped model learns a domain, in about five minutes on two cores
	$(BIN)/raytune-ds demo

test: $(READY)  ## all tests: no network, no GPU
	$(BIN)/python -m pytest tests

test-cluster: $(READY)  ## a real cluster of machines made of namespaces; root, about ten minutes, no network
	$(BIN)/python -m pytest tests/cluster -m cluster -s

parity: $(READY)  ## every engine beside one plain process, the whole table; about twenty minutes on two cores
	$(BIN)/python -m tests.matrix

lint: $(READY)  ## ruff and mypy
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(READY)  ## let ruff format the code
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: $(READY)  ## speed beside the plain Hugging Face recipe, paired in one process
	$(BIN)/python -m tests.bench

cluster-files: $(READY)  ## write cluster/ and docker/compose.yaml anew, from the templates
	$(BIN)/python -m tests.cluster_files

lock: $(READY)  ## pin what is installed now
	$(BIN)/python -m pip freeze --exclude-editable | grep -v '@' | sed 's/+cpu$$//' > requirements.lock

clean:  ## remove the environment and caches; runs in ~/raytune_ds stay
	rm -rf $(VENV) .mypy_cache .ruff_cache .pytest_cache *.egg-info
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
