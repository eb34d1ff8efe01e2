"""Every kind of page and figure, in a browser: what can be chosen on it, and nothing overlaps."""

from __future__ import annotations

import csv
import json
import math
import re
import shutil
from pathlib import Path

import matplotlib as mpl
import numpy as np
import pytest
from page_in_browser import BROWSER, DRIVER, column, size, wait
from page_kinds import (
    KINDS,
    Pages,
    one,
    running,
    searched,
    show,
)
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.support.ui import Select
from synthetic_runs import put

from harness.report import (
    evidence,
    figures,
    files,
    parts,
    progress,
    samples,
    search,
    sheet,
    table,
)
from harness.report.__main__ import main
from harness.results import run_record
from harness.system import lock

needs_browser = pytest.mark.skipif(
    not (BROWSER and DRIVER), reason="needs chromium and chromedriver"
)


@pytest.fixture(scope="module")
def pages(tmp_path_factory):
    return Pages(tmp_path_factory.mktemp("pages"))


# ----------------------------------------------------------------------------- without a browser


def test_a_sweep_of_anything_has_a_figure_of_it(pages):
    found = evidence.find(pages["warm_up"])
    drawn = {figure.axes.key: figure for figure in figures.figures(found.rows, found.found)}
    warm, schedule = drawn["swept-train-warmup"], drawn["swept-train-schedule"]
    assert [s.x for s in warm.series] == [[0.0, 0.05, 0.1, 0.2]] * 2
    assert {s.name for s in warm.series} == {
        f"lora all r=8 schedule={name}" for name in ("cosine", "linear")
    }
    for series in warm.series:
        expected = [found.found["test"].intervals[name].perplexity[0] for name in series.rows]
        assert series.y == pytest.approx(expected) and series.line
        assert all(a > b for a, b in zip(series.y, series.y[1:], strict=False))
    assert {tuple(s.x) for s in schedule.series} == {("cosine", "linear")}
    assert "lowest" in warm.alt and len(schedule.series) == 4
    assert not [key for key in drawn if key.startswith("swept") and key not in (
        "swept-train-warmup", "swept-train-schedule")]  # fmt: skip


def test_no_line_goes_up_and_down_between_points_of_one_cost(pages):
    for kind, joined in (("sixty", False), ("grid", True)):  # twelve alphas a rank, and three
        found = evidence.find(pages[kind])
        drawn = {f.axes.key: f for f in figures.figures(found.rows, found.found)}["parameters"]
        (lora,) = (s for s in drawn.series if s.name == "lora all")
        assert lora.line is joined


def test_the_first_figure_is_of_what_differs(pages):
    def first(kind):
        text = (pages[kind] / "report" / "index.html").read_text()
        return re.search(r'<div class="hero">.*?data-figure="([^"]+)"', text, re.S)[1]

    assert first("warm_up") == "swept-train-warmup"  # all train as many parameters
    assert first("grid") == first("one") == "parameters"


@needs_browser
@pytest.mark.parametrize(("width", "names"), [(1440, 0), (390, 2)])
def test_a_line_has_one_name_where_no_legend_says_it(width, names, pages, browser):
    show(browser, pages["warm_up"], width)
    said = browser.execute_script(
        "return document.querySelector('.hero .figure').layout.annotations.map(a => a.text)"
    )
    lines = ["lora all r=8 schedule=cosine", "lora all r=8 schedule=linear"]
    assert sorted(said) == lines[:names]


def test_where_all_rows_cost_the_same_no_figure_is_of_costs(pages):
    rows = evidence.find(pages["warm_up"])
    keys = {figure.axes.key for figure in figures.figures(rows.rows, rows.found)}
    assert "swept-train-warmup" in keys and not {"parameters", "perplexity-memory"} & keys
    rows = evidence.find(pages["one"])
    assert "parameters" in {f.axes.key for f in figures.figures(rows.rows, rows.found)}


def test_no_figure_of_rates_that_belong_to_configurations(pages):
    found = evidence.find(pages["grid"])
    keys = {figure.axes.key for figure in figures.figures(found.rows, found.found)}
    assert not [key for key in keys if key.startswith("swept")]


SLOW_KINDS = [pytest.param(k, marks=pytest.mark.slow) for k in ("sixty", "searched", "anatomised")]


@pytest.mark.parametrize("kind", ["warm_up", "one", "grid", *SLOW_KINDS])
def test_no_labels_of_the_files_overlap(kind, pages, monkeypatch):
    """Tick labels, titles and the names of reference lines, as matplotlib places them."""
    import matplotlib.pyplot as plt

    from harness.report import draw

    boxes = []

    def measure(canvas):
        canvas.canvas.draw()
        for axes in canvas.axes:
            ticks = [  # those beyond the ends of an axis are not drawn
                tick.label1
                for axis, ends in ((axes.xaxis, axes.get_xlim()), (axes.yaxis, axes.get_ylim()))
                for tick in axis.get_major_ticks()
                if min(ends) <= tick.get_loc() <= max(ends)
            ]
            texts = [*ticks, axes.xaxis.label,
                     axes.yaxis.label, axes.title, *axes.texts]  # fmt: skip
            shown = [t for t in texts if t.get_text().strip() and t.get_visible()]
            boxes.append([(t.get_text(), t.get_window_extent()) for t in shown])

    close = plt.close
    monkeypatch.setattr(plt, "close", lambda canvas: (measure(canvas), close(canvas)))
    found = evidence.find(pages[kind])
    drawn = figures.figures(found.rows, found.found) + parts.figures(pages[kind], found.rows)
    for figure in drawn:
        draw.draw(figure, pages[kind] / "again", "command")
        for i, (text, a) in enumerate(boxes[-1]):
            for other, b in boxes[-1][:i]:
                over = min(a.x1, b.x1) - max(a.x0, b.x0), min(a.y1, b.y1) - max(a.y0, b.y0)
                assert min(over) <= 1, (kind, figure.axes.key, text, other)
    assert boxes


def test_heat_maps_run_the_same_way_and_an_empty_cell_is_no_value(pages):
    from harness.report import interactive

    found = evidence.find(pages["grid"])
    heat = next(f for f in figures.figures(found.rows, found.found) if f.axes.kind == "heat")
    assert [s.name for s in heat.series] == ["4", "8", "16"]  # Plotly's first is at the bottom
    (trace,) = interactive.plotly(heat)["data"]
    assert trace["z"][2][2] is None and trace["text"][2][2] == "–"
    from harness.report import draw

    drawn = []
    original = mpl.axes.Axes.imshow
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            mpl.axes.Axes, "imshow",
            lambda self, values, **more: drawn.append((values, more))
            or original(self, values, **more),
        )  # fmt: skip
        draw.draw(heat, pages["grid"] / "again", "command")
    ((values, more),) = drawn
    assert more["origin"] == "lower" and values.mask[2, 2] and values.mask.sum() == 1


def test_a_table_for_a_paper_fits_a_column_and_tells_rows_apart(pages):
    tex = (pages["grid"] / "report" / "table.tex").read_text()
    lines = tex[tex.index(r"\midrule") : tex.index(r"\bottomrule")].splitlines()[1:]
    assert len(lines) == 9 and len({line.rpartition("&")[0] for line in lines}) == 9
    columns = re.search(r"\{@\{\}([lr]+)@\{\}\}", tex)[1]
    assert all(line.count("&") == len(columns) - 1 for line in lines) and len(columns) <= 9
    found = evidence.find(pages["grid"])
    best = min(found.rows, key=lambda row: row.values[table.TEST]).values[table.TEST]
    bold = [line for line in lines if r"\textbf" in line]
    assert bold and all(cell.strip().rstrip("\\ ").startswith(r"\textbf") for line in bold
                        for cell in line.split("&"))  # fmt: skip
    assert f"{best:.2f}" in bold[0] and r"\caption{Test perplexity per token." in tex
    assert r"\label{tab:grid}" in tex and "MiB" in tex and "2026--" not in tex
    assert tex.count("{") == tex.count("}")
    widest = max(len(re.sub(r"\\textbf\{|\}|\\\\|\\", "", line)) for line in lines)
    assert widest <= 80  # about 3.3 inches in small print
    if compiler := shutil.which("pdflatex"):  # where TeX can be had
        import subprocess

        text = "\\documentclass[twocolumn]{article}\\usepackage{booktabs}\\begin{document}"
        source = pages["grid"] / "paper.tex"
        source.write_text(f"{text}\n{tex}\\end{{document}}\n")
        done = subprocess.run(
            [compiler, "-interaction=nonstopmode", source.name], cwd=source.parent,
            capture_output=True, text=True,
        )  # fmt: skip
        assert done.returncode == 0 and "Overfull" not in done.stdout, done.stdout


def test_latex_ranges_are_ranges_and_dates_are_dates():
    told = {
        "48.2-56.7": "48.2--56.7", "2026-11-29": "2026-11-29", "1-3": "1--3", "-": "--",
        "-0.5": "-0.5",
    }  # fmt: skip
    column = sheet.Column("x", "x", text=True)
    text = sheet.latex(sheet.Sheet("", [column], [[sheet.Cell(shown)] for shown in told]))
    rows = text.partition("\\midrule\n")[2].partition("\\bottomrule")[0]
    assert rows.splitlines() == [f"{written} \\\\" for written in told.values()]


def test_a_search_has_its_history_slices_keys_importance_and_front(pages):
    folder = pages["searched"]
    found = search.find(folder)
    assert found.keys == ["train.lr", "method.r", "train.schedule"]
    assert found.rungs == [20, 60, 80] and found.objectives == ["memory.peak_bytes"]
    with (folder / "search" / "trials.csv").open() as stream:
        trials = list(csv.DictReader(stream))
    best = min((row for row in trials if row["nll_at_80"]), key=lambda row: float(row["nll_at_80"]))
    assert found.best["run"] == best["run"]
    drawn = {figure.axes.key: figure for figure in search.figures(found)}
    assert list(drawn) == [
        "search-history", "search-slice-train-lr", "search-slice-method-r",
        "search-slice-train-schedule", "search-parallel", "search-importance",
        "search-front-memory-peak_bytes",
    ]  # fmt: skip
    groups = {s.name: len(s.x) for s in drawn["search-history"].series}
    assert groups == {"stopped at step 20": 18, "stopped at step 60": 6, "finished": 3,
                      "lowest so far": 3}  # fmt: skip
    lowest = drawn["search-history"].series[-1].y
    assert lowest == sorted(lowest, reverse=True)
    assert lowest[-1] == pytest.approx(float(best["nll_at_80"]))
    for key in found.keys:  # every candidate at the first rung, whatever became of it
        slice_ = drawn[f"search-slice-{key.replace('.', '-')}"]
        points = [(str(x), y) for s in slice_.series for x, y in zip(s.x, s.y, strict=True)]
        form = str if key == "train.schedule" else lambda text: str(float(text))
        expected = [(form(row[key]), float(row["nll_at_20"])) for row in trials]
        assert sorted(points) == sorted(expected)
    assert drawn["search-slice-train-lr"].axes.log_x
    lines = drawn["search-parallel"].series
    assert [s.name for s in lines][-1] == "the best" and len(lines[-1].x) == 3 + 1
    assert all(0 <= v <= 1 for s in lines for v in s.x if v == v)
    ends = {label for s in lines for label in s.y}
    assert any(label.startswith("train.lr, ") for label in ends) and len(ends) == 3
    assert drawn["search-importance"].series[0].x == ["train.lr", "method.r", "train.schedule"]
    assert drawn["search-importance"].series[0].y == [0.81, 0.15, 0.04]
    sheet_ = search.sheet(found)
    assert len(sheet_.lines) == 10 and sheet_.lines[0][0].shown == best["candidate"]
    assert "And 17 more candidates." in sheet_.notes


def test_the_front_of_a_search_has_what_no_other_beats_in_both(tmp_path):
    searched(tmp_path / "x")
    found = search.find(tmp_path / "x")
    done = found.trials[found.trials["state"] == "finished"]
    points = list(zip(done["memory.peak_bytes"] / 2**20, done["last"], strict=True))
    front = [p for p in points if not any(q != p and q[0] <= p[0] and q[1] <= p[1] for q in points)]
    figure = search.figures(found)[-1]
    drawn = [s for s in figure.series if s.dash]
    shown = sorted(zip(drawn[0].x, drawn[0].y, strict=True)) if drawn else front
    assert shown == sorted(front) and f"{len(front)} of 3 candidates" in figure.alt


def test_searches_of_several_spaces_are_told_apart_and_a_broken_file_is_none(tmp_path):
    searched(tmp_path)
    path = tmp_path / "search" / "trials.csv"
    lines = path.read_text().splitlines()
    second = [line.replace(tmp_path.name, "other space", 1) for line in lines[1:10]]
    path.write_text("\n".join([*lines, *second]) + "\n")
    found = search.find(tmp_path)
    drawn = {figure.axes.key: figure for figure in search.figures(found)}
    assert {s.name for s in drawn["search-history"].series} == {tmp_path.name, "other space"}
    assert "search-parallel" not in drawn
    assert search.sheet(found).headings[1] == "space"
    for text in ("", "study,candidate\n", "no csv"):
        path.write_text(text)
        assert search.find(tmp_path) is None
    path.unlink()
    assert parts.find(tmp_path, []) == []


def test_candidates_that_stopped_are_in_the_searchs_section_and_no_failures(pages):
    text = (pages["searched"] / "report" / "index.html").read_text()
    body = text[: text.index('<script type="application/json"')]
    assert "candidate-" not in body.split("Failures and skipped runs")[1].split("<h2")[0]
    assert body.index('id="search"') > body.index("Failures and skipped runs")
    assert "The best candidates" in body and 'data-figure="search-parallel"' in body


def test_how_far_a_run_is_and_how_long_it_takes(pages):
    folder = pages["running"]
    claim = lock.claim(folder / "under-way")
    (found,) = progress.running(folder)
    claim.release()
    # Six steps of two seconds each; six are left.
    assert (found.step, found.steps, found.left, found.perplexity) == (6, 12, "12 s", "20.09")
    assert progress.running(folder) == []  # whose process has gone is not running


def test_samples_are_of_one_prompt_the_base_first(tmp_path):
    for name, method in (("lora", "lora"), ("none", "none")):
        run_dir = put(tmp_path, name, method=method)
        lines = [
            {"id": str(i), "prompt": f"prompt {i}", "completion": f"{name} says {i}",
             "references": [f"reference {i}"]}
            for i in (range(3) if name == "none" else (2, 1))
        ]  # fmt: skip
        (run_dir / "generations.jsonl").write_text("".join(json.dumps(x) + "\n" for x in lines))
    put(tmp_path, "full", method="full")  # wrote nothing
    found = samples.sheet(evidence.find(tmp_path).rows)
    assert found.title in ("Samples: prompt 1", "Samples: prompt 2")
    number = found.title[-1]
    assert found.texts == [
        ["none all k=8", f"none says {number}"],
        ["lora all r=8", f"lora says {number}"],
        ["reference", f"reference {number}"],
    ]
    (tmp_path / "lora" / "generations.jsonl").write_text("no JSON\n")
    assert samples.sheet(evidence.find(tmp_path).rows).texts[0][0] == "none all k=8"


# ------------------------------------------------------------------------------ in a browser


OVERLAPS = """
const found = [];
for (const box of document.querySelectorAll(".figure, #explore")) {
  const kinds = ".xtick text, .ytick text, .xtitle, .ytitle, .legendtext, .annotation-text-g";
  const legend = box.querySelector(".legend .bg"), frame = legend && legend.getBoundingClientRect();
  const texts = [...box.querySelectorAll(kinds)].filter(e => {
    const room = e.getBoundingClientRect();  // of a legend that scrolls a part is seen
    const inside = frame && room.bottom <= frame.bottom + 1 && room.top >= frame.top - 1;
    const visible = getComputedStyle(e).visibility !== "hidden" && e.textContent.trim();
    return visible && (inside || !e.matches(".legendtext"));
  });
  const rooms = texts.map(e => e.getBoundingClientRect());
  for (let i = 0; i < rooms.length; i++) for (let j = 0; j < i; j++) {
    const a = rooms[i], b = rooms[j], said = [box.id, texts[i].textContent, texts[j].textContent];
    const wide = Math.min(a.right, b.right) - Math.max(a.left, b.left);
    const high = Math.min(a.bottom, b.bottom) - Math.max(a.top, b.top);
    if (wide > 1 && high > 2) found.push([...said, wide, high]);
  }
}
return found;
"""


@needs_browser
@pytest.mark.parametrize("width", [390, 1440])
@pytest.mark.parametrize(
    "kind",
    [k if k in ("warm_up", "one") else pytest.param(k, marks=pytest.mark.slow) for k in KINDS],
)
def test_no_labels_of_a_page_overlap_and_it_fits(kind, width, pages, browser):
    show(browser, pages[kind], width)
    assert browser.execute_script(OVERLAPS) == []
    assert browser.execute_script("return document.documentElement.scrollWidth") <= width
    said = browser.find_element(By.TAG_NAME, "main").text
    assert "1 rows" not in said and "1 runs" not in said
    if kind == "failed":
        assert "No run has finished yet: 3 failed." in said and said.count("diverged") == 3
    if kind == "one":
        assert "1 row" in said and "Choose two rows" not in said
        assert "reaches a test perplexity of" in said and "lowest" not in said


@needs_browser
def test_a_page_that_runs_shows_how_far(tmp_path, browser):
    running(tmp_path / "exp")
    claim = lock.claim(tmp_path / "exp" / "under-way")
    files.write_page(evidence.find(tmp_path / "exp"), refresh=60)
    claim.release()
    size(browser, 1440)
    browser.get((tmp_path / "exp" / "report" / "index.html").as_uri())
    shown = browser.find_element(By.CSS_SELECTOR, ".running").text
    assert shown.startswith("under-way") and "step 6 of 12, about 12 s left" in shown
    assert "validation perplexity 20.09" in shown
    bar = browser.find_element(By.TAG_NAME, "progress")
    assert (bar.get_attribute("value"), bar.get_attribute("max")) == ("6", "12")
    missing = browser.find_element(By.TAG_NAME, "main").text.split("Failures and skipped runs")[1]
    assert "under-way" not in missing


@pytest.fixture
def gridded(pages, browser):
    show(browser, pages["grid"], 1440)
    return browser


@needs_browser
def test_two_rows_give_their_paired_difference(gridded, pages):
    found = evidence.find(pages["grid"])
    pair = found.found["test"].comparisons[5]
    for name in (pair.a, pair.b):
        gridded.find_element(By.CSS_SELECTOR, f"#results tr[data-name='{name}'] td").click()
    said = gridded.find_element(By.ID, "pair").text
    assert said.startswith(f"{pair.a} has {float(f'{math.exp(pair.difference):.4g}'):g}")
    assert f"95 % {float(f'{math.exp(pair.low):.4g}'):g} to " in said
    lower = "significantly lower" if pair.difference < 0 else "significantly higher"
    assert (lower if pair.adjusted_p < 0.05 else "not told apart") in said
    # The other way round it is the inverse ratio; by key.
    for name in (pair.a, pair.b, pair.b, pair.a):
        row = gridded.find_element(By.CSS_SELECTOR, f"#results tr[data-name='{name}']")
        row.send_keys(Keys.ENTER)
    turned = gridded.find_element(By.ID, "pair").text
    assert turned.startswith(f"{pair.b} has {float(f'{math.exp(-pair.difference):.4g}'):g}")


@needs_browser
def test_filters_act_on_the_figures_and_their_front(gridded):
    js = """
    const box = document.getElementById("figure-parameters");
    return [box.data.filter(t => t.meta === "rows").flatMap(t => t.x),
            box.data.filter(t => t.meta === "front").map(t => t.x)];
    """
    before, front = gridded.execute_script(js)
    assert 100_000 in before and 100_000 in front[0]
    Select(gridded.find_element(By.CSS_SELECTOR, "[data-filter=method]")).select_by_visible_text(
        "lora"
    )
    wait(lambda: 100_000 not in gridded.execute_script(js)[0])
    after, front = gridded.execute_script(js)
    assert sorted(after) == sorted(x for x in before if x != 100_000)
    assert 100_000 not in front[0] and set(front[0]) <= set(after)
    bars = "return document.getElementById('figure-speed').data.flatMap(t => t.y)"
    assert not [name for name in gridded.execute_script(bars) if name.startswith("full")]
    gridded.find_element(By.ID, "find").send_keys("no such row")
    wait(lambda: gridded.execute_script(js)[0] == [])


@needs_browser
def test_hovering_says_interval_rate_memory_and_speed(gridded):
    js = "return document.getElementById('figure-parameters').data.find(t => t.meta === 'rows')"
    trace = gridded.execute_script(js)
    said = trace["customdata"][0]
    for part in ("95 %", "lr 0.01 (tuned)", "MiB", "tokens/s", "parameters train"):
        assert part in said
    assert "%{customdata}" in trace["hovertemplate"]


@needs_browser
def test_a_line_stands_out_under_the_pointer(gridded):
    js = """
    const box = document.getElementById("figure-curves-tokens");
    single(box, box.data[0].legendgroup);
    const seen = [...box.querySelectorAll(".scatterlayer .trace")].map(n => n.style.opacity);
    single(box, null);
    return [seen, [...box.querySelectorAll(".scatterlayer .trace")].map(n => n.style.opacity)];
    """
    seen, after = gridded.execute_script(js)
    assert "" in seen and seen.count("0.15") > seen.count("") and set(after) == {""}


@needs_browser
def test_axes_can_be_chosen_and_their_front_follows(gridded):
    gridded.execute_script("document.getElementById('explore').scrollIntoView()")
    box = "document.getElementById('explore')"
    wait(lambda: gridded.execute_script(f"return {box}.data !== undefined"))
    Select(gridded.find_element(By.ID, "across")).select_by_value("memory.peak_bytes")
    Select(gridded.find_element(By.ID, "upwards")).select_by_value("quality.test.perplexity")
    title = f"return {box}.layout.xaxis.title.text"
    assert gridded.execute_script(title) == "peak of live tensors, MiB"
    points, front = gridded.execute_script("""
        const own = t => t.x.map((x, i) => [x, t.y[i]]);
        const data = document.getElementById("explore").data;
        return [data.filter(t => t.meta === "rows").flatMap(own),
                data.filter(t => t.mode === "lines").map(own)];
    """)
    expected = [
        p for p in points
        if not any((q[0] <= p[0] and q[1] < p[1]) or (q[0] < p[0] and q[1] <= p[1]) for q in points)
    ]  # fmt: skip
    np.testing.assert_allclose(sorted(front[0]), sorted({tuple(p) for p in expected}), rtol=1e-9)


@needs_browser
def test_columns_can_be_chosen_and_what_is_shown_can_be_copied(gridded):
    gridded.find_element(By.CSS_SELECTOR, "#columns summary").click()
    labels = gridded.find_elements(By.CSS_SELECTOR, "#columns label")
    next(label for label in labels if label.text.strip() == "tok/s").click()
    gridded.find_element(By.CSS_SELECTOR, "#columns summary").click()
    gridded.find_element(By.ID, "find").send_keys("alpha=16")
    for form in ("CSV", "Markdown", "LaTeX"):
        button = gridded.find_element(By.CSS_SELECTOR, f"[data-copy={form}]")
        button.click()
        text = wait(lambda button=button: button.get_attribute("data-copied"))
        assert "tok/s" not in text and "16" in text
        lines = text.splitlines()
        if form == "CSV":
            assert lines[0].startswith('method,targets,"r, k"') and len(lines) == 1 + len(
                column(gridded, "method")
            )
        if form == "Markdown":
            assert len({line.count("|") for line in lines}) == 1
        if form == "LaTeX":
            assert r"\toprule" in text and r"\%" in text


def test_the_report_of_the_command_line_has_them(tmp_path, capsys):
    one(tmp_path / "exp")
    assert main([str(tmp_path / "exp")]) == 0
    assert {p.suffix for p in (tmp_path / "exp" / "report" / "figures").glob("*")} == {
        ".svg", ".png", ".pdf",
    }  # fmt: skip
    assert Path(tmp_path / "exp" / "report" / "index.html").is_file()
    assert run_record.read(tmp_path / "exp" / "lora")["status"] == "finished"
