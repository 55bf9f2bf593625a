# One virtual environment, made when first needed. Everything below runs in it.
PYTHON ?= python3
VENV   ?= .venv
PIP_ARGS ?=
ENGINE ?= $(shell for engine in docker podman buildah; do $$engine info > /dev/null 2>&1 && echo $$engine && break; done)
COMPOSE ?= $(shell docker compose version > /dev/null 2>&1 && echo docker compose || echo $(CURDIR)/$(BIN)/podman-compose)
BIN    := $(VENV)/bin
READY  := $(VENV)/.ready

.PHONY: help setup train test test-cluster slow-check chaos parity lint format bench cluster-files \
    image image-cpu image-cuda up down image-check lock clean
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
	$(BIN)/python -m pytest -n logical --maxprocesses 4 --dist worksteal tests/unit
	$(BIN)/python -m pytest --ignore tests/unit tests

test-cluster: $(READY)  ## a real cluster of machines made of namespaces; root, about ten minutes, no network
	$(BIN)/python -m pytest -m cluster -s tests/cluster/test_nodes.py tests/cluster/test_onprem.py \
	    tests/cluster/test_aws.py tests/cluster/test_metrics.py

slow-check: $(READY)  ## whole sweeps, on two engines, by every searcher and scheduler, killed; nodes that come and go; half an hour
	$(BIN)/python -m pytest -m slow tests

chaos: $(READY)  ## N=20 runs on real nodes, from which something is killed at a random point, SEED=0; about a minute each
	$(BIN)/python -m tests.faults.chaos --number $(or $(N),20) --seed $(or $(SEED),0)

parity: $(READY)  ## every engine beside one plain process, the whole table; about twenty minutes on two cores
	$(BIN)/python -m tests.matrix

lint: $(READY)  ## ruff and mypy
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(READY)  ## let ruff format the code
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: $(READY)  ## speed beside other trainers, paired: NAME= picks comparisons; about an hour on two cores
	$(BIN)/python -m pip install --quiet $(PIP_ARGS) --constraint requirements.lock --editable '.[bench]'
	$(BIN)/python -m tests.bench $(NAME)

cluster-files: $(READY)  ## write cluster/ and docker/compose.yaml anew, from the templates
	$(BIN)/python -m tests.cluster_files

image: image-cpu image-cuda  ## container images raytune-ds:cpu and raytune-ds:cuda, by docker, podman or buildah

# torch's own index has the CPU build; PyPI has the one for CUDA.
image-cpu: IMAGE_PIP_ARGS := --extra-index-url https://download.pytorch.org/whl/cpu
image-cpu image-cuda: image-%:
	@test -n '$(ENGINE)' || { echo 'make image needs docker, podman or buildah, or ENGINE=...'; exit 1; }
	BUILDAH_FORMAT=docker $(ENGINE) build --file docker/Dockerfile --target $* --tag raytune-ds:$* \
	    --build-arg PIP_ARGS='$(or $(PIP_ARGS),$(IMAGE_PIP_ARGS))' \
	    --build-arg VERSION=$$(sed -n 's/^version = "\(.*\)"/\1/p' pyproject.toml) \
	    --build-arg REVISION=$$(git rev-parse HEAD 2> /dev/null || echo unknown) .

up: $(if $(findstring podman-compose,$(COMPOSE)),$(READY))  ## a cluster of containers on this machine, N=2 CPU workers; GPU=1: one worker with all GPUs
	$(COMPOSE) --file docker/compose.yaml $(if $(GPU),--profile gpu) up --detach --scale worker=$(if $(GPU),0,$(or $(N),2))

down:  ## remove those containers; what is on their shared volume stays
	$(COMPOSE) --file docker/compose.yaml --profile gpu down

image-check: $(READY)  ## build the images without an engine, train in them, a cluster of them; about ten minutes, as root
	PIP_ARGS='$(PIP_ARGS)' $(BIN)/python -m pytest -m cluster tests/cluster/test_image.py tests/cluster/test_compose.py

lock: $(READY)  ## pin what is installed now
	$(BIN)/python -m pip freeze --exclude-editable | grep -v '@' | sed 's/+cpu$$//' > requirements.lock

clean:  ## remove the environment and caches; runs in ~/raytune_ds stay
	rm -rf $(VENV) .mypy_cache .ruff_cache .pytest_cache *.egg-info
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
