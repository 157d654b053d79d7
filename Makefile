# `make demo` and `make test` work in a fresh clone: the first of them creates .venv. See README.md.

PYTHON ?= python3
TORCH_INDEX ?=
RANKS ?= 2
CONFIG ?= zero2
PYTEST_ARGS ?=

BIN := .venv/bin
INSTALLED := .venv/installed
PIP_INSTALL = $(BIN)/python -m pip install --quiet -c constraints.txt $(if $(TORCH_INDEX),--extra-index-url $(TORCH_INDEX))

.PHONY: demo test test-monitors lint format bench native clean

demo: $(INSTALLED)
	$(BIN)/deepspeed --num_accelerators $(RANKS) examples/gpt/train.py --deepspeed_config examples/gpt/$(CONFIG).json

test: $(INSTALLED)
	$(BIN)/python -m pytest $(PYTEST_ARGS)

test-monitors: $(INSTALLED)
	$(PIP_INSTALL) -e '.[dev,monitor]'
	$(BIN)/python -m pytest tests/monitor $(PYTEST_ARGS)

lint: $(INSTALLED)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

bench: $(INSTALLED)
	$(BIN)/python benchmarks/step_time.py --model gpt
	$(BIN)/python benchmarks/step_time.py --model layers

# Compile csrc/ into this checkout again, without installing.
native:
	$(BIN)/python setup.py --quiet build_ext --inplace

format: $(INSTALLED)
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

clean:
	rm -rf .venv build *.egg-info deepspeed/lib

# csrc/ is compiled by the last line. torch first and alone, so that the build chosen here is the one everything else resolves against.
$(INSTALLED): pyproject.toml constraints.txt setup.py $(wildcard csrc/*)
	$(PYTHON) -m venv .venv
	$(PIP_INSTALL) torch
	$(PIP_INSTALL) -e '.[dev]'
	touch $@
