"""The claims' verdicts on runs written here, whose truth is known; scipy; Holm by hand."""

import csv
import math
import re
import sys
import zlib
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
from scipy import stats as scipy_stats

from harness import compose
from harness.config.errors import ConfigError
from harness.config.paths import REPOSITORY
from harness.report.table import rows
from harness.results import run_record

sys.path.insert(0, str(REPOSITORY / "experiments" / "claims"))
import budgets
import seven
import statements
import verdicts

DOCUMENTS, TOKENS = 30, 100
FULL = 3.0  # nats per token after 80 steps


def truth(run, better):
    """Nats per token: LoRA's gap to full fine-tuning falls with its rank, unless it is `better`."""
    if run.method.name == "none":
        return 5.0
    if run.method.name == "truncate":
        return 6.0
    shorter = 0.5 * math.log(80 / run.train.steps)
    if run.method.name == "full":
        return FULL + shorter
    if run.method.name == "lora":
        gap = 0.6 / math.sqrt(run.method.r)
        return FULL + shorter + (-gap if better else gap)
    return FULL + 1.0


def write(folder, run, *, better=False, slower=1.5):
    """A finished run, its documents and its learning curve: LoRA's steps are `slower`."""
    run_dir = folder / run_record.naming.run_name(run)
    run_dir.mkdir(parents=True)
    draw = np.random.default_rng(zlib.crc32(run_dir.name.encode()))
    fixed = run_record.naming.is_deterministic(run)
    nll = truth(run, better) + (0 if fixed else 0.01 * draw.normal())
    ids = [f"doc{i}" for i in range(DOCUMENTS)]
    nats = (nll + np.random.default_rng(0).normal(0, 0.1, DOCUMENTS)) * TOKENS
    frame = pd.DataFrame({"id": ids, "nll_nats": nats, "num_tokens": TOKENS})
    quality = {
        "nll_nats": float(nats.sum()), "num_tokens": DOCUMENTS * TOKENS,
        "perplexity": math.exp(nats.sum() / DOCUMENTS / TOKENS),
    }  # fmt: skip
    frame.to_parquet(run_dir / "documents-test.parquet", index=False)
    also = {}
    for name in run.evaluate.also:  # nobody forgets anything
        same = frame.assign(nll_nats=np.random.default_rng(1).normal(2, 0.1, DOCUMENTS) * TOKENS)
        for file in (f"documents-{name}.parquet", f"documents-{name}-before.parquet"):
            same.to_parquet(run_dir / file, index=False)
        told = {"nll_nats": float(same.nll_nats.sum()), "num_tokens": DOCUMENTS * TOKENS}
        also[name] = {"before": told, "after": told}
    lora = run.method.name == "lora"
    weights = {"frozen_weights": 100 if lora else 0, "trainable_weights": 1 if lora else 100}
    trained = weights["trainable_weights"]
    state = {"gradients": trained, "optimizer_state": 2 * trained}
    parts = weights | state | {"activations": 60}
    trainable = {"full": 10_000, "lora": 64 * getattr(run.method, "r", 0)}.get(run.method.name, 256)
    record = {
        "status": "finished", "wall_seconds": 1.0,
        "parameters": {"trainable": trainable, "total": 20_000, "trainable_percent": 1.0},
        "memory": {"peak_bytes": sum(parts.values()) * 2**20, "by_category": {
            name: size * 2**20 for name, size in parts.items()}},
        "predicted": {"peak_bytes": sum(parts.values()) * 2**20},
        "quality": {"test": quality, "validation": quality, "also": also},
        "evaluation": {"context_length": 256, "stride": 256, "tokenizer": "abc"},
        "environment": {"commit": "abcdef012345", "hardware": {"cpu": "a CPU"}, "runs_beside": 0},
    }  # fmt: skip
    run_record.write(run_dir, run_record.describe(run, run_dir) | record)
    if not run.train.steps or fixed:
        return
    with run_record.Metrics(run_dir, 0, -1) as metrics:
        for step in range(run.train.steps + 1):
            if step:
                seconds = (slower if lora else 1.0) * (1 + 0.001 * draw.normal())
                metrics.log({"step": step, "train/nll": 3.0, "train/step_seconds": seconds})
            if (
                step % run.evaluate.interval == 0
            ):  # from 5.3 nats to a third of that, at half of the speed with LoRA
                value = 5.3 - 2.0 * min(1.0, step / (80 if lora else 40)) + 0.01 * draw.normal()
                metrics.log({"step": step, "tokens": 2048 * step, "eval/validation/nll": value})


@pytest.fixture(scope="module")
def configured():
    return {name: compose(f"experiment={name}") for name in ("claims", "claims_lstm")}


def judge(tmp_path, monkeypatch, configured, capsys, **what):
    """README.md's statements -> verdict, of written runs."""
    for name, found in configured.items():
        for run in found:
            write(tmp_path / name, run, **what)
    out = tmp_path / "out"
    out.mkdir()
    monkeypatch.setattr(verdicts, "HERE", out)
    share = {"peak": 100.0} | dict.fromkeys(budgets.CATEGORIES, 20.0)
    monkeypatch.setattr(budgets, "peaks", lambda *o, **k: share)
    monkeypatch.setattr(sys, "argv", ["x", str(tmp_path / "claims"), str(tmp_path / "claims_lstm")])
    assert verdicts.main() == 0, capsys.readouterr().err
    page = (out / "README.md").read_text()
    return out, dict(re.findall(r"^\| ([^|]+) \| ~?([a-z ]+) \| [^|]+ \| [^|]+ \|$", page, re.M))


@pytest.mark.slow
def test_the_verdicts_are_the_truth_of_the_runs(tmp_path, monkeypatch, configured, capsys):
    out, found = judge(tmp_path, monkeypatch, configured, capsys)
    assert (
        found["LoRA r=1 and r=8 of every matrix train a tenth of the parameters, or fewer"]
        == "holds"
    )
    assert found["at equal steps (80), LoRA r=64 gets below full fine-tuning"] == "does not hold"
    assert found["a step of LoRA r=8 is shorter"] == "does not hold"
    # Read every 10 steps: 60 against 30 is known to be more, and 28 against 14 hardly is.
    assert found["LoRA r=8 needs fewer steps to validation perplexity 45"] == "does not hold"
    assert found["LoRA r=8 needs fewer steps to validation perplexity 100"] == "cannot be told"
    assert found["in 80 steps with all of the text, full is better than LoRA r=1"] == "holds"
    assert found["training D alone adapts the model (full rank, 4,096 parameters)"] == "holds"
    assert found["LoRA r=8 of every matrix needs less memory, 8 blocks a pass"] == "holds"
    assert found["what shrinks at that peak is the optimizer's state"] == "holds"
    assert found["activations do not shrink"] == "holds"
    assert (
        found["where memory is scarce LoRA fits and full fine-tuning does not"] == "does not hold"
    )
    # No difference at all: nothing is forgotten by anyone.
    assert found["LoRA r=8 forgets less (all of the text)"] == "cannot be told"
    named = [path.name for path in out.glob("*.png")]
    assert {name[0] for name in named} == set("1234567")
    page = (out / "README.md").read_text()
    assert all(f"]({name})" in page for name in named) and page.count("\n## ") == 9
    marked = " ".join(re.findall(r"^\| ([^|]+) \| ~", page, re.M))  # rates for 80 steps, at 240
    assert "in three times its steps" in marked and "at equal steps (80)" not in marked
    # What was found later of the recorded runs is not printed with these, which are others.
    later = " ".join(verdicts.LATER) + " ".join(p for ps in verdicts.LATER.values() for p in ps)
    numbers = set(re.findall(r"0\.\d{3}|\d+\.\d+ to \d+\.\d+", later))
    assert len(numbers) > 5 and not any(f" {number}" in page for number in numbers)
    assert "## Later" not in page and "These runs have no control" in page.replace("\n", " ")
    rows = list(csv.DictReader((out / "runs.csv").open()))
    assert len(rows) == sum(map(len, configured.values()))


@pytest.mark.slow
def test_the_opposite_truth_turns_them(tmp_path, monkeypatch, configured, capsys):
    _, found = judge(tmp_path, monkeypatch, configured, capsys, better=True, slower=0.5)
    assert found["at equal steps (80), LoRA r=64 gets below full fine-tuning"] == "holds"
    assert found["a step of LoRA r=8 is shorter"] == "holds"
    assert (
        found["in 80 steps with all of the text, full is better than LoRA r=1"] == "does not hold"
    )


@pytest.mark.slow
@pytest.mark.parametrize(("of_rank", "verdict"), [(0.6, "holds"), (0.0, "cannot be told")])
def test_with_the_control_the_verdict_on_the_rank_is_of_the_rank(
    tmp_path, configured, monkeypatch, of_rank, verdict
):
    """Both leave frozen what costs 0.6 nats per token; the rank of LoRA may cost as much again."""

    def nll(run, better):
        if run.method.name == "full":
            return FULL + (0.6 if run.method.train_only else 0.0)
        return 5.0 if run.method.name == "none" else FULL + 0.6 + of_rank

    monkeypatch.setitem(globals(), "truth", nll)
    needed = [
        run for run in configured["claims"]
        if run.method.name in ("none", "full", "lora") and run.train.micro_batch == 8
        and run.targets.name == "all" and run.train.steps >= 80
    ]  # fmt: skip
    for run in needed:
        write(tmp_path, run)
    alone = seven.expressiveness(statements.Runs(tmp_path, rows(tmp_path)))
    assert alone.verdict() == "holds" and "no verdict on the rank alone" in " ".join(alone.remarks)
    same = (
        "method=full method.train_only=[matrices] train.steps=80 train.lr=2e-3 evaluate.interval=10"
    )
    for seed in range(3):
        write(tmp_path, compose(*same.split(), f"seed={seed}")[0])
    claim = seven.expressiveness(statements.Runs(tmp_path, rows(tmp_path)))
    found = dict(zip([s.text for s in claim.statements], claim.verdicts(), strict=True))
    assert claim.verdict() == verdict and len(claim.statements) == len(alone.statements) + 4
    frozen = "full fine-tuning is better than LoRA's matrices at full rank, the rest frozen"
    assert found[frozen] == "holds"
    assert found["in 80 steps with all of the text, full is better than LoRA r=64"] == "holds"


@pytest.mark.parametrize("commit", [verdicts.RECORD + "0" * 33, "abcdef012345"])
@pytest.mark.parametrize("control", [None, "its row"])
def test_what_was_found_later_is_printed_with_its_record_only(commit, control):
    records = [{"environment": {"commit": commit}}]
    runs = SimpleNamespace(rows=[SimpleNamespace(records=records)], control=lambda: control)
    said = "\n".join(verdicts.later(runs, runs))
    assert all((f"## {heading}" in said) == (commit[:7] == verdicts.RECORD)
               for heading in verdicts.LATER)  # fmt: skip
    assert ("## No control in the sweep" in said) == (control is None)
    other = SimpleNamespace(rows=[SimpleNamespace(records=[{"environment": {"commit": "f" * 40}}])])
    assert "## Later" not in "\n".join(verdicts.later(runs, other))


def row(name, needs):
    """A row of which `what` is known, a seed each."""
    records = [{"config": {"seed": seed}} for seed in range(len(needs))]
    found = [statements.Need(abs(n), is_bound=n < 0) for n in needs]  # here: below 0, a bound
    values = {"method.name": "lora", "method.label": name, "method.rank": None}
    return SimpleNamespace(name=name, records=records, needs=found, values=values)


def smaller(a, b):
    return statements.smaller("", "steps", row("a", a), row("b", b), lambda row: row.needs)


def test_ratios_are_tested_as_scipy_does():
    found = smaller([1.1, 1.3, 1.0], [2.0, 2.1, 2.3])
    logs = np.log([1.1 / 2.0, 1.3 / 2.1, 1.0 / 2.3])
    test = scipy_stats.ttest_1samp(logs, 0)
    assert found.p == pytest.approx(test.pvalue) and found.favours
    low, high = np.exp(test.confidence_interval())
    assert f"ratio {np.exp(logs.mean()):.2f} ({low:.2f} to {high:.2f})" in found.numbers


def test_who_is_not_there_by_the_end_needs_more_and_that_is_known():
    found = smaller([-80, 79, -80] * 2, [20, 21, 20] * 2)
    assert not found.favours and "more than 79.7 against 20.3, more in 6 of 6" in found.numbers
    assert found.p == pytest.approx(2 * 0.5**6)
    assert statements.Claim("", [found], []).verdicts() == ["does not hold"]
    few = smaller([-80, 79, -80], [20, 21, 20])
    assert statements.Claim("", [few], []).verdicts() == ["cannot be told"]
    # More than 20 against 21 is no sign of less, and of what `b` needs nothing is known.
    for a, b in (([-20, -20, -20], [21, 22, 21]), ([20, 20, 20], [-80, 70, 75])):
        assert statements.Claim("", [smaller(a, b)], []).verdicts() == ["cannot be told"]


def test_what_lies_between_two_readings_is_in_a_ratio_s_interval():
    a = [statements.Need(x, least=30, most=40) for x in (33, 35, 38)]
    b = [statements.Need(x, least=10, most=20) for x in (17, 18, 17)]
    both = row("a", []), row("b", [])
    for one, needs in zip(both, (a, b), strict=True):
        one.records, one.needs = [{"config": {"seed": seed}} for seed in range(3)], needs
    found = statements.smaller("", "steps", *both, lambda row: row.needs)
    logs = np.log([33 / 17, 35 / 18, 38 / 17])
    error = scipy_stats.sem(logs)
    half = scipy_stats.t.ppf(0.975, 2) * error
    low, high = 30 / 20 * math.exp(-half), 40 / 10 * math.exp(half)
    ends = f"ratio {np.exp(logs.mean()):.2f} ({low:.2f} to {high:.2f})"
    assert found.numbers == f"steps: 30-40 against 10-20, {ends}"
    assert found.p == pytest.approx(2 * scipy_stats.t.sf(math.log(1.5) / error, 2))
    # What may be equal is not told apart, however little seeds differ; from 0 on there is no bound.
    for least, most in ((20, 40), (0, 40)):
        both[1].needs = [statements.Need(n.amount, least=0, most=20) for n in b]
        both[0].needs = [statements.Need(n.amount, least=least, most=most) for n in a]
        found = statements.smaller("", "steps", *both, lambda row: row.needs)
        assert found.p == 1 and "to inf)" in found.numbers
    assert statements.Need(30, least=20, most=40).times(0.5).ends == (10, 20)


def test_the_ratio_of_steps_that_are_read_every_ten_is_covered():
    """Curves of known truth: the intervals of ratios hold the ratio that no reading shows."""
    rng = np.random.default_rng(3)
    for spread in (0.02, 0.1, 0.3):
        covers = 0
        for _ in range(300):
            true = rng.uniform(15, 60, 2)  # steps to the level of two methods
            needs = []
            for x in true:
                own = x * np.exp(spread * rng.standard_normal(3))
                above = np.ceil(own / 10) * 10 - 10
                line = np.log1p(own) - np.log1p(above)  # validation is not a line in between
                share = line / (np.log1p(above + 10) - np.log1p(above))
                needs.append([
                    statements.Need(a + 10 * s, least=a, most=a + 10)
                    for a, s in zip(above, share, strict=True)
                ])  # fmt: skip
            logs, lower, upper = statements.log_ratios(list(zip(*needs, strict=True)))
            half = statements.views.mean(logs)[1]
            truth = math.log(true[0] / true[1])
            covers += np.mean(lower) - half <= truth <= np.mean(upper) + half
        assert covers >= scipy_stats.binom.ppf(0.001, 300, 0.95), spread


def test_tests_of_a_claim_share_its_level():
    def one(p, favours=True):
        return statements.Statement("", "", favours, p, ())

    alone = statements.Claim("", [one(0.03)], [])
    both = statements.Claim("", [one(0.03), one(0.03), one(None, False)], [])
    assert alone.verdicts() == ["holds"]
    assert both.verdicts() == ["cannot be told", "cannot be told", "does not hold"]
    assert statements.Claim("", [one(0.001, False), one(0.04)], []).verdicts() == [
        "does not hold", "holds",
    ]  # fmt: skip


def test_a_claim_of_several_parts_holds_where_all_do():
    def one(p, favours):
        return statements.Statement("", "", favours, p, ())

    parts = [one(None, True), one(1e-6, True), one(0.5, True), one(1e-6, False)]
    assert statements.Claim("", parts, [], main=2).verdict() == "holds"
    assert statements.Claim("", parts, [], main=3).verdict() == "cannot be told"
    assert statements.Claim("", parts, [], main=4).verdict() == "does not hold"


def test_a_run_that_is_missing_is_named(tmp_path):
    with pytest.raises(ConfigError, match="has no finished lora all 8 steps=80"):
        statements.Runs(tmp_path, []).one("lora", 8)
