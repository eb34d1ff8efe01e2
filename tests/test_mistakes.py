"""Mistakes on the command line: one line in our own words, at once, and no directory left."""

import dataclasses
import shlex
import shutil
import subprocess
import sys

import pytest
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING

from harness import compose
from harness.commands import arguments, count, plan
from harness.config import keys, model_shapes, peft_fields
from harness.config.errors import ConfigError
from harness.config.method_schema import PeftMethod
from harness.config.paths import REPOSITORY, options
from harness.methods import adapters
from harness.models import model_size, pretrained
from harness.results import run_record
from harness.runs import launcher, mistakes, outcomes, run_directory, worker_attempt

RAW = ("Lexer", "viable", "Could not", "could not be converted", "usage:", "Ambiguous", "struct")


def line(overrides, make_run):
    """What the program says of arguments that Hydra's compose refuses."""
    with pytest.raises((ConfigError, HydraException)) as error:
        make_run(*overrides)
    said = mistakes.explain(error.value)
    assert "\n" not in said and not any(word in said for word in RAW), said
    return said


@pytest.mark.parametrize(
    ("override", "meant"),
    [
        ("lr=1e-3", "did you mean 'train.lr'?"),
        ("r=8", "did you mean 'method.r'?"),
        ("steps=4", "did you mean 'train.steps'?"),
        ("epochs=3", "did you mean 'train.epochs'?"),
        ("rank=8", "did you mean 'method.r' or 'method.rank' (of method=udv and truncate)?"),
        ("train.r=8", "did you mean 'method.r'?"),
        ("train.learning_rate=1e-3", "did you mean 'train.lr'?"),
        ("batch_size=8", "train.batch_tokens (tokens of a step) or train.micro_batch (blocks"),
        ("max_steps=8", "did you mean 'train.steps'?"),
        ("lora_alpha=8", "did you mean 'method.alpha'?"),
        ("microbatch=8", "did you mean 'train.micro_batch'?"),
        ("method.train=udv", "method=lora does not have it; method=udv does"),
        ("wizard=sgd", "choose one of: contents, data"),
    ],
)
def test_a_key_is_looked_for_among_all_keys_and_by_the_names_of_others(make_run, override, meant):
    assert meant in line([override], make_run)


def test_every_other_name_leads_to_a_key_that_there_is_and_hides_none():
    there = keys.every()
    for name, meant in keys.ALIASES.items():
        assert {key.partition(" ")[0] for key in meant} <= there, name
        assert name not in there


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("train.steps=many", "train.steps=many: expected a whole number, as in train.steps=100"),
        (
            "train.lr=fast",
            "train.lr=fast: expected a number, as in train.lr=2e-3, or auto or tuned",
        ),
        ("train.steps=1e3", "train.steps=1000.0: expected a whole number, as in train.steps=1000"),
        (
            "seed=0..4",
            "seed=0..4: expected a whole number, or for several runs -m 'seed=range(0,5)'",
        ),
        ("method.r=1.5", "method.r=1.5: expected a whole number, as in method.r=8"),
        (
            "train.max_grad_norm=x",
            "train.max_grad_norm=x: expected a number or null, as in train.max_grad_norm=1",
        ),
        ("train.compile=maybe", "train.compile=maybe: expected true or false"),
        (
            "train.lr=null",
            "train.lr=null: expected a number, as in train.lr=2e-3, or auto or tuned",
        ),
        ("train.steps=???", "train.steps is missing: give it a value, train.steps=…"),
        ("data.packages=numpy", "data.packages=numpy: expected a list, as [a,b]"),
        ("tracker=[wandb,tensorbord]", "tracker=tensorbord: no such option; did you mean 'tensorb"),
        ("train=", "train=: no such option; choose one of: default"),
        ("data=/etc/hosts", "did you mean data=text_files data.path=/etc/hosts?"),
        ("data=notes.jsonl", "did you mean data=text_files data.path=notes.jsonl?"),
        ("model=./mine", "did you mean model=local model.path=./mine?"),
        ("model=a/b", "model=hub model.id=a/b (on the hub), or model=local model.path=a/b?"),
        ("data.path=a(b", "data.path=a(b: quote a value with special characters: 'data.path=\"a(b"),
        ("targets.modules=[a", "the value begins with [ and does not end with its other half"),
        ("smoke", "smoke: expected key=value, did you mean experiment=smoke?"),
        ("nothing", "nothing: expected key=value, as in method.r=8"),
        ("method", "method: expected key=value, as in method="),
        ("targets=wrongly", "targets=wrongly: no such option; choose one of: all, attn"),
        ("targets=wrongly", ", o, q, qk"),  # all of them
        ("train.max_seconds=10m", "train.max_seconds=10m: expected a number of seconds or null"),
    ],
)
def test_a_value_is_shown_with_what_was_expected(make_run, override, said):
    assert said in line([override], make_run)


def test_a_quoted_value_is_quoted_so_that_the_shell_and_hydra_read_it():
    told = mistakes.unparsed('data.path=~/a "b".txt')
    (argument,) = shlex.split(told.partition("characters: ")[2])
    assert OverridesParser.create().parse_override(argument).value() == '~/a "b".txt'


@pytest.mark.parametrize(
    ("typed", "said"),
    [
        (["--foo"], "--foo: no such flag"),
        (["--mutlirun"], "--mutlirun: no such flag; did you mean '--multirun'?"),
        (["--lr=3"], "keys have no dashes; did you mean 'train.lr'?"),
        (["--method=lora"], "--method=lora: keys have no dashes; did you mean method=lora?"),
        (["--cfg", "jbo"], "--cfg jbo: did you mean 'job'?"),
        (["--cfg"], "--cfg: expected a value"),
        (["--info", "method=lora"], "--info method=lora: choose one of: all, config, defaults"),
        (["--cfg", "job", "-m", "method.r=1,2"], "harness plan method.r=1,2 lists them"),
        (["-m", "--info"], "harness plan lists them"),
        (["--resolve"], "--resolve goes with --cfg"),
        (["--run", "-m"], "give one"),
    ],
)
def test_flags_that_are_wrong_or_do_not_go_together_are_one_line(typed, said):
    with pytest.raises(ConfigError) as error:
        arguments.read(typed)
    assert said in str(error.value) and "usage" not in str(error.value)


def test_commas_without_m_ask_for_a_sweep_or_a_list():
    assert mistakes.several("method.r=1,2").endswith("a sweep: harness sweep method.r=1,2")
    assert mistakes.several("method.train_only=a,b").endswith("a list, method.train_only=[a,b]")


def test_help_is_one_screen_of_what_a_first_run_needs():
    lines = arguments.help_text().splitlines()
    assert len(lines) <= 32 and max(map(len, lines)) <= 80
    text = "\n".join(lines)
    for key in arguments.MOST_USED:  # each is a key or a group, and has its default
        assert key in keys.GROUPS or key in keys.every(), key
        assert f"\n  {key}=" in text
    assert "train.lr=auto " in text and "data.context_length=256 " in text and "seed=0 " in text
    assert "--help all" in text and "conf/README.md" in text


def test_help_of_a_group_and_of_an_option_is_theirs_alone():
    text = arguments.help_text(["method=udv"])
    assert "method.residual=drop" in text and "train.steps" not in text and "gpt2_xl" not in text
    text = arguments.help_text(["train"])
    assert "train.batch_tokens=2048" in text and "method.r" not in text
    with pytest.raises(ConfigError, match="did you mean 'train'"):
        arguments.help_text(["tain"])
    with pytest.raises(ConfigError, match="method=udw: did you mean 'udv'"):
        arguments.help_text(["method=udw"])


def test_help_says_what_every_option_and_key_is():
    text = arguments.help_text(["all", "method=udv"])
    for group in (*keys.GROUPS, "scale"):
        for option in options(group):
            if (group, option) != ("data", "source"):
                assert [row for row in text.splitlines() if row.split()[:1] == [option]], option
                assert len(arguments.sentence_of(group, option)) > 8, option
    assert (
        "method.residual=drop" in text
        and "train.batch_tokens=2048" in text
        and "    method.r=8" not in text
    )
    assert arguments.version_line().startswith("harness ")


# --------------------------------------------------------------------------- before a run starts


@pytest.mark.parametrize("model", ["gpt2_mini", "gpt2", "gpt2_xl", "smollm2_135m"])
def test_known_shapes_are_those_of_the_model(make_run, model):
    run = make_run(f"model={model}", "model.unfuse_qkv=false")
    described = model_shapes._configuration(run.model)
    base = pretrained.on_meta(run, pretrained.load_config(pretrained.without_files(run).model))
    there = model_size.matrices(base)
    known = model_shapes.matrices(described)
    assert {name.rpartition(".")[2] for name in there} <= {n.rpartition(".")[2] for n in known}
    for name, shape in there.items():
        (kind,) = [kind for kind in known if name == kind or name.endswith(f".{kind}")]
        assert sorted(known[kind]) == sorted(shape), name


def test_peft_fields_read_from_its_source_are_those_of_its_classes():
    real = {str(getattr(k, "value", k)): v for k, v in PEFT_TYPE_TO_CONFIG_MAPPING.items()}
    real.pop("UDV", None)  # ours
    assert set(peft_fields.classes()) == set(real)
    for kind, configured in real.items():
        names = {field.name for field in dataclasses.fields(configured)}
        assert set(peft_fields.fields(kind)) == names, kind
        method = PeftMethod("peft", peft_type=kind)
        assert peft_fields.takes_matrices(kind) == adapters.takes_matrices(method, configured)


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["method.r=257"], "method.r=257: attn.c_attn allows a rank of 256 at most"),
        (["model=gpt2", "method.r=769"], "a rank of 768 at most"),
        (["method=udv", "method.rank=300"], "method.rank=300: attn.c_attn allows a rank of 256"),
        (["targets.modules=[c_fcc]", "targets.name=x"], "'c_fcc' matches no matrix of gpt2_mini"),
        (
            ["data.context_length=512", "train.micro_batch=4"],
            "512 tokens is longer than gpt2_mini's 256",
        ),
        (["data.context_length=4096"], "4096 tokens is longer than gpt2_mini's 256"),
        (["data=text_files", "data.path=nothing.txt"], "no such file or folder"),
        (["+method.fields.use_doraa=1"], "LoraConfig has no such field; did you mean 'use_dora'"),
        (["method=peft", "method.peft_type=IA4"], "method.peft_type=IA4: did you mean 'IA3'?"),
        (["data=text_files", "data.path=one.txt"], "1 document(s) cannot be split"),
        (["data=text_files", "data.path=bad.jsonl"], "bad.jsonl, line 2: not JSON"),
        (["data=text_files", "data.path=field.jsonl"], "did you mean 'txt'?"),
        (["data=pairs", "data.path=bad.jsonl"], "bad.jsonl, line 1 is a record of text"),
        (["model=local", "model.path=."], "no config.json in this folder"),
    ],
)
def test_what_needs_no_torch_is_found_before_a_run_is_planned(
    make_run, tmp_path, monkeypatch, overrides, said
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "one.txt").write_text("one text\n")
    (tmp_path / "constraints.txt").write_text("much like nothing.txt, by its end\n")
    (tmp_path / "bad.jsonl").write_text('{"text": "a"}\n{"text": 3\n')
    (tmp_path / "field.jsonl").write_text('{"txt": "a"}\n')
    before = sorted(tmp_path.iterdir())
    told = line(overrides, make_run)
    assert said in told and "constraints" not in told
    assert sorted(tmp_path.iterdir()) == before  # not even a cache


def test_only_the_beginning_of_a_large_text_is_looked_at(make_run, tmp_path, monkeypatch):
    monkeypatch.setattr("harness.runs.early_checks.WHOLE_BYTES", 10)
    monkeypatch.setattr("harness.runs.early_checks.RECORDS", 3)
    file = tmp_path / "long.jsonl"
    file.write_text('{"text": "a text"}\n' * 5 + "{broken\n")
    assert make_run("data=text_files", f"data.path={file}").data.source == "text_files"
    file.write_text('{"text": "a text"}\n' * 2 + "{broken\n")
    with pytest.raises(ConfigError, match="line 3: not JSON"):
        make_run("data=text_files", f"data.path={file}")


def test_a_mistake_that_only_the_worker_finds_leaves_no_directory(make_run, tmp_path, monkeypatch):
    run = make_run(f"outputs_dir={tmp_path}/out", "method=full", "method.train_only=[nothing]")

    def refused(run, claim, *, quiet):
        record = run_record.read(run.run_dir) | {
            "status": "failed",
            "failure": {"class": "config", "message": "method.train_only: 'nothing' matches none"},
        }
        run_record.write(run.run_dir, record)
        (run.run_dir / "log.txt").write_text("Traceback …")
        return outcomes.of_record(run.run_dir, record)

    monkeypatch.setattr(worker_attempt, "attempt", refused)
    outcome = launcher.launch(run, "python -m harness …")
    assert (outcome.status, outcome.exit_code) == ("refused", 2)
    assert outcome.summary() == "method.train_only: 'nothing' matches none"
    assert not list(tmp_path.iterdir())

    # What was there before, or was measured before the mistake was found, stays.
    run.run_dir.mkdir(parents=True)
    assert launcher.launch(run, "…").status == "failed" and (run.run_dir / "log.txt").exists()
    shutil.rmtree(tmp_path / "out")
    real = run_directory.prepare

    def measured(run, *arguments, **more):
        real(run, *arguments, **more)
        (run.run_dir / run_record.METRICS_NAME).write_text('{"step": 0}\n')

    monkeypatch.setattr(run_directory, "prepare", measured)
    assert launcher.launch(run, "…").status == "failed" and (run.run_dir / "log.txt").exists()


def test_plan_and_count_take_m(capsys):
    assert count.main(["-m", "method=none,full,lora", "method.r=4,8", "seed=0,1"]) == 0
    rows = [row.split() for row in capsys.readouterr().out.splitlines() if "gpt2_mini" in row]
    assert [row[1:5] for row in rows] == [
        ["none", "-", "-", "4,273,664"], ["full", "-", "-", "4,273,664"],
        ["lora", "all", "4", "4,339,200"], ["lora", "all", "8", "4,404,736"],
    ]  # fmt: skip
    assert plan.main(["-m", "method=none,lora", "method.r=4,0"]) == 2
    shown = capsys.readouterr()
    assert "left out for methods that have no such key: method.r (none)" in shown.err
    assert "method.r=0: expected a rank of 1 or more" in shown.err


@pytest.mark.slow
def test_plan_lists_the_runs_of_a_sweep(capsys):
    assert plan.main(["-m", "method=none,lora", "method.r=4,8"]) == 0
    shown = capsys.readouterr()
    assert shown.out.count("lora-all-r") == 2 and shown.out.count("none-") == 1


def test_plan_and_count_find_a_mistake_without_torch():
    probe = (
        "import sys\n"
        "from harness.commands import count, plan\n"
        "codes = [module.main(['method.rr=3']) for module in (count, plan)]\n"
        "print(codes, sorted({'torch', 'transformers', 'peft'} & set(sys.modules)))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", probe], capture_output=True, text=True, cwd=REPOSITORY, timeout=60
    )
    assert done.stdout == "[2, 2] []\n"
    assert done.stderr == "error: unknown key 'method.rr': did you mean 'method.r'?\n" * 2


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("targets=[c_attn,c_proj]", r"expected one option .*all of them.*roles=\[qkv,mlp_out\]"),
        ("targets=[q,v]", r"sweep targets=q,v; for all of them at once, targets\.roles=\[q,v\]$"),
        ("targets=[attn,mlp]", r"targets\.roles=\[…\] or targets\.modules=\[…\]"),
        ("method=[udv,full]", r"expected one option of conf/method, as in method=udv"),
        ("data=[kjv,docstrings]", r"harness sweep data=kjv,docstrings"),
    ],
)
def test_a_list_of_options_is_refused_and_not_the_last_one_taken(override, said):
    """Hydra merges them, and the last one wins: targets=[q,v] trained v alone."""
    with pytest.raises(ConfigError, match=said):
        compose("method=lora", override)


@pytest.mark.parametrize(
    ("option", "meant"),
    [("q_proj", "q"), ("v_proj", "v"), ("fc1", "c_fc"), ("down_proj", "c_proj"), ("qkv", "c_attn")],
)
def test_what_other_models_call_a_matrix_is_told_by_what_it_does(option, meant):
    with pytest.raises(ConfigError, match=f"no such option; did you mean targets={meant}[?]$"):
        compose("method=lora", f"targets={option}")
    assert meant in options("targets")
