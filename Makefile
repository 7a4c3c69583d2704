# Two commands for a fresh machine: `make run` and `make test`. Both set up .venv first.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready

.PHONY: help setup run test test-slow test-cluster lint tables bench clean reference-env reference

help:
	@echo "make run    set up, then quantize and measure the embedded model with every method (CPU, no network)"
	@echo "make test   set up, then run the tests"
	@echo "make lint   ruff"
	@echo "make test-slow   the tests that take minutes"
	@echo "make test-cluster   sweeps on a real Slurm on this machine (root, slurm-wlm and munge installed)"
	@echo "make tables  draw results/README.md from the committed records"
	@echo "make reference-env  a second environment with the libraries that the baselines are compared with"
	@echo "make reference  compare the baselines with them"
	@echo "make bench  per-GEMM latency on this machine's GPU"

setup: $(READY)

$(READY): constraints.txt pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	    { echo "Python 3.11 or later is needed: make run PYTHON=python3.11" >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt torch
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev,cluster,gpu]'
	@touch $@

run: setup
	$(BIN)/python run.py -m experiment=quickstart

# Most of the minutes are of processes that load their libraries, each on one core.
test: setup
	$(BIN)/python -m pytest --numprocesses logical --maxprocesses 4 --dist worksteal

test-slow: setup
	$(BIN)/python -m pytest -m slow

test-cluster: setup
	CLUSTER_REPORT=results/cluster/report.md $(BIN)/python -m pytest -m cluster tests/cluster

lint: setup
	$(BIN)/ruff check .

tables: setup
	$(BIN)/python -m experiments report

bench: setup
	$(BIN)/python -m fastgemm.bench

# The libraries that the baselines are checked against and can run (method.backend), in an environment of their own.
REFERENCE := .venv-reference

reference-env: $(REFERENCE)/.ready

$(REFERENCE)/.ready: constraints.txt constraints-reference.txt pyproject.toml
	$(PYTHON) -m venv $(REFERENCE)
	$(REFERENCE)/bin/python -m pip install --quiet --constraint constraints.txt torch setuptools wheel
	$(REFERENCE)/bin/python -m pip install --quiet --constraint constraints.txt --editable '.[dev,cluster,gpu]'
	BUILD_CUDA_EXT=0 $(REFERENCE)/bin/python -m pip install --quiet --no-deps --no-build-isolation \
	    --requirement constraints-reference.txt
	@touch $@

reference: reference-env
	$(REFERENCE)/bin/python -m pytest -m reference tests/reference

clean:
	rm -rf outputs .pytest_cache .ruff_cache
