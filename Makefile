# `make` lists the targets.
.DEFAULT_GOAL := help
.PHONY: help venv demo test test-all test-lowest compile-check compile-check-full gpu-check lint format bench clean

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
# The lowest NumPy and SciPy have no wheels for newer Pythons.
LOWEST_PYTHON ?= python3.11
LOWEST := .venv-lowest

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## /{printf "%-19s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

venv: $(STAMP) ## make or refresh .venv with everything that demo and tests need

$(STAMP): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[train,test,bench,bundle]"
	touch $@

$(LOWEST)/.installed: pyproject.toml constraints-lowest.txt
	test -x $(LOWEST)/bin/python || $(LOWEST_PYTHON) -m venv $(LOWEST)
	$(LOWEST)/bin/python -m pip install --quiet --disable-pip-version-check -c constraints-lowest.txt \
		-e ".[train,test,bench,bundle]"
	touch $@

demo: venv ## phantoms -> EDL and SURE -> demo/report.html, on the CPU, in minutes
	$(BIN)/sure demo --out demo

# Two processes, a file each at a time; threads that wait asleep do not take the other process's core.
test test-all test-lowest: export OMP_WAIT_POLICY = PASSIVE
PYTEST := -m pytest -n 2 --dist loadfile

test: venv ## the test suite
	$(BIN)/python $(PYTEST)

test-all: venv ## the test suite with the long cases
	$(BIN)/python $(PYTEST) -m "slow or not slow"

test-lowest: $(LOWEST)/.installed ## the test suite with the lowest versions pyproject.toml allows, in .venv-lowest
	$(LOWEST)/bin/python $(PYTEST)

# Triton 3.4 links AMD code with ROCm's linker and brings none; the compile check reads the assembly before it.
test-lowest: export TRITON_HIP_LLD_PATH ?= $(firstword $(wildcard /opt/rocm/llvm/bin/ld.lld /bin/true))

compile-check: venv ## compile every kernel for four GPU families, with every pair of its flags; fails on spills
	$(BIN)/python -m sure_kernels.compile_check

compile-check-full: venv ## every pair of flags on every GPU family, every K (resumes where it stopped); docs/compile-check.md
	$(BIN)/python -m sure_kernels.compile_check --full --cache build/compile-check.jsonl --output docs/compile-check.md

gpu-check: ## on a machine with a GPU, in nine minutes: kernel tests compiled, timings, a profile; PYTHON=... with torch
	scripts/gpu_check.sh

lint: venv ## ruff (lint and format) and mypy
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: venv ## let ruff rewrite what it can
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: venv ## time the ops on this machine and make benchmarks/RESULTS.md: needs green tests and a clean tree
	$(BIN)/python -m benchmarks run --record
	$(BIN)/python -m benchmarks plot

clean: ## remove what the other targets made
	rm -rf $(VENV) $(LOWEST) demo build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis .benchmarks
