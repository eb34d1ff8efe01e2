"""Rows of a folder on several texts: only those that were evaluated alike are compared."""

from synthetic_runs import edit, one, put

from harness.report import evidence, summary
from harness.report.figures import figures
from harness.results import run_record


def on_another_text(run_dir):
    def change(record):
        record["data"]["name"] = "tiny.txt"
        record["date"] = "2031-01-01T00:00:00Z"

    return edit(run_dir, change)


def test_rows_on_another_text_cost_the_others_nothing(tmp_path, capsys):
    """Of the others the statistics are those of a folder without these rows."""
    folders = tmp_path / "with", tmp_path / "without"
    for folder in folders:
        for r in (1, 2, 4):
            for seed in range(3):
                put(folder, f"r{r}s{seed}", r=r, seed=seed, nll=3 - r / 100)
    on_another_text(put(folders[0], "other", r=8, nll=1.0))
    put(folders[0], "short", r=16, nll=1.5, evaluation={"context_length": 64})
    other, plain = (evidence.find(folder) for folder in folders)
    with_others, alone = other.found["test"], plain.found["test"]
    assert with_others.intervals == alone.intervals
    assert with_others.comparisons == alone.comparisons
    assert with_others.ranks == alone.ranks and not other.refused
    assert with_others.apart == {
        "lora all r=8": "text tiny.txt in place of kjv",
        "lora all r=16": "context_length 64 in place of 256",
    }
    summary.tell(other)
    shown = one(capsys.readouterr().out)
    assert "†: 2 of 5 rows are not compared on test" in shown
    assert "lora all r=8 (text tiny.txt in place of kjv)" in shown and "2.60†" in shown
    assert "Of the 3 rows that were evaluated alike, lora all r=4 reaches the lowest" in shown
    assert "experiment_name=NAME" in shown and "--last" not in shown  # no sweep is recorded
    names = (tmp_path / "with" / "comparisons.csv").read_text()
    assert "r=4" in names and "r=8" not in names
    drawn = [
        s.name for f in figures(other.rows, other.found) for s in f.series if "val" in f.axes.y
    ]
    assert drawn and not {"lora all r=8", "lora all r=16"} & set(drawn)


def test_of_two_texts_with_as_many_rows_the_latest_is_compared(tmp_path):
    for r in (1, 2):
        put(tmp_path, f"old{r}", r=r)
        on_another_text(put(tmp_path, f"new{r}", r=2 + r))
    run_record.write_sweep(tmp_path, {"new1": "", "new2": ""})
    findings = evidence.find(tmp_path)
    assert set(findings.found["test"].intervals) == {"lora all r=3", "lora all r=4"}
    (note,) = evidence.not_compared(findings)
    assert "2 of 4 rows" in note and f"harness report --last {tmp_path} shows" in note
