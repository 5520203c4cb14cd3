# Everything a person or CI runs; `make` alone lists it. Set-up is done once, on first need, into .venv.
PYTHON  ?= python3
WORKERS ?= 2

VENV   := .venv
PY     := $(VENV)/bin/python
PIP    := $(PY) -m pip -qq --disable-pip-version-check --no-input
PYTEST := OMP_NUM_THREADS=1 $(PY) -m pytest --quiet -n $(WORKERS) --dist worksteal
NATIVE := env -u TRITON_INTERPRET
MADE   := $(VENV)/.made
TORCH  := $(VENV)/.torch
READY  := $(VENV)/.ready
OLDER  := build/triton-3.6.0

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.NOTPARALLEL:
.PHONY: help demo test check lint types format setup clean test-unit test-interpreter test-aot test-aot-older evidence bench-cpu bench-routing bench-analysis bench-simulator bench-seeds bench-gpu docs faults

help: ## List the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-18s%s\n", $$1, $$2 }' $(MAKEFILE_LIST)

demo: $(READY) ## Run the examples on real input; tables here, kernel and mask picture in build/demo
	@$(NATIVE) $(PY) -m examples.demo
	@echo "demo: the files are in $(CURDIR)/build/demo"

test: $(READY) ## Run every test
	@$(MAKE) --no-print-directory --keep-going test-unit test-interpreter test-aot

check: lint types test ## What a change must pass: lint, types, tests

# Triton reads TRITON_INTERPRET once, at import, so the interpreter and the compiler need processes of their own.
test-unit: $(READY) ## Tests that run no generated kernel
	@$(NATIVE) $(PYTEST) tests --ignore=tests/interpreter --ignore=tests/aot

test-interpreter: $(READY) ## Generated kernels under Triton's interpreter
	@TRITON_INTERPRET=1 $(PYTEST) tests/interpreter

test-aot: $(READY) ## Kernels compiled for GPUs that are not here
	@$(NATIVE) $(PYTEST) tests/aot

test-aot-older: $(READY) $(OLDER) ## The same by the oldest Triton that is supported
	@$(NATIVE) PYTHONPATH=$(CURDIR)/$(OLDER) $(PYTEST) tests/aot

lint: $(READY) ## Ruff: rules and format
	@$(PY) -m ruff check --quiet
	@$(PY) -m ruff format --quiet --check

types: $(READY) ## Mypy, strict
	@$(PY) -m mypy --no-error-summary

format: $(READY) ## Mend what ruff can mend
	@$(PY) -m ruff check --quiet --fix-only
	@$(PY) -m ruff format --quiet

evidence: $(READY) ## Compile the whole covering array for every target; done work is kept
	@$(NATIVE) $(PY) -m benchmarks.evidence

bench-cpu: $(READY) ## Time the CPU backend against its tile bound, SDPA and FlexAttention
	@$(NATIVE) $(PY) -m benchmarks.cpu

bench-routing: $(READY) ## Time head routing on the CPU beside all heads
	@$(NATIVE) $(PY) -m benchmarks.routing

bench-analysis: $(READY) ## Time block-mask analysis beside create_block_mask
	@$(NATIVE) $(PY) -m benchmarks.analysis

bench-simulator: $(READY) ## The simulator's error table: published timings that nothing is fitted to
	@$(NATIVE) $(PY) -m benchmarks.simulator

bench-seeds: $(READY) ## Published speed figures beside the simulator's
	@$(NATIVE) $(PY) -m benchmarks.seeds

bench-gpu: $(READY) ## Check and time every kernel on the GPU of this machine
	@$(NATIVE) $(PY) -m benchmarks.gpu

docs: $(READY) ## Write docs/spec.md and its pictures from the models
	@$(NATIVE) $(PY) -m docs.vocabulary

faults: $(READY) ## Seed faults one at a time; each must make its tests fail
	@$(PY) -m tests.faults

setup: $(READY) ## Only make the environment

clean: ## Remove the environment and everything a run leaves behind
	@rm -rf $(VENV) build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis

$(MADE):
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "attncc needs Python 3.10 or later; try make PYTHON=...")'
	@echo "setting up $(VENV): a few minutes, once"
	@$(PYTHON) -m venv --clear $(VENV)
	@touch $@

# Alone and first, from the index pip is configured with: nothing that follows may choose or move torch.
$(TORCH): constraints.txt | $(MADE)
	@$(PIP) install "$$(grep '^torch==' constraints.txt)"
	@touch $@

# Beside the environment's own Triton, not in its place.
$(OLDER):
	@$(PIP) install --no-deps --target $@ triton==$(@:build/triton-%=%)

$(READY): pyproject.toml constraints.txt $(TORCH)
	@$(PIP) install --constraint constraints.txt --editable '.[dev,examples,plot,yaml]'
	@touch $@
