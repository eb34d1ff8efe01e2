"""The program, in which what follows the test fails on rank FAILS, or on all (test_ranks.py)."""

import os
import sys

from harness.__main__ import program
from harness.evaluation import classification, generation, protocols

CLASSIFY, MEASURE = classification.Task.measure, protocols.measure
COMPLETE = generation._completions


def broken(*_, **__):
    raise ValueError("broken on purpose")


def in_a_broken_model(measure, prepared):
    """What `measure` gives where every forward pass of this rank's model fails."""
    module = getattr(prepared, "module", prepared)  # of DDP, or divided
    hook = module.register_forward_pre_hook(broken)
    try:
        return measure(prepared)
    finally:
        hook.remove()


def measure(task, prepared, folder, **named):
    return in_a_broken_model(lambda model: CLASSIFY(task, model, folder, **named), prepared)


def completions(model, stops, prompts, cfg, accelerator):
    first_try = cfg.max_new_tokens == 2  # what is tried before training
    return (COMPLETE if first_try else broken)(model, stops, prompts, cfg, accelerator)


if os.environ["FAILS"] in (os.environ["RANK"], "all"):
    generation._completions = completions
    classification.Task.measure = measure
    protocols.measure = lambda prepared, text, **named: in_a_broken_model(
        lambda model: MEASURE(model, text, **named), prepared
    )

if __name__ == "__main__":
    sys.exit(program())
