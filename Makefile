# `make help` lists the targets.
PYTHON ?= python3
VENV := .venv
RUN := $(VENV)/bin/python

.PHONY: help experiment report test lint
help: ## list the targets
	@grep -E '^[a-z-]+:.*##' Makefile | sed 's/:.*## /: /'

$(VENV)/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(RUN) -m pip install -q -c constraints.txt -e ".[dev]"
	touch $(VENV)/installed

experiment: $(VENV)/installed ## set up, run the main experiment and print its table
	$(RUN) -m harness experiment=main

report: $(VENV)/installed ## the table of the main experiment again
	$(RUN) -m harness.report outputs/main

test: $(VENV)/installed/installed ## set up and run the tests
	$(RUN) -m pytest

lint: $(VENV)/installed ## ruff
	$(RUN) -m ruff check .
