"""AdaLoRA against PEFT's own example loop, its budget, its resume, and what of it is refused."""

import copy
import dataclasses

import peft
import pytest
import torch
from accelerate import Accelerator
from cut_runs import outcome, run_until
from torch.nn import functional as F

from harness import methods
from harness.config import naming
from harness.config.errors import ConfigError
from harness.config.method_schema import AdaloraMethod
from harness.config.rank_schedule import schedule_of
from harness.data.token_data import batch_of, block_order
from harness.methods import adalora, objective
from harness.models import model_size
from harness.models.next_token import NextToken
from harness.results import run_record, schema
from harness.system.signals import Stop
from harness.training import buffers, checkpoint, loop, optimizers

STEPS, TINIT, TFINAL = 20, 3, 6
MODULES = ["attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj"]
ASKED = (
    "method=adalora", "targets=all", "method.target_r=4", "method.init_r=6", "method.alpha=12",
    f"method.tinit={TINIT}", f"method.tfinal={TFINAL}", "method.deltaT=2",
    f"train.steps={STEPS}", "data.context_length=16", "train.batch_tokens=64",
    "train.micro_batch=2",
    "train.lr=0.05", "train.max_grad_norm=0.5", "evaluate.interval=5",
)  # fmt: skip


def trained(model, text, run, tmp_path, validate=lambda: 1.0):
    """Train as the worker does; the state, the loss of each step, and the best weights loaded."""
    accelerator, rows = Accelerator(cpu=True), []
    optimizer = optimizers.make_optimizer(model, run.train)
    state = loop.State(micro_batch=run.train.micro_batch)
    kept, best = buffers.BufferState(model), tmp_path / "best"
    hooks = loop.Hooks(
        validate, lambda: checkpoint.save_trained(model, best, buffers=kept), lambda: None,
        rows.append,
    )  # fmt: skip
    training = loop.Training(
        NextToken(model), text, run, accelerator, optimizer, objective.penalty(model, run),
        after_step=adalora.after_step(model, run), final_from=adalora.last_cut(run),
    )  # fmt: skip
    loop.train(training, state, hooks, Stop())
    checkpoint.load_trained(model, best, buffers=kept)
    return state, [row["train/nll"] for row in rows if "train/nll" in row]


def pefts_own_loop(base, run, text):
    """PEFT's example: its loss of labels, its clipping, its call after each optimizer step."""
    # Transformers' own loss is of fp32 logits, whose rounding Adam makes steps of.
    base.loss_function = lambda logits, labels, **_: F.cross_entropy(
        logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten()
    )
    torch.manual_seed(0)
    config = peft.AdaLoraConfig(
        task_type="CAUSAL_LM", target_modules=MODULES, fan_in_fan_out=True, target_r=4, init_r=6,
        lora_alpha=12, tinit=TINIT, tfinal=TFINAL, deltaT=2, total_step=STEPS,
    )  # fmt: skip
    model = peft.get_peft_model(base, config).train()
    for name, parameter in model.named_parameters():
        if "ranknum" in name:  # the first rank: PEFT freezes it, but not where it casts it
            parameter.requires_grad_(False)
    weights = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(weights, lr=1.0, weight_decay=0.0, foreach=False)
    losses = []
    for step in range(STEPS):
        ids = batch_of(text.blocks, block_order(run.seed, step, 4, 10)).ids
        nll = 0.0
        for some in ids.split(2):  # two micro-batches
            out = model(input_ids=some, labels=some)
            (out.loss / 2).backward()
            nll += F.cross_entropy(out.logits[:, :-1].flatten(0, 1), some[:, 1:].flatten()) / 2
        torch.nn.utils.clip_grad_norm_(weights, 0.5)
        optimizer.param_groups[0]["lr"] = loop.learning_rate(step, run.train)
        optimizer.step()
        model.base_model.update_and_allocate(step)
        optimizer.zero_grad()
        losses.append(float(nll.detach()))
    return model, losses


@pytest.fixture
def both(tiny, make_run, text, tmp_path):
    """(ours, its losses, PEFT's, its losses, the run, the state), in float64."""
    run, tiny = make_run(*ASKED), tiny.double()
    other = copy.deepcopy(tiny)
    torch.manual_seed(0)
    model = methods.adapt(tiny, run)
    state, losses = trained(model, text, run, tmp_path)
    return model, losses, *pefts_own_loop(other, run, text), run, state


def test_training_is_pefts_own_loop_and_reaches_its_budget(both):
    model, losses, theirs, their_losses, _, state = both
    assert losses == pytest.approx(their_losses, rel=1e-6)
    assert state.best_step > STEPS - TFINAL  # validation never improved: the first one counts
    patterns = [m.peft_config["default"].rank_pattern for m in (model, theirs)]
    assert patterns[0] == patterns[1]
    found = adalora.facts(model)
    assert found["budget"]["initial"] == 48 and found["budget"]["target"] == 32
    assert found["budget"]["reached"] == 32 == sum(found["ranks"].values())
    assert len(set(found["ranks"].values())) > 1
    assert len(found["ranks"]) == 8


def test_the_penalty_is_pefts_and_no_part_of_the_nats(tiny, make_run):
    run = make_run(*ASKED)
    model = methods.adapt(tiny, run)
    ids = torch.arange(1, 21).view(2, 10)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * 0.1)
        out = model(input_ids=ids, labels=ids)
        plain = F.cross_entropy(out.logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
        penalty = objective.penalty(model, run)()
        assert float(penalty) > 0.1
        assert float(out.loss - plain) == pytest.approx(float(penalty), rel=1e-4)
        nats = NextToken(model).eval()(ids[:, :-1], ids[:, 1:]).nats
    assert float(nats.mean()) == pytest.approx(float(plain), rel=1e-5)
    assert objective.penalty(model, make_run(*ASKED, "method.orth_reg_weight=0")) is None


def test_it_is_saved_with_its_final_ranks_as_plain_peft_loads_it(both, tiny, tmp_path, tokenizer):
    model, *_, run, _ = both
    ids = torch.arange(1, 21).view(2, 10)
    found = adalora.facts(model)
    with torch.no_grad():
        logits = model.eval()(input_ids=ids).logits
        assert checkpoint.export(model, tokenizer, tmp_path, merged=True) == ["adapter", "model"]
        torch.manual_seed(0)
        base = type(tiny)(tiny.config)
        base.load_state_dict(
            {
                key.replace(".base_layer", ""): value
                for key, value in both[2].base_model.model.state_dict().items()
                if "lora_" not in key and "ranknum" not in key
            }
        )
        again = peft.PeftModel.from_pretrained(base.double().eval(), tmp_path / "adapter")
        again = again.double()
        torch.testing.assert_close(again(input_ids=ids).logits, logits, rtol=1e-5, atol=1e-5)
        held = {
            name: len(module.lora_E["default"])
            for name, module in again.base_model.model.named_modules()
            if hasattr(module, "lora_E")
        }
        assert held == found["ranks"]
        kept = sum(p.numel() for n, p in again.named_parameters() if "lora_" in n)
        assert kept == found["budget"]["parameters"]
        whole = type(tiny).from_pretrained(tmp_path / "model").double().eval()
        torch.testing.assert_close(whole(input_ids=ids).logits, logits, rtol=1e-4, atol=1e-4)
    assert naming.run_name(run).startswith("adalora-all-r6to4-a12-")


def test_validation_chooses_among_final_ranks_alone(tiny, make_run, text, tmp_path):
    """The lowest nll of all comes before the last cut, and does not count."""
    nlls = iter([5.0, 1.0, 2.0, 4.0, 3.0])  # after steps 0, 5, 10, 15 and 20; the cut is after 15
    run = make_run(*ASKED)
    model = methods.adapt(tiny, run)
    state, _ = trained(model, text, run, tmp_path, lambda: next(nlls))
    assert (state.best_step, state.best_nll) == (20, 3.0)
    assert adalora.facts(model)["budget"]["reached"] == 32
    early = make_run(*ASKED, "method.tfinal=8")  # after 13: that of step 15 is worse than of 20
    assert adalora.last_cut(early) == 13


@pytest.mark.parametrize("steps", [3, 10, 100, 1234])
def test_shares_become_steps_within_the_run(steps):
    found = schedule_of(AdaloraMethod("adalora"), steps)
    assert 0 <= found.tinit < found.last_cut < steps and found.deltaT >= 1 and found.tfinal >= 1
    assert abs(found.tinit - 0.1 * steps) <= 0.5 and abs(found.tfinal - 0.3 * steps) <= 0.5 + 0.5


def test_what_counts_as_trainable_is_pefts_count_with_or_without_weights(tiny, make_run):
    run = make_run(*ASKED)
    model = methods.adapt(copy.deepcopy(tiny), run)
    count = model_size.count_parameters(model).trainable
    assert count == model.get_nb_trainable_parameters()[0] == 2 * 6 * (16 * 32 + 4)
    assert model_size.count_parameters(methods.check(tiny.to("meta"), run)).trainable == count


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["method.init_r=4"], r"method\.init_r=4: expected more than method\.target_r=4"),
        (["method.target_r=0"], r"method\.target_r=0"),
        (["method.tinit=1.5"], r"method\.tinit=1\.5: expected 0 or more steps, or a share"),
        (["method.tfinal=0"], r"method\.tfinal=0: expected 1 or more steps"),
        (["method.deltaT=true"], r"method\.deltaT=True: expected"),
        (["method.tinit=14"], r"leave none for cutting ranks: expected a sum below 20"),
        (["method.beta1=1"], r"method\.beta1=1.*in \(0, 1\)"),
        (["train.max_seconds=9"], r"train\.max_seconds=9\.0 with method=adalora"),
        (["train.early_stopping.patience=2"], r"early_stopping\.patience=2 with method=adalora"),
        (["train.ema=0.9"], r"method=adalora with train\.ema=0\.9: triplets that are cut"),
        (["optimizer=lora_plus"], r"optimizer=lora_plus.*method=adalora has no LoRA"),
        (["method.init_r=33"], r"method\.init_r=33: .* allows a rank of 32 at most"),
        (["+method.fields.rank_pattern={c_fc: 3}"], r"rank_pattern"),
        (["+method.fields.r=3"], r"method\.fields\.r"),
        (["+method.fields.init_lora_weights=pissa"], r"AdaLoRA has one start of its own"),
        (["+method.fields.use_dora=true"], r"does not support DoRA"),
        (["+method.fields.total_step=3"], r"total_step: set it by its own key"),
    ],
)
def test_what_it_cannot_do_is_refused_by_name(tiny, make_run, overrides, message):
    with pytest.raises(ConfigError, match=message):
        methods.adapt(tiny, make_run(*ASKED, *overrides))


# --------------------------------------------------------------------------- whole runs

RUN = [
    "method=adalora", "targets=all", "method.target_r=2", "method.tinit=2", "method.tfinal=6",
    "train.steps=16", "evaluate.interval=4", "train.lr=0.02", "train.warmup=0", "train.threads=1",
    "data.validation_share=0.003", "data.test_share=0.003", "data.context_length=32",
    "train.batch_tokens=128", "train.micro_batch=2", "data.document_chars=500",
]  # fmt: skip


@pytest.mark.slow
def test_a_run_that_is_cut_goes_on_with_the_allocator(make_run, tmp_path):
    """Once while ranks are cut, by means that go back to the first step, and once after it."""
    whole = make_run(*RUN, f"outputs_dir={tmp_path}", "run_name=whole")
    result = run_until(whole)
    assert schema.problems(result) == []
    assert result["saved_check"]["nats_per_token"] < 1e-5, result["saved_check"]
    assert result["method"]["budget"]["reached"] == 32 and result["quality"]["best_step"] > 10
    assert result["predicted"]["peak_bytes"] == result["memory"]["peak_bytes"]
    cut = dataclasses.replace(whole, run_name="cut")
    for step in (8, 12):
        assert run_until(cut, pause_at=step)["status"] == "paused"
    assert run_until(cut)["run"]["resumed_at"] == [8, 12]
    one, other = (outcome(run.run_dir, ["validation", "test"]) for run in (whole, cut))
    assert one == other
    ranks = [run_record.read(run.run_dir)["method"]["ranks"] for run in (whole, cut)]
    assert ranks[0] == ranks[1]
