"""Ranks that divide a model take the steps of one process, hold a part each, and save it whole."""

import os
import shutil
import signal
import sys

import numpy as np
import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from scored_documents import Rank, documents
from transformers import AutoModelForCausalLM
from two_ranks import SAME, metrics, ranks_of, start, started

from harness.config.errors import ConfigError
from harness.config.paths import ASSETS_DIR, CONF_DIR
from harness.evaluation import protocols, sliding_window
from harness.models.next_token import NextToken
from harness.results import run_record
from harness.training import sharding

SHARDED = ["launch.num_processes=2", "launch.accelerate=fsdp"]
FULL, LORA = ["method=full"], ["method=lora", "method.r=3"]  # three rows in halves: uneven parts
NORM = 1e-4  # one fp32 sum over a million elements is off by 2e-5, over half of them by less


def same_numbers(mine, theirs):
    assert len(mine) == len(theirs)
    for a, b in zip(mine, theirs, strict=True):
        assert a.keys() == b.keys() and a["step"] == b["step"]
        for key, value in a.items():
            rel = NORM if key == "train/grad_norm" else 1e-5
            assert b[key] == pytest.approx(value, rel=rel), key


def weights(run_dir):
    (path,) = [*run_dir.glob("model/*.safetensors"), *run_dir.glob("adapter/*.safetensors")]
    return load_file(path)


def loaded(run_dir):
    """What plain transformers and PEFT load of a run."""
    if (run_dir / "model").is_dir():
        return AutoModelForCausalLM.from_pretrained(run_dir / "model")
    base = AutoModelForCausalLM.from_pretrained(ASSETS_DIR / "gpt2_mini")
    return PeftModel.from_pretrained(base, run_dir / "adapter")


@pytest.mark.slow
@pytest.mark.parametrize("method", [FULL, LORA])
def test_sharded_ranks_take_the_steps_of_one_and_hold_half(harness, tmp_path, method):
    plain, divided = ("run_name=plain",), ("run_name=divided", *SHARDED)
    alike = {"plain": plain, "divided": divided}
    if method is FULL:
        alike["ddp"] = ("run_name=ddp", "launch.num_processes=2")
    for overrides in alike.values():
        # eps: the gradient of a key's bias is rounding alone, which Adam would make whole steps of.
        done = harness(*method, *SAME, "train.eps=1e-4", *overrides)
        assert done.returncode == 0, done.stderr
    folder = tmp_path / "outputs" / "scratch"
    found = {name: run_record.read(folder / name) for name in alike}
    ids = torch.arange(100, 140)[None]
    with torch.no_grad():
        logits = {name: loaded(folder / name)(ids).logits for name in alike}
    for name in alike.keys() - {"divided"}:
        same_numbers(metrics(tmp_path, name), metrics(tmp_path, "divided"))
        assert run_record.get(found["divided"], "quality.test.nll_nats") == pytest.approx(
            run_record.get(found[name], "quality.test.nll_nats"), rel=1e-5
        )
        mine, theirs = weights(folder / name), weights(folder / "divided")
        assert mine.keys() == theirs.keys()
        for key, tensor in mine.items():
            torch.testing.assert_close(theirs[key], tensor, rtol=1e-3, atol=2e-5, msg=key)
        torch.testing.assert_close(logits["divided"], logits[name], rtol=1e-3, atol=1e-3)
    one, two = found["plain"], found["divided"]
    assert one["run"]["identity"] == two["run"]["identity"]
    assert one["parameters"] == two["parameters"]
    assert two["environment"]["sharded"] and not one["environment"]["sharded"]
    assert two["predicted"] is None and one["predicted"]
    for kind in ("frozen_weights", "trainable_weights", "gradients", "optimizer_state"):
        whole, part = (r["memory"]["category_peaks"][kind] for r in (one, two))
        # LoRA's three rows: the first rank has two of them.
        assert whole / 2 <= part <= whole * (0.5001 if method is FULL else 0.6)
    if method is FULL:
        assert two["memory"]["peak_bytes"] < 0.8 * one["memory"]["peak_bytes"]


@pytest.mark.faults
def test_a_killed_rank_is_gone_on_from_sharded_or_not(harness, tmp_path):
    run = [*FULL, *SAME, "train.steps=24", "evaluate.interval=8"]
    here, there = f"outputs_dir={tmp_path}/outputs", f"outputs_dir={tmp_path}/alone/outputs"
    assert harness(*run, *SHARDED, here, "run_name=whole").returncode == 0
    run_dir = tmp_path / "outputs" / "scratch" / "cut"
    controller = started(tmp_path, run_dir, 11, *run, *SHARDED, here, "run_name=cut")
    os.kill(ranks_of(run_dir)[-1], signal.SIGKILL)
    _, errors = controller.communicate(timeout=60)
    assert controller.returncode == 1 and "failed (killed)" in errors
    shutil.copytree(tmp_path / "outputs", tmp_path / "alone" / "outputs")
    for then in ([*SHARDED, here], ["launch.num_processes=1", there]):
        done = harness(*run, *then, "run_name=cut")
        assert done.returncode == 0, done.stderr
    for folder in (tmp_path, tmp_path / "alone"):
        record = run_record.read(folder / "outputs" / "scratch" / "cut")
        assert record["run"]["resumed_at"] == [8]
    assert metrics(tmp_path, "cut") == metrics(tmp_path, "whole")
    same_numbers(metrics(tmp_path, "whole"), metrics(tmp_path / "alone", "cut"))


@pytest.mark.faults
def test_by_hand_and_with_blocks_run_again_in_mixed_precision(harness, tmp_path):
    run = [*LORA, *SAME, "train.batch_tokens=256", "train.steps=2", "train.checkpointing=true",
           "train.precision=bf16", "model.frozen_dtype=bf16"]  # fmt: skip
    assert harness(*run, "run_name=one").returncode == 0
    config_file = str(CONF_DIR / "accelerate" / "fsdp.yaml")
    by_hand = start(
        tmp_path, sys.executable, "-m", "accelerate.commands.launch", "--config_file", config_file,
        "--main_process_port", "0", "-m", "harness", *run, "launch.accelerate=fsdp", "run_name=two",
    )  # fmt: skip
    _, errors = by_hand.communicate(timeout=300)
    assert by_hand.returncode == 0, errors
    assert run_record.read(tmp_path / "outputs" / "scratch" / "two")["environment"]["sharded"]
    for a, b in zip(metrics(tmp_path, "one"), metrics(tmp_path, "two"), strict=True):
        for key, value in a.items():
            # Other blocks share a product, whose gradients are rounded to bf16.
            rel = 2e-2 if key == "train/grad_norm" else 1e-3
            assert b[key] == pytest.approx(value, rel=rel), key


@pytest.mark.parametrize("lengths", [[30], [30, 31, 32], [9, 30, 31, 32, 5, 28]])
def test_ranks_run_equally_many_passes_and_count_each_document_once(tiny, lengths):
    docs, prepared = documents(lengths), NextToken(tiny)
    passes = []
    prepared.register_forward_pre_hook(lambda *_: passes.append(1))
    windows = list(sliding_window.windows(lengths, 16, 16))
    text = protocols.Text(
        [np.array([0, *ids]) for ids in docs["tokens"]], windows, None, {"name": "any"}
    )
    options = {"context": 16, "stride": 16, "bos": 0, "batch_tokens": 32}
    for of in (
        lambda rank: sliding_window.document_nll(prepared, docs, accelerator=rank, **options)[0],
        lambda rank: sliding_window.window_nll(
            prepared, text.windows, text.ids, batch_tokens=32, accelerator=rank
        ),
    ):
        whole = of(None)
        passes.clear()
        first = of(Rank(0))
        of_the_first = len(passes)
        second = of(Rank(1))
        assert len(passes) == 2 * of_the_first
        np.testing.assert_allclose(first + second, whole, rtol=1e-6)


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["launch.num_processes=1"], "launch.num_processes to 2 or more"),
        (["train.compile=true"], "set train.compile=false"),
        (["data=e2e_nlg", "evaluate=generate"], "set evaluate.generate=null"),
        (["method=udv", "method.train=udv", "method.orthogonality=0.1"], "method.orthogonality=0"),
    ],
)
def test_what_a_divided_model_cannot_do_is_refused(make_run, overrides, words):
    with pytest.raises(ConfigError, match=words):
        make_run(*SHARDED, *overrides)


def test_a_weight_that_blocks_share_and_one_without_dimensions_are_refused(tiny):
    blocks = list(tiny.transformer.h)
    sharding._check(NextToken(tiny), blocks)  # tied embeddings are outside of all blocks
    own = blocks[1].ln_1.weight
    for other in (blocks[0].ln_1, tiny.transformer.ln_f):
        blocks[1].ln_1.weight = other.weight
        with pytest.raises(ConfigError, match=r"ln_\w\.weight is shared by several blocks"):
            sharding._check(NextToken(tiny), blocks)
    blocks[1].ln_1.weight = own
    blocks[1].scale = torch.nn.Parameter(torch.tensor(1.0))
    with pytest.raises(ConfigError, match=r"transformer\.h\.1\.scale has no dimension"):
        sharding._check(NextToken(tiny), blocks)


WORLD_OF_TWO = """
import torch
from accelerate import Accelerator
from transformers import GPT2Config, GPT2LMHeadModel
from harness.training import sharding
from harness.models.next_token import NextToken
accelerator = Accelerator(cpu=True)
torch.manual_seed(accelerator.process_index)  # unlike, and as the first one's from then on
model = GPT2LMHeadModel(GPT2Config(vocab_size=7, n_positions=8, n_embd=6, n_layer=1, n_head=2))
before = {name: p.detach().clone() for name, p in model.named_parameters()}
sharding.shard(NextToken(model.eval()), accelerator)
rows = [p.to_local().shape[0] for p in model.parameters()]
assert rows[0] == (4, 3)[accelerator.process_index], rows
for name, p in model.named_parameters():
    full = sharding.full_tensor(p.detach())
    assert accelerator.process_index or torch.equal(full, before[name]), name
    again = sharding.distribute_like(full, p)
    assert torch.equal(again.to_local(), p.to_local()) and again.placements == p.placements
    assert sharding.distribute_like(torch.ones(()), p).shape == ()
sharding.unshard(model, keep=accelerator.is_main_process)
if accelerator.is_main_process:
    assert model.lm_head.weight is model.transformer.wte.weight
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())
"""


@pytest.mark.slow
def test_a_divided_model_is_the_first_ranks_and_becomes_whole_again(tmp_path):
    (tmp_path / "ranks.py").write_text(WORLD_OF_TWO)
    ranks = start(tmp_path, sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2",
                  "--standalone", "ranks.py")  # fmt: skip
    _, errors = ranks.communicate(timeout=120)
    assert ranks.returncode == 0, errors
