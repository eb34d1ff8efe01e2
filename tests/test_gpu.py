"""On a GPU: predicted peaks beside the allocator's, two precisions, and the program itself."""

import gc
import multiprocessing

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from conftest import SHORT
from measured_step import UDV, measured

from harness import methods
from harness.data import token_data, token_tables
from harness.models import loss, pretrained
from harness.models.next_token import NextToken
from harness.results import environment, run_record
from harness.runs import estimate, run_directory, worker
from harness.training import loop, optimizers

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
# GPT-2's width, heads and vocabulary: what the libraries keep for themselves is small beside it.
SHAPE = [
    "model=gpt2_mini_init", "model.architecture.n_embd=768", "model.architecture.n_head=12",
    "model.architecture.n_layer=6", "model.architecture.vocab_size=50257",
    "model.architecture.n_positions=1024", "evaluate.context_length=512",
]  # fmt: skip
BF16 = "train.precision=bf16"


def batch(blocks, context, accumulated=1):
    tokens = blocks * context * accumulated
    return [
        f"data.context_length={context}", f"train.micro_batch={blocks}",
        f"train.batch_tokens={tokens}"
    ]  # fmt: skip


CONFIGURATIONS = [
    ["method=full", *batch(8, 512)],
    ["method=full", *batch(8, 512), BF16],
    ["method=full", *batch(4, 1024), BF16],
    ["method=full", *batch(32, 128), BF16],
    ["method=full", *batch(4, 512, accumulated=2), BF16],
    ["method=full", *batch(8, 512), BF16, "train.checkpointing=true"],
    ["method=full", *batch(8, 512), BF16, "train.label_smoothing=0.1"],
    ["method=lora", *batch(8, 512), "targets=c_attn"],
    ["method=lora", *batch(8, 512), "targets=all", "method.r=64"],
    ["method=lora", *batch(8, 512), "targets=qv", "train.checkpointing=true"],
    ["method=lora", *batch(8, 512), "targets=c_attn", BF16],
    ["method=lora", *batch(2, 1024), "targets=all", BF16],
    ["method=lora", *batch(32, 128), "targets=mlp", BF16],
    ["method=lora", *batch(4, 512, accumulated=2), "targets=c_attn", BF16],
    ["method=lora", *batch(8, 512), "targets=all", BF16, "model.frozen_dtype=bf16"],
    ["method=lora", *batch(8, 512), "targets=c_attn", BF16, "train.checkpointing=true"],
    ["method=lora", *batch(8, 512), BF16, "method.dropout=0.1", "model.dropout=0.1"],
    ["method=lora", *batch(8, 512), BF16, "method.use_dora=true"],
    ["method=lora", *batch(8, 512), BF16, "data=e2e_nlg", "data.context_length=512"],
    [*UDV, *batch(8, 512), "targets=c_attn"],
    [*UDV, *batch(8, 512), "targets=c_attn", BF16],
    [*UDV, *batch(8, 512), "targets=c_attn", BF16, "method.train=udv"],
    ["method=peft", "method.peft_type=IA3", *batch(8, 512), BF16],
    ["method=none", *batch(8, 512), BF16],
]


def accelerator(run):
    gc.collect()  # what an earlier test has left would count
    AcceleratorState._reset_state(reset_partial_state=True)
    return Accelerator(mixed_precision={"fp32": "no", "bf16": "bf16"}[run.train.precision])


@pytest.mark.parametrize("overrides", CONFIGURATIONS, ids=" ".join)
def test_the_predicted_peak_is_the_allocators(make_run, overrides, record_property):
    run = make_run(*SHAPE, *overrides)
    config = pretrained.load_config(run.model)
    found = estimate.predict(run, config, accelerator(run))
    expected, evaluated = measured(run, config, accelerator(run))
    main = found.train or found.evaluate
    record_property("predicted", main["peak_bytes"])
    record_property("measured", expected["peak_bytes"])
    assert expected["measured_by"] == "cuda allocator"
    assert main["peak_bytes"] == pytest.approx(expected["peak_bytes"], rel=0.1)
    assert found.evaluate["peak_bytes"] == pytest.approx(evaluated["peak_bytes"], rel=0.1)
    for name in ("frozen_weights", "trainable_weights", "optimizer_state"):
        assert main["by_category"][name] == expected["by_category"][name], name


@pytest.mark.parametrize("trained", ["hidden", "both"])
@pytest.mark.parametrize("autocast", [False, True])
def test_the_loss_is_that_of_whole_logits_in_float64(trained, autocast):
    """Over several chunks, the last one short, at GPT-2's vocabulary."""
    torch.manual_seed(0)
    num_tokens = 2 * loss.chunk_tokens(50257, "cuda") + 100
    hidden = torch.randn(num_tokens, 64, device="cuda", requires_grad=True)
    weight = (0.3 * torch.randn(50257, 64, device="cuda")).requires_grad_(trained == "both")
    targets = torch.randint(0, 50257, (num_tokens,), device="cuda")
    targets[::7] = token_tables.IGNORE
    h, w = (t.detach().double().requires_grad_() for t in (hidden, weight))
    exact = torch.nn.functional.cross_entropy(h @ w.t(), targets, reduction="sum")
    exact.backward()
    with torch.autocast("cuda", torch.bfloat16, enabled=autocast):
        found = loss.linear_nll(hidden, weight, targets)
    found.objective.backward()
    tolerance = 1e-2 if autocast else 1e-5
    assert found.objective.item() == pytest.approx(exact.item(), rel=tolerance)
    for mine, theirs in ((hidden.grad, h.grad), (weight.grad, w.grad)):
        if mine is not None:
            assert (mine.double() - theirs).norm() <= tolerance * theirs.norm()


def test_bf16_learns_as_fp32_does(make_run):
    losses = {}
    for precision in ("fp32", "bf16"):
        run = make_run(*SHAPE, *batch(8, 512), "method=lora", "targets=all", "train.lr=1e-3",
                       f"train.precision={precision}")  # fmt: skip
        losses[precision] = trained(run)
    assert losses["fp32"][-1] < losses["fp32"][0]
    assert losses["bf16"] == pytest.approx(losses["fp32"], rel=1e-2)


def trained(run, steps=5):
    """Losses of a few steps on one batch."""
    accelerate = accelerator(run)
    config = pretrained.load_config(run.model)
    torch.manual_seed(0)
    model = methods.adapt(pretrained.load_model(run, config), run).to(accelerate.device)
    prepared = accelerate.prepare_model(NextToken(model))
    optimizer = accelerate.prepare_optimizer(
        optimizers.make_optimizer(model, run.train, run.optimizer)
    )
    prepared.train()
    ids = torch.randint(0, config.vocab_size, (run.train.micro_batch, run.data.context_length + 1))
    blocks = token_data.Batch(ids[:, :-1], ids[:, 1:], None)
    losses = []
    for _ in range(steps):
        total = loop.accumulate(prepared, [blocks], blocks.targets.numel(), accelerate)
        loop.apply(model, optimizer, accelerate, run.train)
        losses.append(total.item() / blocks.targets.numel())
    return losses


def test_a_sweep_says_what_the_cpu_says(harness, tmp_path, monkeypatch):
    """The program itself, in fp32: the numbers of both devices, and where memory was measured."""
    found = {}
    for device in ("gpu", "cpu"):
        if device == "cpu":
            monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
        sweep = ["-m", "method=none,full,lora,udv", *SHORT, "train.steps=6"]
        done = harness(*sweep, f"outputs_dir={tmp_path / device}")
        assert done.returncode == 0, done.stdout + done.stderr
        folders = [path.parent for path in (tmp_path / device).rglob("result.json")]
        records = [run_record.read(folder) for folder in folders]
        found[device] = {record["method"]["name"]: record for record in records}
    assert len(found["gpu"]) == 4
    for name, record in found["gpu"].items():
        other = found["cpu"][name]
        assert record["environment"]["hardware"]["gpus"]
        assert record["memory"]["measured_by"] == "cuda allocator"
        assert other["memory"]["measured_by"] == "live tensors"
        for split in ("validation", "test"):
            ours, theirs = (r["quality"][split]["nll_nats"] for r in (record, other))
            assert ours == pytest.approx(theirs, rel=1e-4), (name, split)


def _within(run_dir, num_bytes):
    """The run in a process that may take so much of the device."""
    total = torch.cuda.get_device_properties(0).total_memory
    torch.cuda.set_per_process_memory_fraction(num_bytes / total)
    raise SystemExit(worker.main(run_dir, quiet=True))


def test_a_batch_that_does_not_fit_is_taken_in_halves(make_run, tmp_path):
    run = make_run(*SHORT, *batch(64, 256), "method=lora", f"outputs_dir={tmp_path}")
    peak = estimate.predict(run, pretrained.load_config(run.model), accelerator(run)).peak_bytes
    run.run_dir.mkdir(parents=True)
    run_directory.prepare(run, "test")
    process = multiprocessing.get_context("spawn").Process(
        target=_within, args=(run.run_dir, int(0.7 * peak))
    )
    process.start()
    process.join(120)
    record = run_record.read(run.run_dir)
    assert record["status"] == "finished", record
    assert record["train"]["micro_batch_asked"] == 64 > record["train"]["micro_batch"]
    assert environment.precision("auto") == "bf16"
