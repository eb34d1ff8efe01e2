"""Which parameters train, what is refused, and that an adapter starts as the base and leaves it."""

import copy

import numpy as np
import peft
import pytest
import torch

from harness import methods
from harness.config.errors import ConfigError
from harness.methods import adapt, model_facts, objective, svd, targets
from harness.models import model_size, pretrained
from harness.models.lstm import LSTMConfig, LSTMForCausalLM
from harness.models.next_token import NextToken
from harness.models.split_qkv import unfuse_qkv

IDS = torch.arange(1, 21).view(2, 10)
ALL = ["attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj"]


def trainable(model):
    return {name for name, p in model.named_parameters() if p.requires_grad}


def test_none_trains_nothing_and_full_everything(tiny, make_run):
    total = sum(p.numel() for p in tiny.parameters())
    assert not trainable(adapt(tiny, make_run("method=none")))
    assert model_size.count_parameters(tiny).total == total
    full = adapt(tiny, make_run("method=full"))
    assert model_size.count_parameters(full).trainable == total
    assert tiny.lm_head.weight is tiny.transformer.wte.weight  # tied, counted once
    d, n_layer = 32, 2
    assert total == 64 * d + 32 * d + n_layer * (12 * d * d + 13 * d) + 2 * d


@pytest.mark.parametrize(
    ("targets", "per_layer"),
    [("c_attn", 4), ("attn", 6), ("mlp", 10), ("all", 16)],  # in units of r d
)
def test_lora_counts(tiny, make_run, targets, per_layer):
    model = adapt(tiny, make_run("method=lora", f"targets={targets}", "method.r=3"))
    assert model_size.count_parameters(model).trainable == per_layer * 3 * 32 * 2
    assert all("lora_" in name for name in trainable(model))


def test_lora_fields_reach_peft(tiny, make_run):
    model = adapt(
        tiny,
        make_run(
            "method=lora", "method.r=4", "method.alpha=3r", "method.dropout=0.25",
            "method.use_rslora=true", "method.init=gaussian",
            "+method.fields.layers_to_transform=[1]",
        ),
    )  # fmt: skip
    config = model.peft_config["default"]
    assert (config.r, config.lora_alpha, config.lora_dropout) == (4, 12, 0.25)
    assert config.use_rslora and config.init_lora_weights == "gaussian" and config.fan_in_fan_out
    assert all(".h.1." in name for name in trainable(model))


@pytest.mark.parametrize(
    ("peft_type", "extra"),
    [
        ("IA3", []),
        ("FOURIERFT", ["+method.fields.n_frequency=10"]),
        ("VERA", []),
        ("LN_TUNING", []),
        ("PROMPT_TUNING", ["+method.fields.num_virtual_tokens=4"]),
        ("PREFIX_TUNING", ["+method.fields.num_virtual_tokens=4"]),
    ],
)
def test_any_peft_method_by_name_trains(tiny, make_run, peft_type, extra):
    targets = "attn" if peft_type == "VERA" else "all"
    method = f"method.peft_type={peft_type}"
    model = adapt(tiny, make_run("method=peft", method, f"targets={targets}", *extra))
    assert (
        0
        < model_size.count_parameters(model).trainable
        < model_size.count_parameters(model).total / 2
    )
    found = NextToken(model)(IDS, IDS)
    assert found.nats.shape == IDS.shape
    found.objective.backward()
    trained = [p for p in model.parameters() if p.requires_grad]
    assert any(p.grad is not None and p.grad.abs().sum() > 0 for p in trained)


def test_lora_is_the_base_at_the_start_and_not_after_a_step(tiny, make_run):
    with torch.no_grad():
        base = tiny(IDS).logits
    model = adapt(tiny, make_run("method=lora"))
    with torch.no_grad():
        assert torch.equal(model(input_ids=IDS).logits, base)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1.0)
    model(input_ids=IDS, labels=IDS).loss.backward()
    optimizer.step()
    with torch.no_grad():
        assert not torch.allclose(model(input_ids=IDS).logits, base)
        with model.disable_adapter():
            assert torch.equal(model(input_ids=IDS).logits, base)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["method.r=33"], r"method\.r=33: .* allows a rank of 32 at most"),
        (["targets.modules=[attn.c_atn]"], r"'attn\.c_atn' matches no matrix.*attn\.c_attn"),
        (["targets.modules=[c_proj]"], r"several matrices of a layer.*attn\.c_proj, mlp\.c_proj"),
        (["targets.modules=[h.0.attn.c_attn]"], r"1 of 2 layers \(not in 1\)"),
        (["targets.roles=[]"], r"names no modules"),
        (["+method.fields.use_dorra=true"], r"did you mean 'use_dora'"),
        (["+method.fields.r=3"], r"method\.fields\.r: set it by its own key"),
        (["method.init=gausian"], r"."),
        (["method.init=eva"], r"init=eva reads training text before step 0, which only a run"),
        (["method.init=12"], r"LORA does not fit|LoraConfig"),
        (["+method.fields.rank_pattern={attn.c_attn: 99}"], r"rank_pattern\.attn\.c_attn=99.*32"),
        (["method=peft", "method.peft_type=LORA", "+method.fields.r=99"], r"r=99.*32 at most"),
        (["method=peft", "method.peft_type=ADALORA"], r"ADALORA: .*use method=adalora"),
        (["method=peft", "method.peft_type=IA4"], r"did you mean 'IA3'"),
        (["method=peft", "method.peft_type=LOHA", "+method.fields.rr=3"], r"method\.fields\.rr"),
        (["method=peft", "method.peft_type=LOHA"], r"^LOHA does not fit this model: .*Conv1D"),
    ],
)
def test_what_does_not_fit_the_model_is_refused(tiny, make_run, overrides, message):
    with pytest.raises(ConfigError, match=message):
        adapt(tiny, make_run(*overrides))


def test_embeddings_and_the_head_need_no_layer(tiny, make_run):
    found = targets.resolve(tiny, make_run("targets.modules=[wte]").targets)
    assert found.shapes == {"transformer.wte": (64, 32)} and not found.conv1d


# --------------------------------------------------------------------------- the whole contract

LORA = {"lora_A", "lora_B", "lora_embedding_A", "lora_embedding_B"}
METHODS = {  # overrides, and the parameters that may train, by the part of their name that tells
    "lora": (["method=lora", "method.r=3"], LORA),
    "dora": (
        ["method=lora", "method.r=3", "method.use_dora=true"],
        LORA | {"lora_magnitude_vector"},
    ),
    "pissa": (["method=pissa", "method.r=3"], LORA),
    "mica": (["method=mica", "method.r=3"], {"lora_A", "lora_embedding_A", "lora_embedding_B"}),
    "d": (["method=udv", "method.rank=5"], {"udv_d"}),
    "u": (["method=udv", "method.rank=5", "method.train=u"], {"udv_u"}),
    "v": (["method=udv", "method.rank=5", "method.train=v"], {"udv_v"}),
    "udv": (["method=udv", "method.rank=0.5", "method.train=udv"], {"udv_u", "udv_d", "udv_v"}),
    "d-keep": (["method=udv", "method.rank=5", "method.residual=keep"], {"udv_d"}),
    "udv-keep": (
        ["method=udv", "method.energy=0.6", "method.train=udv", "method.residual=keep"],
        {"udv_u", "udv_d", "udv_v"},
    ),
    "truncate": (["method=truncate", "method.rank=0.5"], set()),
}
WHERE = {
    "gpt2": ["targets=all"],
    "unfused": ["targets=qkvo"],
    "lstm": ["model=lstm", "targets=lstm_core"],
}
CHANGES_THE_START = {"d", "u", "v", "udv", "truncate"}  # residual: drop


def base_model(where, tiny):
    torch.manual_seed(0)
    if where == "lstm":
        config = LSTMConfig(vocab_size=64, embedding_size=32, hidden_size=32, initializer_range=0.5)
        return LSTMForCausalLM(config).eval()
    return unfuse_qkv(tiny) if where == "unfused" else tiny


def logits(model):
    with torch.no_grad():
        return model(input_ids=IDS).logits


def part(name):
    """The part of a parameter's name that tells its role: udv_d of ….c_fc.udv_d.default."""
    return next((p for p in name.split(".") if p.startswith(("lora_", "udv_"))), name)


@pytest.mark.parametrize("method", METHODS)
def test_every_method_can_be_checked_without_weights(tiny, make_run, method):
    run = make_run("model=gpt2_mini", *METHODS[method][0])
    on_meta = methods.check(pretrained.on_meta(run, pretrained.load_config(run.model)), run)
    real = adapt(pretrained.load_model(run, pretrained.load_config(run.model)), run)
    assert trainable(on_meta) == trainable(real)
    if getattr(run.method, "energy", None) is None:  # which only the weights can tell
        assert model_size.count_parameters(on_meta) == model_size.count_parameters(real)


@pytest.mark.parametrize("where", WHERE)
@pytest.mark.parametrize("method", METHODS)
def test_the_contract_of_peft(tiny, make_run, tmp_path, method, where):
    base = base_model(where, tiny)
    pristine = copy.deepcopy(base)
    untouched = logits(base.requires_grad_(False))
    overrides, meant = METHODS[method]
    run = make_run(*overrides, *WHERE[where])
    if where == "lstm" and method == "dora":  # takes additive deltas only
        with pytest.raises(ConfigError, match="DoraLinearVariant cannot adapt an LSTM"):
            logits(adapt(base, run))
        return
    model = adapt(base, run).eval()
    start = logits(model)
    if method in CHANGES_THE_START:
        assert not torch.allclose(start, untouched, atol=1e-3)
    else:  # a start that is wrong on Conv1D shows here
        torch.testing.assert_close(start, untouched, rtol=1e-4, atol=5e-5)

    trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
    assert {part(name) for name in trained} <= meant and bool(trained) == bool(meant)
    if trained:
        optimizer = torch.optim.SGD(trained.values(), lr=0.5)
        model(input_ids=IDS, labels=IDS).loss.backward()
        with_gradient = {n for n, p in model.named_parameters() if p.grad is not None}
        assert with_gradient == set(trained)
        at_start_zero = {"lora_A"} if method in ("lora", "dora") else set()  # since B is zero
        for name, p in trained.items():
            assert part(name) in at_start_zero or p.grad.abs().max() > 0, name
        optimizer.step()
        assert not torch.allclose(logits(model), start)
    active = logits(model)

    def disabled():
        with model.disable_adapter():
            return logits(model)

    exact = method not in ("pissa",)  # PiSSA moves the base's principal part into the adapter
    assert not exact or torch.equal(disabled(), untouched)

    model.save_pretrained(tmp_path / "adapter", save_embedding_layers=False)
    torch.manual_seed(1)
    again = peft.PeftModel.from_pretrained(copy.deepcopy(pristine), tmp_path / "adapter").eval()
    if exact:
        assert torch.equal(logits(again), active)
    else:
        torch.testing.assert_close(logits(again), active, rtol=1e-5, atol=1e-5)

    model.merge_adapter()
    torch.testing.assert_close(logits(model), active, rtol=1e-4, atol=5e-5)
    if method in SVD:
        assert torch.equal(disabled(), untouched)  # while merged
    model.unmerge_adapter()
    if method in SVD:
        assert torch.equal(logits(model), active)
        assert torch.equal(disabled(), untouched)
    unloaded = model.merge_and_unload()
    torch.testing.assert_close(logits(unloaded), active, rtol=1e-4, atol=5e-5)


SVD = {"d", "u", "v", "udv", "d-keep", "udv-keep", "truncate"}


def test_pissa_takes_the_principal_part_of_a_conv1d(tiny, make_run):
    weight = tiny.transformer.h[1].attn.c_attn.weight.detach().double().numpy().T  # (out, in)
    u, d, vt = np.linalg.svd(weight, full_matrices=False)
    model = adapt(tiny, make_run("method=pissa", "method.r=4", "method.alpha=1r"))
    layer = model.base_model.model.transformer.h[1].attn.c_attn
    product = layer.lora_B["default"].weight @ layer.lora_A["default"].weight
    found = product.detach().double().numpy()
    np.testing.assert_allclose(found, (u[:, :4] * d[:4]) @ vt[:4], atol=1e-4)


def test_full_rank_udv_is_the_base_and_truncation_is_numpys(tiny, make_run):
    untouched = logits(tiny)
    weight = tiny.transformer.h[0].mlp.c_fc.weight.detach().double().numpy()
    torch.testing.assert_close(
        logits(adapt(copy.deepcopy(tiny), make_run("method=udv"))), untouched, rtol=1e-4, atol=1e-4
    )
    model = adapt(tiny, make_run("method=truncate", "method.rank=4")).merge_and_unload()
    u, d, vt = np.linalg.svd(weight, full_matrices=False)
    found = model.transformer.h[0].mlp.c_fc.weight.detach().double().numpy()
    np.testing.assert_allclose(found, u[:, :4] * d[:4] @ vt[:4], atol=1e-5)


def test_svd_factors_are_computed_once_for_all_ranks(tiny, make_run, tmp_path, monkeypatch):
    monkeypatch.setenv(svd.CACHE_ENV, str(tmp_path))
    before = svd.svd_counts()
    adapt(copy.deepcopy(tiny), make_run("method=udv", "method.rank=3"))
    first = svd.svd_counts()
    adapt(copy.deepcopy(tiny), make_run("method=truncate", "method.rank=7"))
    second = svd.svd_counts()
    assert first["computed"] - before["computed"] == 8  # four matrices of two layers
    assert second["computed"] == first["computed"] and second["read"] - first["read"] == 8


def test_lora_paper_is_the_papers(make_run):
    run = make_run("method=lora_paper")
    assert run.targets.modules == ["attn.c_attn.q", "attn.c_attn.v"]
    assert (run.method.r, run.method.lora_alpha, run.method.dropout) == (4, 32, 0.1)
    assert make_run("method=lora_paper", "targets=mlp").targets.name == "mlp"
    config = pretrained.load_config(run.model)
    assert pretrained.wants_unfused(run, config)
    assert not pretrained.wants_unfused(make_run("targets=c_attn"), config)


def test_orthogonality_is_added_only_where_it_is_asked_for(tiny, make_run):
    quiet = make_run("method=udv", "method.train=udv", "method.rank=4")
    assert objective.penalty(adapt(copy.deepcopy(tiny), quiet), quiet) is None
    run = make_run("method=udv", "method.train=udv", "method.rank=4", "method.orthogonality=0.5")
    model = adapt(tiny, run)
    penalty = objective.penalty(model, run)
    assert penalty().item() == pytest.approx(0, abs=1e-8)
    layer = model.base_model.model.transformer.h[0].mlp.c_fc
    with torch.no_grad():
        layer.udv_u["default"].mul_(2)  # U^T U = 4 I: |3 I|^2 = 9 k
    assert penalty().item() == pytest.approx(0.5 * 9 * 4, rel=1e-4)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["method=udv", "method.rank=33"], r"32"),
        (["method=udv", "method.rank=half"], r"half"),
        (["method=udv", "method.orthogonality=1"], r"penalises nothing"),
        (["method=truncate", "method.rank=0"], r"rank"),
        (["targets=q", "model.unfuse_qkv=false"], r"need model\.unfuse_qkv=true"),
        (["method=udv", "+method.rank_pattern={mlp.c_fcc: 4}"], r"'mlp\.c_fcc' matches no module"),
        (["method=lora", "method.init=loftq"], r"LoftQ runs on CUDA alone"),
        (["method=lora", "method.init=olora"], r"olora is wrong on GPT-2"),
        (["method=udv", "+method.fields.trian=d"], r"did you mean 'train'"),
        (["method=udv", "+method.fields.train=d"], r"set it by its own key"),
    ],
)
def test_svd_methods_refuse_what_does_not_fit(tiny, make_run, overrides, message):
    with pytest.raises(ConfigError, match=message):
        methods.check(tiny, make_run(*overrides))


def test_unfusing_what_has_no_c_attn_is_refused(make_run):
    run = make_run("model=lstm", "targets=lstm", "model.unfuse_qkv=true")
    with pytest.raises(ConfigError, match=r"model\.unfuse_qkv"):
        pretrained.on_meta(run, pretrained.load_config(run.model))


def test_ranks_by_pattern_and_energy_are_recorded(tiny, make_run):
    run = make_run("method=udv", "method.rank=4", "+method.rank_pattern={mlp.c_fc: 9}")
    assert model_facts.svd_facts(adapt(copy.deepcopy(tiny), run))["ranks"] == {
        "attn.c_attn": [4], "attn.c_proj": [4], "mlp.c_fc": [9], "mlp.c_proj": [4],
    }  # fmt: skip
    weight = tiny.transformer.h[0].attn.c_attn.weight.detach().double().numpy()
    share = np.cumsum(np.linalg.svd(weight, compute_uv=False) ** 2)
    k = int(np.searchsorted(share / share[-1], 0.7)) + 1
    model = adapt(tiny, make_run("method=truncate", "method.energy=0.7"))
    assert k in model_facts.svd_facts(model)["ranks"]["attn.c_attn"]
    assert model_facts.svd_facts(base_model("lstm", tiny)) == {}


def test_the_size_of_a_truncated_model_counts_factors_for_weights(tiny, make_run):
    total = model_size.count_parameters(tiny).total
    d, k = 32, 3
    shapes = [(d, 3 * d), (d, d), (d, 4 * d), (4 * d, d)]
    saved = 2 * sum(m * n - k * (m + n + 1) for m, n in shapes)
    truncated = adapt(copy.deepcopy(tiny), make_run("method=truncate", f"method.rank={k}"))
    assert model_facts.factored_total(truncated) == total - saved
    keep = make_run("method=udv", f"method.rank={k}", "method.residual=keep")
    assert model_facts.factored_total(adapt(copy.deepcopy(tiny), keep)) is None
    assert model_facts.factored_total(tiny) is None
