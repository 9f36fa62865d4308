# Each target sets up .venv when needed and does nothing more when it is up to date.
PORT ?= 5000
READY := .venv/.ready
export PATH := $(CURDIR)/.venv/bin:$(PATH)
export PYTHONNOUSERSITE := 1

.DEFAULT_GOAL := help
.PHONY: help repro test test-slow lint ui embedded lock clean

help: ## show this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-10s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

repro: $(READY) ## run the pipeline (dvc repro), then show what each stage cost
	dvc repro
	@python -m capas.timings
	@echo "Report: reports/index.html   En español: reports/index.es.html   Runs: make ui"

test: $(READY) ## the default tests: offline, CPU, minutes
	python -m pytest

test-slow: $(READY) ## whole pipelines in temporary clones: kills, threads, second clones
	python -m pytest -m slow

lint: $(READY) ## ruff and mypy
	ruff check .
	ruff format --check .
	mypy

ui: $(READY) ## the MLflow UI on http://127.0.0.1:5000 (PORT=5001 for another port)
	@python -c "import socket; socket.create_server(('127.0.0.1', $(PORT)))" 2>/dev/null \
	  || { echo "Port $(PORT) is in use. Try: make ui PORT=$$(( $(PORT) + 1 ))"; exit 1; }
	MLFLOW_DISABLE_TELEMETRY=true mlflow ui --host 127.0.0.1 --port $(PORT) --workers 1 \
	  --backend-store-uri sqlite:///mlflow.db

embedded: $(READY) ## make the embedded base model again and compare it with data/embedded/
	python stages/pretrain_embedded.py

lock: ## resolve pyproject.toml anew into requirements.lock
	rm -rf .venv-lock && python3 -m venv .venv-lock
	.venv-lock/bin/pip install --quiet '.[sweep,dev]'
	{ sed -n '1,/^[^#]/{/^#/p}' requirements.lock; \
	  .venv-lock/bin/pip freeze --exclude capas | sed 's/+[a-z0-9.]*$$//'; } > requirements.lock.new
	mv requirements.lock.new requirements.lock && rm -rf .venv-lock

clean: ## remove .venv, tool caches and debug runs; results and DVC's cache stay (see dvc gc)
	rm -rf .venv .pytest_cache .mypy_cache .ruff_cache capas.egg-info dvc_plots .dvc/tmp/debug
	find capas stages tests -name __pycache__ -type d -prune -exec rm -rf {} +

$(READY): requirements.lock pyproject.toml
	@python3 -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
	  || { echo "capas needs Python 3.11 or newer; python3 is $$(python3 --version)"; exit 1; }
	@echo "Setting up .venv: about 2 GB, a few minutes."
	test -x .venv/bin/python || python3 -m venv .venv
	.venv/bin/python -m pip install --quiet --disable-pip-version-check -r requirements.lock
	.venv/bin/python -m pip install --quiet --disable-pip-version-check --no-deps -e .
	@touch $(READY)
