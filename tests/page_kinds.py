"""Folders of made-up runs, one for every kind of page, and their pages when asked for."""

from __future__ import annotations

import csv
import json
import math
import time
from pathlib import Path
from typing import Any

import numpy as np
from anatomised_runs import left as anatomised
from page_in_browser import scheme, size, wait
from selenium.webdriver.common.by import By
from synthetic_runs import put

from harness.report import (
    evidence,
    files,
)
from harness.system import lock

SEEDS = range(3)


def train(**values):
    return {"train": {"steps": 10} | values}


def warm_up(folder):
    for seed in SEEDS:
        put(folder, f"none-s{seed}", method="none", seed=seed, nll=4.0, **train(warmup=0.0))
        for warmup in (0.0, 0.05, 0.1, 0.2):
            for schedule in ("cosine", "linear"):
                put(
                    folder, f"lora-w{warmup}-{schedule}-s{seed}", seed=seed,
                    nll=3 - warmup - (schedule == "linear") / 5,
                    **train(warmup=warmup, schedule=schedule),
                )  # fmt: skip


def sixty(folder):
    for r in (1, 2, 4, 8, 16):
        for alpha in (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048):
            put(folder, f"lora-r{r}-a{alpha}", r=r, alpha=alpha, nll=3 - r / 50 - alpha / 5000)


def one(folder):
    put(folder, "lora", nll=3.0)


def failed(folder):
    for seed in SEEDS:
        put(folder, f"lora-s{seed}", seed=seed, status="failed")
        path = folder / f"lora-s{seed}" / "result.json"
        record = json.loads(path.read_text())
        path.write_text(json.dumps(record | {"failure": {"class": "nan", "message": "diverged"}}))


def grid(folder):
    """Ranks and scales, one cell of which was not run; perplexities within a tenth of a decade."""
    for seed in SEEDS:
        put(folder, f"full-s{seed}", method="full", r=100, seed=seed, nll=2.9)
        for r in (4, 8, 16):
            for scale in (1, 2, 4):
                if (r, scale) != (16, 4):
                    put(folder, f"lora-r{r}-x{scale}-s{seed}", r=r, alpha=r * scale, seed=seed,
                        nll=3 - r / 400 - scale / 100, also=(2.0, 2.1))  # fmt: skip


def running(folder):
    one(folder)
    put(folder, "under-way", r=4, status="running")
    path = folder / "under-way" / "result.json"
    record = json.loads(path.read_text())
    record["config"]["train"] = {"steps": 12}
    path.write_text(json.dumps(record))


def searched(folder):
    """What harness search leaves: 27 candidates over three keys, paused at two rungs."""
    random = np.random.default_rng(0)
    rows: list[dict[str, Any]] = []
    for number in range(27):
        lr, r = 10 ** random.uniform(-3, -1), int(random.choice([1, 8, 64]))
        schedule = str(random.choice(["cosine", "linear"]))
        nll = 3.2 + (math.log10(lr) + 1.8) ** 2 + 0.2 / r + (schedule == "linear") / 50
        rows.append({"number": number, "train.lr": lr, "method.r": r, "train.schedule": schedule,
                     "nll": nll, "memory.peak_bytes": float(2**20 * (150 + r))})  # fmt: skip
    ranked = sorted(rows, key=lambda row: row["nll"])
    (folder / "search").mkdir(parents=True)
    with (folder / "search" / "trials.csv").open("w", newline="") as stream:
        keys = ("train.lr", "method.r", "train.schedule")
        names = ["study", "candidate", "bracket", "state", "steps", "nll_at_20", "nll_at_60",
                 "nll_at_80", "pareto", *keys, "run", "memory.peak_bytes"]  # fmt: skip
        writer = csv.DictWriter(stream, names)
        writer.writeheader()
        for row in rows:
            place, name = ranked.index(row), f"candidate-{row['number']}"
            steps = 80 if place < 3 else 60 if place < 9 else 20
            state = "finished" if place < 3 else "stopped"
            at = {"nll_at_20": f"{row['nll'] + 0.4:.6f}", "nll_at_60": "", "nll_at_80": ""}
            if steps >= 60:
                at["nll_at_60"] = f"{row['nll'] + 0.1:.6f}"
            if steps == 80:
                at["nll_at_80"] = f"{row['nll']:.6f}"
                at["memory.peak_bytes"] = row["memory.peak_bytes"]
            own = {"study": folder.name, "candidate": row["number"], "bracket": 0, "state": state,
                   "steps": steps, "pareto": "", "run": name}  # fmt: skip
            writer.writerow(own | at | {key: row[key] for key in keys})
            put(folder, name, r=row["method.r"], nll=row["nll"], **train(lr=row["train.lr"]),
                status="finished" if state == "finished" else "paused")  # fmt: skip
    shares = "train.lr,0.8100,0.0300\n{0},method.r,0.1500,0.0200\n{0},train.schedule,0.0400,0.0100"
    text = f"study,key,share,spread\n{{0}},{shares}\n".format(folder.name)
    (folder / "search" / "importance.csv").write_text(text)


KINDS = {f.__name__: f for f in (warm_up, sixty, one, failed, grid, running, searched)}
KINDS["anatomised"] = anatomised


class Pages(dict[str, Path]):
    """Kind -> the folder of an experiment with its report, which is made when it is asked for."""

    def __init__(self, base):
        super().__init__()
        self.base = base

    def __missing__(self, kind):
        folder = self.base / kind
        KINDS[kind](folder)
        claim = lock.claim(folder / "under-way") if kind == "running" else None
        findings = evidence.find(folder)
        if findings.rows:
            files.write(findings)
        else:
            files.write_page(findings)
        if claim:
            claim.release()
        self[kind] = folder
        return folder


def show(browser, folder, width):
    size(browser, width)
    scheme(browser, "light")
    browser.get((folder / "report" / "index.html").as_uri())
    height = browser.execute_script("return document.documentElement.scrollHeight")
    for y in range(0, height, 500):
        browser.execute_script(f"scrollTo(0, {y})")
        time.sleep(0.05)
    boxes = browser.find_elements(By.CSS_SELECTOR, ".figure")
    wait(lambda: all(box.find_elements(By.CSS_SELECTOR, ".main-svg") for box in boxes))
    time.sleep(0.5)
