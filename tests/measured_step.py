"""What a real step of a run takes, and its evaluation, in the worker's order of events."""

import functools

import torch

from harness import methods
from harness.data import token_data
from harness.evaluation import sliding_window
from harness.methods import adalora, objective
from harness.models import pretrained, transformer_blocks
from harness.models.next_token import NextToken
from harness.training import loop, memory, optimizers

UDV = ["method=udv", "method.rank=16"]


def measured(run, config, accelerate, evaluated=None):
    """Real tensors, the worker's order of events: the second step or the only one, evaluation."""
    torch.manual_seed(0)
    model = methods.adapt(pretrained.load_model(run, config), run)
    transformer_blocks.checkpoint_activations(model, run.train)
    frozen = not any(p.requires_grad for p in model.parameters())
    prepared = accelerate.prepare_model(
        NextToken(model, run.train.label_smoothing), evaluation_mode=frozen
    )
    report, on_evaluation = {}, {}

    def evaluate(optimizer):
        context = run.evaluation_context
        tokens = run.evaluate.batch_tokens or sliding_window.batch_tokens(config)
        shape = evaluated or (max(1, tokens // context), context)
        ids = torch.randint(0, config.vocab_size, shape)
        ids = ids.to(accelerate.device)
        with (
            optimizers.evaluation(optimizer),
            torch.no_grad(),
            memory.measured(model, optimizer, on_evaluation),
        ):
            prepared.eval()(ids, ids)

    if frozen or not run.train.steps:
        evaluate(None)
        return on_evaluation, on_evaluation
    optimizer = accelerate.prepare_optimizer(
        optimizers.make_optimizer(model, run.train, run.optimizer)
    )
    prepared.train()
    optimizers.start(optimizer)
    shape = (run.train.micro_batch, run.data.context_length)
    number = run.train.batch_tokens // (shape[0] * shape[1])
    for step in range(min(run.train.steps, 2)):
        report.clear()
        with memory.measured(model, optimizer, report):
            ids = [torch.randint(0, config.vocab_size, shape) for _ in range(number)]
            packed = run.data.source == "pairs" and run.data.packing == "packed"
            positions = torch.arange(shape[1]).expand(shape) if packed else None
            batches = [token_data.Batch(block, block, positions) for block in ids]
            penalty = objective.penalty(model, run)
            loop.accumulate(prepared, batches, run.train.batch_tokens, accelerate, penalty)
            after_step = adalora.after_step(model, run)
            stepped = after_step and functools.partial(after_step, step)
            loop.apply(model, optimizer, accelerate, run.train, stepped)
    evaluate(optimizer)
    return report, on_evaluation
