# `make` lists what there is. Every target sets up what it needs: no other step comes first.
#
#   PYTHON     the interpreter of the virtual environment (3.10 or later)
#   TORCH      what pip installs as PyTorch, e.g. TORCH=torch==2.12.0
#   WORKERS    pytest processes; 0 runs the tests in one, auto in two
#   ARGS       further arguments of pytest, e.g. ARGS='-k layout'
#   NPROC      ranks of the demo; by default two, or one on a machine with a single GPU
#   DEMO_ARGS  further arguments of the demo

PYTHON ?= python3
TORCH ?= -r requirements/torch.txt
WORKERS ?= 0
ARGS ?=
NPROC ?=
DEMO_ARGS ?=

VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/ready
SPEC := $(VENV)/torch-spec
KERNELS := $(wildcard src/zerolith/kernels/csrc/*)
SOURCES := setup.py src tests examples benchmarks docs

export OMP_NUM_THREADS ?= 1
export PYTEST_XDIST_AUTO_NUM_WORKERS ?= 2
export PIP_DISABLE_PIP_VERSION_CHECK ?= 1

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help venv test unit lint format types docs docs-check demo clean FORCE

help: ## List the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-12s %s\n", $$1, $$2}' Makefile

venv: $(READY) ## Make the virtual environment .venv and install zerolith there, editable

test: lint types unit docs ## Lint, check the types, run all tests, build the documents

unit: $(READY) ## Run the tests
	$(BIN)/python -m pytest -n $(WORKERS) $(ARGS)

lint: $(READY) ## Check style and format
	$(BIN)/ruff check $(wildcard $(SOURCES))
	$(BIN)/ruff format --check $(wildcard $(SOURCES))

format: $(READY) ## Mend style and format where a tool can
	$(BIN)/ruff check --fix $(wildcard $(SOURCES))
	$(BIN)/ruff format $(wildcard $(SOURCES))

types: $(READY) ## Check the types
	$(BIN)/mypy

docs-check: $(READY) ## Check that the links of the documents lead somewhere
	$(BIN)/python -m pytest -q tests/house/test_docs.py

docs: $(READY) ## Build the documents into build/docs
	$(BIN)/python -m pip install -q -r requirements/docs.txt
	$(BIN)/python -m sphinx -q -E -W --keep-going -b html docs build/docs
	@echo 'build/docs/index.html'

demo: $(READY) ## Train a small GPT with ZeRO-3 in bf16
	$(BIN)/torchrun --standalone --nproc-per-node \
	    $(or $(NPROC),$$($(BIN)/python -c 'import torch; print(min(torch.cuda.device_count() or 2, 2))')) \
	    examples/pretrain_gpt.py --config examples/configs/zero3_bf16.json $(DEMO_ARGS)

clean: ## Remove the virtual environment, caches, builds and runs
	rm -rf $(VENV) build dist runs src/*.egg-info src/zerolith/kernels/*.so .mypy_cache .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

$(READY): $(SPEC) $(wildcard requirements/*.txt) pyproject.toml setup.py $(KERNELS)
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "zerolith needs Python 3.10 or later: make PYTHON=python3.11 ...")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q $(TORCH)
	$(BIN)/python -m pip install -q -r requirements/test.txt -r requirements/examples.txt
	$(BIN)/python -m pip install -q --no-deps --no-build-isolation -e .
	@touch $@

# Rewritten only when TORCH is another than last time, so that $(READY) follows it.
$(SPEC): FORCE
	@mkdir -p $(VENV)
	@echo '$(TORCH)' | cmp -s - $@ || echo '$(TORCH)' > $@
