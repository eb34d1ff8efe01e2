"""Roles of weight matrices against the models of transformers, and names that must not change."""

import csv
import itertools

import pytest
import torch
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.pytorch_utils import Conv1D

from harness.config import matrix_roles
from harness.config.errors import ConfigError
from harness.config.naming import identity, run_name
from harness.config.paths import CONF_DIR, REPOSITORY, options
from harness.config.schema import TargetsConfig
from harness.methods import check, targets
from harness.models import model_size, pretrained
from harness.models.split_qkv import UNFUSED_TARGETS, unfuse_qkv
from harness.runs.composition import from_hydra

LAYERS = {  # where two layers need another field than num_hidden_layers
    "gpt_neo": {"num_layers": 2, "attention_types": [[["global", "local"], 1]]},
    "mpt": {"n_layers": 2},
    "xglm": {"num_layers": 2},
    "nemotron": {"num_hidden_layers": 2, "num_key_value_heads": 8},
    "lstm": {},
}


def on_meta(kind, **fields):
    fields = fields or LAYERS.get(kind, {"num_hidden_layers": 2})
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **fields))


def named_set(name):
    loaded = OmegaConf.load(CONF_DIR / "targets" / f"{name}.yaml")
    return TargetsConfig(name, list(loaded.modules), list(loaded.roles))


def parameters_of(model, name):
    return set(targets.resolve(model, named_set(name)).shapes)


@pytest.mark.parametrize("kind", matrix_roles.SUFFIXES)
def test_every_set_is_what_it_says_on_every_architecture(kind):
    model = on_meta(kind)
    table = matrix_roles.SUFFIXES[kind]
    ends = {
        "embeddings": model.get_input_embeddings(),
        "head": model.get_output_embeddings(),
    }
    for role, module in ends.items():
        (name,) = parameters_of(model, role)
        assert model.get_submodule(name) is module
    if kind == "lstm":
        with pytest.raises(ConfigError, match="try targets=lstm"):
            parameters_of(model, "all")
        return
    blocks = {
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear | Conv1D)
        and any(part.isdigit() for part in name.split("."))
    }
    assert parameters_of(model, "all") == blocks  # no matrix of a block is left out
    attention, mlp = parameters_of(model, "attn"), parameters_of(model, "mlp")
    assert attention | mlp == blocks and not attention & mlp
    assert parameters_of(model, "c_attn") | parameters_of(model, "o") == attention
    widest = max(min(model.get_submodule(name).weight.shape) for name in mlp)
    assert all(max(model.get_submodule(name).weight.shape) >= widest for name in mlp)
    if kind == "gpt2":
        unfuse_qkv(model)
    for name in ("q", "k", "v", "qv", "qk", "qkvo"):
        if "q" in table:
            assert len(parameters_of(model, name)) == len(named_set(name).roles) * 2
            continue
        with pytest.raises(ConfigError, match=f"{kind} keeps q, k and v in one matrix"):
            parameters_of(model, name)
    if "gate" in table:
        assert len(parameters_of(model, "gate")) == 2
    else:
        with pytest.raises(ConfigError, match="has no matrix for 'gate'"):
            parameters_of(model, "gate")


def test_gpt2s_parts_are_those_of_unfuse():
    assert {role: matrix_roles.SUFFIXES["gpt2"][role] for role in "qkv"} == UNFUSED_TARGETS


def test_modules_by_name_stand_instead_of_roles(make_run):
    run = make_run("targets.modules=[mlp.c_fc]")
    assert (run.targets.modules, run.targets.roles) == (["mlp.c_fc"], [])
    assert run == make_run("targets.modules=[mlp.c_fc]", "targets.roles=[q]")


def test_an_unknown_architecture_says_how_to_name_modules(make_run):
    model = on_meta("openai-gpt", n_layer=2, n_embd=32, n_head=2, vocab_size=64)
    run = make_run("model=hub", "model.id=someone/something", "targets=attn")
    assert run.targets.roles == ["qkv", "o"] and not run.targets.modules
    with pytest.raises(ConfigError) as error:
        targets.resolve(model, run.targets)
    for part in ("targets.modules=[…]", "attn.c_attn", "mlp.c_proj", "'openai-gpt'"):
        assert part in str(error.value)
    run = make_run("model=hub", "model.id=a/b", "targets.modules=[attn.c_attn]")
    assert len(targets.resolve(model, run.targets).shapes) == 2


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["targets.roles=[qq]"], r"no role 'qq'"),
        (["targets.roles=[mlpin]"], r"no role 'mlpin'; did you mean 'mlp_in'"),
        (["targets=gate"], r"gpt2 has no matrix for 'gate'; it has: .*mlp_in"),
        (["model=lstm"], r"lstm has no matrix for 'qkv' \(try targets=lstm\)"),
        (
            ["model.asset=null", "+model.architecture.model_type=gpt_neox", "targets=q"],
            r"one matrix",
        ),
    ],
)
def test_roles_that_are_not_there_are_refused_by_the_controller(make_run, overrides, message):
    with pytest.raises(ConfigError, match=message):
        make_run(*overrides)


def test_a_hub_models_roles_come_apart_where_gpt2_needs_it(make_run):
    run = make_run("model=hub", "model.id=someone/gpt2", "targets=qv")
    config = AutoConfig.for_model("gpt2", n_layer=2, n_embd=32, n_head=2, vocab_size=64)
    assert pretrained.wants_unfused(run, config)
    assert not pretrained.wants_unfused(
        make_run("model=hub", "model.id=a/b", "targets=attn"), config
    )
    adapted = check(pretrained.on_meta(run, config), run)
    assert model_size.count_parameters(adapted).trainable == 2 * 2 * 2 * 8 * 32


# ------------------------------------------------------------------------ names that are recorded


def test_the_recorded_runs_of_the_main_experiment_keep_their_names():
    expected = set()
    for file in ("results-tuned.csv", "results-control.csv"):  # the latter has one row more
        with (REPOSITORY / "experiments" / "main" / file).open() as stream:
            expected |= {name for row in csv.DictReader(stream) for name in row["runs"].split()}
    names = set()
    with initialize_config_dir(str(CONF_DIR), version_base="1.3"):
        cfg = compose("config", ["experiment=main"], return_hydra_config=True)
        for grid in cfg.hydra.sweeper.grids:
            cells = itertools.product(*(str(value).split(",") for value in grid.values()))
            for cell in cells:
                overrides = [f"{key}={value}" for key, value in zip(grid, cell, strict=True)]
                run = from_hydra(compose("config", ["experiment=main", *overrides]))
                names.add(run_name(run))
    assert names == expected and len(names) == 16


IDENTITIES = {  # first digits, as the code before this had them
    "method=lora targets=all": "4ffd030099492565",
    "method=lora targets=c_attn": "f468d97bc9dab17d",
    "method=lora targets=attn": "2fd40c02f82ad189",
    "method=lora targets=mlp": "1ab76f561d9bbdca",
    "method=lora targets=qkvo model.unfuse_qkv=true": "511c9aed61730d7d",
    "method=lora_paper": "f31abf60e0ed7d86",
    "method=udv targets=c_fc": "9f44686ac26136d9",
    "method=truncate method.rank=8 targets=c_proj": "53426e0ff7e3fbf2",
    "method=lora targets.modules=[mlp.c_fc]": "cf2579c530482faf",
    "model=lstm targets=lstm method=udv": "1edb22b925704097",
    "model=lstm targets=lstm_core method=lora": "6d70d5850290582e",
    "model=lstm targets=lstm_ends method=lora": "029ce8f14bfacb01",
    "method=full": "dfac77f7a7434132",
    "method=none": "7bfe92d3ae583a81",
    "model=gpt2_mini_init method=full": "561858d626e3d53f",
    "method=peft method.peft_type=IA3 targets=k": "1b09d98dff4ab099",
}


@pytest.mark.parametrize("overrides", IDENTITIES)
def test_identities_from_before_there_were_roles(make_run, overrides):
    assert identity(make_run("train.lr=2e-3", *overrides.split()))[:16] == IDENTITIES[overrides]


def test_every_target_file_names_roles_or_modules():
    for name in options("targets"):
        found = named_set(name)
        assert found.name == name and bool(found.roles) != bool(found.modules)
