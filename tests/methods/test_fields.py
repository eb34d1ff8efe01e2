"""`method.fields`: what matches nothing, has another type or is never read is refused by name."""

import copy
import dataclasses
import enum
import functools
import re
import types
import typing
from dataclasses import replace

import peft
import peft_types
import pytest
import torch
from accelerate import Accelerator
from omegaconf import OmegaConf
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from transformers import LlamaConfig, LlamaForCausalLM

from harness import compose, methods
from harness.config.errors import ConfigError
from harness.data.token_data import Batch
from harness.methods import fields, peft_adapter, peft_config, positions, refusals
from harness.models import model_size, pretrained, transformer_blocks
from harness.models.next_token import NextToken
from harness.training import loop, memory

IDS = torch.arange(4, 36).view(2, 16)
LLAMA = LlamaConfig(
    vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
    num_attention_heads=2, num_key_value_heads=2, max_position_embeddings=64,
    initializer_range=0.2, use_cache=False,
)  # fmt: skip
F = "+method.fields."
OF_LLAMA = ("model.asset=null", "+model.architecture={model_type: llama}", "targets=attn")


def llama():
    torch.manual_seed(0)
    return LlamaForCausalLM(LLAMA).eval()


@functools.cache
def composed(*overrides):
    (run,) = compose(*overrides)
    return run


def with_fields(run, *texts, **changes):
    """`run` with method.fields of texts like `name=value`: composing each anew takes too long."""
    fields = OmegaConf.to_container(OmegaConf.from_dotlist(list(texts)))
    return replace(run, method=replace(run.method, fields=fields, **changes))


def peft_run(name, *texts):
    run = composed("method=peft", "method.peft_type=IA3", *OF_LLAMA)
    return with_fields(run, *texts, peft_type=name)


@pytest.mark.parametrize(
    ("field", "message"),
    [
        ("rank_pattern={attn.c_atn: 1}", r"rank_pattern: 'attn\.c_atn' .*mean 'attn\.c_attn'"),
        ("alpha_pattern={c_atn: 64}", r"alpha_pattern: 'c_atn' .*mean 'c_attn'"),
        ("rank_pattern={attn.c_attn: '1'}", r"c_attn='1': expected a whole number"),
        ("rank_pattern={attn.c_attn: true}", r"c_attn=True: expected a whole number"),
        ("rank_pattern={attn.c_attn: 0}", r"c_attn=0: expected a number above 0"),
        ("rank_pattern.attn.c_attn=1", r"dots make keys of keys"),
        ("rank_pattern={c_attn: 1, attn.c_attn: 2}", r"'attn\.c_attn' is never used: 'c_attn'"),
        ("modules_to_save=[lm_had]", r"modules_to_save: 'lm_had' .*mean 'lm_head'"),
        ("modules_to_save=lm_head", r"expected a list of names"),
        ("exclude_modules=[mlp.c_fc]", r"'mlp\.c_fc' matches no module that would be adapted"),
        ("exclude_modules=[attn.c_attn]", r"does not fit this model: No modules"),
        ("layers_to_transform=[0,7]", r"no layer 7 to adapt; expected 0 to 1"),
        ("layers_to_transform=[-1]", r"no layer -1"),
        ("layers_to_transform=[true]", r"layers_to_transform=\[True\]: expected"),
        ("target_parameters=[c_atn.weight]", r"matches no parameter; .*c_attn\.weight"),
        ("trainable_token_indices=[1,64]", r"64 is no token; expected ids of 0 to 63"),
        ("alora_invocation_tokens=[99]", r"99 is no token"),
        ("layer_replication=[[0,3]]", r"\[0, 3\] is no range of layers"),
        ("kasa_config={bta: 1.0}", r"kasa_config\.bta: did you mean 'beta'"),
        ("lora_bias='yes'", r"lora_bias='yes': expected true or false"),
        ("task_type=SEQ_CLS", r"task_type: the harness sets it"),
        ("inference_mode=true", r"inference_mode: the harness sets it"),
        ("arrow_config={}", r"Arrow routes between adapters"),
        ("runtime_config={ephemeral_gpu_offload: true}", r"runtime_config: "),
        ("megatron_config={}", r"Megatron"),
        ("loftq_config={loftq_bits: 4}", r"LoftQ runs on CUDA alone"),
    ],
)
def test_a_field_of_lora_that_does_not_fit_is_refused(tiny, field, message):
    run = with_fields(composed("method=lora", "method.r=2", "targets=c_attn"), field)
    with pytest.raises(ConfigError, match=message):
        methods.check(copy.deepcopy(tiny).to("meta"), run)  # before anything is loaded
    with pytest.raises(ConfigError, match=message):
        methods.adapt(tiny, run)


@pytest.mark.parametrize(
    ("named", "field", "message"),
    [
        ("method.alpha=0", "lora_alpha=0", r"alpha=0: expected a number above 0"),
        ("method.alpha=-8", "lora_alpha=-8", r"alpha=-8: expected a number above 0"),
        ("method.dropout=-0.5", "lora_dropout=-0.5", r"dropout=-0\.5: expected .*in \[0, 1\)"),
        ("method.dropout=1", "lora_dropout=1.0", r"dropout=1\.0: expected .*in \[0, 1\)"),
        ("method.r=0", "r=0", r"r=0: expected .*1 or more"),
    ],
)
def test_both_doors_to_lora_refuse_the_same_numbers(tiny, named, field, message):
    with pytest.raises(ConfigError, match=message):
        compose("method=lora", named)
    run = with_fields(composed("method=peft", "method.peft_type=LORA"), field)
    with pytest.raises(ConfigError, match=r"method\.fields\..*" + message):
        methods.check(tiny.to("meta"), run)


@pytest.mark.parametrize(
    ("name", "field", "message"),
    [
        ("LORA", "kasa_config={beta: -1.0}", r"kasa_config\.beta=-1\.0: expected 0 or more"),
        ("LORA", "monteclora_config={kl_loss_weight: -0.5}", r"kl_loss_weight=-0\.5: expected"),
        ("LORA", "monteclora_config={num_samples: 0}", r"num_samples=0: expected 1 or more"),
        ("LORA", "velora_config={num_groups: 0}", r"num_groups=0: expected 1 or more"),
        ("SHADOW", "auxiliary_loss_weight=-1.0", r"default is 0\.05"),
        ("LOHA", "module_dropout=1.5", r"module_dropout=1\.5: expected a probability"),
        ("LOHA", "alpha=0", r"alpha=0: expected a number above 0 \(PEFT's default is 8\)"),
        ("DELORA", "delora_lambda=-1", r"delora_lambda=-1: expected a number above 0"),
        ("FROD", "regularization_alpha=-1.0", r"regularization_alpha=-1\.0: expected 0 or more"),
        ("PROMPT_TUNING", "prompt_tuning_init=FOO", r"expected one of TEXT, SAMPLE_VOCAB, RANDOM$"),
        ("PROMPT_TUNING", "prompt_tuning_init=text", r"did you mean 'TEXT'"),
        ("PROMPT_TUNING", "prompt_tuning_init=RANDM", r"did you mean 'RANDOM'"),
        ("PROMPT_TUNING", "prompt_tuning_init=3", r"=3: expected one of TEXT"),
        ("P_TUNING", "encoder_reparameterization_type=MLPS", r"expected one of MLP, LSTM; .*'MLP'"),
    ],
)
def test_a_value_out_of_its_range_is_refused(name, field, message):
    tokens = ["num_virtual_tokens=4"] if name.endswith("TUNING") else []
    with pytest.raises(ConfigError, match=message):
        methods.adapt(llama(), peft_run(name, *tokens, field))


def test_the_edges_of_a_range_are_taken():
    given = {"lora_dropout": 0.0, "kasa_config": {"beta": 0, "gamma": 0.0}, "lora_alpha": 0.5}
    assert peft_config.configured(CLASSES["LORA"], {}, given).lora_alpha == 0.5
    assert peft_config.configured(CLASSES["OFT"], {}, {"r": 0, "oft_block_size": 8}).r == 0
    assert peft_config.configured(CLASSES["FROD"], {}, {"regularization_alpha": 0.0})


@pytest.mark.parametrize("init", ["eva", "corda", "lora_ga", "loftq", "olora"])
def test_both_doors_to_lora_refuse_the_same_starts(tiny, init):
    named, other = composed("method=lora"), composed("method=peft", "method.peft_type=LORA")
    for run in (
        replace(named, method=replace(named.method, init=init)),
        with_fields(other, f"init_lora_weights={init}"),
    ):
        with pytest.raises(ConfigError, match=init):
            methods.adapt(copy.deepcopy(tiny), run)


@pytest.mark.parametrize(
    ("name", "field", "message"),
    [
        ("LORA", "use_qalora=true", r"use_qalora=True: LORA does nothing with it here"),
        ("LOKR", "rank_pattern={q_prj: 1}", r"mean '(self_attn\.)?q_proj'"),
        ("HIRA", "rank_pattern={q_prj: 1}", r"mean '(self_attn\.)?q_proj'"),
        ("DELORA", "lambda_pattern={q_prj: 1}", r"mean '(self_attn\.)?q_proj'"),
        ("FOURIERFT", "n_frequency_pattern={q_prj: 1}", r"mean '(self_attn\.)?q_proj'"),
        ("WAVEFT", "n_frequency_pattern={q_proj: '9'}", r"expected a whole number"),
        ("C3A", "block_size_pattern={q_prj: 8}", r"mean '(self_attn\.)?q_proj'"),
        ("OSF", "rank_pattern={q_prj: 8}", r"mean '(self_attn\.)?q_proj'"),
        ("OSF", "target_svd_config={q_proj: 8}", r"OSF does nothing with it here"),
        ("VERA", "layers_to_transform=[2]", r"no layer 2"),
        ("IA3", "feedforward_modules=[down_prj]", r"feedforward_modules"),
        ("LN_TUNING", "target_modules=[nrm]", r"'nrm' matches no module"),
        ("ADAMSS", "use_asa=true", r"use_asa: it changes its own ranks or masks after every step"),
        ("ADAMSS", "asa_target_subspaces=3", r"ADAMSS does nothing with it here"),
        ("SHADOW", "r=4", r"adds a term of its own .*auxiliary_loss_weight=0"),
        (
            "CPT",
            "cpt_token_ids=[1,2,3] cpt_tokens_type_mask=[1,2,4]",
            r"CPT: PEFT adds a term of its own",
        ),
        ("CPT", "opt_weighted_loss_type=decay", r"acts through the loss"),
        ("P_TUNING", "num_virtual_tokens=0", r"expected 1 or more|needs method.fields"),
        ("PROMPT_TUNING", "tokenizer_kwargs=null", r"needs method\.fields\.num_virtual_tokens"),
        ("ADALORA", "total_step=9", r"use method=adalora"),
        ("POLY", "n_tasks=1", r"needs the task of every example"),
        ("MULTITASK_PROMPT_TUNING", "num_virtual_tokens=4", r"needs the task of every example"),
        ("XLORA", "adapters={}", r"mixes adapters that were trained before"),
    ],
)
def test_a_field_of_any_method_that_is_not_read_is_refused(name, field, message):
    fields = re.split(r" (?=\w+=)", field)
    with pytest.raises(ConfigError, match=message):
        methods.adapt(llama(), peft_run(name, *fields))


def test_a_field_that_is_read_is_taken():
    model = methods.adapt(llama(), peft_run("BEFT", "init_weights=false"))
    assert model.peft_config["default"].init_weights is False


NO_EFFECT = [
    ("OFT", ["oft_block_size=8"], "module_dropout=0.5", None),
    ("OFT", ["oft_block_size=8"], "eps=0.1", "coft=true"),
    ("P_TUNING", ["num_virtual_tokens=4"], "encoder_num_layers=3",
     "encoder_reparameterization_type=LSTM"),
    ("PREFIX_TUNING", ["num_virtual_tokens=4"], "encoder_hidden_size=8", "prefix_projection=true"),
    ("PROMPT_TUNING", ["num_virtual_tokens=4"], "token_dim=32", None),
    ("LOKR", [], "rank_dropout_scale=true", "rank_dropout=0.5"),
]  # fmt: skip


@pytest.mark.parametrize(("name", "own", "field", "with_it"), NO_EFFECT)
def test_a_field_that_peft_reads_to_no_effect_is_refused(name, own, field, with_it):
    with pytest.raises(ConfigError, match="does nothing with it"):
        methods.adapt(llama(), peft_run(name, *own, field))
    if with_it:
        methods.adapt(llama(), peft_run(name, *own, field, with_it))


@pytest.mark.parametrize(
    ("name", "field"),
    [
        ("GLORA", "config_C=vector"),
        ("GLORA", "config_C=none"),
        ("GLORA", "config_D_E=vector"),
        ("LORA", "bias=lora_only"),
        ("LORA", "bias=all"),
        ("BOFT", "bias=boft_only"),
    ],
)
def test_a_field_that_acts_on_biases_is_refused_where_there_are_none(name, field):
    """Of a Llama, whose matrices have none; with them PEFT's own count moves."""
    if name == "LORA":  # the other door to it
        run = composed("method=lora", f"method.{field}", *OF_LLAMA)
        with pytest.raises(ConfigError, match=r"^method\.bias=.* has a bias"):
            methods.adapt(llama(), run)
    own = ["boft_block_size=8"] if name == "BOFT" else []
    with pytest.raises(ConfigError, match=r"does nothing with it here: .* has a bias"):
        methods.adapt(llama(), peft_run(name, *own, field))
    with_them = LlamaForCausalLM(LlamaConfig(**{**LLAMA.to_dict(), "attention_bias": True}))
    plain = methods.adapt(copy.deepcopy(with_them), peft_run(name, *own))
    found = methods.adapt(with_them, peft_run(name, *own, field))
    counts = [model_size.count_parameters(model).trainable for model in (plain, found)]
    assert counts[0] != counts[1]


@pytest.mark.parametrize(
    ("name", "own", "field"), [case[:3] for case in NO_EFFECT if case[0] != "PROMPT_TUNING"]
)
def test_what_is_refused_has_no_effect_indeed(name, own, field, monkeypatch):
    """Without the refusal the trained parameters begin alike and get the same gradients."""
    monkeypatch.setattr(refusals, "_no_effect", lambda *_: None)

    def found(*fields):
        torch.manual_seed(0)
        model = methods.adapt(llama(), peft_run(name, *own, *fields))
        start = [p.detach().clone() for p in model.parameters() if p.requires_grad]
        return start, list(gradients(model).values())

    plain, other = found(), found(field)
    for one, same in zip([*plain[0], *plain[1]], [*other[0], *other[1]], strict=True):
        assert torch.equal(one, same)


def samples(hint):
    """Values of a declared type, each alternative of it at least once."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        return [value for one in arguments for value in samples(one)]
    if origin is typing.Literal:
        return list(arguments)
    if hint is dict or origin is dict:
        inner = samples(arguments[1]) if arguments else [1, "x", None]
        return [{}, *({"q_proj": value} for value in inner), {"(": inner[0]}]
    if origin is tuple:
        return [[samples(one)[0] for one in arguments]]
    if origin in (list, set):
        return [[], *([value] for value in samples(arguments[0]))]
    if isinstance(hint, type) and issubclass(hint, enum.Enum):
        return [member.value for member in hint]
    if dataclasses.is_dataclass(hint):
        return [{}]
    plain = {bool: [True, False], int: [1, 0], float: [0.5], str: ["x", "("], type(None): [None]}
    return plain[hint]


CLASSES = {str(getattr(k, "value", k)): v for k, v in PEFT_TYPE_TO_CONFIG_MAPPING.items()}


@pytest.mark.parametrize("name", peft_types.names())
def test_a_value_of_its_declared_type_is_taken_or_refused_by_name(name):
    hints, model = typing.get_type_hints(CLASSES[name]), llama()
    tried = 0
    for field in dataclasses.fields(CLASSES[name]):
        for value in samples(hints[field.name]):
            given = copy.deepcopy(peft_types.FIELDS.get(name, {})) | {field.name: value}
            tried += 1
            try:
                config = peft_config.configured(CLASSES[name], {}, given)
                fields.check_names(config, model, given, "method.fields")
                fields.pattern_values(config, model, given)
            except ConfigError:  # any other exception fails the test
                continue
    assert tried > 10


def test_a_pattern_that_matches_has_its_effect(tiny, make_run):
    fields = (F + "rank_pattern={attn.c_attn: 1}", F + "alpha_pattern={mlp.c_fc: 64}")
    model = methods.adapt(tiny, make_run("method=lora", "method.r=2", *fields))
    block = model.get_base_model().transformer.h[1]
    assert block.attn.c_attn.lora_A["default"].weight.shape[0] == 1
    assert block.attn.c_proj.lora_A["default"].weight.shape[0] == 2
    assert block.mlp.c_fc.scaling["default"] == 64 / 2


def test_a_run_is_not_changed_by_being_adapted(make_run):
    fields = ("+method.fields.modules_to_save=[lm_head]", "+method.fields.ensure_weight_tying=true")
    run = make_run("model=gpt2_mini", "method=lora", *fields)
    config = pretrained.load_config(run.model)
    on_meta = methods.check(pretrained.on_meta(run, config), run)
    found = [methods.adapt(pretrained.load_model(run, config), run) for _ in range(2)]
    assert run.method.fields == {"modules_to_save": ["lm_head"], "ensure_weight_tying": True}
    counts = [model_size.count_parameters(model) for model in (on_meta, *found)]
    assert counts[0] == counts[1] == counts[2]
    first, last = found[1].get_input_embeddings(), found[1].get_output_embeddings()
    assert first.weight is last.weight and first.weight.requires_grad


def test_trying_an_adapter_out_leaves_weights_and_generators(tiny, make_run):
    torch.manual_seed(5)
    mine = methods.adapt(tiny, make_run("method=lora", "method.r=2"))
    after = torch.rand(1)
    torch.manual_seed(5)
    config = mine.peft_config["default"]
    theirs = peft.get_peft_model(mine.unload(), config)
    assert torch.equal(after, torch.rand(1))
    state = theirs.state_dict()
    torch.manual_seed(5)
    again = methods.adapt(theirs.unload(), make_run("method=lora", "method.r=2")).state_dict()
    assert state.keys() == again.keys() and all(torch.equal(state[k], again[k]) for k in state)


# --------------------------------------------------------------------------- losses of their own


def gradients(model, *, passes=1):
    prepared = NextToken(model).train()
    rows = IDS.chunk(passes)
    batches = [Batch(part, part, None) for part in rows]
    loop.accumulate(prepared, batches, IDS.numel(), Accelerator(cpu=True))
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("passes", [1, 2])
def test_kasa_trains_on_its_own_loss_with_its_weights(make_run, passes):
    def found(beta, gamma):
        torch.manual_seed(0)
        fields = f"{F}kasa_config={{beta: {beta}, gamma: {gamma}}}"
        lora = ("method=lora", "method.r=2", "method.init=gaussian")
        run = make_run(*lora, *OF_LLAMA, fields)
        return methods.adapt(llama(), run)

    plain, model = gradients(found(0.0, 0.0), passes=passes), found(0.5, 0.25)
    mine = gradients(model, passes=passes)
    for layer in model.get_base_model().model.layers:  # the loss of the paper, written out
        for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
            lora = getattr(layer.self_attn, name)
            a, b = (getattr(lora, f"lora_{x}")["default"].weight for x in "AB")
            one = torch.eye(2)
            ours = 0.5 * lora.lora_diag["default"].square().sum() + 0.25 * (
                (b.T @ b - one).norm() + (a @ a.T - one).norm()
            )
            for parameter in (a, b, lora.lora_diag["default"]):
                parameter.grad = None
            ours.backward()
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            expected = plain[name] + parameter.grad
            assert torch.allclose(mine[name], expected, rtol=1e-3, atol=1e-5), name


@pytest.mark.parametrize("weight", [0.5, 0.125])
def test_monteclora_trains_on_its_own_loss_with_its_weight(make_run, weight):
    """The divergences as PEFT has them, differentiated by hand.

    e are the logs of the experts' concentrations a, s those of the standard deviations, and v the
    variances that were drawn. By e, s and s: Dirichlet, Wishart and normal.
    """
    samplers = pytest.importorskip("peft.tuners.lora.monteclora")

    def found(kl_loss_weight):
        fields = f"monteclora_config={{kl_loss_weight: {kl_loss_weight}, num_samples: 3}}"
        run = make_run("method=lora", "method.r=2", *OF_LLAMA, F + fields)
        base = llama()
        torch.manual_seed(1)
        model = methods.adapt(base, run)
        with torch.no_grad():  # off its start, where s is 0 and Wishart's term is at its least
            for name, parameter in model.named_parameters():
                if name.endswith("_prior"):
                    parameter.add_(0.3 * torch.rand(parameter.shape))
        torch.manual_seed(2)
        return model, gradients(model)

    (_, plain), (model, mine) = found(0.0), found(weight)
    layers = {n: m for n, m in model.named_modules() if isinstance(m, samplers.MontecloraSampler)}
    assert len(layers) == 2 * 4
    for name, layer in layers.items():
        a, m = layer.expert_weights_prior.detach().exp(), layer.out_features
        s, v = layer.std_prior.detach(), layer.gaussian_var_prior.detach().diag()
        prior, total = 0.1, a.sum()
        of_dirichlet = a * (
            total.digamma()
            + a.digamma()
            + (a.digamma() - total.digamma())
            + (a - prior) * torch.polygamma(1, a)
            - (a - prior).sum() * torch.polygamma(1, total)
        )
        of_spread = m * ((2 * s).exp() - 1) + 3 * (v - 1) * (v > 1e-3)  # v is 0.001 at least
        for leaf, ours in (("expert_weights_prior", of_dirichlet), ("std_prior", of_spread)):
            expected = weight * ours / len(layers)
            assert expected.abs().max() > 1e-3
            got = mine[f"{name}.{leaf}"] - plain.get(f"{name}.{leaf}", 0)
            torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)
    others = [n for n in mine if not n.endswith("_prior")]
    assert others and all(torch.equal(mine[n], plain[n]) for n in others)


@pytest.mark.parametrize("name", ["PROMPT_TUNING", "P_TUNING", "CPT"])
def test_prompts_in_the_embeddings_can_be_checkpointed(name):
    tokens = "cpt_token_ids=[1,2,3]" if name == "CPT" else "num_virtual_tokens=4"

    def found(checkpointing):
        torch.manual_seed(0)
        run = peft_run(name, tokens)
        run = replace(run, train=replace(run.train, checkpointing=checkpointing))
        assert positions.num_virtual_tokens(run) == (3 if name == "CPT" else 4)
        return gradients(
            transformer_blocks.checkpoint_activations(methods.adapt(llama(), run), run.train)
        )

    plain, again = found(False), found(True)
    assert plain and all(torch.equal(plain[n], again[n]) for n in plain)


def test_an_error_of_the_meta_device_is_no_refusal():
    run = peft_run("SHIRA", "r=4")
    with torch.device("meta"):
        bare = LlamaForCausalLM(LLAMA)
    with pytest.raises(peft_adapter.NeedsWeightsError):
        methods.check(bare, run)
    count = model_size.count_parameters(methods.adapt(llama(), run)).trainable
    assert count == 2 * 4 * 4 * (32 + 32)  # r (m + n) of four square matrices a layer


def test_sparse_tensors_are_followed_in_memory():
    model = torch.nn.Module()
    dense = torch.zeros(50, 60).index_put_(
        (torch.tensor([3, 7]), torch.tensor([5, 9])), torch.ones(2)
    )
    model.register_buffer("sparse", dense.to_sparse().coalesce())
    live = memory.LiveTensors(model)
    live.close()
    assert live.by_category["frozen_weights"] == 2 * (2 * 8 + 4)  # two indices and a value each
