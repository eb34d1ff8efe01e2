"""The report's page in a real browser: headless Chromium, driven by Selenium."""

import base64
import csv
import json
import time
from pathlib import Path
from urllib.parse import unquote

import pytest
from page_in_browser import BROWSER, DRIVER, column, scheme, size, wait
from PIL import Image
from selenium import webdriver
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.support.ui import Select
from synthetic_runs import put

from harness.report import evidence, files, page
from harness.report.__main__ import main

pytestmark = pytest.mark.skipif(not (BROWSER and DRIVER), reason="needs chromium and chromedriver")
EVIL = "<script>window.evil=1</script>\"'&"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("outputs") / "exp"
    for seed in range(3):
        put(folder, f"none-s{seed}", method="none", r=1, seed=seed, nll=4.0, also=(2.0, 2.0))
        put(folder, f"full-s{seed}", method="full", r=100, seed=seed, nll=2.0, also=(2.0, 2.9))
        for r, nll in ((4, 3.0), (8, 2.7), (16, 2.5)):
            for alpha in (r, 2 * r):
                put(
                    folder, f"lora-r{r}-a{alpha}-s{seed}", r=r, alpha=alpha, seed=seed,
                    nll=nll - alpha / r / 20, also=(2.0, 2.2), curve=(5.0, nll + 0.5, nll),
                )  # fmt: skip
        put(folder, f"evil-s{seed}", method=EVIL, r=3, seed=seed, nll=3.3)
    put(folder, "dead", r=99, status="failed")
    record = json.loads((folder / "dead" / "result.json").read_text())
    record["failure"] = {"class": "oom", "message": f"no room {EVIL}"}
    (folder / "dead" / "result.json").write_text(json.dumps(record))
    assert main([str(folder)]) == 0
    return folder


@pytest.fixture
def opened(browser, folder):
    """The page at 1440 pixels in light; fails on a word of the console or a request elsewhere."""
    size(browser, 1440)
    scheme(browser, "light")
    path = folder / "report" / "index.html"
    browser.get_log("browser"), browser.get_log("performance")
    browser.get(path.as_uri())
    wait(lambda: browser.find_elements(By.CSS_SELECTOR, ".figure .main-svg"))
    yield browser
    said = [entry["message"] for entry in browser.get_log("browser")]
    assert not [
        text for text in said if "index.html" in text
    ]  # a folder's listing is the browser's
    asked = [
        message["params"]["request"]["url"]
        for entry in browser.get_log("performance")
        if (message := json.loads(entry["message"])["message"])["method"]
        == "Network.requestWillBeSent"
    ]
    assert not [url for url in asked if not url.startswith(("file://", "data:", "blob:"))]


def heading(browser, name):
    buttons = browser.find_elements(By.CSS_SELECTOR, "#results thead button")
    return next(button for button in buttons if button.text.startswith(name))


def test_it_answers_the_question_and_shows_every_row(opened):
    said = opened.find_element(By.CSS_SELECTOR, ".answer").text
    assert said.startswith("full all k=100 reaches the lowest test perplexity, 7.")
    assert "significantly lower than every other" in said
    assert len(column(opened, "method")) == 9
    assert opened.find_element(By.ID, "count").text == "9 rows"
    shaded = opened.find_elements(By.CSS_SELECTOR, "tr.tie")
    assert [row.find_element(By.TAG_NAME, "td").text for row in shaded] == ["full"]


def test_it_sorts_by_mouse_and_by_key(opened):
    values = [float(text) for text in column(opened, "test")]
    assert values == sorted(values) and len(set(values)) == 9  # as it comes
    heading(opened, "test").send_keys(Keys.ENTER)
    assert [float(text) for text in column(opened, "test")] == values[::-1]
    heading(opened, "alpha").click()  # those without one come last
    assert [a for a in column(opened, "alpha") if a != "-"] == ["4", "8", "8", "16", "16", "32"]
    assert column(opened, "alpha")[-3:] == ["-"] * 3
    heading(opened, "method").click()
    assert column(opened, "method")[1:] == ["full", *["lora"] * 6, "none"]


def test_it_filters(opened):
    Select(opened.find_element(By.CSS_SELECTOR, "[data-filter=method]")).select_by_visible_text(
        "lora"
    )
    assert set(column(opened, "method")) == {"lora"} and len(column(opened, "method")) == 6
    Select(opened.find_element(By.CSS_SELECTOR, "[data-filter=rank]")).select_by_visible_text("8")
    assert column(opened, "r, k") == ["8", "8"]
    opened.find_element(By.ID, "find").send_keys("alpha=16")
    assert column(opened, "alpha") == ["16"]
    assert opened.find_element(By.ID, "count").text == "1 of 9 rows"


def test_names_are_text_whatever_they_are(opened):
    assert opened.execute_script("return window.evil") is None
    assert EVIL in column(opened, "method")
    assert (
        EVIL in opened.find_element(By.TAG_NAME, "main").text.split("Failures and skipped runs")[1]
    )
    labels = opened.execute_script(
        "return [...document.querySelectorAll('.legendtext, .ytick text')].map(e => e.textContent)"
    )
    assert any("<script>" in text for text in labels)


def test_a_row_leads_to_its_runs(opened, folder):
    row = opened.find_element(By.CSS_SELECTOR, "#results tr[data-name^=none]")
    row.find_element(By.TAG_NAME, "summary").click()
    links = row.find_elements(By.CSS_SELECTOR, "details a")
    targets = [link.get_attribute("href") for link in links]
    assert targets == [(folder / f"none-s{seed}").as_uri() + "/" for seed in range(3)]
    links[1].click()
    assert opened.current_url == targets[1] and "result.json" in opened.page_source


def test_every_link_leads_to_a_file(opened, folder):
    links = opened.find_elements(By.CSS_SELECTOR, "main a")
    targets = {link.get_attribute("href").removeprefix("file://") for link in links}
    dead = {path for path in targets if not Path(unquote(path)).exists()}
    assert dead == set() and any(path.endswith("parameters.svg") for path in targets)


def test_a_legend_hides_and_shows_a_line(opened):
    figure = opened.find_element(By.ID, "figure-parameters")
    toggle = figure.find_element(By.CSS_SELECTOR, ".legendtoggle")
    shown = "return document.getElementById('figure-parameters').data[0].visible"
    opened.execute_script("arguments[0].scrollIntoView({block: 'center'})", figure)
    webdriver.ActionChains(opened).move_to_element(toggle).click().perform()
    wait(lambda: opened.execute_script(shown) == "legendonly")
    time.sleep(0.5)  # or it counts as a double click
    toggle = figure.find_element(By.CSS_SELECTOR, ".legendtoggle")
    webdriver.ActionChains(opened).move_to_element(toggle).click().perform()
    wait(lambda: opened.execute_script(shown) is True)


def test_every_figure_is_drawn_and_has_words(opened):
    keys = {
        "parameters", "perplexity-memory", "perplexity-time", "rank", "alpha", "heat-alpha",
        "memory", "speed", "curves-tokens", "curves-seconds", "forgetting-more",
    }  # fmt: skip
    drawn = opened.find_elements(By.CSS_SELECTOR, ".figure")
    assert {figure.get_attribute("data-figure") for figure in drawn} == keys - {"memory"}
    hero = opened.find_element(By.CSS_SELECTOR, ".hero .figure")
    assert hero.get_attribute("data-figure") == "parameters"
    for figure in drawn:
        wait(lambda figure=figure: figure.find_elements(By.CSS_SELECTOR, ".main-svg"))
        assert len(figure.get_attribute("aria-label")) > 30
        assert figure.get_attribute("role") == "img" and figure.get_attribute("tabindex") == "0"


@pytest.mark.parametrize("width", [390, 1440])
@pytest.mark.parametrize("name", ["light", "dark"])
def test_it_fits_and_is_readable(opened, width, name):
    scheme(opened, name)
    size(opened, width)
    wait(lambda: opened.execute_script("return innerWidth") == width)
    assert opened.execute_script("return document.documentElement.scrollWidth") <= width
    ink, paper = opened.execute_script(
        "const s = getComputedStyle(document.body); return [s.color, s.backgroundColor]"
    )
    assert contrast(ink, paper) > 7 and (luminance(paper) > 0.5) == (name == "light")
    fill = "return getComputedStyle(document.querySelector('#figure-parameters .ytick text')).fill"
    wait(lambda: contrast(opened.execute_script(fill), paper) > 7)  # a figure is drawn again
    opened.execute_script("document.getElementById('theme').click()")  # and the other way
    other = opened.execute_script("return getComputedStyle(document.body).backgroundColor")
    assert (luminance(other) > 0.5) == (name == "dark")


def luminance(color):
    """Relative luminance of an rgb(…) as WCAG has it."""
    parts = [float(c) / 255 for c in color[color.index("(") + 1 : -1].split(",")[:3]]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def contrast(one, other):
    low, high = sorted((luminance(one), luminance(other)))
    return (high + 0.05) / (low + 0.05)


def test_it_prints(opened):
    pdf = opened.execute_cdp_cmd("Page.printToPDF", {"printBackground": True})["data"]
    assert base64.b64decode(pdf).startswith(b"%PDF") and len(pdf) > 20_000
    figures = opened.find_elements(By.CSS_SELECTOR, ".figure")
    assert all(figure.find_elements(By.CSS_SELECTOR, ".main-svg") for figure in figures)


def test_figures_and_tables_for_papers_lie_beside_it(folder):
    report = folder / "report"
    keys = {path.stem for path in (report / "figures").glob("*.svg")}
    assert keys == {path.stem for path in (report / "figures").glob("*.png")}
    assert {"parameters", "rank", "curves-tokens", "forgetting-more"} <= keys
    text = (report / "table.md").read_text().splitlines()
    lines = [line for line in text if line.startswith("|")]
    assert lines[0].startswith("| method | targets | r, k |") and len(lines) == 2 + 9
    assert all(line.count("|") == lines[0].count("|") for line in lines)
    command = f"harness report {folder}"
    assert text[0] == "# exp" and text[-1] == f"    {command}"
    tex = (report / "table.tex").read_text()
    assert r"\toprule" in tex and r"\& " not in tex.splitlines()[5] and r"\%" in tex
    assert tex.startswith(f"% {command}\n% ")
    assert command in (report / "figures" / "parameters.svg").read_text()
    assert Image.open(report / "figures" / "parameters.png").text["Description"] == command
    assert tex.count(r"\\") == 1 + 9


def test_the_first_screen_has_question_setting_answer_figure_and_choices(opened):
    top = {
        name: opened.find_element(By.CSS_SELECTOR, selector).location["y"]
        for name, selector in {
            "question": ".question", "setting": ".setting", "answer": ".answer",
            "figure": "#figure-parameters", "results": "#results", "caveats": ".notes",
        }.items()
    }  # fmt: skip
    assert list(top.values()) == sorted(top.values()) and top["figure"] < 400
    assert top["results"] < 1000 < top["caveats"]  # of a window of 1440 by 1000
    assert "context 256" in opened.find_element(By.CSS_SELECTOR, ".setting").text
    said = opened.find_element(By.CSS_SELECTOR, ".answer").text
    assert "lora all r=16 alpha=32 (1.60 % of the parameters) trains 6.2 times fewer" in said
    assert "ends at 1.49 times its perplexity" in said
    table = opened.find_element(By.CSS_SELECTOR, "#choices table").text
    assert (
        "lowest full all k=100 7." in table and "≤ 5,000 parameters lora all r=4 alpha=8" in table
    )


NAMES = """
    const box = document.getElementById("figure-parameters");
    return [...box.querySelectorAll(".annotation")].map(e => {
        const r = e.querySelector(".annotation-text-g").getBoundingClientRect();
        return [e.textContent, r.left, r.top, r.right, r.bottom];
    });
"""


@pytest.mark.parametrize("width", [390, 1440])
def test_points_of_the_first_figure_have_names_that_do_not_overlap(opened, width):
    size(opened, width)
    opened.refresh()
    found = wait(lambda: (n := opened.execute_script(NAMES)) and len(n) > 4 and n)
    names = [text for text, *_ in found]
    assert {"full all k=100", "lora all r=4 alpha=4"} <= set(names) and len(set(names)) == len(
        names
    )
    for i, (one, *a) in enumerate(found):
        for other, *b in found[:i]:
            apart = a[2] <= b[0] or b[2] <= a[0] or a[3] <= b[1] or b[3] <= a[1]
            assert apart, (one, other)


def test_which_row_to_take_follows_what_is_asked(opened):
    def chosen():
        return opened.find_element(By.ID, "chosen").text

    assert chosen().startswith("Take full all k=100: test perplexity 7.")
    budget = opened.find_element(By.CSS_SELECTOR, "[data-budget='trainable parameters']")
    budget.send_keys("10000")
    assert chosen() == "No row is that good within these budgets."
    Select(opened.find_element(By.ID, "above")).select_by_value("100")
    assert chosen().startswith("Take lora all r=8 alpha=16") and "8,000 parameters" in chosen()
    Select(opened.find_element(By.ID, "above")).select_by_value("")
    assert chosen().startswith("Take none")  # it trains nothing
    Select(opened.find_element(By.ID, "least")).select_by_value("training time")
    assert chosen().startswith(f"Take {EVIL}")


def test_comparisons_budgets_and_steps_to_a_perplexity_are_on_the_page(opened, folder):
    titles = [h2.text for h2 in opened.find_elements(By.TAG_NAME, "h2")]
    for beginning in ("Each configuration and the next best", "Validation perplexity at equal"):
        assert [title for title in titles if title.startswith(beginning)]
    said = opened.find_element(By.TAG_NAME, "main").text
    assert "steps to 15" in said and "p (Holm)" in said and "≤ 20,000 parameters" in said
    data = opened.execute_script("return data")  # for whatever else the page is to show
    rows = csv.DictReader((folder / "comparisons.csv").open())
    pairs = {(row["a"], row["b"]): row for row in rows if row["text"] == "test"}
    assert len(data["pairs"]) == len(pairs) == 9 * 8 / 2
    for a, b, difference, *_, p in data["pairs"]:
        pair = pairs[data["rows"][a]["name"], data["rows"][b]["name"]]
        assert difference == pytest.approx(float(pair["difference_nats_per_token"]), rel=1e-4)
        assert p == pytest.approx(float(pair["p_holm"]), rel=1e-4)
    assert all(row["costs"]["trainable parameters"] >= 0 for row in data["rows"])


def test_five_hundred_runs_make_a_page_under_6_mb(tmp_path):
    for r in range(1, 101):
        for seed in range(5):
            put(tmp_path, f"r{r}-s{seed}", r=r, seed=seed, nll=4 - r / 50)
    path = files.write_page(evidence.find(tmp_path))
    assert path.stat().st_size < 6e6


def test_text_cannot_leave_the_data(folder):
    assert "</script" not in page.embedded({"x": "</script><!--", "y": float("nan")})
