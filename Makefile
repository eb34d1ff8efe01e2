# Two cores and a package index are enough; `make help` lists the targets.
PYTHON ?= python3
RUN := .venv/bin/python
EXPERIMENT ?= main

.DEFAULT_GOAL := help
.PHONY: help setup experiment report test lint bench gpt2_mini clean

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z0-9_-]+:.*## / {printf "  make %-12s %s\n", $$1, $$2}' Makefile

setup: .venv/installed ## create .venv and install the project with the pinned constraints

.venv/installed: pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "Python 3.10 or newer is needed")'
	$(PYTHON) -m venv .venv
	$(RUN) -m pip install --quiet --constraint constraints.txt --editable ".[dev]"
	@touch .venv/installed

experiment: setup ## run an experiment and print its table (EXPERIMENT=main, about 12 minutes)
	$(RUN) -m harness experiment=$(EXPERIMENT)

report: setup ## print an experiment's table again (EXPERIMENT=main)
	$(RUN) -m harness.report outputs/$(EXPERIMENT)

test: setup ## run the tests (about 7 minutes)
	$(RUN) -m pytest

lint: setup ## ruff and mypy
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .
	$(RUN) -m mypy

bench: setup ## the training step beside the HF Trainer with PEFT (about 30 minutes)
	$(RUN) experiments/bench/training_step/bench.py

gpt2_mini: setup ## pretrain the shipped model again: tokenizer, 26 M tokens, packaging (about 75 minutes)
	$(RUN) experiments/pretrain_gpt2_mini/build.py tokenizer
	$(RUN) -m harness experiment=pretrain_gpt2_mini
	$(RUN) experiments/pretrain_gpt2_mini/build.py package outputs/pretrain_gpt2_mini/pretrain

clean: ## delete the environment and the cache; outputs stay
	rm -rf .venv .cache
