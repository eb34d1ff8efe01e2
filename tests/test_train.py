"""The loop against a plain PyTorch loop, and its schedule, best checkpoint and failures."""

import dataclasses
import math
from types import SimpleNamespace

import pytest
import torch
from accelerate import Accelerator
from peft import LoHaConfig, LoKrConfig, get_peft_model
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from short_training import BLOCKS, config, losses_of, run_loop
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    MambaConfig,
    MambaForCausalLM,
    get_wsd_schedule,
)

from harness.config.errors import ConfigError
from harness.config.schema import TrainConfig
from harness.data.token_data import batch_of, block_order
from harness.methods import adapt
from harness.models.next_token import NextToken
from harness.system.signals import Stop
from harness.training import loop as training
from harness.training import optimizers


@pytest.mark.parametrize("schedule", ["cosine", "linear", "constant"])
def test_the_schedule_warms_up_and_ends_where_it_says(schedule):
    cfg = TrainConfig(steps=100, lr=2.0, warmup=0.1, min_lr_ratio=0.25, schedule=schedule)
    rates = [training.learning_rate(step, cfg) for step in range(100)]
    assert rates[:10] == pytest.approx([0.2 * (i + 1) for i in range(10)])
    assert rates[-1] == pytest.approx(2.0 if schedule == "constant" else 0.5)
    assert rates[10:] == sorted(rates[10:], reverse=True)
    middle = 2.0 if schedule == "constant" else 1.25
    assert (rates[54] + rates[55]) / 2 == pytest.approx(middle, rel=1e-2)


@pytest.mark.parametrize(("cooldown", "steps"), [(0.2, 100), (0.9, 10), (0.0, 30), (0.5, 7)])
def test_wsd_is_the_schedule_of_transformers_a_step_later(cooldown, steps):
    cfg = TrainConfig(
        steps=steps, lr=2.0, warmup=0.1, min_lr_ratio=0.25, schedule="wsd", cooldown=cooldown
    )
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=2.0)
    warmup, falling = round(0.1 * steps), round(cooldown * steps)
    scheduler = get_wsd_schedule(
        optimizer, num_warmup_steps=warmup, num_decay_steps=falling,
        num_training_steps=steps, decay_type="linear", min_lr_ratio=0.25,
    )  # fmt: skip
    for step in range(steps):
        optimizer.step()
        scheduler.step()  # theirs begins at 0
        expected = scheduler.get_last_lr()[0] if falling or step < steps - 1 else 2.0
        if step < warmup:  # theirs rises from the last rate, and not from 0
            assert training.learning_rate(step, cfg) == pytest.approx(2.0 * (step + 1) / warmup)
        else:
            assert training.learning_rate(step, cfg) == pytest.approx(expected)


def test_one_step_and_no_warmup_are_schedules_too():
    assert training.learning_rate(0, TrainConfig(steps=1, lr=2.0, warmup=0.0)) == 2.0
    assert training.learning_rate(0, TrainConfig(steps=1, lr=2.0, warmup=1.0)) == 2.0


@pytest.mark.parametrize("method", ["full", "lora"])
def test_twenty_steps_equal_a_plain_loop_with_transformers_own_loss(
    tiny, make_run, text, tmp_path, method
):
    run = config(make_run, f"method={method}", "train.weight_decay=0.1", "train.max_grad_norm=0.5")
    torch.manual_seed(0)
    model = adapt(tiny, run)
    start = {n: p.detach().clone() for n, p in model.named_parameters()}
    losses = losses_of(run_loop(model, text, run, tmp_path)[1])

    with torch.no_grad():
        for name, p in model.named_parameters():
            p.copy_(start[name])
    model.train()
    matrices = [p for p in model.parameters() if p.requires_grad and p.ndim >= 2]
    vectors = [p for p in model.parameters() if p.requires_grad and p.ndim < 2]
    groups = [{"params": matrices, "weight_decay": 0.1}]
    groups += [{"params": vectors, "weight_decay": 0.0}] if vectors else []
    optimizer = torch.optim.AdamW(groups, lr=1.0, betas=(0.9, 0.999), eps=1e-8, foreach=False)
    for step in range(20):
        ids = batch_of(text.blocks, block_order(run.seed, step, 4, BLOCKS)).ids
        loss = model(input_ids=ids, labels=ids).loss  # all four blocks at once: no accumulation
        loss.backward()
        torch.nn.utils.clip_grad_norm_(matrices + vectors, 0.5)
        for group in optimizer.param_groups:
            group["lr"] = training.learning_rate(step, run.train)
        optimizer.step()
        optimizer.zero_grad()
        assert losses[step] == pytest.approx(loss.item(), rel=1e-5), step
    assert losses[-1] < losses[0]


def test_accumulation_changes_nothing(tiny, make_run, text, tmp_path):
    start = {n: p.detach().clone() for n, p in tiny.named_parameters()}
    losses = []
    for micro in (1, 4):
        with torch.no_grad():
            for name, p in tiny.named_parameters():
                p.copy_(start[name])
        run = config(make_run, "method=full", f"train.micro_batch={micro}")
        losses.append(losses_of(run_loop(adapt(tiny, run), text, run, tmp_path)[1]))
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


def test_the_best_checkpoint_by_validation_is_what_remains(tiny, make_run, text, tmp_path):
    run = config(make_run, "method=full")
    nlls, seen = iter([9.0, 3.0, 2.0, 2.5, 2.6]), []

    def validate():
        seen.append({n: p.detach().clone() for n, p in tiny.named_parameters()})
        return next(nlls)

    done, rows, saved = run_loop(adapt(tiny, run), text, run, tmp_path, validate)
    assert (done.best_step, done.best_nll, done.step) == (10, 2.0, 20)
    assert all(torch.equal(p, seen[2][n]) for n, p in tiny.named_parameters())
    assert not all(torch.equal(p, seen[4][n]) for n, p in tiny.named_parameters())
    assert [row["step"] for row in rows if "eval/validation/nll" in row] == [0, 5, 10, 15, 20]
    assert saved == [5, 10, 15, 20]
    assert done.tokens == 20 * 64 and done.tokens_per_second > 0


def test_training_that_only_harms_leaves_the_start(tiny, make_run, text, tmp_path):
    start = {n: p.detach().clone() for n, p in tiny.named_parameters()}
    run = config(make_run, "method=full")
    nlls = iter([1.0, 5.0, 5.0, 5.0, 5.0])
    done, _, _ = run_loop(adapt(tiny, run), text, run, tmp_path, lambda: next(nlls))
    assert done.best_step == 0
    assert all(torch.equal(p, start[n]) for n, p in tiny.named_parameters())


def test_a_nan_stops_the_run_and_names_the_step(tiny, make_run, text, tmp_path):
    run = config(make_run, "method=full")

    calls = []

    def poison():
        calls.append(1)
        if len(calls) == 2:
            with torch.no_grad():
                tiny.transformer.wte.weight[3, 3] = math.nan
        return 1.0

    with pytest.raises(training.NonFiniteLossError, match="nan at step 6 of 20"):
        run_loop(adapt(tiny, run), text, run, tmp_path, poison)


def test_a_penalty_moves_the_weights_as_in_a_plain_loop_and_not_the_logged_loss(
    tiny, make_run, text, tmp_path
):
    run = config(
        make_run, "method=full", "train.steps=1", "train.max_grad_norm=null", "train.warmup=0"
    )
    start = {n: p.detach().clone() for n, p in tiny.named_parameters()}

    def penalty():
        return 3.0 * tiny.transformer.wpe.weight.square().sum()

    _, rows, _ = run_loop(tiny, text, run, tmp_path, penalty=penalty)
    after = tiny.transformer.wpe.weight.detach().clone()
    with torch.no_grad():
        for name, p in tiny.named_parameters():
            p.copy_(start[name])
    ids = batch_of(text.blocks, block_order(run.seed, 0, 4, BLOCKS)).ids
    loss = tiny(input_ids=ids, labels=ids).loss
    assert losses_of(rows)[0] == pytest.approx(loss.item(), rel=1e-5)
    optimizer = torch.optim.AdamW(tiny.parameters(), lr=run.train.lr, weight_decay=0.0)
    (loss + penalty()).backward()
    optimizer.step()
    moved = tiny.transformer.wpe.weight.detach()
    torch.testing.assert_close(after, moved, rtol=1e-4, atol=1e-6)
    assert not torch.allclose(after, start["transformer.wpe.weight"])


def test_nothing_to_train_takes_no_step(tiny, make_run, text, tmp_path):
    run = config(make_run, "method=none")
    done, rows, saved = run_loop(adapt(tiny, run), text, run, tmp_path)
    assert done.step == 0 and [row["step"] for row in rows] == [0] and not saved


def test_a_pass_that_does_not_fit_is_taken_in_halves(tiny, make_run, text, tmp_path, monkeypatch):
    start = {n: p.detach().clone() for n, p in tiny.named_parameters()}
    found = []
    accumulate = training.accumulate

    def small_machine(prepared, batches, *rest):
        batches = list(batches)
        if len(batches[0].inputs) > 1:
            accumulate(prepared, batches[:1], *rest)  # gradients of a part are there already
            raise torch.OutOfMemoryError("out of memory")
        return accumulate(prepared, batches, *rest)

    run = config(make_run, "method=full", "train.micro_batch=4")
    for limited in (False, True):
        with torch.no_grad():
            for name, p in tiny.named_parameters():
                p.copy_(start[name])
        if limited:
            monkeypatch.setattr(training, "accumulate", small_machine)
        state, rows, _ = run_loop(adapt(tiny, run), text, run, tmp_path)
        found.append(losses_of(rows))
        assert state.micro_batch == (1 if limited else 4)
    assert found[0] == pytest.approx(found[1], rel=1e-5)
    run = config(make_run, "method=full", "train.micro_batch=4", "train.on_oom=fail")
    with pytest.raises(training.PassOutOfMemoryError, match=r"out of memory.*step 1"):
        run_loop(adapt(tiny, run), text, run, tmp_path)


def test_an_order_to_stop_ends_the_step_and_writes_a_checkpoint(tiny, make_run, text, tmp_path):
    run, stop, saved = config(make_run, "method=full"), Stop(), []

    class Rows(list):
        def append(self, row):
            super().append(row)
            if row["step"] == 7 and "train/nll" in row:
                stop.requested = True

    rows = Rows()
    model = adapt(tiny, run)
    state = training.State(micro_batch=2)
    optimizer = optimizers.make_optimizer(model, run.train)
    hooks = training.Hooks(lambda: 1.0, lambda: None, lambda: saved.append(state.step), rows.append)
    trained = training.Training(NextToken(model), text, run, Accelerator(cpu=True), optimizer)
    with pytest.raises(KeyboardInterrupt):
        training.train(trained, state, hooks, stop)
    assert saved == [5, 7] and state.step == 7 and state.validated == 5


def test_a_global_batch_that_does_not_divide_among_ranks_is_refused(make_run):
    run = config(make_run)
    assert training.blocks_per_rank(run, 2) == 2
    with pytest.raises(ConfigError, match="do not divide among 3 processes"):
        training.blocks_per_rank(run, 3)


# What trains on one block of the tiny GPT-2, by the ends of names: what decays, and what does not.
NORMS = {"ln_1.weight", "ln_2.weight", "ln_f.weight"}
MATRICES = {"wte.weight", "wpe.weight", "c_attn.weight", "c_fc.weight", "c_proj.weight"}
PEFT = "method=peft"


@pytest.mark.parametrize(
    ("overrides", "decays", "spared"),
    [
        (["method=full"], MATRICES, NORMS | {"bias"}),
        (["method=lora", "method.r=1"], {"lora_A.default.weight", "lora_B.default.weight"}, set()),
        (["method=lora", "method.r=8"], {"lora_A.default.weight", "lora_B.default.weight"}, set()),
        (
            ["method=lora", "method.r=1", "method.use_dora=true", "method.bias=all"],
            {"lora_A.default.weight", "lora_B.default.weight"},
            {"lora_magnitude_vector.default.weight", "bias"},
        ),
        (
            ["method=udv", "method.rank=1", "method.train=udv"],
            {"udv_u.default", "udv_v.default"},
            {"udv_d.default"},
        ),
        ([PEFT, "method.peft_type=IA3"], set(), {"ia3_l.default"}),
        ([PEFT, "method.peft_type=VERA"], set(), {"vera_lambda_b.default", "_lambda_d.default"}),
        (
            [PEFT, "method.peft_type=RANDLORA", "+method.fields.r=4"],
            set(),
            {"randlora_lambda.default", "randlora_gamma.default"},
        ),
        (
            [PEFT, "method.peft_type=PROMPT_TUNING", "+method.fields.num_virtual_tokens=1"],
            {"prompt_encoder.default.embedding.weight"},
            set(),
        ),
        (  # rows of an embedding, which full fine-tuning decays too
            [PEFT, "method.peft_type=TRAINABLE_TOKENS", "+method.fields.token_indices=[3]"],
            {"trainable_tokens_delta.default"},
            set(),
        ),
        ([PEFT, "method.peft_type=LN_TUNING"], set(), {"weight", "bias"}),
    ],
    ids=lambda value: " ".join(value).replace("method.", "") if isinstance(value, list) else "",
)  # fmt: skip
def test_weight_decay_is_of_matrices_by_what_they_are(tiny, make_run, overrides, decays, spared):
    """A and B are factors at r=1 as at r=8, and IA3's (1, n) is a vector: against lists by hand."""
    model = adapt(tiny, make_run(*overrides))
    optimizer = optimizers.make_optimizer(model, TrainConfig(weight_decay=0.1))
    names = {p: name for name, p in model.named_parameters() if p.requires_grad}
    found = {0.1: set(), 0.0: set()}
    for group in optimizer.param_groups:
        found[group["weight_decay"]] |= {names.pop(p) for p in group["params"]}
    assert not names
    for rate, ends in ((0.1, decays), (0.0, spared)):
        assert {end for end in ends if any(name.endswith(end) for name in found[rate])} == ends
        assert all(name.endswith(tuple(ends)) for name in found[rate]), found[rate]


@pytest.mark.parametrize("config", [LoHaConfig(r=1), LoHaConfig(r=8), LoKrConfig(r=1)])
def test_factors_that_an_adapter_multiplies_out_are_matrices_at_every_rank(config):
    config.target_modules = ["0"]
    model = get_peft_model(torch.nn.Sequential(torch.nn.Linear(15, 8)), config)
    found = {n: p for n, p in model.named_parameters() if p.requires_grad}
    assert found and all(optimizers.is_matrix(model, name, p) for name, p in found.items())


def test_the_rates_of_a_state_space_do_not_decay():
    """Mamba's own code marks A_log, (channels, states), as not to decay."""
    config = MambaConfig(vocab_size=64, hidden_size=16, state_size=4, num_hidden_layers=1)
    model = MambaForCausalLM(config)
    spared = {
        name for name, p in model.named_parameters()
        if p.ndim > 1 and not optimizers.is_matrix(model, name, p)
    }  # fmt: skip
    assert spared == {"backbone.layers.0.mixer.A_log"}


def test_the_optimizer_has_all_that_trains_and_betas_of_its_own(tiny):
    optimizer = optimizers.make_optimizer(tiny, TrainConfig(weight_decay=0.1))
    counted = sum(p.numel() for g in optimizer.param_groups for p in g["params"])
    assert counted == sum(p.numel() for p in tiny.parameters())
    assert SimpleNamespace(**optimizer.defaults).betas == (0.9, 0.999)


@pytest.mark.slow
def test_every_vector_of_peft_in_two_dimensions_is_known():
    """At r=8 no factor has a side of 1: what has one is a vector, in every method that PEFT has."""
    base = LlamaConfig(
        vocab_size=64, hidden_size=64, intermediate_size=128, num_hidden_layers=1,
        num_attention_heads=4, num_key_value_heads=4,
    )  # fmt: skip
    vectors, built = set(), 0
    for kind, config_class in PEFT_TYPE_TO_CONFIG_MAPPING.items():
        names = {field.name for field in dataclasses.fields(config_class)}
        # ADAMSS takes its subspaces to pieces of rank 1; CPT has as many tokens as it is given.
        if str(getattr(kind, "value", kind)) in ("ADAMSS", "CPT", "FROD"):
            continue
        asked = {
            "target_modules": ["q_proj", "v_proj"], "feedforward_modules": ["v_proj"],
            "num_virtual_tokens": 8, "total_step": 100, "r": 8, "token_indices": list(range(8)),
        }  # fmt: skip
        fields = {key: value for key, value in asked.items() if key in names}
        try:
            with torch.device("meta"):
                base_model = LlamaForCausalLM(base)
            config = config_class(task_type="CAUSAL_LM", **fields)
            model = get_peft_model(base_model, config, low_cpu_mem_usage=True)
        except (ValueError, RuntimeError, TypeError, NotImplementedError, ImportError):
            continue
        built += 1
        for name, p in model.named_parameters():
            if p.requires_grad and p.ndim >= 2 and 0 < sum(size > 1 for size in p.shape) < 2:
                vectors.add(name.split(".")[-2] if name.endswith(".default") else name)
    refused = {"prefix_task_cols", "prefix_task_rows", "module_logits"}  # MULTITASK…, POLY
    left = {
        n for n in vectors if n not in optimizers.VECTORS and n.rpartition(".")[2] not in refused
    }
    assert not left and built > 20 and {"ia3_l", "boft_s"} <= vectors
