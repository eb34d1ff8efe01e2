"""Notebooks: progress in the cell, reports and results as they are shown, types and units."""

import json
import sys
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
from synthetic_runs import put

import harness
from harness import compose, plan, sweep
from harness.config.errors import ConfigError
from harness.results import run_record
from harness.runs import notebook

SHORT = (
    "train.steps=2", "evaluate.interval=1", "data.document_chars=300",
    "data.validation_share=0.002",
    "data.test_share=0.002", "data.context_length=32", "train.batch_tokens=64",
    "train.micro_batch=2",
    "train.threads=1",
)  # fmt: skip


@pytest.fixture
def cell(monkeypatch):
    """A kernel as IPython has it, and what was displayed and updated in its cell."""
    shown = []

    class Handle:
        def update(self, what):
            shown.append(what)

    def display(what, display_id):
        shown.append(what)
        return Handle()

    ipython, of_display = ModuleType("IPython"), ModuleType("IPython.display")
    ipython.get_ipython = lambda: SimpleNamespace(kernel=object())
    of_display.display = display
    monkeypatch.setitem(sys.modules, "IPython", ipython)
    monkeypatch.setitem(sys.modules, "IPython.display", of_display)
    return shown


def test_a_run_shows_its_progress_in_the_cell(cell, tmp_path):
    (one,) = compose(*SHORT, f"outputs_dir={tmp_path}", "method.label='<b>'", "train.lr=0.01")
    with notebook.shown([one], alone=True):
        one.run_dir.mkdir(parents=True)
        row = {"step": 1, "tokens": 64, "eval/validation/nll": 3.0}
        (one.run_dir / run_record.METRICS_NAME).write_text(json.dumps(row) + "\n")
        record: dict[str, Any] = {"status": "running", "run": {"name": "x"}}
        run_record.write(one.run_dir, record)
        tries = 1200
        while not any("step 1 of 2" in p._repr_html_() for p in cell) and tries:
            tries -= 1
            notebook.progress.time.sleep(0.1)
        record |= {"status": "finished", "wall_seconds": 3.2}
        run_record.write(one.run_dir, record)
    (during,) = [p for p in cell if "step 1 of 2" in p._repr_html_()][:1]
    assert '<progress value="1" max="2">' in during._repr_html_()
    assert "validation perplexity 20.09" in during._repr_html_()  # exp(3)
    assert "<b>" not in during._repr_html_() and "step 1 of 2" in repr(during)
    assert (
        "1 done, 0 running" in cell[-1]._repr_html_() and "progress" not in cell[-1]._repr_html_()
    )
    assert "[1/1]" in cell[-1]._repr_html_() and "finished in 3 s" in repr(cell[-1])


def test_without_a_kernel_a_run_keeps_the_bar_of_its_worker(monkeypatch):
    assert not notebook.has_cell()
    monkeypatch.setitem(sys.modules, "IPython", ipython := ModuleType("IPython"))
    ipython.get_ipython = lambda: SimpleNamespace()  # IPython in a terminal has no kernel
    assert not notebook.has_cell()


@pytest.fixture
def folder(tmp_path):
    for r, nll in ((2, 3.2), (8, 3.0)):
        for seed in range(3):
            put(tmp_path / "exp", f"lora-r{r}-s{seed}", r=r, seed=seed, nll=nll, alpha=2 * r)
    put(tmp_path / "exp", "cut", r=4, status="interrupted")
    return tmp_path / "exp"


def test_a_report_is_a_table_with_figures_and_says_what_has_no_row(folder, monkeypatch):
    def made(command, **_):
        assert command[1:] == ["-m", "harness.report", str(folder)]
        (folder / "report" / "figures").mkdir(parents=True)
        (folder / "report" / "index.html").write_text("page")
        for n in range(6):
            (folder / "report" / "figures" / f"{n}.svg").write_text("<svg/>")
        return SimpleNamespace(returncode=0, stderr="")

    monkeypatch.setattr(notebook.subprocess, "run", made)
    found = harness.report(str(folder))
    text, page = repr(found), found._repr_html_()
    heads, first, second = text.splitlines()[1:4]
    assert "test" in heads and "95 %" in heads and first.startswith("lora") and "19.31" in second
    assert len(heads) < 200 and "interrupted: cut" in text and "3 seeds" in text
    assert page.count("<tr>") == 3 and page.count("<img") == notebook.FIGURES
    assert "2 more figures" in page and "interrupted: cut" in page


def test_a_report_of_nothing_is_refused_by_name(tmp_path):
    (tmp_path / "main").mkdir()
    with pytest.raises(ConfigError, match="did you mean 'main'"):
        harness.report(tmp_path / "mian")
    with pytest.raises(ConfigError, match="no run"):
        harness.report(tmp_path / "main")
    with pytest.raises(ConfigError, match="one experiment"):
        sweep("experiment_name=a,b", *SHORT, f"outputs_dir={tmp_path}")
    with pytest.raises(ConfigError, match="did you mean 'seed'"):
        sweep("sede=1,2")


def test_report_is_the_function_whatever_of_its_package_is_imported():
    """As harness.plan is: Python sets a package's attribute to each submodule that it imports."""
    import harness.report.table
    from harness import report

    assert callable(harness.report) and report is harness.report
    assert harness.report.table.rows


def test_what_is_shown_of_runs_plans_and_results_is_a_line():
    (one,) = compose("method=lora", "method.r=8", "train.lr=0.01")
    needs = plan(one)
    assert needs is not None
    for shown in (repr(one), repr(needs)):
        assert len(shown) < 250 and "\n" not in shown
    assert "lora-all-r8" in repr(one) and "131,072 of 4,404,736 parameters train" in repr(needs)
    record = {
        "status": "finished", "run": {"name": "r8"}, "parameters": {"trainable": 131072},
        "quality": {"test": {"perplexity": 40.444}}, "memory": {"peak_bytes": 92 * 2**20},
    }  # fmt: skip
    found = notebook.Result(record)
    line = "r8: finished, test perplexity 40.44, 131,072 trainable parameters, 92 MiB at peak"
    assert repr(found) == line and found == record and json.loads(json.dumps(found)) == record


def test_a_collected_frame_has_types_and_units(folder):
    """The type of a column depends on the column, and not on what happens to be in it."""
    found = harness.collect(folder)
    types = {name: str(kind) for name, kind in found.dtypes.items()}
    for name, kind in {
        "name": "string", "method.label": "string", "runs": "string", "also": "string",
        "seeds": "Int64", "method.rank": "Int64", "parameters.trainable": "Int64",
        "quality.test.perplexity": "float64", "memory.peak_bytes": "float64",
        "method.alpha": "float64", "method.lr": "float64",
    }.items():  # fmt: skip
        assert types[name] == kind, name
    assert "object" not in types.values()
    units = found.attrs["units"]
    assert units["memory.peak_bytes"] == "bytes" and units["speed.train_seconds"] == "seconds"
    assert units["speed.tokens_per_second"] == "tokens/second"
    assert units["quality.test.perplexity"] == "per token"
    assert units["parameters.trainable_percent"] == "%" and "name" not in units
    empty = folder.parent / "alone"  # one configuration: no rank, and alpha not there
    put(empty, "none", method="none")
    types = {name: str(kind) for name, kind in harness.collect(empty).dtypes.items()}
    assert types["method.alpha"] == "float64" and types["seeds"] == "Int64"


CELLS = [
    "from harness import compose, plan, run, sweep, report, collect",
    f"short = {list(SHORT)!r}\n(one,) = compose('method=lora', 'method.r=4', *short)\none",
    "plan(one)",
    "run(one)",
    "sweep('method=lora', 'method.r=1,2', *short)",
    "report('outputs/scratch')",
    "collect('outputs/scratch')[['name', 'parameters.trainable', 'quality.test.perplexity']]",
]


@pytest.mark.slow
def test_a_notebook_shows_progress_and_results_in_its_cells(tmp_path, monkeypatch):
    """Executed by a real kernel; what its cells then hold is what a reader sees."""
    nbclient, nbformat = pytest.importorskip("nbclient"), pytest.importorskip("nbformat")
    pytest.importorskip("ipykernel")
    monkeypatch.setenv("PYTHONPATH", str(harness.config.paths.REPOSITORY))
    book = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(text) for text in CELLS])
    folder = {"metadata": {"path": str(tmp_path)}}
    nbclient.NotebookClient(book, timeout=400, resources=folder).execute()

    def shown(cell, kind):
        return [o["data"].get(kind, "") for o in cell.outputs if "data" in o]

    def printed(cell):
        return "".join(o.get("text", "") for o in cell.outputs)

    _, one, needs, done, swept, reported, frame = book.cells
    assert "RunConfig(lora-all-r4" in shown(one, "text/plain")[0]
    assert "parameters train" in shown(needs, "text/plain")[0]
    progress = shown(done, "text/html")[0]
    assert "1 done" in progress and "finished in" in progress
    assert "finished, test perplexity" in shown(done, "text/plain")[-1]
    assert "it/s" not in printed(done)  # no second bar of the worker's
    progress, table = shown(swept, "text/html")
    assert "2 done" in progress and "[2/2]" in progress
    assert table.count("<tr>") == 3 and "<img" in table  # of these two, and not of the run before
    (table,) = shown(reported, "text/html")
    assert table.count("<tr>") == 4 and "index.html" in table
    assert "131" not in shown(frame, "text/html")[0] and "<table" in shown(frame, "text/html")[0]
