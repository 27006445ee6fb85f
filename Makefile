# One environment in .venv; every target makes what it needs.  `make demo` and `make test` need python3.11+, a C/C++ compiler, cmake and
# the package index, nothing else.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
RUN := OMP_NUM_THREADS=2 TOKENIZERS_PARALLELISM=false

# llama.cpp is compiled for this machine.  AMX is left out: ggml 0.25.3 crashes in it (docs/decisions/0004-no-amx.md).
AMX := $(shell echo | $(or $(CC),cc) -march=native -dM -E - 2>/dev/null | grep -q AMX_INT8 && echo -mno-amx-int8)
# pip's cache is not used: it would give a wheel that was compiled with other flags.
LLAMA_ARGS := -DLLAVA_BUILD=OFF $(if $(AMX),-DCMAKE_C_FLAGS=$(AMX) -DCMAKE_CXX_FLAGS=$(AMX))

.PHONY: help setup demo test test-all check bench format clean

help:
	@echo "make demo    build the bundled model to a budget and show the report"
	@echo "make test    run the test suite"
	@echo "make test-all  also the slow tests: every architecture that llama.cpp runs"
	@echo "make check   ruff, mypy --strict (benchmarks: mypy), import layers"
	@echo "make bench   our plans beside the peers on both bundled models, and planning times (two hours)"
	@echo "make format  ruff format and fix"

setup: $(VENV)/.done

$(VENV)/.done: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --upgrade pip
	$(BIN)/pip install --quiet --constraint constraints.txt torch
	@echo "building llama.cpp from source, about 5 minutes on two cores"
	CMAKE_ARGS="$(LLAMA_ARGS)" $(BIN)/pip install --quiet --no-cache-dir --constraint constraints.txt --no-binary llama-cpp-python llama-cpp-python
	$(BIN)/pip install --quiet --constraint constraints.txt --editable ".[hf,llama,onnx,mlx,dev]"
	touch $@

demo: setup
	rm -rf demo
	$(RUN) $(BIN)/edgemoe build examples/tiny-moe --memory 50MB -o demo
	@echo "the report with pictures: demo/report.html"

test: setup
	OMP_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false $(BIN)/python -m pytest --numprocesses 2 --dist loadscope

test-all: test
	OMP_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false $(BIN)/python -m pytest --numprocesses 2 --dist load -m slow

check: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/mypy --config-file benchmarks/mypy.ini
	$(BIN)/lint-imports

bench: setup
	$(RUN) $(BIN)/python benchmarks/quality.py examples/tiny-moe --jobs 2
	$(RUN) $(BIN)/python benchmarks/quality.py examples/tiny-moe-b --jobs 2
	$(RUN) $(BIN)/python benchmarks/jointness.py examples/tiny-moe --generic GLM-5.2 Qwen3-30B-A3B
	$(RUN) $(BIN)/python benchmarks/planner.py

format: setup
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf $(VENV) build dist demo *.egg-info
