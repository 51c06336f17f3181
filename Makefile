# make demo | test | node | lint | build | bench. Everything goes into .venv; nothing else is touched.
#   PYTHON   the interpreter to start from; if it can import torch >= 2.11, that torch is used
#   TORCH    what to install otherwise
#   MLLAMA_KERNELS_CUDA=auto|1|0  build the CUDA kernels (default here: where there is a GPU)

PYTHON ?= python3
TORCH ?= torch==2.13.0
VENV := .venv
BIN := $(VENV)/bin
IMAGE ?=
QUESTION ?=
export MLLAMA_KERNELS_CUDA ?= $(if $(shell command -v nvidia-smi),auto,0)
export PIP_DISABLE_PIP_VERSION_CHECK := 1

HAS_TORCH = $(shell $(PYTHON) -c "import torch; print(int(tuple(map(int, torch.__version__.split('.')[:2])) >= (2, 11)))" 2>/dev/null)
CSRC := $(wildcard csrc/*.h csrc/*.cpp csrc/*/*.* csrc/*/*/*.*)
SOURCES := setup.py pyproject.toml $(CSRC)

.PHONY: demo test node lint build bench
.DELETE_ON_ERROR:

$(BIN)/python:
	$(PYTHON) -m venv $(if $(filter 1,$(HAS_TORCH)),--system-site-packages) $(VENV)

$(VENV)/torch: $(BIN)/python
	$(BIN)/python -m pip install -q --upgrade pip "setuptools>=77" wheel ninja
	$(BIN)/python -c "import torch" 2>/dev/null || $(BIN)/python -m pip install "$(TORCH)"
	touch $@

$(VENV)/built: $(VENV)/torch $(SOURCES)
	$(BIN)/python -m pip install --no-build-isolation -e .
	touch $@

$(VENV)/test: $(VENV)/built
	$(BIN)/python -m pip install -q --no-build-isolation -e ".[test]"
	touch $@

$(VENV)/bench: $(VENV)/built
	$(BIN)/python -m pip install -q --no-build-isolation -e ".[bench]"
	touch $@

$(VENV)/node/node_modules: tests/node/package.json tests/node/package-lock.json
	mkdir -p $(VENV)/node
	cp $^ $(VENV)/node
	npm ci --prefix $(VENV)/node --ignore-scripts --no-audit --no-fund
	touch $@

$(VENV)/dev: $(BIN)/python
	$(BIN)/python -m pip install -q ruff clang-format
	touch $@

build: $(VENV)/built

demo: $(VENV)/built
	$(BIN)/mllama demo $(if $(IMAGE),--image "$(IMAGE)") $(if $(QUESTION),--question "$(QUESTION)")

test: $(VENV)/test
	$(BIN)/python -m pytest $(PYTEST_ARGS)

# clients of the server, for tests that are skipped without them
node: $(VENV)/node/node_modules

bench: $(VENV)/bench
	$(BIN)/python -m benchmarks.run $(BENCH_ARGS)

lint: $(VENV)/dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/clang-format --dry-run -Werror $(CSRC) $(wildcard tests/*.cpp tests/*/*.h)
