# `make help` lists the targets. Everything runs in .venv, which the first target creates.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
QUICKSTART := build/quickstart

.DEFAULT_GOAL := help
.PHONY: help install quickstart test unit testbed lint format generate bench gpu-check image-check clean

help: ## Show this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  %-12s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

$(INSTALLED): pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; assert sys.version_info >= (3, 11), "Python 3.11 or newer is needed; set PYTHON=..."'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --editable '.[job,cli,dev]' --constraint constraints.txt
	touch $@

install: $(INSTALLED) ## Create the environment in .venv

quickstart: $(INSTALLED) ## Cache activations of a small real model and train an SAE on them, locally
	$(BIN)/python tools/small_model.py --model $(QUICKSTART)/smollm2-135m --text $(QUICKSTART)/english-text
	$(BIN)/sae-job run -f examples/quickstart.yaml

test: lint ## Run every check and test: unit, random lives, a real API server and Kueue, real pods and S3, peers
	$(BIN)/python -m tests.testbed build
	$(BIN)/python -m pytest -n 3 --dist loadfile

unit: $(INSTALLED) ## Run the unit tests alone (a minute or two)
	$(BIN)/python -m pytest -n 2 --dist loadfile tests/unit

testbed: $(INSTALLED) ## Start a real control plane, S3 server, node and operator on loopback, to play with
	$(BIN)/python -m tests.testbed up --operator

lint: $(INSTALLED) ## Check style, types, import layers and generated files
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/basedpyright
	$(BIN)/lint-imports --no-cache
	$(BIN)/python -m sae_operator.api.crd --out manifests/crds --check
	$(BIN)/python -m sae_operator.api.reference --out docs/reference --check
	$(BIN)/python tools/argo_cd_config.py --out gitops/argo-cd --check

format: $(INSTALLED) ## Format the code
	$(BIN)/ruff check --fix
	$(BIN)/ruff format

generate: $(INSTALLED) ## Write the CRDs and the reference documentation from the models
	$(BIN)/python -m sae_operator.api.crd --out manifests/crds
	$(BIN)/python -m sae_operator.api.reference --out docs/reference
	$(BIN)/python tools/argo_cd_config.py --out gitops/argo-cd

bench: $(INSTALLED) ## Run the benchmarks, quickly; each prints one line of JSON last
	for name in operator first_step text caching reading training many_saes quality storage_quality; do $(BIN)/python bench/$$name.py --quick || exit 1; done

gpu-check: $(INSTALLED) ## Compare GPU and CPU results; needs a CUDA device
	$(BIN)/python -m pytest tests/gpu

image-check: $(INSTALLED) ## Build both images and run them by a real kubelet; needs root, Debian and some of its packages
	$(BIN)/python -m pytest tests/containers

clean: ## Remove the environment and what runs have written
	rm -rf $(VENV) build out
