"""What `harness anatomy`, `compress` and `interpolate` leave in a folder of made-up runs."""

from __future__ import annotations

import numpy as np
import pandas as pd
from synthetic_runs import put

from harness.report import anatomy, compression, evidence

SEEDS = range(3)
KINDS = ("q", "k", "v", "o", "mlp_in", "mlp_out", "embeddings", "positions", "norms", "biases")


def left(folder):
    """Runs with a change, and the files of the three commands."""
    for seed in SEEDS:
        put(folder, f"none-s{seed}", method="none", seed=seed, nll=4.0)
        put(folder, f"full-s{seed}", method="full", r=300, seed=seed, nll=2.5, also=(2.0, 3.0))
        for r in (1, 8):
            put(folder, f"lora-r{r}-s{seed}", r=r, seed=seed, nll=3 - r / 50, also=(2.0, 2.5))
    rows = evidence.find(folder).rows
    lines = []
    for row in rows:
        if not row.trained:
            continue
        for quantity in anatomy.QUANTITIES:
            lines.append((row.name, anatomy.ALL, quantity, 2.0, 1.0, 3.0, 3))
        kinds = KINDS if row.values["method.name"] == "full" else KINDS[:4]
        lines += [(row.name, kind, "share", *[1 / len(kinds)] * 3, 3) for kind in kinds]
    lines.append(("gone", anatomy.ALL, "rank", 2.0, 1.0, 3.0, 3))  # of runs that were deleted
    (folder / anatomy.FOLDER).mkdir()
    columns = ["name", "of", "quantity", "mean", "low", "high", "count"]
    pd.DataFrame(lines, columns=columns).to_csv(
        folder / anatomy.FOLDER / anatomy.FILE_NAME, index=False
    )
    for seed in SEEDS:
        run_dir = folder / f"full-s{seed}"
        points = [
            by_document(rank=rank, beside=beside, text="validation", nats=nats + (beside != "with"))
            for rank, nats in (("1", 4.0), ("16", 3.0), ("full", 2.5), ("energy 0.9", 2.6))
            for beside in ("with", "without")
        ]
        pd.concat(points).to_parquet(run_dir / compression.COMPRESSED)
        scales = [
            by_document(scale=scale, kinds="all", text=text, nats=nats)
            for scale in (0.0, 0.5, 1.0)
            for text, nats in (("validation", 4 - scale), ("more", 2 + scale))
        ]
        pd.concat(scales).to_parquet(run_dir / compression.INTERPOLATED)
    return folder


def by_document(nats, **columns):
    count = np.arange(12)
    frame = {"id": [f"d{i}" for i in count], "num_tokens": 10, "nll_nats": 10 * nats + count / 50}
    return pd.DataFrame(frame | columns)
