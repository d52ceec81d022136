# `make help` lists the targets. Each works as the only command on a fresh machine.
PYTHON ?= python3
VENV := .venv
RUN := OMP_NUM_THREADS=1 $(VENV)/bin/python
STAMP := $(VENV)/.installed

.DEFAULT_GOAL := help
.PHONY: help setup demo demo-seeds fashion-mnist test lint bench clean

help: ## list the targets
	@awk 'BEGIN {FS = ":.*## "} /^[a-z-]+:.*## / {printf "  %-14s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

setup: $(STAMP) ## build .venv with everything that is needed (PYTHON= selects the interpreter)

$(STAMP): requirements.txt requirements-dev.txt pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/python -m pip install --quiet --upgrade pip
	$(VENV)/bin/python -m pip install --quiet -r requirements-dev.txt
	$(VENV)/bin/python -m pip install --quiet --no-deps -e .
	touch $(STAMP)

demo: $(STAMP) ## all three stages on the embedded digits; ends with a table and pictures
	$(RUN) -m tessera.run.demo

demo-seeds: $(STAMP) ## the demo with three seeds; the table shows mean and spread
	$(RUN) -m tessera.run.demo --seeds 3

fashion-mnist: $(STAMP) ## the same chain on Fashion-MNIST (TESSERA_FASHION_MNIST= gives its folder)
	$(RUN) -m tessera.run.demo --dataset fashion_mnist

test: $(STAMP) ## all tests
	$(RUN) -m pytest -n 2

lint: $(STAMP) ## style checks
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .

bench: $(STAMP) ## benchmarks; each prints ratios
	for file in benchmarks/[a-z]*.py; do echo "== $$file"; $(RUN) $$file || exit 1; done

clean: ## remove caches and the virtual environment; never touches results in outputs/
	rm -rf $(VENV) .pytest_cache .ruff_cache build src/*.egg-info
	find src tests -name __pycache__ -type d -prune -exec rm -rf {} +
