"""On a GPU: GPT-2's shape in two precisions, and its predicted peak beside the allocator's."""

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState

from harness import data, memory, methods, models, predict, train
from harness.loss import NextToken

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
STEPS = 5


def trained(run):
    """Losses of a few steps, bytes of live tensors by `memory`, the allocator's peak, predicted."""
    AcceleratorState._reset_state(reset_partial_state=True)
    accelerator = Accelerator(mixed_precision={"fp32": "no", "bf16": "bf16"}[run.train.precision])
    config = models.load_config(run.model)
    torch.manual_seed(0)
    model = methods.adapt(models.load_model(run, config), run).to(accelerator.device)
    prepared = accelerator.prepare_model(NextToken(model, run.train.label_smoothing))
    optimizer = accelerator.prepare_optimizer(train.make_optimizer(model, run.train))
    prepared.train()
    ids = torch.randint(0, config.vocab_size, (run.train.micro_batch, run.data.context + 1))
    batch = data.Batch(ids[:, :-1], ids[:, 1:], None)
    num_tokens = batch.targets.numel()
    losses, report = [], {}
    for step in range(STEPS):
        if step == 2:  # the optimizer has its state
            torch.cuda.reset_peak_memory_stats()
        follow = memory.measured(model, optimizer, report) if step == STEPS - 1 else None
        if follow is None:
            total = train.accumulate(prepared, [batch], num_tokens, accelerator)
            train.apply(model, optimizer, accelerator, run.train)
            allocated = torch.cuda.max_memory_allocated()
        else:
            with follow:
                total = train.accumulate(prepared, [batch], num_tokens, accelerator)
                train.apply(model, optimizer, accelerator, run.train)
        losses.append(total.item() / num_tokens)
    return losses, report["peak_bytes"], allocated, predict.predict(run, config, accelerator)


@pytest.fixture(scope="module")
def in_both():
    """Of LoRA r=8 on every matrix of GPT-2's shape, 4 x 512 tokens: by precision."""
    from hydra import compose, initialize_config_dir

    from harness.composition import from_hydra
    from harness.config import CONF_DIR

    found = {}
    for precision in ("fp32", "bf16"):
        overrides = ["model=gpt2", "method=lora", "targets=all", f"train.precision={precision}",
                     "data.context=512", "train.batch_tokens=2048", "train.micro_batch=4",
                     "train.lr=1e-3"]  # fmt: skip
        with initialize_config_dir(str(CONF_DIR), version_base="1.3"):
            run = models.without_files(from_hydra(compose("config", overrides)))
        found[precision] = trained(run)
    return found


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_the_predicted_peak_is_the_measured_one(in_both, precision):
    _, live, allocated, predicted = in_both[precision]
    assert predicted.train["peak_bytes"] == pytest.approx(live, rel=0.05)
    assert live <= allocated == pytest.approx(live, rel=0.1)


def test_bf16_learns_as_fp32_does_and_takes_less(in_both):
    fp32, bf16 = in_both["fp32"], in_both["bf16"]
    assert fp32[0][-1] < fp32[0][0]
    assert bf16[0] == pytest.approx(fp32[0], rel=1e-2)
    assert bf16[2] < fp32[2]
