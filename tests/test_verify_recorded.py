"""The comparison with recorded experiments: what has changed must fail, and nothing else."""

import sys

import pytest

from harness.config.paths import REPOSITORY

sys.path.insert(0, str(REPOSITORY / "experiments"))
import verify_recorded as verify

BY_NAME = {record.name: record for record in verify.RECORDS}
SEEDS, OLD = BY_NAME["main_seeds"], BY_NAME["targets_sweep"]


def changed(record, row, column, factor):
    """The verdicts that are not `identical` where one number of the record is another."""
    old = verify.recorded(record)
    new = [dict(found) for found in old]
    (one,) = [found for found in new if verify.key(found) == row]
    one[column] = repr(float(one[column]) * factor)
    found = verify.compare(record, old, new)
    assert len(found) > 4 * len(old)
    return [(c.row, c.column, c.verdict) for c in found if c.verdict != "identical"]


@pytest.mark.parametrize(
    ("column", "factor", "verdict"),
    [
        (verify.TEST, 1.003, "OUTSIDE"),
        (verify.TEST, 0.997, "OUTSIDE"),
        (verify.TEST, 1 + 1e-5, "within 0.20%"),
        (verify.TEST, float("nan"), "OUTSIDE"),
        (verify.STEP0, 1.001, "OUTSIDE"),  # before training nothing is amplified
        ("quality.test.bits_per_byte", 0.99, "OUTSIDE"),
        ("quality.also.docstrings_held_out.after.perplexity", 1.01, "OUTSIDE"),
        ("parameters.trainable", 1 + 1e-5, "OUTSIDE"),
        ("quality.test.num_tokens", 1 - 1e-4, "OUTSIDE"),
        ("seeds", 2 / 3, "OUTSIDE"),  # a run failed
        ("memory.peak_bytes", 1.06, "OUTSIDE"),
        ("memory.peak_bytes", 0.94, "OUTSIDE"),
        ("memory.peak_bytes", 0.96, "within 5.00%"),
    ],
)
def test_a_changed_number_is_outside_and_no_other(column, factor, verdict):
    row = "lora all 8 16 0.02"
    assert changed(SEEDS, row, column, factor) == [(row, column, verdict)]


def test_a_leaner_step_than_an_old_record_is_no_failure():
    row, column = "lora k 16 32 0.01", "memory.peak_bytes"
    assert changed(OLD, row, column, 0.6) == [(row, column, "less")]
    assert changed(OLD, row, column, 1.06) == [(row, column, "OUTSIDE")]


@pytest.mark.parametrize("record", verify.RECORDS, ids=lambda record: record.name)
def test_every_row_is_still_what_its_experiment_makes_and_its_runs_are_as_many(record):
    rows = verify.recorded(record)
    assert len(rows) == len(record.rows or rows) > 2
    made = [verify.key_of(one) for one in verify.runs_of(record)]
    assert {verify.key(row): int(row["seeds"]) for row in rows} == {
        one: made.count(one) for one in made
    }


def test_the_table_and_the_exit_status(monkeypatch, capsys):
    monkeypatch.setattr(verify, "again", verify.recorded)
    assert verify.main([]) == 0
    assert "OUTSIDE" not in capsys.readouterr().out
    monkeypatch.setattr(verify, "again", lambda record: verify.recorded(record)[1:])
    assert verify.main(["--only", "targets_sweep"]) == 1
    shown = capsys.readouterr().out
    assert "lora k 16 32 0.01" in shown and "OUTSIDE" in shown
    assert verify.main(["--only", "lstm_lra"]) == 2
    assert "did you mean 'lstm_lora'?" in capsys.readouterr().err
