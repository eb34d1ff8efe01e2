"""A run stops at a step of its own schedule, unfinished, and goes on to the same last bit."""

from dataclasses import replace

import pytest
from cut_runs import CONFIG, outcome

from harness.config import naming
from harness.config.errors import ConfigError
from harness.report import missing, table
from harness.report.evidence import find
from harness.results import run_record
from harness.runs import launcher
from harness.runs.decision import Decision, Found, Request, decide


def at(run, step):
    return replace(run, launch=replace(run.launch, pause_at=step))


@pytest.fixture
def run(make_run, tmp_path):
    return make_run(*CONFIG, f"outputs_dir={tmp_path}", "run_name=paused")


@pytest.mark.slow
def test_a_run_paused_at_two_rungs_equals_an_unbroken_one_bit_for_bit(run):
    for rung, resumed in ((4, []), (8, [4])):
        paused = launcher.launch(at(run, rung), "test", sweep=True)
        assert (paused.status, paused.exit_code) == ("paused", 0), paused
        assert f"paused after step {rung} of 12" in paused.summary()
        record = run_record.read(run.run_dir)
        assert record["status"] == "paused" and "failure" not in record
        assert record["run"]["paused_at"] == rung and record["run"]["resumed_at"] == resumed
        steps = [r["step"] for r in run_record.read_metrics(run.run_dir) if "train/nll" in r]
        assert steps == list(range(1, rung + 1))  # none is missing, none was taken twice
        validated = [
            r["step"] for r in run_record.read_metrics(run.run_dir) if "eval/validation/nll" in r
        ]
        assert validated[-1] == rung
        assert not list(run.run_dir.glob("documents-test*"))
        # It is in no table, and the report says what it is.
        assert table.rows(run.run_dir.parent) == []
        (told,) = missing.find(find(run.run_dir.parent))
        assert (told.status, told.reason) == ("paused", f"after step {rung} of 12")
    before = (run.run_dir / run_record.FILE_NAME).stat().st_mtime_ns
    for rung in (4, 8):  # it is there already: no worker is started
        assert launcher.launch(at(run, rung), "test", sweep=True).status == "paused"
    assert (run.run_dir / run_record.FILE_NAME).stat().st_mtime_ns == before
    assert launcher.launch(run, "test", sweep=True).status == "finished"
    assert not run_record.can_resume(run.run_dir)
    assert run_record.read(run.run_dir)["run"]["resumed_at"] == [4, 8]

    unbroken = replace(run, run_name="unbroken")
    assert launcher.launch(unbroken, "test", sweep=True).status == "finished"
    assert outcome(run.run_dir) == outcome(unbroken.run_dir)
    for name in ("documents-test.parquet", "documents-validation.parquet"):
        assert (run.run_dir / name).read_bytes() == (unbroken.run_dir / name).read_bytes()


def test_where_a_run_pauses_is_not_part_of_what_it_is(run):
    unnamed = replace(run, run_name=None)
    assert naming.identity(at(unnamed, 4)) == naming.identity(unnamed)
    assert at(unnamed, 4).run_dir == unnamed.run_dir


@pytest.mark.parametrize(
    ("step", "said"),
    [(6, "try 4 or 8"), (3, "try 4$"), (0, "launch.pause_at=0: expected 1 or more")],
)
def test_a_pause_that_would_make_another_run_is_refused(make_run, step, said):
    with pytest.raises(ConfigError, match=said):
        make_run(*CONFIG, f"launch.pause_at={step}")
    make_run(*CONFIG, "launch.pause_at=8")
    make_run(*CONFIG, "launch.pause_at=13")  # which finishes


PAUSED = Found("paused", same=True, can_resume=True, ended=100, paused_at=8)


@pytest.mark.parametrize(
    ("found", "request_", "decided"),
    [
        (PAUSED, Request(pause_at=8), Decision.LEAVE),
        (PAUSED, Request(pause_at=4), Decision.LEAVE),
        (PAUSED, Request(pause_at=12), Decision.RESUME),
        (PAUSED, Request(), Decision.RESUME),
        (PAUSED, Request(rerun=True), Decision.START),
        (replace(PAUSED, can_resume=False), Request(pause_at=12), Decision.START),
        (replace(PAUSED, same=False), Request(pause_at=8), Decision.REFUSE_UNFINISHED),
        (Found("finished", same=True, ended=100), Request(pause_at=4), Decision.SKIP),
        (Found("interrupted", True, can_resume=True), Request(pause_at=4), Decision.RESUME),
    ],
)
def test_what_is_done_about_a_paused_run(found, request_, decided):
    assert decide(found, request_) is decided
