import itertools
import re
from dataclasses import replace

import pytest
from hydra import compose, initialize_config_dir
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException

from harness import methods
from harness.config.errors import ConfigError
from harness.config.method_schema import LoraMethod
from harness.config.naming import identity, run_name
from harness.config.paths import ASSETS_DIR, CONF_DIR, options
from harness.config.run_config import to_dict
from harness.config.schema import SECTIONS
from harness.models import pretrained
from harness.runs.composition import explain, from_hydra, load


@pytest.mark.parametrize(
    ("alpha", "r", "number"),
    [(16, 4, 16), ("16", 4, 16), ("2r", 4, 8), ("r", 4, 4), ("0.5r", 4, 2), (" 1.5r ", 3, 4.5)],
)
def test_alpha_is_a_number_or_a_multiple_of_r(alpha, r, number):
    assert LoraMethod("lora", r=r, alpha=alpha).lora_alpha == number


@pytest.mark.parametrize("alpha", ["x2", "", "2q", "-1r", None, True, [1]])
def test_alpha_that_is_neither_is_refused_by_name(alpha):
    with pytest.raises(ConfigError, match=r"method\.alpha"):
        _ = LoraMethod("lora", r=4, alpha=alpha).lora_alpha


def test_a_schema_without_a_file_says_what_conf_says(make_run):
    run = make_run("train.lr=2e-3")  # in conf it is auto
    for section in ("train", "evaluate", "launch"):
        composed, schema = getattr(run, section), SECTIONS[section]()
        rates = "gpt2_mini_kjv" if section == "train" else None  # what lr=tuned reads by default
        assert composed == (replace(schema, rates=rates) if rates else schema), section


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["train.lr=fast"], r"train\.lr=fast: expected a number"),
        (["+train.lrr=1"], r"unknown key 'train\.lrr': did you mean 'train\.lr'"),
        (["+sede=1"], r"unknown key 'sede': did you mean 'seed'"),
        (["train.schedule=cosin"], r"train\.schedule='cosin': did you mean 'cosine'"),
        (["train.precision=fp16"], r"train\.precision='fp16'"),
        (["train.batch_tokens=3000"], r"8 x 256 = 2048: try 2048 or 4096"),
        (["train.batch_tokens=100"], r"try 2048"),
        (["train.steps=-1"], r"train\.steps=-1"),
        (["train.lr=0"], r"train\.lr=0"),
        (["train.max_grad_norm=0"], r"train\.max_grad_norm=0"),
        (["data.context_length=1"], r"data\.context_length=1"),
        (["data.test_share=0.6"], r"data\.test_share=0\.6"),
        (["data.train_share=0"], r"data\.train_share=0.*share in \(0, 1\]"),
        (["evaluate.stride=300"], r"evaluate\.stride=300: expected 1 to the context of 256"),
        (["method.r=0"], r"method\.r=0"),
        (["method.dropout=1"], r"method\.dropout=1"),
        (["method=udv", "method.train=uv"], r"method\.train='uv'"),
        (["method=udv", "method.residual=kep"], r"method\.residual='kep': did you mean 'keep'"),
        (["method=udv", "method.energy=1.5"], r"method\.energy=1\.5: expected a share in \(0, 1\]"),
        (["method=truncate", "method.energy=0"], r"method\.energy=0"),
        (["model.unfuse_qkv=maybe"], r"model\.unfuse_qkv='maybe'"),
        (["save_merged=yes"], r"save_merged="),
        (["method=udv", "method.rank=4", "method.energy=0.5"], r"are alternatives"),
        (["method.bias=some"], r"method\.bias='some'"),
        (["method.name=lorra"], r"'lorra' is not a method: did you mean 'lora'"),
        (["method.fields.use_qalora=true"], r"write \+method\.fields\.use_qalora=… to add it"),
        (["method.rr=1"], r"unknown key 'method\.rr': did you mean 'method\.r'"),
        (["method=lorra"], r"method=lorra: no such option; did you mean 'lora'"),
        (["method=peft"], r"method\.peft_type"),
        (["model.asset=gpt2_mimi"], r"did you mean 'gpt2_mini'"),
        (["model.id=gpt2"], r"exactly one of asset, path, id"),
        (["model=local", "model.path=/nowhere"], r"/nowhere"),
        (["model.dropout=1"], r"model\.dropout"),
        (["data=hub"], r"data\.id"),
        (["seed=-1"], r"seed=-1: expected 0 to 2\^32 - 1"),
        (["train.lr=inf"], r"train\.lr=inf"),
        (["evaluate.context_length=0"], r"evaluate\.context_length=0"),
        (["run_name=.."], r"run_name='\.\.'"),
        (["run_name=a/b"], r"run_name='a/b'"),
        (["experiment_name=../x"], r"experiment_name"),
    ],
)
def test_bad_values_are_named_with_what_was_expected(make_run, overrides, message):
    with pytest.raises((ConfigError, HydraException)) as error:
        make_run(*overrides)
    assert re.search(message, explain(error.value))


def test_a_config_survives_its_file(make_run, tmp_path):
    from omegaconf import OmegaConf

    run = make_run("method=lora", "method.r=4", "+method.fields.use_qalora=false", "seed=3")
    OmegaConf.save(OmegaConf.create(to_dict(run)), tmp_path / "config.yaml")
    assert load(tmp_path / "config.yaml") == run


def test_the_name_tells_runs_apart_that_differ_in_anything(make_run):
    changes = [
        [],
        ["method.r=4"],
        ["method.alpha=7"],
        ["targets=attn"],
        ["train.lr=0.5"],
        ["train.weight_decay=0.1"],
        ["method.dropout=0.1"],
        ["data.context_length=128"],
        ["seed=1"],
        ["method=full"],
        ["method=none"],
        ["method=peft", "method.peft_type=IA3"],
        ["method=udv"],
        ["method=udv", "method.rank=8"],
        ["method=udv", "method.energy=0.8"],
        ["method=udv", "method.residual=keep"],
        ["method=udv", "method.train=udv"],
        ["method=udv", "method.which=bottom"],
        ["method=truncate"],
    ]
    names = [run_name(make_run(*change)) for change in changes]
    assert len(set(names)) == len(names)
    assert names[0].startswith("lora-all-r8-a16-lr0.02-s0-")
    assert run_name(make_run("run_name=mine")) == "mine"


def test_the_identity_leaves_out_what_moves_no_number(make_run):
    one = make_run()
    other = make_run("outputs_dir=/x", "experiment_name=y", "rerun=true", "data.cache_dir=/z")
    assert identity(one) == identity(other) != identity(make_run("seed=1"))
    assert identity(one) == identity(make_run("method.alpha=16"))  # r=8, alpha=2r
    none = identity(make_run("method=none"))
    assert none == identity(make_run("method=none", "targets=attn", "train.lr=1", "seed=1"))
    assert run_name(make_run("method=none")) == run_name(make_run("method=none", "seed=1"))
    random = ["method=truncate", "method.rank=8", "method.which=random"]
    assert identity(make_run(*random)) != identity(make_run(*random, "seed=1"))
    drawn = ["method=none", "model=lstm", "targets=lstm"]
    assert run_name(make_run(*drawn)) != run_name(make_run(*drawn, "seed=1"))
    assert none != identity(
        make_run("method=none", "data.context_length=128", "train.micro_batch=16")
    )


def test_every_model_data_method_and_target_file_composes(make_run):
    needs = {
        "model": {
            "local": [f"model.path={ASSETS_DIR}/gpt2_mini"],
            "hub": ["model.id=x/y"],
            "lstm": ["targets=lstm"],
        },
        "data": {
            "text_files": ["data.path=README.md"],
            "hub": ["data.id=x/y"],
            "source": None,  # the base of the others
            "pairs": ["data.id=x/y"],
            "mix": ["data.parts={kjv:1,docstrings:1}"],
        },
        "method": {"peft": ["method.peft_type=IA3"]},
        "targets": {
            "gate": ["model=smollm2_135m"],
            **{name: ["model=lstm"] for name in ("lstm", "lstm_core", "lstm_ends")},
        },
    }
    for group, special in needs.items():
        for option in options(group):
            extra = special.get(option, [])
            if extra is None or option == "text_files":
                continue  # text_files needs a text file: tests/test_documents.py
            assert make_run(f"{group}={option}", *extra)


@pytest.fixture
def asked_for(tmp_path):
    """What experiments want from their user, by their name."""
    for name in ("valid", "test"):
        (tmp_path / f"{name}.txt").write_text("".join(f"a{i}||b\n" for i in range(4)))
    return {key: [f"data.path={tmp_path}"] for key in ("e2e_methods", "smollm2_e2e")}


@pytest.mark.parametrize("name", options("experiment"))
def test_every_run_of_every_experiment_is_valid_for_its_model(name, asked_for):
    """Every cell of every grid, on the meta device: a typo in a grid would be found by users."""
    needed = [f"experiment={name}", *asked_for.get(name, [])]
    with initialize_config_dir(str(CONF_DIR), version_base="1.3"):
        cfg = compose("config", needed, return_hydra_config=True)
        grids = cfg.hydra.sweeper.grids or [{}]
        names = []
        for grid in grids:
            asked = OverridesParser.create().parse_overrides([f"{k}={v}" for k, v in grid.items()])
            values = [
                [f"{o.get_key_element()}={v}" for v in o.sweep_string_iterator()]
                if o.is_sweep_override()
                else [o.input_line]
                for o in asked
            ]
            # A model takes any rate: of several the first and the last stand for all.
            values = [[one[0], one[-1]] if one[0].startswith("train.lr=") and len(one) > 1 else one
                      for one in values]  # fmt: skip
            for overrides in itertools.product(*values):
                run = pretrained.without_files(from_hydra(compose("config", [*needed, *overrides])))
                assert methods.check(
                    pretrained.on_meta(run, pretrained.load_config(run.model)), run
                )
                names.append(run_name(run))
    assert len(set(names)) == len(names)


@pytest.mark.parametrize("name", options("experiment"))
def test_every_experiment_composes_and_states_what_it_asks(name, asked_for):
    header = (CONF_DIR / "experiment" / f"{name}.yaml").read_text().split("defaults:")[0]
    for word in ("Question:", "Command:", "Runtime:", "Expected:"):
        assert word in header
    with initialize_config_dir(str(CONF_DIR), version_base="1.3"):
        needed = asked_for.get(name, [])
        run = from_hydra(compose("config", [f"experiment={name}", *needed]))
        assert run.experiment_name == name


@pytest.mark.parametrize(
    ("option", "message"),
    [("jobllib", "did you mean 'joblib'"), ("ray", r"not installed: pip install -e '.\[ray\]'")],
)
def test_a_launcher_that_is_not_there(option, message):
    error = HydraException(f"In 'config': Could not find 'hydra/launcher/{option}'\n\nAvailable …")
    assert re.search(message, explain(error))
