"""The view of a sweep reads the runs' own files."""

import json

from rich.console import Console

from harness.results import run_record
from harness.runs.progress import View, _duration


def write(run, status, **more):
    run.run_dir.mkdir(parents=True, exist_ok=True)
    run_record.write(run.run_dir, {"status": status, **more})


def finished(perplexity):
    quality = {"test": {"perplexity": perplexity}, "validation": {"perplexity": perplexity - 1}}
    return {"wall_seconds": 3.0, "quality": quality}


def test_every_end_is_told_once_in_the_order_of_the_ends(make_run, tmp_path, capsys):
    runs = [make_run(f"outputs_dir={tmp_path}", f"method.r={r}") for r in (1, 2, 3, 4)]
    write(runs[0], "finished", **finished(50.0))  # before the sweep
    write(runs[1], "failed", failure={"class": "nan", "message": "the loss is nan"})  # and left
    with View(runs) as view:
        write(runs[3], "running")
        write(runs[3], "finished", **finished(40.0))
        view._look()
        write(runs[2], "running")
        view._look()
        metrics = runs[2].run_dir / run_record.METRICS_NAME
        metrics.write_text(json.dumps({"step": 25}) + '\n{"step": 26, "tra')  # being written
        console = Console(width=100, file=None, record=True)
        console.print(view._picture())
        shown = console.export_text()
        write(runs[2], "failed", failure={"class": "oom", "message": "out of memory\nand more"})
    told = [line for line in capsys.readouterr().out.splitlines() if line.startswith("[")]
    assert [line.split()[0] for line in told] == ["[1/4]", "[2/4]", "[3/4]", "[4/4]"]
    assert "already finished, test perplexity 50.00" in told[0]
    assert "-r4-" in told[1] and "finished in 3 s, test perplexity 40.00" in told[1]
    assert told[2].endswith("failed (oom): out of memory") and told[3].endswith("the loss is nan")
    assert "1 done, 1 running, 0 failed, 1 skipped, 1 waiting" in shown  # it may be tried again
    assert "step 25 of 100" in shown and "best so far on validation: 39.00" in shown


def test_durations():
    shown = [_duration(seconds) for seconds in (5.4, 99, 100, 3500, 3600 * 11.5)]
    assert shown == ["5 s", "99 s", "2 min", "58 min", "11 h 30 min"]
