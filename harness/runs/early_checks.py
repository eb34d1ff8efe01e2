"""Mistakes that are found in a second, before a run's directory is made: what needs no torch.

The worker finds the same ones again, and the others, on the model itself.
"""

from __future__ import annotations

import json
from functools import lru_cache
from itertools import islice
from pathlib import Path

from harness.config import model_shapes, parts, peft_fields
from harness.config.run_config import RunConfig
from harness.config.schema import DataConfig
from harness.data import documents, forms, pairs, records, sources
from harness.system import contents, files

WHOLE_BYTES = 16 * 2**20  # a text up to this size is read as a run will read it
RECORDS = 1000  # of each file of a larger one, the first so many


def check(run: RunConfig) -> None:
    """A run's shapes, PEFT fields and text.

    Raises:
        ConfigError: as the run itself would.
    """
    peft_fields.check(run.method)
    model_shapes.check(run)
    for key, cfg in contents.texts(run):
        if cfg.source in ("text_files", "pairs") and cfg.path:
            kinds = files.OF_PAIRS if cfg.source == "pairs" else files.KINDS
            own = [file for group in sources.own_files(cfg, kinds).values() for file in group]
            stamp = tuple((str(f), f.stat().st_mtime_ns, f.stat().st_size) for f in own)
            trained: tuple[str, ...] = (
                documents.SPLITS if run.evaluate.test else documents.SPLITS[:2]
            )
            if key.startswith("evaluate."):
                trained = ("test",)
            elif run.data.parts and cfg != parts.evaluated_text(run.data):
                trained = ("train",)
            _check_text(json.dumps(vars(cfg)), trained, stamp)


@lru_cache(maxsize=64)  # the runs of a sweep share a text
def _check_text(
    described: str, splits: tuple[str, ...], stamp: tuple[tuple[str, int, int], ...]
) -> None:
    cfg = DataConfig(**json.loads(described))
    small = sum(size for _, _, size in stamp) <= WHOLE_BYTES
    if small:
        (documents.read if cfg.source == "text_files" else pairs.read)(cfg, splits)
        return
    for file in (Path(name) for name, _, _ in stamp):
        if files.kind(file) not in (*files.TEXTS, ".json"):
            sample = islice(records.records(file, None, cfg.encoding), RECORDS)
            for _ in forms.rows(sample, cfg, None) if cfg.source == "pairs" else sample:
                pass
