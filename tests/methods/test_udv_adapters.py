"""`udv` under the whole PEFT contract: several adapters, saved, loaded, merged, beside LoRA."""

import copy
import json
import warnings

import peft
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from torch import nn
from udv_models import (
    FAMILIES,
    GPT2_TARGETS,
    MODES,
    TRAINED_MODES,
    adapt,
    close,
    gpt2,
    layers,
    logits,
    perturb,
    states_equal,
    tokens,
    trainable,
)

from harness.methods import svd, udv
from harness.methods.udv import UDVConfig

# --------------------------------------------------------------------------- PEFT contract


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(("train", "residual"), MODES)
def test_contract(family, train, residual, form):
    model = FAMILIES[family]()
    base_state, base = copy.deepcopy(model.state_dict()), logits(model)
    adapted = perturb(adapt(model, train=train, residual=residual))
    active = logits(adapted)
    assert (active - base).abs().max() > 1e-2

    with adapted.disable_adapter():
        assert torch.equal(logits(adapted), base)
    assert torch.equal(logits(adapted), active)

    adapted.merge_adapter()
    close(logits(adapted), active)
    adapted.unmerge_adapter()
    assert torch.equal(logits(adapted), active)
    with adapted.disable_adapter():
        assert torch.equal(logits(adapted), base)

    adapted.merge_adapter(safe_merge=True)
    with adapted.disable_adapter():  # unmerges, as PEFT's own layers do
        assert torch.equal(logits(adapted), base)
    assert torch.equal(logits(adapted), active)

    restored = copy.deepcopy(adapted).unload()
    assert states_equal(restored.state_dict(), base_state)
    unloaded = adapted.merge_and_unload()
    assert type(unloaded) is type(model) and not layers(unloaded)
    assert unloaded.state_dict().keys() == base_state.keys()
    close(logits(unloaded), active)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(("train", "residual"), TRAINED_MODES)
def test_only_the_chosen_factors_train_and_one_step_changes_the_model(
    family, train, residual, form
):
    adapted = adapt(FAMILIES[family](), train=train, residual=residual).train()
    before = logits(adapted)
    frozen = {n: b.clone() for n, b in adapted.named_buffers()}
    base = {n: p.clone() for n, p in adapted.named_parameters() if not p.requires_grad}
    expected = {f"udv_{letter}.default" for letter in train}
    assert {".".join(name.split(".")[-2:]) for name in trainable(adapted)} == expected
    assert len(trainable(adapted)) == len(train) * len(layers(adapted))

    optimizer = torch.optim.SGD([p for p in adapted.parameters() if p.requires_grad], lr=0.5)
    adapted(input_ids=tokens(), labels=tokens()).loss.backward()
    for name, parameter in adapted.named_parameters():
        if parameter.requires_grad:
            assert parameter.grad.abs().max() > 0, name
        else:
            assert parameter.grad is None, name
    optimizer.step()
    assert (logits(adapted) - before).abs().max() > 1e-3
    assert all(torch.equal(b, frozen[n]) for n, b in adapted.named_buffers())
    parameters = dict(adapted.named_parameters())
    assert all(torch.equal(parameters[n], value) for n, value in base.items())


@pytest.mark.parametrize("family", ["gpt2", "llama"])
@pytest.mark.parametrize(("train", "residual"), MODES)
@pytest.mark.parametrize("store", [False, True])
@pytest.mark.parametrize("low_memory", [False, True])
def test_save_and_load_round_trip(family, train, residual, store, low_memory, tmp_path):
    adapted = perturb(
        adapt(FAMILIES[family](), train=train, residual=residual, store_factors=store)
    )
    active = logits(adapted)
    adapted.save_pretrained(tmp_path)
    saved = load_file(tmp_path / "adapter_model.safetensors")
    kinds = {key.rsplit(".", 1)[1] for key in saved}
    trained = {f"udv_{letter}" for letter in train} if train != "none" else set()
    if not store:
        assert kinds == trained
    else:
        kept = "udv" if residual == "keep" else [x for x in "udv" if f"udv_{x}" not in trained]
        assert kinds == trained | {f"udv_frozen_{letter}" for letter in kept}
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*missing.*")
        loaded = PeftModel.from_pretrained(
            FAMILIES[family](), tmp_path, low_cpu_mem_usage=low_memory
        )
    assert torch.equal(logits(loaded), active)
    assert loaded.peft_config["default"].rank == 5
    assert loaded.peft_config["default"].train == train
    close(logits(loaded.merge_and_unload()), active)


def test_stored_factors_do_not_depend_on_the_svd(tmp_path, monkeypatch):
    """With every factor in the file, another sign or rounding of the SVD changes nothing."""
    adapted = perturb(adapt(gpt2(), train="d", residual="keep", store_factors=True))
    active = logits(adapted)
    adapted.save_pretrained(tmp_path)
    original = svd._decompose

    def flipped(*args):
        u, s, vh = original(*args)
        return -u, 2 * s, -vh

    monkeypatch.setattr(svd, "_decompose", flipped)
    assert torch.equal(logits(PeftModel.from_pretrained(gpt2(), tmp_path)), active)

    # And with init_weights=False in the adapter's config, no SVD runs at all.
    path = tmp_path / "adapter_config.json"
    config = json.loads(path.read_text()) | {"init_weights": False}
    path.write_text(json.dumps(config))
    monkeypatch.setattr(svd, "_decompose", lambda *_: pytest.fail("SVD"))
    assert torch.equal(logits(PeftModel.from_pretrained(gpt2(), tmp_path)), active)


def test_random_triplets_are_found_again_on_load(tmp_path):
    adapted = perturb(adapt(gpt2(), which="random", seed=3, residual="keep"))
    kept = layers(adapted)[0].udv_frozen_d["default"]
    assert not torch.equal(kept, layers(adapt(gpt2()))[0].udv_d["default"])
    adapted.save_pretrained(tmp_path)
    assert torch.equal(logits(PeftModel.from_pretrained(gpt2(), tmp_path)), logits(adapted))


def test_factors_come_from_the_cache(tmp_path, monkeypatch):
    monkeypatch.setenv(svd.CACHE_ENV, str(tmp_path))
    first = adapt(gpt2(), rank=3)
    monkeypatch.setattr(svd, "_decompose", lambda *_: pytest.fail("SVD"))
    second = adapt(gpt2(), rank=3)
    assert torch.equal(logits(first), logits(second))
    adapt(gpt2(), rank="full")


def test_several_adapters(form):
    model = gpt2()
    base = logits(model)
    adapted = adapt(model, "one", train="d", residual="drop", target_modules=GPT2_TARGETS)
    config = UDVConfig(rank=0.5, train="udv", residual="keep", target_modules=["attn.c_attn"])
    before = trainable(adapted)
    adapted.add_adapter("two", config)
    assert trainable(adapted) == before
    perturb(adapted)
    one = logits(adapted)
    adapted.set_adapter("two")
    assert {name.rsplit(".", 1)[1] for name in trainable(adapted)} == {"two"}
    assert torch.equal(logits(adapted), base)
    perturb(adapted)
    two = logits(adapted)
    assert (two - base).abs().max() > 1e-2

    # Two at once add their differences from the base, active as merged.
    adapted.base_model.set_adapter(["one", "two"])
    both = logits(adapted)
    weight = model.transformer.h[0].attn.c_attn
    summed = weight.get_base_layer().weight + sum(
        weight.get_delta_weight(name) for name in ("one", "two")
    )
    adapted.merge_adapter(["one"])
    adapted.merge_adapter(["two"])
    close(weight.get_base_layer().weight, summed)
    close(logits(adapted), both)
    adapted.unmerge_adapter()
    assert torch.equal(logits(adapted), both)

    adapted.set_adapter("one")
    assert torch.equal(logits(adapted), one)
    adapted.delete_adapter("one")
    adapted.set_adapter("two")
    assert torch.equal(logits(adapted), two)
    assert not any("one" in layer.udv_specs for layer in layers(adapted))
    assert not any(name.endswith(".one") for name, _ in adapted.named_buffers())
    with adapted.disable_adapter():
        assert torch.equal(logits(adapted), base)


def test_a_further_adapter_on_other_layers_waits_its_turn():
    model = gpt2()
    adapted = perturb(adapt(model, "one", target_modules=["c_attn"]))
    before, active = trainable(adapted), logits(adapted)
    adapted.add_adapter("two", UDVConfig(rank=2, target_modules=r".*(c_attn.*|mlp\.c_fc)"))
    assert trainable(adapted) == before
    assert torch.equal(logits(adapted), active)
    adapted.set_adapter("two")
    assert len(trainable(adapted)) == 4


def test_an_adapter_added_while_another_is_merged_decomposes_the_original():
    adapted = perturb(adapt(gpt2(), "one"))
    adapted.merge_adapter()
    adapted.add_adapter("two", UDVConfig(rank=5, target_modules="all-linear"))
    adapted.set_adapter("two")  # unmerges
    assert torch.equal(logits(adapted), logits(adapt(gpt2())))


def test_two_dropping_adapters_at_once(form):
    """delta_1 + delta_2 with both bypassing W: the sum holds W minus one time."""
    torch.manual_seed(0)
    base = nn.Linear(9, 7)
    weight, bias = base.weight.detach().clone(), base.bias.detach().clone()
    model = get_peft_model(nn.Sequential(base), UDVConfig(rank=2, target_modules=["0"]))
    model.add_adapter("b", UDVConfig(rank=3, which="bottom", target_modules=["0"]))
    model.base_model.set_adapter(["default", "b"])
    u, s, vh = torch.linalg.svd(weight)
    u = u[:, :7]
    top, bottom = (u[:, :2] * s[:2]) @ vh[:2], (u[:, 4:] * s[4:]) @ vh[4:7]
    x = torch.randn(5, 9)
    close(model(x), x @ (top + bottom - weight).T + bias)


def test_adapters_reload_beside_each_other(tmp_path):
    one = perturb(adapt(gpt2(), train="d"))
    two = perturb(adapt(gpt2(), train="udv", residual="keep"), seed=8)
    expected = [logits(one), logits(two)]
    one.save_pretrained(tmp_path / "one")
    two.save_pretrained(tmp_path / "two")
    model = PeftModel.from_pretrained(gpt2(), tmp_path / "one", adapter_name="one")
    model.load_adapter(tmp_path / "two", adapter_name="two")
    assert torch.equal(logits(model), expected[0])
    model.set_adapter("two")
    assert torch.equal(logits(model), expected[1])


# --------------------------------------------------------------------------- coexistence


def test_registration_is_idempotent_and_leaves_the_others_alone():
    tables: list[dict] = [
        peft.mapping.PEFT_TYPE_TO_CONFIG_MAPPING,
        peft.mapping.PEFT_TYPE_TO_TUNER_MAPPING,
        peft.mapping.PEFT_TYPE_TO_PREFIX_MAPPING,
    ]
    before = [dict(table) for table in tables]
    udv.model.register()
    assert [dict(table) for table in tables] == before
    assert all(table["UDV"] for table in tables)
    prefixes = list(peft.mapping.PEFT_TYPE_TO_PREFIX_MAPPING.values())
    assert prefixes.count("udv_") == 1
    assert "UDV" not in peft.mapping.PEFT_TYPE_TO_MIXED_MODEL_MAPPING


def test_lora_and_udv_in_one_process(tmp_path):
    lora_config = LoraConfig(r=2, target_modules=["c_attn"], fan_in_fan_out=True)
    lora = perturb(get_peft_model(gpt2(), lora_config))
    ours = perturb(adapt(gpt2(), train="udv"))
    expected = {"lora": (lora, logits(lora)), "udv": (ours, logits(ours))}
    for name, (model, out) in expected.items():
        model.save_pretrained(tmp_path / name)
        loaded = PeftModel.from_pretrained(gpt2(), tmp_path / name)
        assert torch.equal(logits(loaded), out)
        assert loaded.active_peft_config.peft_type == name.upper()
    assert not layers(lora)


def test_one_matrix_takes_one_method():
    lora = get_peft_model(gpt2(), LoraConfig(target_modules=["c_attn"], fan_in_fan_out=True))
    with pytest.raises(TypeError, match=r"h\.0\.attn\.c_attn already carries"):
        get_peft_model(lora.base_model.model, UDVConfig(rank=2, target_modules=["c_attn"]))
