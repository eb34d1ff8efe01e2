"""The training loop and what it carries: optimizer, checkpoints, memory, evaluation on the way.

`loop` is the same for every method, `run_state` is what a checkpoint holds, `evaluator` reads the
held-out texts, `sharding` divides one model over several GPUs.

Imports `evaluation`, `methods` and below.
"""
