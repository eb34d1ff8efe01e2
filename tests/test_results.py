import csv
import json
import math

import pytest

from harness import report, results


def result(name, *, method="lora", r=8, seed=0, test=20.0, status="finished"):
    return {
        "status": status,
        "run": {"name": name, "seed": seed},
        "config": {"method": {"name": method, "r": r}, "seed": seed, "run_name": None},
        "method": {
            "name": method, "label": method, "targets": "all", "rank": str(r),
            "alpha": 2 * r, "lr": 0.01,
        },
        "parameters": {"trainable": 1000 * r, "total": 10**6, "trainable_percent": r / 10},
        "memory": {"peak_bytes": 3 * 2**20, "process_peak_bytes": 5},
        "speed": {"tokens_per_second": 1234.5, "train_seconds": 1.0},
        "quality": {
            "step0": {"validation": {"perplexity": 100.0}}, "validation": {"perplexity": 21.0},
            "test": {
                "perplexity": test, "word_perplexity": 1.0, "bits_per_byte": 1.0, "num_tokens": 9,
            },
        },
    }  # fmt: skip


def put(folder, name, **options):
    (folder / name).mkdir(parents=True)
    results.write(folder / name, result(name, **options))


def test_written_results_are_read_back_and_numbers_stay_json(tmp_path):
    results.write(tmp_path, {"status": "finished", "x": [1.5, math.nan, {"y": math.inf}]})
    assert results.read(tmp_path)["x"] == [1.5, None, {"y": None}]
    json.loads((tmp_path / "result.json").read_text(), parse_constant=pytest.fail)
    assert [p.name for p in tmp_path.iterdir()] == ["result.json"]


@pytest.mark.parametrize("text", ["", "{", "[]", '{"schema_version": 99}', "null"])
def test_a_damaged_or_foreign_result_is_no_result(tmp_path, text):
    (tmp_path / "result.json").write_text(text)
    assert results.read(tmp_path) is None
    assert results.read(tmp_path / "nowhere") is None


def test_get_follows_a_path():
    assert results.get({"a": {"b": 3}}, "a.b") == 3
    assert results.get({"a": 1}, "a.b") is None


def test_the_table_has_a_row_per_configuration_and_means_over_seeds(tmp_path, capsys):
    put(tmp_path, "b8-s0", r=8, test=20.0)
    put(tmp_path, "b8-s1", r=8, test=30.0, seed=1)
    put(tmp_path, "a64", r=64, test=15.0)
    put(tmp_path, "z-full", method="full", r=1, test=10.0)
    put(tmp_path, "dead", status="failed")
    report.print_table(tmp_path)
    shown = capsys.readouterr().out
    lines = [line.split() for line in shown.splitlines() if line.startswith((" lora", " full"))]
    assert [line[0] for line in lines] == ["full", "lora", "lora"]
    assert [line[2] for line in lines] == ["1", "8", "64"]
    assert [line[-2:] for line in lines] == [["10.00", "1"], ["25.00", "2"], ["15.00", "1"]]
    assert "failed: dead" in shown and f"again: python -m harness.report {tmp_path}" in shown
    with (tmp_path / "results.csv").open() as stream:
        rows = list(csv.DictReader(stream))
    assert [float(row["quality.test.perplexity"]) for row in rows] == [10.0, 25.0, 15.0]
    assert rows[1]["runs"] == "b8-s0 b8-s1" and rows[1]["seeds"] == "2"
    table = [line for line in shown.splitlines() if line.startswith(" ")]
    assert table and all(len(line) <= 120 for line in table)


def test_only_the_runs_asked_for_are_shown_and_all_are_saved(tmp_path, capsys):
    put(tmp_path, "one", r=1)
    put(tmp_path, "two", r=2)
    report.print_table(tmp_path, [tmp_path / "two"])
    shown = capsys.readouterr().out
    assert sum(line.startswith(" lora") for line in shown.splitlines()) == 1
    assert len((tmp_path / "results.csv").read_text().splitlines()) == 3


def test_the_report_of_nothing_says_so(tmp_path, capsys):
    (tmp_path / "main").mkdir()
    assert report.main([str(tmp_path / "mian")]) == 2
    assert "did you mean 'main'" in capsys.readouterr().err
    assert report.main([]) == 2
    assert report.main([str(tmp_path / "main")]) == 0
    assert "no finished run" in capsys.readouterr().out
