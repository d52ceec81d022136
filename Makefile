# One entry per task; `make` alone lists them. `make test` and `make demo` set up what they need.

VENV   := .venv
BIN    := $(VENV)/bin
STAMP  := $(VENV)/.setup-done
PYTHON ?= python3
ARGS   ?=
METRICS ?= inception

# Small models on few cores are fastest with one thread per process; the tests run in one process per core.
export OMP_NUM_THREADS ?= 1
export MKL_NUM_THREADS ?= 1

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help setup test lint format eval-reconstruction eval-perturbation eval-generation compare docs demo fashion-mnist claims tiny-models notebooks bench clean

help:  ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-19s %s\n", $$1, $$2}' $(MAKEFILE_LIST)
	@echo
	@echo "  make reproduce-ROW: DRY=1 checks its commands and runs none; CHECKPOINT=1 evaluates its published checkpoint."
	@echo "  PYTHON=python3.12 selects the interpreter of a new $(VENV); ARGS='...' is passed on to what a target runs."

setup: $(STAMP)  ## build .venv with the pinned requirements and this package

$(STAMP): requirements.txt requirements-dev.txt pyproject.toml
	@test -x $(BIN)/pip || $(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	    { echo "error: Python 3.11 or newer is needed, $(PYTHON) is older or missing; choose one with PYTHON=..."; exit 1; } >&2
	test -x $(BIN)/pip || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements-dev.txt
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps -e .
	@touch $@

test: $(STAMP)  ## run the tests
	$(BIN)/python -m pytest -n 2 $(ARGS)

lint: $(STAMP)  ## check style and format
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: $(STAMP)  ## format the code
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

eval-reconstruction: $(STAMP)  ## rFID, PSNR, SSIM, LPIPS and codebook usage of a tokenizer (CKPT=...)
	$(BIN)/python eval.py task=reconstruction $(CKPT:%=ckpt=%) $(ARGS)

eval-perturbation: $(STAMP)  ## pFID of a tokenizer (CKPT=...)
	$(BIN)/python eval.py task=perturbation $(CKPT:%=ckpt=%) $(ARGS)

eval-generation: $(STAMP)  ## gFID, sFID, IS, precision and recall of a generator (CKPT=...)
	$(BIN)/python eval.py task=generation $(CKPT:%=ckpt=%) $(ARGS)

compare: $(STAMP)  ## the same of images made by anyone (A=...) against a reference (B=...; METRICS=digits: offline)
	$(BIN)/python eval.py task=compare metrics=$(METRICS) $(A:%=task.a=%) $(B:%=task.b=%) $(ARGS)

docs: $(STAMP)  ## write the tables of combinations and of published checkpoints (docs/*.md)
	$(BIN)/python docs/combinations.py $(ARGS)
	$(BIN)/python docs/checkpoints.py $(ARGS)

demo: $(STAMP)  ## train, post-train and measure everything on the embedded digits (minutes on a CPU)
	$(BIN)/python -m tessera.run.demo $(ARGS)

fashion-mnist: $(STAMP)  ## the same chain on Fashion-MNIST
	$(BIN)/python -m tessera.run.demo --dataset fashion_mnist $(ARGS)

claims: $(STAMP)  ## test the papers' claims on Fashion-MNIST and write docs/claims.md (hours on a CPU)
	$(BIN)/python -m tessera.run.claims.study $(ARGS)

tiny-models: $(STAMP)  ## train and export the models that come with the package (src/tessera/zoo/tiny)
	$(BIN)/python train.py experiment=digits/tiny_tokenizer
	$(BIN)/python train.py experiment=digits/tiny_generator tokenizer.path=outputs/digits/tiny_tokenizer/checkpoints/last.ckpt
	$(BIN)/python eval.py task=export ckpt=outputs/digits/tiny_generator/checkpoints/last.ckpt name=digits/tiny_export \
	    task.folder=src/tessera/zoo/tiny/digits task.title=digits task.licence=Apache-2.0

reproduce-list: $(STAMP)  ## list the published rows that `make reproduce-ROW` trains and measures
	$(BIN)/python -m tessera.run.reproduce

# CHECKPOINT=1 evaluates the row's published checkpoint instead of training; DRY=1 checks every command and runs none
reproduce-%: $(STAMP)
	@$(BIN)/python -m tessera.run.reproduce $* $(if $(CHECKPOINT),--checkpoint) $(if $(DRY),--dry-run) -- $(ARGS)

notebooks: $(STAMP)  ## run the notebooks and save their pictures in them
	$(BIN)/python notebooks/execute.py $(ARGS)

bench: $(STAMP)  ## run the benchmarks; each prints a ratio
	@for file in benchmarks/[a-z]*.py; do echo "== $$file"; $(BIN)/python $$file || exit 1; done

clean:  ## remove caches and builds; results (outputs/, multirun/) and .venv stay
	rm -rf build dist .pytest_cache .ruff_cache src/*.egg-info
	find . -name __pycache__ -type d -not -path './$(VENV)/*' -prune -exec rm -rf {} +
