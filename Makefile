# Everything sets itself up on first use: Python 3.11 or newer and make are all it takes.

PYTHON ?= $(shell for p in python3 python3.14 python3.13 python3.12 python3.11; do \
	"$$p" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo "$$p" && break; \
	done)
VENV ?= .venv
BIN := $(VENV)/bin
READY := $(VENV)/.kvq-ready
# Arguments for pytest, e.g. make test PYTEST_ARGS='tests/formats -x'
PYTEST_ARGS ?=

.PHONY: help setup demo test test-oldest test-newest lint format types contracts docs check \
	bench-kmeans bench-accuracy bench-append bench-memory bench-decode bench-gpu bench-paper clean

help:
	@echo "make demo         calibrate the built-in model, evaluate it, generate with it (offline)"
	@echo "make test         run the tests"
	@echo "make test-oldest  run those that depend on transformers with the oldest supported version"
	@echo "make test-newest  the same with the newest that there is"
	@echo "make check        lint, import contracts and types"
	@echo "make format       let ruff format the code"
	@echo "make docs         write docs/cli.md and the tables of docs/{kernels,models}.md anew"
	@echo "make bench-kmeans measure the codebook solver against scikit-learn"
	@echo "make bench-accuracy measure kvq and other methods on three models; writes docs/accuracy.md"
	@echo "make bench-append measure what a token costs to append at 1k and at 64k tokens"
	@echo "make bench-memory measure the memory of a 64k-token cache against the plan"
	@echo "make bench-decode measure decoding on a CPU against transformers' quantized caches"
	@echo "make bench-gpu    check and measure everything on a GPU, within ten minutes, uninstalled"
	@echo "make bench-paper  measure a model by the protocol of the paper's table: MODEL=org/name"
	@echo "make clean        remove the virtual environment and all caches"

setup: $(READY)

$(READY): pyproject.toml constraints.txt
	@test -n "$(PYTHON)" || { \
		echo "kvq needs Python 3.11 or newer; none was found. Name one: make PYTHON=/path/to/python3" >&2; \
		exit 1; }
	@test -x $(BIN)/python || "$(PYTHON)" -m venv $(VENV) || { \
		echo "could not make $(VENV); on Debian and Ubuntu: apt install python3-venv" >&2; exit 1; }
	@echo 'Setting up $(VENV): downloads torch and friends, once; takes minutes.'
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	@touch $@

demo: $(READY)
	$(BIN)/kvq demo

test: $(READY)
	$(BIN)/python -m pytest -n auto $(PYTEST_ARGS)

# Tests that depend on transformers, in environments that have another version of it before the
# packages of $(VENV): the lower bound in pyproject.toml, or what the registry has today.
OLDEST ?= .venv-oldest
NEWEST ?= .venv-newest
TRANSFORMERS_TESTS := tests/runtime/test_rope.py tests/runtime/test_rotary_layout.py \
	tests/runtime/test_runtime_rule.py tests/runtime/test_supported_models.py \
	tests/calibration/test_pipeline.py $(wildcard tests/families)

test-oldest: $(OLDEST)/.kvq-ready
	$(OLDEST)/bin/python -m pytest -n auto $(TRANSFORMERS_TESTS) $(PYTEST_ARGS)

$(OLDEST)/.kvq-ready: $(READY) scripts/overlay_environment.py
	$(BIN)/python scripts/overlay_environment.py --oldest $(OLDEST)
	@touch $@

test-newest: $(READY)
	$(BIN)/python scripts/overlay_environment.py --newest $(NEWEST)
	$(NEWEST)/bin/python -m pytest -n auto $(TRANSFORMERS_TESTS) $(PYTEST_ARGS)

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: $(READY)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

contracts: $(READY)
	$(BIN)/lint-imports

types: $(READY)
	$(BIN)/mypy

check: lint contracts types

docs: $(READY)
	$(BIN)/python scripts/generate_cli_docs.py
	$(BIN)/python scripts/generate_kernel_docs.py
	$(BIN)/python scripts/generate_model_docs.py

bench-kmeans: $(READY)
	$(BIN)/python benchmarks/kmeans.py

bench-accuracy: $(READY)
	$(BIN)/python benchmarks/accuracy.py

bench-append: $(READY)
	$(BIN)/python benchmarks/append.py

bench-memory: $(READY)
	$(BIN)/python benchmarks/cache_memory.py

# The others' backends: $(BIN)/pip install optimum-quanto hqq
bench-decode: $(READY)
	$(BIN)/python benchmarks/decode_cpu.py

# On a machine with a GPU and what kvq needs; kvq itself is not installed, and nothing else is.
# Without a GPU: TRITON_INTERPRET=1 make bench-gpu PYTHON_GPU=$(BIN)/python BENCH_GPU_ARGS=--smoke
PYTHON_GPU ?= python3
BENCH_GPU_ARGS ?=
bench-gpu:
	PYTHONPATH=formats:kernels:runtime:calibration:evaluation:tests/support:.:$$PYTHONPATH \
		$(PYTHON_GPU) benchmarks/bench_gpu.py $(BENCH_GPU_ARGS)

# Options of the script, e.g. make bench-paper MODEL=org/name BENCH_PAPER_ARGS='--bits 3'
MODEL ?=
BENCH_PAPER_ARGS ?=
bench-paper: $(READY)
	@test -n "$(MODEL)" || { \
		echo "bench-paper needs a model: make bench-paper MODEL=meta-llama/Llama-2-7b-hf" >&2; \
		exit 2; }
	$(BIN)/python benchmarks/paper_table.py --model "$(MODEL)" $(BENCH_PAPER_ARGS)

clean:
	rm -rf $(VENV) $(OLDEST) $(NEWEST)
	rm -rf build dist .pytest_cache .hypothesis .mypy_cache .ruff_cache .import_linter_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
