# Two cores and a package index are enough; `make help` lists the targets.
PYTHON ?= python3
RUN := .venv/bin/python
EXPERIMENT ?= main

.DEFAULT_GOAL := help
.PHONY: help setup experiment claims tune report wandb-sync verify-published verify-recorded test test-fast test-faults test-launchers test-peft test-quantised test-stats test-oldest test-newest lint bench gpt2_mini clean

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z0-9_-]+:.*## / {printf "  make %-16s %s\n", $$1, $$2}' Makefile

setup: .venv/installed ## create .venv and install the project with the pinned constraints

.venv/installed: pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "Python 3.10 or newer is needed")'
	$(PYTHON) -m venv .venv
	$(RUN) -m pip install --quiet --constraint constraints.txt --editable ".[dev]"
	@touch .venv/installed

experiment: setup ## run an experiment, print its answer and table, write its page (EXPERIMENT=main, about 12 minutes)
	$(RUN) -m harness "experiment=$(EXPERIMENT)"; status=$$?; \
	if [ -d "outputs/$(EXPERIMENT)" ]; then $(RUN) -m harness.report --page "outputs/$(EXPERIMENT)" || status=$$?; fi; \
	exit $$status

claims: setup ## put seven claims for low-rank adaptation to the test (about 100 minutes; goes on after a stop)
	$(RUN) -m harness experiment=claims
	$(RUN) -m harness experiment=claims_lstm
	$(RUN) experiments/claims/verdicts.py outputs/claims outputs/claims_lstm

tune: setup ## search learning rates on validation, write conf/rates (about 40 minutes)
	$(RUN) -m harness experiment=tune

report: setup ## tables, figures and the page of an experiment (EXPERIMENT=main)
	$(RUN) -m harness.report "outputs/$(EXPERIMENT)"

wandb-sync: setup ## upload an experiment's offline W&B runs, each once (EXPERIMENT=main)
	cd "outputs/$(EXPERIMENT)" && "$(CURDIR)/$(RUN)" -m wandb sync --yes

verify-published: setup ## published perplexities of GPT-2 beside ours (ONLY=gpt2, about 30 minutes; weights from the hub)
	$(RUN) -m harness.verify $(if $(ONLY),--only $(ONLY))

verify-recorded: setup ## recorded experiments run again, beside the record (ONLY=lstm_lora, about 20 minutes)
	$(RUN) experiments/verify_recorded.py $(if $(ONLY),--only $(ONLY))

test: setup ## run the tests (about 10 minutes)
	$(RUN) -m pytest --numprocesses 2 --dist worksteal

# Some of every part: configs, counts, data, training, methods, statistics and tables. Left out are
# tests over every experiment or every size of GPT-2, long simulations, and single tests of seconds.
FAST := tests/test_config.py tests/test_count.py tests/test_data.py tests/test_loss.py tests/test_evaluate.py tests/test_train.py tests/test_decision.py tests/test_stats.py tests/test_ranking.py tests/test_columns.py tests/methods/test_methods.py tests/methods/test_lora_layer.py tests/methods/test_udv.py
LONGER := test_config.py::test_every_ test_config.py::test_the_name_tells_runs_apart test_config.py::test_the_identity_leaves_out \
  test_count.py::test_diagonals_count test_count.py::test_lora_counts_are_the_published_ones test_count.py::test_the_command_prints \
  test_stats.py::test_intervals_tests_and_families test_stats.py::test_a_true_null_is_rejected \
  test_columns.py::test_a_column_is_on_the_terminal methods/test_methods.py::test_every_method_can_be_checked

test-fast: setup ## the quickest broad answer (about 80 seconds)
	OMP_NUM_THREADS=1 $(RUN) -m pytest $(FAST) $(LONGER:%=--deselect tests/%)

test-faults: setup ## kills, damage, ranks and all that takes long (about 20 minutes)
	$(RUN) -m pytest -m "faults or slow"

test-launchers: setup ## sweeps by joblib, Ray and submitit (about 8 minutes with their installation)
	$(RUN) -m pip install --quiet --constraint constraints.txt --editable ".[joblib,ray,submitit]"
	$(RUN) -m pytest -m launchers

test-peft: setup ## PEFT's own common tests over udv and the fused LoRA layer (about 3 minutes)
	$(RUN) -m pytest tests/peft_suite.py

test-quantised: setup ## bases quantised by bitsandbytes and torchao (about 3 minutes with their installation)
	$(RUN) -m pip install --quiet --constraint constraints.txt --editable ".[quantised]"
	$(RUN) -m pytest -m quantised tests/test_packed.py tests/test_quantize.py

QUICK := tests/test_config.py tests/test_count.py tests/test_data.py tests/test_evaluate.py tests/test_loss.py tests/test_lstm.py tests/test_models.py tests/test_train.py tests/test_roles.py tests/test_dashboard.py tests/test_stats.py tests/methods/test_methods.py tests/methods/test_lora_layer.py tests/methods/test_udv.py tests/methods/test_udv_adapters.py tests/test_api.py

test-oldest: setup ## the oldest versions that pyproject.toml allows, beside the pinned torch (about 10 minutes with their installation)
	$(PYTHON) -m venv .venv-oldest
	$(RUN) tests/oldest.py > .venv-oldest/bounds.txt
	grep '^torch==' constraints.txt >> .venv-oldest/bounds.txt
	.venv-oldest/bin/python -m pip install --quiet --constraint .venv-oldest/bounds.txt --editable ".[dashboard,tensorboard]" pytest loralib gguf
	.venv-oldest/bin/python -m pytest $(QUICK)

test-newest: setup ## the newest versions of everything, beside the pinned torch (about 10 minutes with their installation)
	$(PYTHON) -m venv .venv-newest
	grep '^torch==' constraints.txt > .venv-newest/bounds.txt
	.venv-newest/bin/python -m pip install --quiet --upgrade --constraint .venv-newest/bounds.txt --editable ".[dashboard,tensorboard]" pytest loralib gguf
	.venv-newest/bin/python -m pytest $(QUICK)

test-stats: setup ## calibration of the statistics by simulation (about 11 minutes)
	$(RUN) -m pytest -m stats --capture=no tests/test_stats.py

lint: setup ## ruff, mypy, which package imports which, and the schema of .github's workflows
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .
	$(RUN) -m mypy
	.venv/bin/lint-imports --no-cache
	.venv/bin/check-jsonschema --builtin-schema vendor.github-workflows .github/workflows/*.yml
	.venv/bin/check-jsonschema --builtin-schema vendor.dependabot .github/dependabot.yml

bench: setup ## the training step beside the HF Trainer, a sweep beside plain processes (about 35 minutes)
	$(RUN) experiments/bench/training_step/bench.py
	$(RUN) experiments/bench/sweep_overhead/bench.py

gpt2_mini: setup ## pretrain the shipped model again: tokenizer, 26 M tokens, packaging (about 75 minutes)
	$(RUN) experiments/pretrain_gpt2_mini/build.py tokenizer
	$(RUN) -m harness experiment=pretrain_gpt2_mini
	$(RUN) experiments/pretrain_gpt2_mini/build.py package outputs/pretrain_gpt2_mini/pretrain

clean: ## delete the environment and the cache; outputs stay
	rm -rf .venv .venv-oldest .venv-newest .cache
