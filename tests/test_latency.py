"""Bytes to ship, seconds to load and speed of what a run saved: beside PEFT and `transformers`."""

import copy
import math
import time

import pytest
import torch
from peft import LoraConfig, PeftModel, PromptTuningConfig, get_peft_model
from scipy import stats as scipy_stats
from trained_kinds import FULL, NONE, PROMPTS
from transformers import GPT2Config, GPT2LMHeadModel

from harness.config import naming
from harness.config.errors import ConfigError
from harness.config.schema import LatencyConfig
from harness.evaluation import latency
from harness.methods import lora_layer
from harness.models.next_token import NextToken
from harness.results import run_record
from harness.runs import finished_run as saved
from harness.runs import saved_costs, worker

SMALL = LatencyConfig(prompt_tokens=6, new_tokens=5, batch_sizes=[1, 3], repeats=6)
ASKED = "evaluate.latency={prompt_tokens: 6, new_tokens: 4, batch_sizes: [1, 2], repeats: 2}"
LORA = ("method=lora", "method.r=4", "train.lr=0.02", ASKED)


def tiny(**changes):
    torch.manual_seed(0)
    sizes = {"n_layer": 2, "n_embd": 16, "n_head": 2, "vocab_size": 97, "n_positions": 32}
    return GPT2LMHeadModel(GPT2Config(**sizes | changes)).eval().requires_grad_(False)


class Slow(GPT2LMHeadModel):
    """A model whose every pass takes a known time more, by a clock that may be the test's own."""

    def forward(self, *args, **kwargs):
        self.wait()
        return super().forward(*args, **kwargs)


def slow(wait):
    model = Slow(tiny().config).eval().requires_grad_(False)
    model.wait = wait
    return model


def test_tokens_are_those_of_plain_generate_and_all_of_them_are_made():
    model = tiny()
    ids = latency._prompts(model, 3, 6)
    assert ids.shape == (3, 6) and torch.equal(ids, latency._prompts(model, 3, 6))
    model.generation_config.eos_token_id = None  # which could end it early
    expected = model.generate(ids, max_new_tokens=5, do_sample=False, pad_token_id=0)
    assert torch.equal(latency.generated(model, ids, 5), expected)
    first = int(expected[0, 6])  # an end of text at the first new token must not end it
    model.generation_config.eos_token_id = first
    made = latency.generated(model, ids, 5)
    assert made.shape == (3, 11) and first not in made[0, 6:10]


def test_times_by_a_clock_that_only_passes_move(monkeypatch):
    """0.1 and 0.3 s a pass: a pass for each new token, one for scoring; ratios of 3."""
    clock = [0.0]
    monkeypatch.setattr(latency.time, "perf_counter", lambda: clock[0])

    def moving(seconds):
        return lambda: clock.__setitem__(0, clock[0] + seconds)

    models = {"base": slow(moving(0.1)), "attached": slow(moving(0.3))}
    found = latency.measure(models, SMALL, bf16=False)
    for size in (1, 3):
        for kind, passes, tokens in (("generate", 5, 5), ("score", 1, 6)):
            base, own = (found[kind][f"batch_{size}"][name] for name in models)
            assert base["seconds"] == pytest.approx([0.1 * passes] * 6)
            assert own["seconds"] == pytest.approx([0.3 * passes] * 6)
            assert own["tokens_per_second"] == pytest.approx(size * tokens / (0.3 * passes))
            ends = (own["times_base_low"], own["times_base"], own["times_base_high"])
            assert ends == pytest.approx((3, 3, 3)) and base["times_base"] == 1


def test_times_are_those_of_a_plain_loop():
    """Sleeps of 30 and 90 ms a pass; what a busy machine does around them is within factor 2."""
    models = {"base": slow(lambda: time.sleep(0.03)), "attached": slow(lambda: time.sleep(0.09))}
    asked = LatencyConfig(prompt_tokens=6, new_tokens=3, batch_sizes=[1], repeats=3)
    found = latency.measure(models, asked, bf16=False)
    ids, plain = torch.randint(97, (1, 6)), {"generate": [], "score": []}
    for model in models.values():
        for kind, call in (
            ("generate", lambda m=model: m.generate(ids, max_new_tokens=3, pad_token_id=0)),
            ("score", lambda m=model: m(input_ids=ids, labels=ids).loss.item()),
        ):
            start = time.perf_counter()
            call()
            plain[kind].append(time.perf_counter() - start)
    for kind, (base, attached) in plain.items():
        own = found[kind]["batch_1"]
        assert min(own["attached"]["seconds"]) >= 0.09 * (3 if kind == "generate" else 1)
        assert attached / base / 2 < own["attached"]["times_base"] < 2 * attached / base


def test_who_is_first_changes_and_seconds_are_compared_within_a_repeat():
    order = []
    by = {name: lambda name=name: order.append(name) for name in ("base", "a", "b")}
    latency._in_turn(by, 4, torch.device("cpu"))
    assert "".join(name[0] for name in order[:3]) == "bab"  # not timed
    assert [order[i] for i in (3, 6, 9, 12)] == ["base", "a", "b", "base"]
    slower = {"base": [1.0, 10.0, 100.0], "a": [2.0, 20.0, 200.0]}  # the machine gets slower
    found = latency._compared(slower, 10)["a"]
    assert found["times_base"] == 2 and found["tokens_per_second"] == 0.5
    assert latency._compared({"base": [1.0] * 6, "a": [3, 2, 1, 4, 6, 5]}, 1)["a"] == {
        "seconds": [3, 2, 1, 4, 6, 5], "tokens_per_second": 1 / 3.5, "times_base": 3.5,
        "times_base_low": 1, "times_base_high": 6,
    }  # fmt: skip


def test_scoring_gives_the_nats_of_transformers_own_loss():
    model, ids = tiny(), torch.randint(97, (3, 6))
    mine = NextToken(model)(ids[:, :-1], ids[:, 1:]).nats.mean()
    assert mine.item() == pytest.approx(model(input_ids=ids, labels=ids).loss.item(), rel=1e-5)


def test_whether_a_cache_is_kept_is_seen_and_not_asked():
    model = tiny()
    ids = latency._prompts(model, 1, 6)
    assert latency._keeps_cache(model, lambda: latency.generated(model, ids, 4))
    without = lambda: model.generate(ids, max_new_tokens=4, use_cache=False, pad_token_id=0)  # noqa: E731
    assert not latency._keeps_cache(model, without)
    config = PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2)
    prompts = get_peft_model(tiny(), config).eval()
    assert latency._keeps_cache(prompts, lambda: latency.generated(prompts, ids, 4))


def test_prompts_begin_where_an_adapter_begins_to_act():
    config = LoraConfig(r=2, target_modules=["c_attn"], task_type="CAUSAL_LM",
                        alora_invocation_tokens=[5, 7], init_lora_weights=False)  # fmt: skip
    model = get_peft_model(tiny(), config).eval()
    tokens = latency._invocation([tiny(), model])
    assert tokens == [5, 7] and latency._invocation([tiny()]) == []
    ids = latency._prompts(model, 2, 6, tokens)
    assert ids[:, :2].tolist() == [[5, 7]] * 2
    found = latency.measure({"base": tiny(), "attached": model}, SMALL, bf16=False)
    assert found["generate"]["batch_3"]["attached"]["kv_cache"]


@pytest.mark.parametrize("n", [1, 5, 6, 9, 15])
def test_the_interval_of_a_median_holds_it_as_often_as_it_says(n):
    low, high = latency.median_interval([float(i) for i in range(n)])
    if n < 6:
        assert (low, high) == (None, None)
        return
    outside = int(low)  # values below the interval, and as many above
    assert high == n - 1 - outside
    covered = 1 - 2 * scipy_stats.binom.cdf(outside, n, 0.5)
    narrower = 1 - 2 * scipy_stats.binom.cdf(outside + 1, n, 0.5)
    assert covered >= 0.95 > narrower


def test_weights_are_shared_where_they_are_the_same_and_outputs_stay():
    base = tiny()
    config = lora_layer.fuse(LoraConfig(r=2, target_modules=["c_attn"], init_lora_weights=False))
    attached = get_peft_model(copy.deepcopy(base), config).eval()
    merged = copy.deepcopy(attached).merge_and_unload()
    ids = torch.arange(8)[None]
    with torch.no_grad():
        before = [model(ids).logits for model in (base, attached, merged)]
        for model in (attached, merged):
            saved_costs._share(model, base)
        after = [model(ids).logits for model in (base, attached, merged)]
    for one, other in zip(before, after, strict=True):
        assert torch.equal(one, other)
    held = {id(p) for p in base.parameters()}
    own = [name for name, p in attached.named_parameters() if id(p) not in held]
    assert own and all("lora_" in name for name in own)
    own = [name for name, p in merged.named_parameters() if id(p) not in held]
    assert own and all("c_attn.weight" in name for name in own)
    assert merged.lm_head.weight is merged.transformer.wte.weight
    layers = [m for m in attached.modules() if isinstance(m, lora_layer.FusedLinear)]
    assert layers and all(layer.fuses for layer in layers)


def test_a_run_measures_what_it_saved(finished_run):
    run = saved.load(finished_run(*LORA))
    costs = run.record["costs"]
    folder = run.run_dir / "adapter"
    assert costs["adapter_bytes"] == sum(p.stat().st_size for p in folder.iterdir())
    assert costs["load_seconds"] > 0 and "failure" not in costs
    found = costs["latency"]
    assert found["repeats"] == 2 and found["not_merged"] is None and found["threads"] >= 1
    for kind in ("generate", "score"):
        assert list(found[kind]) == ["batch_1", "batch_2"]
        for by_model in found[kind].values():
            assert list(by_model) == ["base", "attached", "fused", "merged"]
            for one in by_model.values():
                assert len(one["seconds"]) == 2 and one["times_base_low"] is None
                assert kind == "score" or one["kv_cache"]
    _, models, _ = saved_costs._models(run)
    assert not any(isinstance(m, lora_layer.FusedLinear) for m in models["attached"].modules())
    ids = torch.arange(12)[None]
    with torch.no_grad():
        logits = {name: model(ids).logits for name, model in models.items()}
        base = run.base()
        expected = PeftModel.from_pretrained(base, folder).eval()(ids).logits
    assert torch.equal(logits["attached"], expected)
    for name in ("fused", "merged"):
        torch.testing.assert_close(logits[name], expected, rtol=1e-3, atol=1e-3)
    assert not torch.allclose(logits["base"], expected, atol=1e-2)


def test_flops_are_counted_for_training_and_evaluation_apart(finished_run):
    """6 N a token and more for what trains; here by the formulas of torch's own counter."""
    run = saved.load(finished_run(*LORA))
    costs, predicted = run.record["costs"], run.record["predicted"]
    assert costs["train_flops"] == predicted["train_flops_per_token"] * 2 * 512
    positions = costs["evaluate_flops"] / predicted["evaluate_flops_per_token"]
    # Validation before and after two steps and test once, whose windows are 64 or a document wide.
    validation, test = (run.record["quality"][k]["num_tokens"] for k in ("validation", "test"))
    assert 2 * validation + test <= positions < 3 * (2 * validation + test)
    assert costs["energy"]["of"] or costs["energy"]["left_out"]


@pytest.mark.parametrize(
    ("overrides", "there", "said"),
    [
        (FULL, ["base", "merged"], None),
        (PROMPTS, ["base", "attached"], "adds prompts, not weights"),
        (NONE, ["base"], None),
    ],
)
def test_methods_have_the_models_that_they_leave(finished_run, overrides, there, said):
    run = saved.load(finished_run(*overrides))
    seconds, models, not_merged = saved_costs._models(run)
    assert list(models) == there and (seconds is None) == (overrides is NONE)
    assert not_merged is None if said is None else said in not_merged
    costs = run.record["costs"]
    assert "latency" not in costs  # nobody has asked
    if overrides is FULL:
        weights, whole = (
            sum(p.stat().st_size for p in (run.run_dir / "model").glob(pattern))
            for pattern in ("*.safetensors", "*")
        )
        assert weights < costs["adapter_bytes"] < min(whole, weights + 5000)
    assert (costs["adapter_bytes"] == 0) == (overrides is NONE)


def test_a_failure_is_noted_and_takes_no_result_away(finished_run, monkeypatch):
    run = saved.load(finished_run(*LORA))
    monkeypatch.setattr(latency, "measure", lambda *_: 1 / 0)
    assert saved_costs.measure(run) == {"failure": "ZeroDivisionError: division by zero"}


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("evaluate.latency=yes_please", "evaluate.latency=yes_please: expected true, false, or"),
        ("evaluate.latency={repeat: 5}", "did you mean 'evaluate.latency.repeats'"),
        ("evaluate.latency={repeats: 0}", "evaluate.latency.repeats=0: expected 1 or more"),
        ("evaluate.latency={new_tokens: 1}", "evaluate.latency.new_tokens=1: expected 2 or more"),
        ("evaluate.latency={batch_sizes: [8, 8]}", "expected different numbers of 1 or more"),
        ("evaluate.latency={batch_sizes: []}", "expected different numbers of 1 or more"),
    ],
)
def test_what_cannot_be_is_refused(make_run, override, said):
    with pytest.raises(ConfigError) as error:
        make_run(override)
    assert said in str(error.value) and "\n" not in str(error.value)


def test_too_long_prompts_and_models_that_do_not_generate_are_refused_before_training():
    with pytest.raises(ConfigError, match="are 11 tokens, and the model has 10 positions: take 10"):
        latency.check(tiny(), SMALL, 10)
    latency.check(tiny(), SMALL, 11)
    latency.check(tiny(), SMALL, None)

    class Mute(GPT2LMHeadModel):
        def generate(self, *args, **kwargs):
            raise ValueError("no words")

    with pytest.raises(ConfigError, match=r"Mute cannot generate \(no words\); set it to false"):
        latency.check(Mute(tiny().config), SMALL, None)


def test_asking_for_it_is_another_run_and_leaving_it_alone_is_none(make_run):
    plain, off = make_run(), make_run("evaluate.latency=false")
    on, by_file = make_run("evaluate.latency=true"), make_run("evaluate=latency")
    assert on.evaluate.latency == by_file.evaluate.latency == LatencyConfig()
    assert naming.identity(plain) == naming.identity(off) != naming.identity(on)
    assert naming.identity(on) == naming.identity(by_file)
    assert math.isclose(on.evaluate.latency.repeats, 9)


def test_a_kill_while_it_measures_leaves_a_finished_run_that_says_so(
    finished_run, tmp_path, monkeypatch
):
    run = saved.load(finished_run(*LORA))
    record = dict(run.record) | {"costs": {"adapter_bytes": 5}}

    def kill(_):
        raise SystemExit(137)

    monkeypatch.setattr(saved_costs, "measure", kill)
    with pytest.raises(SystemExit):
        worker._measure_costs(run.run, tmp_path, record, None)
    left = run_record.read(tmp_path)
    assert left["status"] == "finished"
    assert left["costs"] == {"adapter_bytes": 5, "failure": saved_costs.UNMEASURED}
