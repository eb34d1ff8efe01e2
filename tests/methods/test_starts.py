"""Starts that read training text: EVA, CorDA and LoRA-GA against PEFT's own and closed forms."""

import copy
import dataclasses

import peft
import pytest
import torch
from cut_runs import outcome, run_until
from datasets import Dataset
from peft.tuners.lora.config import CordaConfig
from peft.tuners.lora.corda import preprocess_corda
from peft.tuners.lora.loraga import preprocess_loraga
from torch import nn
from torch.nn import functional as F
from transformers.pytorch_utils import Conv1D

from harness import methods
from harness.config import naming
from harness.config.errors import ConfigError
from harness.data.token_data import Batch, Data, batch_of
from harness.methods import initialisation, model_facts, starts
from harness.models import model_size
from harness.results import run_record, schema
from harness.training import checkpoint
from harness.training.start_text import start_text_of

IDS = torch.arange(1, 21).view(2, 10)
INITS = ("eva", "corda", "lora_ga")
ASKED = (
    "targets=all", "method.r=4", "method.start_sequences=12", "train.micro_batch=4",
    "data.context_length=16", "train.batch_tokens=64",
)  # fmt: skip


@pytest.fixture
def batches():
    torch.manual_seed(1)
    rows = torch.randint(1, 64, (12, 17))
    return [Batch(part[:, :-1], part[:, 1:], None) for part in rows.split(4)]


@pytest.fixture
def text(batches, tmp_path):
    return starts.TrainingText(batches, tmp_path / run_record.START, "it")


def perturbed(model):
    """As training leaves it: other A and B."""
    torch.manual_seed(5)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * 0.05)
    return model.eval()


def factors(model):
    return {n: p.detach().clone() for n, p in model.named_parameters() if ".lora_" in n}


def adapted(tiny, run, text):
    torch.manual_seed(0)
    return methods.adapt(tiny, run, text).eval()


def test_evas_directions_are_the_top_singular_vectors_of_planted_inputs(
    tiny, make_run, batches, text
):
    with torch.no_grad():  # four directions of the first matrix' inputs stand out
        for place, size in ((3, 40.0), (17, 30.0), (25, 20.0), (8, 15.0)):
            tiny.transformer.h[0].ln_1.weight[place] = size
    seen = []
    hook = tiny.transformer.h[0].attn.c_attn.register_forward_hook(
        lambda module, inputs, output: seen.append(inputs[0].flatten(0, 1))
    )
    with torch.no_grad():
        for batch in batches:
            tiny(batch.inputs)
    hook.remove()
    inputs = torch.cat(seen).double()
    _, _, top = torch.linalg.svd(inputs - inputs.mean(0), full_matrices=False)
    run = make_run("method=eva", *ASKED, "+method.fields.eva_config={rho: 1.0}")
    model = adapted(tiny, run, text)
    layer = model.base_model.model.transformer.h[0].attn.c_attn
    found = layer.lora_A["default"].weight.double()
    cosines = F.cosine_similarity(found, top[:4]).abs()
    assert cosines.min() > 0.99, cosines
    assert not layer.lora_B["default"].weight.any()


def test_eva_moves_ranks_and_keeps_their_sum(tiny, make_run, text):
    """PEFT gives more ranks to matrices whose directions explain more, up to rho times r."""
    run = make_run("method=eva", *ASKED)
    model = adapted(tiny, run, text)
    ranks = model_facts.rank_facts(model)["ranks"]
    assert sum(ranks.values()) == 4 * 8 and len(set(ranks.values())) > 1
    assert max(ranks.values()) <= 8 and all(name.startswith("transformer.h.") for name in ranks)
    assert initialisation.moves_ranks(run)
    count = model_size.count_parameters(model).trainable
    assert count == model.get_nb_trainable_parameters()[0]


@pytest.mark.parametrize("init", INITS)
def test_the_adapted_model_starts_as_the_base(tiny, make_run, text, init):
    with torch.no_grad():
        base = tiny(IDS).logits
        model = adapted(tiny, make_run(f"method={init}", *ASKED), text)
        torch.testing.assert_close(model(input_ids=IDS).logits, base, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("init", INITS)
def test_a_trained_adapter_is_the_same_model_in_plain_peft(
    tiny, make_run, text, tmp_path, tokenizer, init
):
    bare = copy.deepcopy(tiny)
    model = adapted(tiny, make_run(f"method={init}", *ASKED), text)
    checkpoint.keep_initial(model, tmp_path)
    with torch.no_grad():
        logits = perturbed(model)(input_ids=IDS).logits
        assert not torch.allclose(logits, bare(IDS).logits, atol=0.05)
        assert checkpoint.export(model, tokenizer, tmp_path, merged=True) == ["adapter", "model"]
        again = peft.PeftModel.from_pretrained(copy.deepcopy(bare), tmp_path / "adapter").eval()
        torch.testing.assert_close(again(input_ids=IDS).logits, logits, rtol=1e-4, atol=1e-4)
        whole = type(bare).from_pretrained(tmp_path / "model").eval()
        torch.testing.assert_close(whole(IDS).logits, logits, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("init", INITS)
def test_a_run_that_goes_on_starts_from_the_same_bits_without_reading(
    tiny, make_run, text, monkeypatch, init
):
    run = make_run(f"method={init}", *ASKED)
    bases = [copy.deepcopy(tiny) for _ in range(3)]
    first = adapted(bases[0], run, text)
    drawn = torch.rand(3)
    took = starts.facts_of(text)
    assert took.tokens >= 12 * 16 and took.passes >= (12 if init == "corda" else 3)
    assert took.tokens == took.passes * (16 if init == "corda" else 64)
    reads = []
    monkeypatch.setitem(starts.READERS, init, lambda *_: reads.append(1))
    again = adapted(bases[1], run, text)
    assert torch.equal(torch.rand(3), drawn)  # and so is what is drawn after it
    assert not reads
    for one, other in zip(first.state_dict().items(), again.state_dict().items(), strict=True):
        assert one[0] == other[0] and torch.equal(one[1], other[1]), one[0]
    other = dataclasses.replace(text, identity="another run")
    assert starts.facts_of(other) is None


def test_corda_is_pefts_own_preprocessing_of_the_same_sequences(tiny, make_run, batches, text):
    other = copy.deepcopy(tiny)
    model = adapted(tiny, make_run("method=corda", *ASKED), text)
    config = peft.LoraConfig(
        task_type="CAUSAL_LM", r=4, lora_alpha=8, init_lora_weights="corda",
        corda_config=CordaConfig(), fan_in_fan_out=True,
        target_modules=["attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj"],
    )  # fmt: skip

    def run():
        for batch in batches:
            for row in batch.inputs:
                other(row[None])

    preprocess_corda(other, config, run_model=run)
    theirs = factors(peft.get_peft_model(other, config))
    ours = factors(model)
    assert ours.keys() == theirs.keys()
    for name, factor in ours.items():
        torch.testing.assert_close(factor, theirs[name], rtol=1e-4, atol=1e-5, msg=name)


class Turned(nn.Linear):
    """GPT-2's matrix as a Linear: the transposed weight, the same product."""

    def __init__(self, conv: Conv1D) -> None:
        super().__init__(*conv.weight.shape)
        with torch.no_grad():
            self.weight.copy_(conv.weight.T)
            self.bias.copy_(conv.bias)


@pytest.mark.parametrize("scale", ["stable", "unit", "gd_scale", "weight_svd"])
def test_lora_ga_on_gpt2_is_pefts_own_on_the_same_model_of_linears(
    tiny, make_run, batches, text, scale
):
    """PEFT's scale=stable takes Conv1D's inputs for its outputs: c_attn has three times as many."""
    other = copy.deepcopy(tiny)
    for block in other.transformer.h:
        for owner, names in ((block.attn, ("c_attn", "c_proj")), (block.mlp, ("c_fc", "c_proj"))):
            for name in names:
                setattr(owner, name, Turned(getattr(owner, name)))
    run = make_run("method=lora_ga", *ASKED, f"+method.fields.lora_ga_config={{scale: {scale}}}")
    model = adapted(tiny, run, text)
    config = peft.LoraConfig(
        task_type="CAUSAL_LM", r=4, lora_alpha=8, init_lora_weights="lora_ga",
        lora_ga_config=peft.LoraGAConfig(scale=scale),
        target_modules=["attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj"],
    )  # fmt: skip

    def step():
        for batch in batches:
            logits = other(batch.inputs).logits
            F.cross_entropy(logits.flatten(0, 1), batch.targets.flatten()).backward()

    preprocess_loraga(other, config, step)
    torch.manual_seed(0)
    theirs = peft.get_peft_model(other, config)
    for name, layer in model.named_modules():
        if not hasattr(layer, "lora_A"):
            continue
        for get in (lambda m: m.lora_B["default"].weight, lambda m: m.lora_A["default"].weight.t()):
            # A singular vector's sign is anyone's: A A^T has the directions and sizes without it.
            own, pefts = (f @ f.t() for f in (get(layer), get(theirs.get_submodule(name))))
            apart = (own - pefts).norm() / pefts.norm()
            assert apart < 1e-3, (name, float(apart))


def test_what_is_read_is_the_training_split_in_the_order_of_the_seed(make_run, tmp_path):
    from accelerate import Accelerator

    rows = torch.randint(1, 64, (20, 17)).tolist()
    data = Data(Dataset.from_dict({"tokens": rows}).with_format("numpy"), {}, {}, False, "")
    run, accelerator = make_run("method=eva", *ASKED, "seed=3"), Accelerator(cpu=True)
    found = start_text_of(run, tmp_path, data, accelerator)
    assert [len(batch.inputs) for batch in found.batches] == [4, 4, 4]
    first = batch_of(data.blocks, data.order(3, 0, 12))
    assert torch.equal(torch.cat([batch.inputs for batch in found.batches]), first.inputs)
    assert start_text_of(make_run("method=lora"), tmp_path, data, accelerator) is None
    with pytest.raises(ConfigError, match=r"start_sequences=21: the training text has 20 seq"):
        start_text_of(
            make_run("method=eva", *ASKED, "method.start_sequences=21"), tmp_path, data, accelerator
        )


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["method=lora", "method.start_sequences=9"], r"init=True reads no training text"),
        (["method=eva", "method.start_sequences=0"], r"start_sequences=0: expected 1 or more"),
        (["method=corda", "+method.fields.eva_config={rho: 1.0}"], r"eva_config: it is for .*=eva"),
        (
            ["method=corda", "+method.fields.corda_config={covariance_file: x}"],
            r"covariance_file: what it holds would stand in",
        ),
        (["method=lora_ga", "method.use_dora=true"], r"init=lora_ga with method\.use_dora=true"),
        (["method=corda", "method.bias=all"], r"init=corda with method\.bias=all"),
        (
            ["method=corda", "method.use_rslora=true", "method.rank_pattern={c_fc: 2}"],
            r"cannot save such an adapter",
        ),
        (["method=eva", "targets=embeddings"], r"init=eva: transformer\.wte is of type Embedding"),
        (["method=eva", "+method.fields.eva_config={rho: 40}"], r"64 predicted tokens, and rank 4"),
        (["method=lora", "method.init=loftq"], r"init=loftq: PEFT's LoftQ runs on CUDA alone"),
        (["method=lora", "method.init=olora"], r"init=olora is wrong on GPT-2"),
        (
            ["method=peft", "method.peft_type=LORA", "+method.fields.init_lora_weights=eva"],
            r"init_lora_weights=eva: .*method=lora method\.init=eva",
        ),
    ],
)
def test_what_contradicts_is_refused_by_name(tiny, make_run, text, overrides, message):
    common = [o for o in ASKED if not o.startswith(("method.r", "method.start", "targets"))]
    if "method=peft" not in overrides:
        common.append("method.r=4")
    with pytest.raises(ConfigError, match=message):
        run = make_run(*common, *overrides)
        methods.check(copy.deepcopy(tiny).to("meta"), run)
        methods.adapt(tiny, run, text)


def test_without_text_there_is_no_such_start(tiny, make_run, text):
    run = make_run("method=eva", *ASKED)
    with pytest.raises(ConfigError, match="this data has no training text to read"):
        methods.adapt(tiny, run, dataclasses.replace(text, batches=[]))


def test_patterns_are_keys_of_lora(tiny, make_run):
    asked = ["method=lora", "targets=all", "method.r=4"]
    pattern = "method.rank_pattern={h.0.attn.c_attn: 16, mlp.c_fc: 2}"
    run = make_run(*asked, pattern, "method.alpha_pattern={h.0.attn.c_attn: 5}")
    model = methods.adapt(copy.deepcopy(tiny), run)
    ranks = model_facts.rank_facts(model)["ranks"]
    assert ranks["transformer.h.0.attn.c_attn"] == 16 and ranks["transformer.h.1.attn.c_attn"] == 4
    assert ranks["transformer.h.0.mlp.c_fc"] == ranks["transformer.h.1.mlp.c_fc"] == 2
    expected = 32 * (4 * (16 + 4) + 2 * (4 + 4) + 5 * (2 + 2) + 5 * (4 + 4))
    assert model_size.count_parameters(model).trainable == expected
    on_meta = methods.check(copy.deepcopy(tiny).to("meta"), run)
    assert model_size.count_parameters(on_meta).trainable == expected
    layer = model.base_model.model.transformer.h[0].attn.c_attn
    assert layer.lora_alpha["default"] == 5 and layer.scaling["default"] == 5 / 16
    assert "-r4+h.0.attn.c_attn=16+mlp.c_fc=2-a8-" in naming.run_name(run)
    assert run_record.describe_method(run)["rank"] == "4+h.0.attn.c_attn=16+mlp.c_fc=2"
    plain = make_run(*asked)
    assert naming.identity(run) != naming.identity(plain)
    assert naming.identity(plain) == naming.identity(make_run(*asked, "method.rank_pattern={}"))


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("method.rank_pattern={attn.c_atn: 8}", r"method\.rank_pattern: 'attn\.c_atn' matches no"),
        ("method.alpha_pattern={mlp.fc: 8}", r"method\.alpha_pattern: 'mlp\.fc' matches no module"),
        ("method.rank_pattern={c_attn: 99}", r"rank_pattern\.c_attn=99: .* rank of 32 at most"),
        ("method.rank_pattern={c_attn: 0}", r"method\.rank_pattern\.c_attn=0: expected a rank"),
        ("method.alpha_pattern={c_attn: -1}", r"method\.alpha_pattern\.c_attn=-1: expected"),
    ],
)
def test_a_pattern_that_does_nothing_is_refused(tiny, make_run, override, message):
    with pytest.raises(ConfigError, match=message):
        methods.adapt(tiny, make_run("method=lora", "targets=all", override))


# --------------------------------------------------------------------------- whole runs

RUN = [
    "targets=all", "method.r=2", "method.start_sequences=16", "train.steps=6",
    "evaluate.interval=2",
    "train.lr=0.005", "train.warmup=0", "train.threads=1", "data.validation_share=0.003",
    "data.test_share=0.003", "data.context_length=32", "train.batch_tokens=128",
    "train.micro_batch=4",
    "data.document_chars=500",
]  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("init", INITS)
def test_a_run_says_what_its_start_took_and_goes_on_without_reading_again(make_run, tmp_path, init):
    whole = make_run(f"method={init}", *RUN, f"outputs_dir={tmp_path}", "run_name=whole")
    result = run_until(whole)
    assert result["status"] == "finished", result
    assert schema.problems(result) == []
    speed = result["speed"]
    assert speed["start_tokens"] >= 16 * 32 and speed["start_seconds"] > 0
    assert result["saved_check"]["nats_per_token"] < 1e-4, result["saved_check"]
    assert not (whole.run_dir / run_record.START).exists()
    quality = result["quality"]
    assert quality["step0"]["validation"]["nll_nats"] == pytest.approx(
        quality.get("base", quality["step0"])["validation"]["nll_nats"], rel=1e-4
    )
    cut = dataclasses.replace(whole, run_name="cut")
    assert run_until(cut, pause_at=2)["status"] == "paused"
    assert (cut.run_dir / run_record.START).is_file()
    again = run_until(cut)
    assert again["run"]["resumed_at"] == [2]
    assert again["speed"]["start_tokens"] == speed["start_tokens"]
    one, other = (outcome(run.run_dir, ["validation", "test"]) for run in (whole, cut))
    assert one == other
