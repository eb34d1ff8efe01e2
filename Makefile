# `make help` lists the targets.
PYTHON ?= python3
VENV := .venv
RUN := $(VENV)/bin/python

.PHONY: help test lint
help: ## list the targets
	@grep -E '^[a-z-]+:.*##' Makefile | sed 's/:.*## /: /'

$(VENV)/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(RUN) -m pip install -q -c constraints.txt -e ".[dev]"
	touch $(VENV)/installed

test: $(VENV)/installed ## set up and run the tests
	$(RUN) -m pytest

lint: $(VENV)/installed ## ruff
	$(RUN) -m ruff check .
