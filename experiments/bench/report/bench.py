"""The report's page of 500 runs: how long it takes to build on one core, and how it scrolls.

python experiments/bench/report/bench.py        (needs chromium and chromedriver; about a minute)
python experiments/bench/report/bench.py --documents 100000   (20 runs of so many documents)
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import shutil
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[3] / "tests"))
import synthetic_runs
from synthetic_runs import put  # the tests' made-up runs

from harness.report import evidence, files
from harness.report.axes import CATEGORIES
from harness.results import run_record

HERE = Path(__file__).resolve().parent
SEEDS = 5
RANKS, SCALES = (1, 2, 4, 8, 16, 32, 64, 128, 256), (0.5, 1, 2, 4)
TARGETS = ("attn", "mlp", "all")
# Scrolls from the top to the end, so many pixels a frame, and says how long every frame took.
SCROLL = """
const [pixels, done] = arguments, frames = [];
scrollTo(0, 0);
let last = 0;
function frame(now) {
  if (last) frames.push(now - last);
  last = now;
  const before = scrollY;
  scrollBy(0, pixels);
  if (scrollY === before && frames.length > 5) done(frames); else requestAnimationFrame(frame);
}
requestAnimationFrame(frame);
"""


def make(folder: Path, number: int) -> int:
    """So many runs of LoRA, five seeds each, but for the base model and full fine-tuning."""
    made = 0
    curve = tuple(5 - 2 * step / 20 for step in range(21))

    def runs(name: str, targets: str, **fields: Any) -> None:
        nonlocal made
        for seed in range(SEEDS):
            run_dir = put(folder, f"{name}-s{seed}", seed=seed, curve=curve, **fields)
            record: dict[str, Any] = dict(run_record.read(run_dir) or {})
            record["method"]["targets"] = targets
            record["config"]["targets"] = {"name": targets}
            sizes = {c: (i + 1) * 2**22 for i, c in enumerate(CATEGORIES)}
            record["memory"] |= {"by_category": sizes, "peak_bytes": sum(sizes.values())}
            record["predicted"] = {"peak_bytes": sum(sizes.values())}
            run_record.write(run_dir, record)
            made += 1

    runs("full", "all", method="full", r=300, nll=2.0)
    put(folder, "none", method="none", r=1, nll=4.0)
    for targets in TARGETS:
        for r in RANKS:
            for scale in SCALES:
                if made + SEEDS >= number:
                    return made + 1
                nll = 3.5 - 0.1 * RANKS.index(r) - 0.05 * SCALES.index(scale)
                nll -= 0.1 * TARGETS.index(targets)
                runs(f"lora-{targets}-r{r}-x{scale}", targets, r=r, alpha=r * scale, nll=nll)
    return made + 1


def make_of_documents(folder: Path, number: int) -> int:
    """Twenty runs, four configurations of five seeds, on so many documents of two texts."""
    draw = np.random.default_rng(0)
    synthetic_runs.DOCUMENTS = number
    synthetic_runs.TOKENS = draw.integers(20, 400, number)
    synthetic_runs.DIFFICULTY = draw.normal(0, 0.3, number)
    for seed in range(SEEDS):
        for i, r in enumerate((1, 8, 64)):
            put(folder, f"lora-r{r}-s{seed}", seed=seed, r=r, alpha=2 * r, nll=3.2 - 0.1 * i,
                also=(3.0, 3.3))  # fmt: skip
        put(folder, f"full-s{seed}", seed=seed, method="full", r=300, nll=2.5, also=(3.0, 3.4))
    return 4 * SEEDS


def scroll(page: Path, width: int, scheme: str) -> dict[str, float]:
    """How long the page takes to be there, and its frames as it scrolls, in milliseconds."""
    from selenium import webdriver
    from selenium.webdriver.chrome.options import Options
    from selenium.webdriver.chrome.service import Service

    options = Options()
    options.binary_location = shutil.which("chromium") or shutil.which("google-chrome") or ""
    for argument in ("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"):
        options.add_argument(argument)
    browser = webdriver.Chrome(options=options, service=Service(shutil.which("chromedriver")))
    try:
        browser.set_script_timeout(300)
        sizes = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": width < 600}
        browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", sizes)
        features = [{"name": "prefers-color-scheme", "value": scheme}]
        browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": features})
        browser.get(page.as_uri())
        timing = "return performance.timing.loadEventEnd - performance.timing.navigationStart"
        loaded = float(browser.execute_script(timing))
        found = {"loaded_ms": loaded}
        for when in ("interruptible", "drawn", "again"):
            frames = sorted(browser.execute_async_script(SCROLL, 60))
            found |= {
                f"{when}_frames": len(frames),
                f"{when}_median_ms": statistics.median(frames),
                f"{when}_worst_ms": frames[-1],
                f"{when}_over_50_ms": sum(frame > 50 for frame in frames),
            }
            while not browser.execute_script("return there.size === boxes.length"):
                time.sleep(0.2)
            time.sleep(1)
    finally:
        browser.quit()
    return found


def main() -> None:
    """Print the figures as JSON, one line a measurement."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=int, default=500)
    parser.add_argument("--documents", type=int, help="of 20 runs, in place of many runs")
    parser.add_argument("--keep", type=Path, help="a folder for the runs, which stays")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        folder = (arguments.keep or Path(scratch)) / "outputs" / "five_hundred"
        if arguments.documents:
            number = make_of_documents(folder, arguments.documents)
        else:
            number = make(folder, arguments.runs)
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        everywhere = os.sched_getaffinity(0)
        os.sched_setaffinity(0, {min(everywhere)})
        began, cpu = time.perf_counter(), time.process_time()
        findings = evidence.find(folder)
        page = files.write_page(findings)
        built, busy = time.perf_counter() - began, time.process_time() - cpu
        files.write(findings)
        all_of_it = time.perf_counter() - began
        os.sched_setaffinity(0, everywhere)
        line = {"runs": number, "rows": len(findings.rows), "page_seconds": round(built, 2)}
        line |= {"page_cpu_seconds": round(busy, 2)}
        line |= {"with_figures_seconds": round(all_of_it, 2), "bytes": page.stat().st_size}
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        line |= {"peak_mib": peak // 1024, "peak_before_mib": before // 1024}
        print(json.dumps(line), flush=True)
        for width, scheme in () if arguments.documents else ((1440, "light"), (390, "dark")):
            found = scroll(page, width, scheme)
            print(json.dumps({"width": width} | {k: round(v, 1) for k, v in found.items()}))


if __name__ == "__main__":
    main()
