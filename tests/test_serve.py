"""All experiments on one page, and the local server of it: what it shows, and what it refuses."""

import http.client
import json
import re
import shutil
import socket
import threading

import pytest
from synthetic_runs import put

from harness import __main__ as controller
from harness.commands import serve
from harness.config.errors import ConfigError
from harness.report import index
from harness.report.__main__ import main as report
from harness.results import run_record

EVIL = "</script><script>window.evil=1</script>"


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """Two experiments that were evaluated alike, and one on longer windows."""
    root = tmp_path_factory.mktemp("outputs")
    for name, context in (("ranks", 256), ("seeds", 256), ("long", 512)):
        for seed in range(2):
            put(
                root / name, f"r8-s{seed}", seed=seed, nll=3.0, train={"steps": 100},
                evaluation={"context_length": context},
            )  # fmt: skip
    put(root / "ranks", "evil", method=EVIL, r=2, nll=3.5)
    put(root / "ranks", "dead", r=4, status="failed")
    (root / "ranks" / "report").mkdir()
    (root / "ranks" / "report" / "index.html").write_text("<p>the page</p>")
    (root / ".cache").mkdir()
    (root / ".cache" / "secret.txt").write_text("secret")
    (root.parent / "outside.txt").write_text("secret")
    (root / "ranks" / "link.txt").symlink_to(root.parent / "outside.txt")
    (root / "ranks" / "weights.bin").write_text("secret")
    return root


def data_of(page):
    (found,) = re.findall(r'<script id="data" type="application/json">(.*?)</script>', page)
    return json.loads(found)


def test_one_page_has_every_experiment_and_its_configurations(root, capsys):
    assert report([str(root), "--index"]) == 0
    assert f"page: {root / 'index.html'}" in capsys.readouterr().out
    page = (root / "index.html").read_text("utf-8")
    found = data_of(page)
    experiments = {one["name"]: one for one in found["experiments"]}
    assert set(experiments) == {"ranks", "seeds", "long"}
    assert experiments["ranks"]["counts"] == {"finished": 3, "failed": 1}
    assert experiments["ranks"]["page"] == "ranks/report/index.html"
    assert experiments["seeds"]["page"] is None
    rows = {(row["experiment"], row["name"]): row for row in found["rows"]}
    assert len(rows) == 4
    record = run_record.read(root / "seeds" / "r8-s0")
    (row,) = [row for (name, _), row in rows.items() if name == "seeds"]
    assert row["seeds"] == 2 and row["settings"]["train.steps"] == 100
    assert row["values"]["test"] == pytest.approx(record["quality"]["test"]["perplexity"], rel=0.05)
    assert EVIL not in page and any(row["name"].startswith(EVIL) for row in found["rows"])


def test_only_rows_that_were_evaluated_alike_have_the_same_mark(root, tmp_path):
    """Whoever ticks two rows is told whether their perplexities compare."""
    rows = data_of(index.text(root))["rows"]
    alike = {row["experiment"]: row["alike"] for row in rows if not row["name"].startswith("<")}
    assert alike["ranks"] == alike["seeds"] != alike["long"]
    for n, change in enumerate(
        ({"run": {"contents": {"data": "sha256:1"}}}, {"data": {"name": "other"}},
         {"evaluation": {"context_length": 256, "stride": 256, "tokenizer": "another"}})
    ):  # fmt: skip
        run_dir = put(tmp_path / f"exp{n}", "r8-s0", evaluation={"context_length": 256})
        record = json.loads((run_dir / run_record.FILE_NAME).read_text())
        for key, value in change.items():
            record[key] = record.get(key, {}) | value
        run_record.write(run_dir, record)
    marks = {row["alike"] for row in data_of(index.text(tmp_path))["rows"]}
    assert len(marks | {alike["ranks"]}) == 4


def test_a_record_that_is_no_result_takes_no_other_experiment_with_it(root, tmp_path):
    copy = tmp_path / "outputs"
    shutil.copytree(root / "seeds", copy / "seeds")
    (copy / "odd" / "run").mkdir(parents=True)
    run_record.write(copy / "odd" / "run", {"status": "finished"})
    experiments = {one["name"]: one for one in data_of(index.text(copy))["experiments"]}
    assert "KeyError" in experiments["odd"]["problem"] and not experiments["seeds"]["problem"]


@pytest.fixture(scope="module")
def server(root):
    server = serve.Server(root, 0)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield server
    server.shutdown()
    server.server_close()
    thread.join(10)


def ask(server, path, method="GET", **headers):
    """Status and body of a request whose path is sent as it is."""
    connection = http.client.HTTPConnection("127.0.0.1", server.server_port, timeout=20)
    connection.request(method, path, headers=headers)
    answer = connection.getresponse()
    found = answer.status, answer.read(), dict(answer.getheaders())
    connection.close()
    return found


def test_the_server_shows_the_index_and_the_files_of_experiments(server):
    status, body, headers = ask(server, "/")
    assert status == 200 and b"all experiments" in body
    assert headers["Content-Type"] == "text/html; charset=utf-8"
    assert headers["X-Content-Type-Options"] == "nosniff"
    assert ask(server, "/ranks/report/index.html")[:2] == (200, b"<p>the page</p>")
    assert json.loads(ask(server, "/ranks/dead/result.json")[1])["status"] == "failed"
    status, body, headers = ask(server, "/ranks/report/index.html", method="HEAD")
    assert (status, body, headers["Content-Length"]) == (200, b"", "15")


@pytest.mark.parametrize(
    "path",
    [
        "/../outside.txt", "/ranks/../../outside.txt", "/%2e%2e/outside.txt", "/..%2foutside.txt",
        "/ranks/%2e%2e/%2e%2e/outside.txt", "//etc/passwd", "/%2fetc%2fpasswd", "/..\\outside.txt",
        "/ranks/link.txt", "/.cache/secret.txt", "/ranks/weights.bin", "/ranks", "/nothing.html",
        "/ranks/%00.txt", "/" + "a/" * 3000,
    ],
)  # fmt: skip
def test_nothing_outside_and_nothing_hidden_is_served(server, path):
    status, body, _ = ask(server, path)
    assert status == 404 and b"secret" not in body and b"root:" not in body


def test_the_server_is_on_the_loopback_address_and_answers_its_own_names_alone(server):
    assert server.server_address[0] == "127.0.0.1"
    assert server.socket.family == socket.AF_INET
    assert ask(server, "/", Host=f"evil.example:{server.server_port}")[0] == 403
    assert ask(server, "/", Host=f"localhost:{server.server_port}")[0] == 200
    for method in ("POST", "PUT", "DELETE"):
        assert ask(server, "/", method=method)[0] == 501


def test_mistakes_of_the_command_are_named(root, tmp_path, capsys, monkeypatch):
    def said(*arguments):
        assert serve.main(list(arguments)) == 2
        return capsys.readouterr().err

    assert f"did you mean '{root.name}'" in said(str(root.parent / f"{root.name}x"))
    assert "no experiment" in said(str(tmp_path))
    assert "--port x: expected a number" in said(str(root), "--port", "x")
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        assert "another one: --port 0" in said(str(root), "--port", port)
    assert "usage" in said()
    with pytest.raises(ConfigError, match="no experiment"):
        index.text(tmp_path)
    assert report([str(tmp_path), "--index"]) == 2
    asked = []
    monkeypatch.setattr(serve, "main", lambda arguments: asked.append(arguments) or 0)
    monkeypatch.setattr("sys.argv", ["harness", "serve", "outputs"])
    assert controller.program() == 0 and asked == [["outputs"]]


@pytest.mark.slow
def test_rows_are_searched_and_compared_in_a_browser(root, server):
    """The words narrow the rows; two that were evaluated alike compare, others are warned of."""
    browser, driver = shutil.which("chromium"), shutil.which("chromedriver")
    if not (browser and driver):
        pytest.skip("needs chromium and chromedriver")
    from selenium import webdriver
    from selenium.webdriver.common.by import By

    options = webdriver.ChromeOptions()
    options.binary_location = browser
    for argument in ("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"):
        options.add_argument(argument)
    page = webdriver.Chrome(options=options, service=webdriver.ChromeService(driver))
    try:
        page.get(server.address)

        def rows():
            return page.find_elements(By.CSS_SELECTOR, "#rows tbody tr")

        def tick(name):
            (row,) = [r for r in rows() if name in r.text]
            row.find_element(By.CSS_SELECTOR, "input").click()
            return page.find_element(By.ID, "compared").text

        assert len(rows()) == 4 and page.execute_script("return window.evil") is None
        page.find_element(By.ID, "search").send_keys("train.steps=100 seeds")
        assert len(rows()) == 1 and "1 of 4 rows" in page.find_element(By.ID, "found").text
        page.find_element(By.ID, "search").clear()
        page.execute_script("document.getElementById('search').oninput()")
        tick("seeds")
        (alike,) = [r for r in rows() if "ranks" in r.text and "lora" in r.text]
        alike.find_element(By.CSS_SELECTOR, "input").click()
        said = page.find_element(By.ID, "compared").text
        assert "Evaluated alike" in said and "(× 1.00)" in said
        assert "do not compare" in tick("long")
        assert not [e for e in page.get_log("browser") if e["level"] == "SEVERE"]
    finally:
        page.quit()
