# Each target sets up .venv when needed and does nothing more when it is up to date.
PORT ?= 5000
PYTHON ?= python3
READY := .venv/.ready
PARALLEL := -n 2 --dist worksteal
SEED ?= $(shell date +%s)
PIP := .venv/bin/python -m pip install --disable-pip-version-check --progress-bar off
SHELL := bash# for pipefail; and make 3.81 (macOS) passes the exported PATH to commands only through a shell
export PATH := $(CURDIR)/.venv/bin:$(PATH)
export PYTHONNOUSERSITE := 1

.DEFAULT_GOAL := help
.PHONY: help repro update due test test-shuffled test-slow test-gpu lint ui embedded lock clean

help: ## show this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-14s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

repro: $(READY) ## run the pipeline (dvc repro), then show time and memory of each stage
	@python -m capas.workspace.restore --quiet
	dvc repro
	@python -m capas.core.timings
	@python -m capas.workspace.reproduced
	@echo "Report: reports/index.html   En español: reports/index.es.html   Runs: make ui"

update: $(READY) ## merge a newer version (UPSTREAM=REMOTE, REMOTE/BRANCH or URL), then list the due stages
	@python -m capas.workspace.update $(UPSTREAM)
	@$(MAKE) --no-print-directory due

due: $(READY) ## list the stages that will run again, and why
	@python -m capas.workspace.due

test: $(READY) ## run the default tests: offline, CPU, minutes
	python -m pytest $(PARALLEL)

test-shuffled: $(READY) ## run the default tests in random order; SEED=N repeats an order
	python -m pytest $(PARALLEL) -p randomly --randomly-seed=$(SEED)

test-slow: $(READY) ## run the slow tests: whole pipelines in temporary clones
	python -m pytest $(PARALLEL) -m slow

test-gpu: $(READY) ## run the tests that need an NVIDIA GPU
	python -m pytest -m gpu

lint: $(READY) ## run ruff and mypy
	ruff check .
	ruff format --check .
	mypy

ui: $(READY) ## serve the MLflow UI on http://127.0.0.1:5000 (PORT=5001 for another port)
	@python -m capas ui --port $(PORT)

embedded: $(READY) ## rebuild the embedded base model and compare it with data/embedded/
	python stages/pretrain_embedded.py

lock: ## resolve pyproject.toml into requirements.lock
	rm -rf .venv-lock && $(PYTHON) -m venv .venv-lock
	.venv-lock/bin/pip install --quiet '.[sweep,harness,serve,dev]'
	set -o pipefail; { sed -n '1,/^[^#]/{/^#/p;}' requirements.lock; \
	  .venv-lock/bin/pip freeze --exclude capas | sed 's/+[a-z0-9.]*$$//'; } > requirements.lock.new
	mv requirements.lock.new requirements.lock && rm -rf .venv-lock

clean: ## remove .venv, tool caches and debug runs; keep results and DVC's cache (see dvc gc)
	rm -rf .venv .pytest_cache .mypy_cache .ruff_cache capas.egg-info dvc_plots .dvc/tmp/debug
	find capas stages tests -name __pycache__ -type d -prune -exec rm -rf {} +

$(READY): requirements.lock pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { exit=$$?; \
	  echo "capas needs Python 3.11 or newer, and $(PYTHON) is $$($(PYTHON) --version 2>&1)."; \
	  echo "Use another: make PYTHON=python3.12"; exit $$exit; }
	@echo "Setting up .venv: about 2 GB, a few minutes."
	@.venv/bin/python -m pip --version > /dev/null 2>&1 || { rm -rf .venv; $(PYTHON) -m venv .venv; }
	@set -o pipefail; $(PIP) -r requirements.lock | awk -v all=$$(grep -c == requirements.lock) ' \
	  /^(Collecting|Processing) / && ++n % 30 == 0 { print "  " n " of " all " packages"; fflush() } \
	  /^Installing collected/ { print "  all downloaded; unpacking takes a minute"; fflush() }'
	@$(PIP) --quiet --no-deps -e .
	@touch $(READY)
