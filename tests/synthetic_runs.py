"""Runs as training leaves them, made up: documents, a record, and curves."""

import json
import math

import numpy as np
import pandas as pd

from harness.results import run_record

DOCUMENTS = 40
TOKENS = np.random.default_rng(7).integers(20, 200, DOCUMENTS)
DIFFICULTY = np.random.default_rng(8).normal(0, 0.2, DOCUMENTS)


def put(
    folder, name, *, method="lora", r=8, seed=0, nll=3.0, alpha=None, status="finished", also=None,
    beside=0, evaluation=(), parts=0.02, curve=(5.0, 4.0, 3.0), **fields,
):  # fmt: skip
    """A run whose documents have about `nll` nats per token; `also`: (before, after) on `more`."""
    run_dir = folder / name
    run_dir.mkdir(parents=True)
    trains = method not in ("none", "truncate")

    def documents(mean, file):
        key = sum(map(ord, f"{method}{r}{alpha}")) * 1000 + seed * trains
        noise = np.random.default_rng(key).normal(0, parts, DOCUMENTS)
        nats = (mean + DIFFICULTY + noise) * TOKENS
        ids = [f"doc{i}" for i in range(DOCUMENTS)]
        frame = pd.DataFrame({"id": ids, "nll_nats": nats, "num_tokens": TOKENS})
        frame.to_parquet(run_dir / file, index=False)
        sums = {"nll_nats": float(nats.sum()), "num_tokens": int(TOKENS.sum())}
        perplexity = math.exp(nats.sum() / TOKENS.sum())
        return sums | {"perplexity": perplexity, "word_perplexity": 1.0, "bits_per_byte": 1.0}

    record = {
        "status": status,
        "run": {"name": name, "seed": seed},
        "config": {
            "method": {"name": method, "r": r, "alpha": alpha}, "seed": seed, "run_name": None,
            "model": {"architecture": {}},
        } | fields,
        "data": {"name": "kjv"},
        "evaluation": {"context_length": 256, "stride": 256, "tokenizer": "abc"} | dict(evaluation),
        "environment": {"runs_beside": beside},
        "method": {
            "name": method, "label": method, "targets": "all", "rank": str(r),
            "alpha": alpha, "lr": 0.01, "lr_from": "tuned", "deterministic": not trains,
        },
        "parameters": {
            "trainable": 1000 * r * trains, "total": 10**6, "trainable_percent": r / 10
        },
        "memory": {"peak_bytes": 3 * 2**20 + r, "process_peak_bytes": 5},
        "speed": {"tokens_per_second": 1234.5, "train_seconds": float(r) * trains},
        "quality": {
            "step0": {"validation": {"perplexity": 100.0}}, "validation": {"perplexity": 21.0},
            "test": documents(nll, "documents-test.parquet"),
        },
    }  # fmt: skip
    if also:
        before = documents(also[0], "documents-more-before.parquet")
        after = documents(also[1], "documents-more.parquet")
        record["quality"]["also"] = {"more": {"before": before, "after": after}}
    run_record.write(run_dir, record)
    if trains:
        with run_record.Metrics(run_dir, 0, -1) as metrics:
            for i, value in enumerate(curve):
                row = {"step": 2 * i, "tokens": 200 * i, "eval/validation/nll": value}
                metrics.log(row)
                for step in (2 * i + 1, 2 * i + 2):
                    row = {"step": step, "tokens": 100 * step, "train/nll": 1.0}
                    metrics.log(row | {"train/step_seconds": 0.5 * r})
    return run_dir


def ratio(run_dir, file="documents-test.parquet"):
    frame = pd.read_parquet(run_dir / file)
    return frame.nll_nats.sum() / frame.num_tokens.sum()


def edit(run_dir, change):
    record = json.loads((run_dir / "result.json").read_text())
    change(record)
    run_record.write(run_dir, record)
    return run_dir


def one(text):
    return " ".join(text.split())
