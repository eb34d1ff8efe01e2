"""The search of learning rates against parabolas of known vertex, and as a user starts it."""

import math

import pytest
import yaml

from harness.config import rate_lookup, rates
from harness.config.errors import ConfigError
from harness.config.optimizers import LoraPlusOptimizer
from harness.config.paths import CONF_DIR, options
from harness.config.rates import Rates, Tuned
from harness.report.columns import is_own_rate
from harness.results import run_record

SETTING = {
    "model.name": "gpt2_mini", "model.asset": "gpt2_mini", "data.name": "kjv", "data.source": "kjv",
    "data.validation_share": 0.02, "data.test_share": 0.04, "data.context_length": 256,
    "train.steps": 80,
    "train.batch_tokens": 2048,
}  # fmt: skip


def parabola(vertex, rate):
    return 3 + 0.2 * math.log(rate / vertex) ** 2


@pytest.mark.parametrize("vertex", [1e-5, 7e-4, 1e-2, 0.013, 0.4, 9.0])
def test_the_grid_grows_until_the_best_is_inside(vertex):
    grid = {rate: parabola(vertex, rate) for rate in rates.grid_around(1e-2, 5, 2.0)}
    rounds = 0
    while further := rates.further(grid, 2.0):
        assert rates.edge(grid) in ("lowest", "highest")
        grid |= {rate: parabola(vertex, rate) for rate in further}
        rounds += 1
    assert rates.edge(grid) is None and rounds <= 12
    assert abs(math.log2(rates.best(grid) / vertex)) <= 0.5 + 1e-9
    assert rates.fitted(grid) == pytest.approx(vertex, rel=1e-3)


def test_a_rate_that_diverges_is_worse_than_any_and_bounds_the_grid():
    grid = {1.0: 4.0, 2.0: 3.0, 4.0: None}
    assert rates.best(grid) == 2.0 and rates.edge(grid) is None and not rates.further(grid, 2.0)
    assert rates.fitted(grid) == 2.0  # no parabola through a point that is not there
    assert rates.further({1.0: None, 2.0: None}, 2.0) == [0.5]
    assert rates.further({1.0: 3.0, 2.0: math.nan}, 2.0) == [0.5]


def test_the_file_is_read_as_it_was_written(tmp_path):
    tuned = (
        Tuned("full", None, None, None, {1e-5: 3.5, 2e-5: 3.25, 4e-5: None}),
        Tuned("udv-d", "all", "full", None, {0.5: 3.0, 1.0: 2.5, 20.0: 2.75}),
        Tuned("lora", "mlp", "3", 1 / 3, {0.001: 3.0, 0.002: 2.5}, {"dropout": 0.1}, "abc on x"),
        Tuned("a: b, [c]", "null", "8", None, {0.001: 3.0}),
    )
    path = tmp_path / "x.yaml"
    path.write_text(rates.text(SETTING, tuned))
    found = rates.read(str(path))
    assert found == Rates(path, SETTING, tuned)
    assert "at_edge: highest" in path.read_text()


def method(make_run, *overrides):
    return make_run(*overrides).method


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "rates.yaml"
    path.write_text(
        rates.text(
            SETTING,
            [
                Tuned("full", None, None, None, {1e-3: 3.0, 2e-3: 2.0, 4e-3: 3.0}),
                Tuned("lora", "all", "4", 2.0, {8e-3: 3.0, 16e-3: 2.0, 32e-3: 3.0}),
                Tuned("lora", "all", "64", 2.0, {2e-3: 3.0, 4e-3: 2.0, 8e-3: 3.0}),
                Tuned("lora", "all", "4", 4.0, {4e-3: 3.0, 8e-3: 2.0, 16e-3: 3.0}),
                Tuned("lora", "mlp", "4", 2.0, {8e-3: 3.0, 20e-3: 2.0}),
                Tuned("udv-d", "all", "64", None, {0.1: 3.0, 0.2: 2.0, 0.4: 3.0}),
                Tuned("udv-d", "all", "full", None, {0.2: 3.0, 0.3: 2.0, 0.4: 3.0}),
            ],
        )
    )
    return str(path)


@pytest.mark.parametrize(
    ("overrides", "lr", "said"),
    [
        (["method=full"], 2e-3, "tuned"),
        (["method=full", "targets=mlp"], 2e-3, "tuned"),
        (["method.r=4"], 16e-3, "tuned"),
        (["method.r=4", "method.alpha=8"], 16e-3, "tuned"),
        (["method.r=16"], 8e-3, "interpolated between r=4 and r=64"),  # half-way in log r
        (["method.r=1"], 16e-3, "as tuned for r=4"),
        (["method.r=128"], 4e-3, "as tuned for r=64"),
        (["method.r=4", "method.alpha=4r"], 8e-3, "tuned"),
        (["method.r=4", "method.alpha=1r"], 16e-3, "tuned at alpha=2r"),
        (["method.r=4", "targets=qv"], 16e-3, "tuned on targets=all"),
        (["method.r=4", "targets=mlp"], 20e-3, "tuned, at the highest of its grid"),
        (["method=udv"], 0.3, "tuned"),
        (["method=udv", "method.rank=64"], 0.2, "tuned"),
        (["method=udv", "method.rank=32"], 0.2, "as tuned for k=64"),
        (["method=udv", "method.rank=0.5"], 0.2, "as tuned for k=64"),
        (["method=none"], 1e-3, "not used"),
        (["method=truncate", "method.rank=8"], 1e-3, "not used"),
        (["method.r=4", "method.dropout=0.1"], 16e-3, "tuned with another method.dropout"),
        (["method.r=4", "method.use_rslora=true"], 16e-3, "tuned with another method.use_rslora"),
        (["method=full", "train.steps=100"], 2e-3, "tuned, for train.steps=80"),
        (["method=full", "train.warmup=0"], 2e-3, "tuned, for train.warmup=the default"),
        (["method=full", "data.context_length=64"], 2e-3, "tuned, for data.context_length=256"),
        (["method=full", "train.micro_batch=4", "train.threads=1"], 2e-3, "tuned"),
    ],
)
def test_a_rate_and_where_it_is_from(make_run, file, overrides, lr, said):
    run = make_run("train.lr=tuned", f"train.rates={file}", "train.steps=80", *overrides)
    assert run.train.lr == pytest.approx(lr)
    assert run.train.lr_from == said
    assert run_record.describe_method(run)["lr_from"] == said


@pytest.mark.parametrize(
    ("overrides", "lr", "said"),
    [
        (["method.r=8"], 0.02, "tuned, for train.steps=80"),
        (["method.r=8", "train.steps=80"], 0.02, "tuned"),
        (["method.r=16", "train.steps=80"], 0.0126, "interpolated between r=8 and r=64"),
        (["method=full", "train.steps=80"], 0.002, "tuned"),
        (["method=full", "data.test_share=0.1", "train.steps=80"], 0.002,
         "tuned, for data.test_share=0.04"),
        (["method=full", "data=docstrings"], 0.001, "default: half of the rate tuned on kjv"),
        (["method=pissa"], 0.01, "default: half of the rate tuned with another method.init"),
        (["method.r=128"], 0.0025, "default: half of the rate as tuned for r=64"),
        (["method.r=8", "method.label=mine", "train.steps=80"], 0.02, "tuned"),
        (["method.r=8", "data.train_share=0.01", "train.steps=80", "seed=3"], 0.01,
         "tuned, for train_share"),
        (["method=none"], 1e-3, "not used"),
        (["method=truncate"], 1e-3, "not used"),
        # 5e-5 * 10 * (2000 / 768) ** 0.781 * sqrt(32 / alpha), and a tenth of it at alpha 32
        (["model=gpt2", "method.r=8", "method.alpha=32"], 1.1e-3, "default: width 768, alpha 32"),
        (["model=gpt2", "method.r=64", "method.alpha=32"], 1.1e-3, "default: width 768, alpha 32"),
        (["model=gpt2", "method.r=8", "method.alpha=8"], 2.1e-3, "default: width 768, alpha 8"),
        (["model=gpt2", "method.r=4", "method.alpha=16", "method.use_rslora=true"], 1.1e-3,
         "default: width 768, alpha 32"),
        (["model=gpt2", "method=full"], 1.1e-4, "default: width 768"),
        (["model=gpt2_xl", "method=full"], 6e-5, "default: width 1600"),
        (["model=gpt2", "method=full", "method.train_only=[biases]"], 1e-3, "default: of vectors"),
        (["model=hub", "model.id=a/b", "targets=mlp", "method.alpha=32"], 8.4e-4,
         "default: width not known, taken as 1024, alpha 32"),
        (["model=lstm", "method=full"], 2e-3, "default: from random weights, width 256"),
        (["method=peft", "method.peft_type=IA3"], 5e-3, "default: PEFT's of IA3"),
        (["method=peft", "method.peft_type=LOHA"], 7e-4, "default: PEFT's of LOHA, width 256"),
    ],
)  # fmt: skip
def test_the_rate_of_auto_is_tuned_or_a_default_that_says_so(make_run, overrides, lr, said):
    run = make_run("train.lr=auto", *overrides)
    assert run.train.lr == pytest.approx(lr)
    if said == "tuned, for train_share":  # the file of a hundredth of the text, not that of all
        assert run.train.lr_from.startswith("tuned") and "train_share" not in run.train.lr_from
    else:
        assert run.train.lr_from == said


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["method.r=0"], "method.r=0"),
        (["method.r=-1"], "method.r=-1"),
        (["method.alpha=0"], "method.alpha"),
        (["method.alpha=.nan"], "method.alpha"),
        (["method.alpha=x"], "method.alpha='x'"),
        (["method=udv", "method.train=uv"], "method.train"),
        (["train.lr=auto_"], "train.lr"),
    ],
)
def test_a_mistake_in_the_method_is_told_as_such(make_run, overrides, said):
    with pytest.raises(ConfigError) as error:
        make_run("train.lr=auto", *overrides)
    assert said in str(error.value)


def test_the_width_is_read_from_a_models_own_files(make_run, tmp_path):
    (tmp_path / "config.json").write_text('{"text_config": {"hidden_size": 2000}}')
    local = ["model=local", f"model.path={tmp_path}", "targets.modules=[q]"]
    run = make_run("train.lr=auto", "method=full", *local)
    assert run.train.lr == 5e-5 and run.train.lr_from == "default: width 2000"


def three_documents(folder):
    """The overrides of a text of one's own."""
    (folder / "a.txt").write_text("one|two|three")
    path = f"data.path={folder}/a.txt"
    return ["data=text_files", path, "data.document_separator='|'"]


def test_auto_finds_a_search_of_ones_own(make_run, tmp_path, monkeypatch):
    mine = [*three_documents(tmp_path), "method=full", "train.steps=80"]
    first = make_run("train.lr=auto", *mine)
    setting = rates.setting_of(first.model, first.data, vars(first.train))
    (tmp_path / "rates").mkdir()
    (tmp_path / "rates" / "mine.yaml").write_text(
        rates.text(setting, [Tuned("full", None, None, None, {3e-3: 3.0, 6e-3: 2.0, 12e-3: 3.0})])
    )
    for module in (rates, rate_lookup):
        monkeypatch.setattr(module, "own_path", lambda name: tmp_path / "rates" / f"{name}.yaml")
    second = make_run("train.lr=auto", *mine)
    assert first.train.lr_from.startswith("default: half") and second.train.lr_from == "tuned"
    assert second.train.lr == 6e-3


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["method=pissa"], "has no rate for pissa, but for full, lora, udv-d: give train.lr"),
        (["method=udv", "method.train=udv"], "no rate for udv-udv"),
        (["train.rates=gpt2_mimi_kjv"], "did you mean 'gpt2_mini_kjv'"),
        (["train.rates=null"], "needs train.rates"),
        (["train.lr=tune"], "train.lr"),
    ],
)
def test_what_has_no_rate_is_refused(make_run, file, overrides, said):
    with pytest.raises(ConfigError) as error:
        make_run("train.lr=tuned", f"train.rates={file}", *overrides)
    assert said in str(error.value)


@pytest.mark.parametrize("text", ["", "3", "tuned: 3", "tuned: [{family: x}]", "{", "tuned: [3]"])
def test_a_damaged_file_is_refused(tmp_path, text):
    (tmp_path / "x.yaml").write_text(text)
    with pytest.raises(ConfigError, match="is no file of rates"):
        rates.read(str(tmp_path / "x.yaml"))


def test_other_models_and_texts_are_told(make_run, file, tmp_path):
    mine = three_documents(tmp_path)
    said = make_run("train.lr=tuned", f"train.rates={file}", "method=full", *mine).train.lr_from
    assert "data.name=kjv" in said and "data.path" in said
    said = make_run("train.lr=tuned", f"train.rates={file}", "method=full", "model=gpt2").train
    assert "model.name=gpt2_mini" in said.lr_from


def test_a_rank_that_is_no_number_takes_what_there_is(make_run, tmp_path):
    path = tmp_path / "x.yaml"
    path.write_text(
        rates.text(SETTING, [Tuned("udv-d", "all", "full", None, {0.1: 3.0, 0.2: 2.0})])
    )
    run = make_run("train.lr=tuned", f"train.rates={path}", "method=udv", "method.energy=0.9")
    assert run.train.lr == 0.2 and run.train.lr_from.startswith("as tuned for k=full")


def test_the_name_and_the_identity_do_not_tell_how_a_rate_was_found(make_run, file):
    from harness.config.naming import identity, run_name

    tuned = make_run("method=full", "train.lr=tuned", f"train.rates={file}")
    given = make_run("method=full", "train.lr=2e-3")
    assert (run_name(tuned), identity(tuned)) == (run_name(given), identity(given))


@pytest.mark.parametrize("name", options("rates"))
def test_every_best_of_the_files_that_ship_is_inside_its_grid(name):
    found = rates.read(name)
    assert not [str(t) for t in found.tuned if rates.edge(t.grid)]
    assert min(len(t.grid) for t in found.tuned) >= 5
    loaded = yaml.safe_load((CONF_DIR / "rates" / f"{name}.yaml").read_text())
    for t, written in zip(found.tuned, loaded["tuned"], strict=True):
        assert written["lr"] == t.lr
        assert written["fitted"] == pytest.approx(rates.fitted(t.grid), rel=0.01)
        assert written["made"] and "-dirty" not in written["made"]


SHORT = (
    "experiment=tune", "train.steps=2", "evaluate.interval=2", "data.validation_share=0.003",
    "data.test_share=0.003", "data.context_length=64", "train.batch_tokens=512",
    "train.micro_batch=2",
    "hydra.sweeper.grids=[{method: full, train.lr: 5e-4}]", "hydra.sweeper.points=3",
)  # fmt: skip


@pytest.mark.slow
def test_a_search_from_the_command_line(harness, tmp_path):
    done = harness(*SHORT, "hydra.sweeper.factor=10", "hydra.sweeper.file=mine.yaml")
    assert done.returncode == 0, done.stdout + done.stderr
    found = rates.read(str(tmp_path / "mine.yaml"))
    (full,) = found.tuned
    assert rates.edge(full.grid) is None and len(full.grid) >= 3
    assert found.setting["train.steps"] == 2 and found.setting["seed"] == 1000
    runs = list((tmp_path / "outputs" / "tune").glob("*/result.json"))
    assert {path.parent.name.split("-")[0] for path in runs} == {"full"}
    assert len(runs) == len(full.grid)
    for path in runs:  # nothing of the test set is there, and what was chosen by is on record
        record = run_record.read(path.parent)
        assert "test" not in record["quality"] and "test" not in record["data"]["num_documents"]
        assert not (path.parent / "documents-test.parquet").exists()
        quality = record["quality"]["validation"]
        nll = quality["nll_nats"] / quality["num_tokens"]
        below_start = record["quality"]["best_step"] > 0
        expected = pytest.approx(nll, abs=1e-5) if below_start else None
        assert full.grid[record["config"]["train"]["lr"]] == expected

    again = harness(*SHORT, "hydra.sweeper.factor=10", "hydra.sweeper.file=mine.yaml")
    assert again.returncode == 0 and "validation only" not in again.stdout  # nothing to do
    assert rates.read(str(tmp_path / "mine.yaml")).tuned == found.tuned

    other = harness(*SHORT, "seed=3", "hydra.sweeper.file=mine.yaml")
    assert other.returncode == 2 and "another setting (seed 1000 and 3)" in other.stderr
    test = harness(*SHORT, "evaluate.test=true", "hydra.sweeper.file=mine.yaml")
    assert test.returncode == 2 and "get no test set" in test.stderr


# --------------------------------------------------------------------- of which optimizer


def test_a_rate_is_tuned_for_the_optimizer_that_it_was_found_with_alone(tmp_path, make_run):
    first = make_run("method=lora", "train.lr=1e-2")
    setting = rates.setting_of(first.model, first.data, vars(first.train))
    plus = LoraPlusOptimizer("lora_plus", ratio=4.0)
    grid = {0.005: 3.2, 0.01: 3.1, 0.02: 3.3}
    of_plus = {0.001: 3.2, 0.002: 3.0, 0.004: 3.4}
    tuned = [
        rates.tuned_of(first.method, "all", grid, "now"),
        rates.tuned_of(first.method, "all", of_plus, "now", plus),
    ]
    assert tuned[0].key != tuned[1].key
    path = tmp_path / "mine.yaml"
    path.write_text(rates.text(setting, tuned), "utf-8")
    assert rates.read(str(path)).tuned == tuple(tuned)
    assert "optimizer" not in rates.text(setting, tuned[:1])  # a file of before is as it was

    def resolved(*overrides):
        run = make_run("method=lora", f"train.rates={path}", *overrides)
        return run.train.lr, run.train.lr_from

    assert resolved("train.lr=tuned") == (0.01, "tuned")
    assert resolved("train.lr=tuned", "optimizer=lora_plus", "optimizer.ratio=4") == (
        0.002,
        "tuned",
    )
    lr, said = resolved("train.lr=tuned", "optimizer=lora_plus", "optimizer.ratio=8")
    assert (lr, said) == (0.002, "tuned with another optimizer.ratio")
    with pytest.raises(ConfigError, match=r"no rate for lora with optimizer=muon, but for lora, "):
        resolved("train.lr=tuned", "optimizer=muon")
    # auto: what was found with it; or else half of AdamW's, and said to be no tuned rate.
    assert resolved("optimizer=lora_plus", "optimizer.ratio=4") == (0.002, "tuned")
    lr, said = resolved("optimizer=muon")
    assert lr == 0.005 and said == "default: half of AdamW's rate (tuned)"
    assert not is_own_rate(said)
    path.write_text(rates.text(setting, tuned[:1]), "utf-8")
    lr, said = resolved("optimizer=lora_plus", "optimizer.ratio=4")
    assert lr == 0.0025 and said.startswith("default: half of AdamW's rate (tuned), over the root")
