import json
import math

import pytest

from harness.results import run_record


def test_written_results_are_read_back_and_numbers_stay_json(tmp_path):
    run_record.write(tmp_path, {"status": "finished", "x": [1.5, math.nan, {"y": math.inf}]})
    assert run_record.read(tmp_path)["x"] == [1.5, None, {"y": None}]
    json.loads((tmp_path / "result.json").read_text(), parse_constant=pytest.fail)
    assert [p.name for p in tmp_path.iterdir()] == ["result.json"]


@pytest.mark.parametrize("text", ["", "{", "[]", '{"schema_version": 99}', "null"])
def test_a_damaged_or_foreign_result_is_no_result(tmp_path, text):
    (tmp_path / "result.json").write_text(text)
    assert run_record.read(tmp_path) is None
    assert run_record.read(tmp_path / "nowhere") is None


def test_get_follows_a_path():
    assert run_record.get({"a": {"b": 3}}, "a.b") == 3
    assert run_record.get({"a": 1}, "a.b") is None


def test_a_run_that_goes_on_keeps_the_metrics_that_are_still_true(tmp_path):
    rows = [
        {"step": 0, "eval/more/nll": 1.0},
        {"step": 0, "eval/validation/nll": 1.0},
        {"step": 2, "train/nll": 1.0},
        {"step": 2, "eval/validation/nll": 1.0},
        {"step": 3, "train/nll": 1.0},
        {"step": 3, "eval/validation/nll": 1.0},  # read, and killed before its checkpoint
        {"step": 3, "eval/more/nll": 1.0},  # after adaptation: read again at the end
        {"step": 4, "train/nll": 1.0},
    ]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    with run_record.Metrics(tmp_path, 3, 2) as metrics:
        metrics.log({"step": 4, "train/nll": math.nan})
    assert run_record.read_metrics(tmp_path) == [*rows[:5], {"step": 4, "train/nll": None}]
