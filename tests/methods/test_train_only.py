"""`method.train_only`: closed forms of counts, a plain loop that freezes the rest, its names."""

import copy
import csv
import re

import pytest
import torch
import torch.nn.functional as F
from short_training import BLOCKS, config, losses_of, run_loop
from transformers import AutoModelForCausalLM, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from harness import compose, plan
from harness.commands import count
from harness.config import naming
from harness.config.errors import ConfigError
from harness.config.paths import REPOSITORY
from harness.data.token_data import batch_of, block_order
from harness.methods import adapt, model_facts, train_only
from harness.models import model_size, pretrained
from harness.training import checkpoint
from harness.training import loop as training

MATRIX = re.compile(r"\.h\.\d+\.(attn\.c_attn|attn\.c_proj|mlp\.c_fc|mlp\.c_proj)\.weight$")


def trained(model):
    return {name for name, p in model.named_parameters() if p.requires_grad}


def only(make_run, entries, *overrides):
    return make_run("method=full", f"method.train_only=[{entries}]", *overrides)


# GPT-2's layer of width d: d x 3d, d x d, d x 4d and 4d x d, with biases of 3d, d, 4d and d, two
# norms of 2d each; a last norm; V tokens and T positions of d.
@pytest.mark.parametrize(
    ("model", "layers", "d", "vocabulary", "positions"),
    [("gpt2_mini", 4, 256, 4096, 256), ("gpt2", 12, 768, 50_257, 1024)],
)
def test_counts_are_closed_forms(model, layers, d, vocabulary, positions):
    closed = {
        "matrices": 12 * d * d * layers,
        "qkv": 3 * d * d * layers,
        "o": d * d * layers,
        "mlp_in,mlp_out": 8 * d * d * layers,
        "mlp.c_fc": (4 * d * d + 4 * d) * layers,
        "mlp.c_fc.weight": 4 * d * d * layers,
        "h.0": 12 * d * d + 13 * d,
        "h.0.*.c_proj.weight": 5 * d * d,
        "embeddings": vocabulary * d,
        "head": vocabulary * d,  # the same weight
        "embeddings,head": vocabulary * d,
        "positions": positions * d,
        "norms": (4 * layers + 2) * d,
        "biases": (11 * layers + 1) * d,
        "norms,biases": (13 * layers + 2) * d,
    }
    run = compose(f"model={model}", "method=full")[0]
    base = pretrained.on_meta(run, pretrained.load_config(pretrained.without_files(run).model))
    for entries, expected in closed.items():
        found = train_only.select(base, entries.split(","))
        assert sum(p.numel() for p in found.values()) == expected, entries
    whole = sum(closed[name] for name in ("matrices", "embeddings", "positions", "norms,biases"))
    assert model_size.count_parameters(base).total == whole
    # q and v are parts of one matrix, which is taken apart where one of them is named.
    asked = [f"model={model}", "method=full", "method.train_only=[q,v]"]
    apart = count.adapted(asked)[1]
    assert model_size.count_parameters(apart).trainable == 2 * d * d * layers


def test_matrices_are_what_lora_adapts_and_no_bias(tiny, make_run):
    bases = copy.deepcopy(tiny), tiny
    run = make_run("method=lora", "targets=all", "method.r=2")
    adapted = {
        name.replace("base_model.model.", "").replace(".base_layer", "")
        for name, _ in adapt(bases[0], run).named_parameters()
        if name.endswith(".base_layer.weight")
    }
    control = trained(adapt(bases[1], only(make_run, "matrices")))
    assert control == adapted and len(control) == 8 and all(map(MATRIX.search, control))


@pytest.mark.parametrize("entries", ["matrices", "embeddings,norms", "head", "positions,biases"])
def test_steps_equal_a_plain_loop_that_freezes_the_rest(tiny, make_run, text, tmp_path, entries):
    """Losses of ten steps, and every weight: what is not named does not move by a bit."""
    plain = copy.deepcopy(tiny)
    start = {name: p.detach().clone() for name, p in tiny.named_parameters()}
    run = config(
        make_run, "method=full", f"method.train_only=[{entries}]", "train.steps=10",
        "evaluate.interval=10", "train.weight_decay=0.1",
    )  # fmt: skip
    model = adapt(tiny, run)
    losses = losses_of(run_loop(model, text, run, tmp_path)[1])

    of_entry = {
        "matrices": MATRIX.search,
        "embeddings": re.compile(r"wte").search,
        "head": re.compile(r"wte").search,
        "norms": re.compile(r"ln_").search,
        "positions": re.compile(r"wpe").search,
        "biases": re.compile(r"bias$").search,
    }
    named = [of_entry[entry] for entry in entries.split(",")]
    free = {n: p for n, p in plain.named_parameters() if any(match(n) for match in named)}
    for name, p in plain.named_parameters():
        p.requires_grad = name in free
    decayed = [p for p in free.values() if p.ndim >= 2]
    others = [p for p in free.values() if p.ndim < 2]
    groups = [{"params": decayed, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW([g for g in groups if g["params"]], lr=1.0, foreach=False)
    plain.train()
    for step in range(10):
        ids = batch_of(text.blocks, block_order(run.seed, step, 4, BLOCKS)).ids
        logits = plain(input_ids=ids).logits[:, :-1]
        loss = F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(list(free.values()), 1.0)
        for group in optimizer.param_groups:
            group["lr"] = training.learning_rate(step, run.train)
        optimizer.step()
        optimizer.zero_grad()
        assert losses[step] == pytest.approx(loss.item(), rel=1e-5), step
    assert losses[-1] < losses[0] and trained(model) == free.keys()
    for name, p in model.named_parameters():
        assert torch.equal(p, start[name]) == (name not in free), name
        other = plain.get_parameter(name)
        if name.endswith("c_attn.bias"):  # a key's has no gradient but rounding, which Adam scales
            p, other = (torch.cat([bias[:32], bias[64:]]) for bias in (p, other))
        torch.testing.assert_close(p, other, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("tie", [True, False])
@pytest.mark.parametrize("entry", ["embeddings", "head"])
def test_a_tied_weight_trains_by_either_name_and_is_told_of(make_run, tie, entry):
    config = LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=1,
        num_attention_heads=2, tie_word_embeddings=tie,
    )  # fmt: skip
    run = only(make_run, entry)
    model = adapt(LlamaForCausalLM(config), run)
    own = "lm_head.weight" if entry == "head" and not tie else "model.embed_tokens.weight"
    assert trained(model) == {own}
    facts = model_facts.trained_alone(model, run)
    both = "model.embed_tokens.weight and lm_head.weight are one weight: it trains, and counts once"
    assert facts == {"trained": [own], "tied": [both] if tie else []}
    assert trained(adapt(LlamaForCausalLM(config), only(make_run, "norms"))) == {
        "model.layers.0.input_layernorm.weight", "model.layers.0.post_attention_layernorm.weight",
        "model.norm.weight",
    }  # fmt: skip


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ("mlp.c_fcc", "'mlp.c_fcc' matches no weight; did you mean 'mlp.c_fc'"),
        ("nrms", "'nrms' matches no weight; did you mean 'norms'"),
        ("matrix", "did you mean 'matrices'"),
        ("h.7", "'h.7' matches no weight"),
        ("c_att", "did you mean 'c_attn'"),  # a part of a name is no name
        ("gate", "gate: gpt2 has no matrix for 'gate'"),
        ("xyzzy", "choose one of: biases, embeddings, .*, or name parameters"),
    ],
)
def test_what_matches_nothing_is_refused_with_the_nearest_name(tiny, make_run, entry, message):
    with pytest.raises(ConfigError, match=f"method.train_only: .*{message}"):
        adapt(tiny, only(make_run, f"matrices,{entry}"))


def test_a_model_without_positions_says_so(make_run):
    config = LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=1,
        num_attention_heads=2,
    )  # fmt: skip
    with pytest.raises(ConfigError, match="'positions' matches no weight"):
        adapt(LlamaForCausalLM(config), only(make_run, "positions"))


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["train.precision=bf16", "model.frozen_dtype=bf16"], "with method.train_only: .*fp32"),
        (["method.train_only=['']"], "method.train_only=.*expected names"),
    ],
)
def test_what_it_cannot_be_is_refused_before_anything_is_loaded(make_run, overrides, message):
    with pytest.raises(ConfigError, match=message):
        only(make_run, "matrices", *overrides)


def test_the_name_of_a_recorded_run_stays(make_run):
    """One of experiments/main_seeds, which was made before there was a `train_only`."""
    with (REPOSITORY / "experiments" / "main_seeds" / "results.csv").open() as stream:
        recorded = {n for row in csv.DictReader(stream) for n in row["runs"].split()}
    run = make_run(
        "method=full", "train.steps=80", "train.lr=2e-3", "evaluate.interval=10",
        "evaluate.also=[docstrings_held_out]",
    )  # fmt: skip
    assert naming.run_name(run) in recorded


def test_runs_are_told_apart_by_the_set_and_not_by_its_order(make_run):
    one, same, other, full = (
        only(make_run, entries) for entries in ("norms,biases", "biases,norms,norms", "norms", "")
    )
    assert naming.run_name(one) == naming.run_name(same)
    assert naming.run_name(one).startswith("full-only-biases+norms-lr")
    assert naming.run_name(other).startswith("full-only-norms-lr")
    assert naming.run_name(full) == naming.run_name(make_run("method=full"))
    assert len({naming.identity(run) for run in (one, other, full)}) == 3


def test_what_a_run_needs_is_predicted_by_what_trains(make_run):
    run = only(make_run, "matrices", "train.micro_batch=1", "train.batch_tokens=256")
    needs, whole = plan(run), plan(make_run("method=full", "train.micro_batch=1",
                                            "train.batch_tokens=256"))  # fmt: skip
    parts = needs.train["by_category"]
    assert needs.parameters.trainable == 3_145_728
    assert parts["trainable_weights"] == 4 * 3_145_728
    assert parts["frozen_weights"] >= 4 * (4_273_664 - 3_145_728)
    assert parts["optimizer_state"] == pytest.approx(8 * 3_145_728, rel=1e-3)
    # What is left out of a backward pass, FLOPs a token: the head's own gradient, 2 V d, and the
    # gradient of what goes into the first layer, 2 d 3d, which nothing before it asks for.
    saved = whole.train_flops_per_token - needs.train_flops_per_token
    assert saved == 2 * 4096 * 256 + 2 * 256 * 768


def test_what_is_exported_is_the_whole_model(tiny, make_run, tokenizer, tmp_path):
    model = adapt(tiny, only(make_run, "o"))
    with torch.no_grad():
        model.transformer.h[0].attn.c_proj.weight.add_(0.1)
    assert checkpoint.export(model, tokenizer, tmp_path, merged=False) == ["model"]
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "model").eval()
    assert isinstance(loaded, GPT2LMHeadModel)
    ids = torch.arange(20)[None]
    assert torch.equal(loaded(input_ids=ids).logits, model(input_ids=ids).logits)


def test_every_kind_is_written_down():
    text = (REPOSITORY / "conf" / "README.md").read_text("utf-8")
    assert all(f"`{kind}`" in text for kind in train_only.KINDS)
