# SPDX-License-Identifier: Apache-2.0
PYTHON ?= python3
VENV ?= .venv
BUILD ?= build
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
RUNTIME := $(VENV)/.installed
TOOLS := $(VENV)/.installed-tools
COVERAGE ?= 90
TESTS ?= tests
PYTEST_OPTIONS ?=

.PHONY: demo test lint lint-ruff lint-types lint-imports lint-scripts docs install tools clean help

help:
	@echo "make demo   simulate three stacks, reconstruct them, score the result ($(BUILD)/demo)"
	@echo "make test   the tests, with coverage of at least $(COVERAGE) %"
	@echo "make lint   ruff, mypy, import-linter, shellcheck, hadolint, actionlint"
	@echo "make docs   the documentation, in $(BUILD)/docs"
	@echo "make clean  remove what these made, the environment $(VENV) too"

demo: install
	$(BIN)/python -m irem_bids.demo $(BUILD)/demo

test: tools
	mkdir -p $(BUILD)
	rm -f $(BUILD)/.coverage $(BUILD)/.coverage.*
	COVERAGE_FILE=$(abspath $(BUILD))/.coverage OMP_NUM_THREADS=1 $(BIN)/python -m pytest \
		--cov=irem_bids --cov-report=term --cov-fail-under=$(COVERAGE) $(PYTEST_OPTIONS) $(TESTS)

lint: lint-ruff lint-types lint-imports lint-scripts

lint-ruff: tools
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

lint-types: tools
	$(BIN)/mypy

lint-imports: tools
	$(BIN)/lint-imports

lint-scripts: tools
	$(BIN)/shellcheck -x $$(grep -lrE '^#!.*\b(ba)?sh\b' .ci docker docs --exclude-dir=cache)
	$(BIN)/hadolint Dockerfile
	bash .ci/actionlint

docs: tools
	$(BIN)/sphinx-build -W --keep-going -q -b html docs $(BUILD)/docs
	@echo "$(abspath $(BUILD))/docs/index.html"

install: $(RUNTIME)
tools: $(TOOLS)

$(BIN)/python:
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info[:2] < (3, 11) and "Python 3.11 or later is needed")'
	$(PYTHON) -m venv $(VENV)

# The environment is kept as long as the locks and the metadata are not newer than it.
$(RUNTIME): requirements.lock setup.cfg pyproject.toml | $(BIN)/python
	$(PIP) install --quiet --requirement requirements.lock
	$(PIP) install --quiet --no-deps --no-build-isolation --editable .
	touch $@

$(TOOLS): requirements-dev.lock $(RUNTIME)
	$(PIP) install --quiet --requirement requirements-dev.lock
	touch $@

clean:
	rm -rf $(BUILD) $(VENV) *.egg-info .pytest_cache .mypy_cache .ruff_cache .import_linter_cache \
		.coverage .coverage.* .ci/cache
