"""What it takes to prepare a text of any size: memory, and the tokenizer's own rate beside it.

    python experiments/bench/data/bench.py --sizes 10,100            # MB; about 3 minutes alone

Records of random verses of the King James text, as .jsonl and as one .txt, are prepared in a fresh
process: read, split, tokenised with gpt2_mini's tokenizer, packed, looked through for copies. Peak
resident memory is counted above what is there after imports and the tokenizer. Another process
prepares the same text again, from the cache. In between the tokenizer alone encodes the text in
large batches, with all cores: `rate_share` is its time over the time of the whole preparation.
Writes results.csv beside this file.
"""

from __future__ import annotations

import argparse
import json
import random
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import pandas as pd

from harness.config.paths import REPOSITORY
from harness.config.schema import DataConfig
from harness.data import documents, token_data

HERE = Path(__file__).resolve().parent
MB = 10**6
BATCH_CHARS = 2**22


def make(file: Path, size: int) -> None:
    """Write a text of `size` bytes: documents of about 1,700 characters, no two alike."""
    chapters = documents.read(DataConfig("kjv", "kjv"))["train"]
    sentences = re.findall(r"[^.?!]+[.?!]", " ".join(text for _, text in chapters))
    draw = random.Random(0)
    written = number = 0
    with file.open("w", encoding="utf-8") as stream:
        while written < size:
            number += 1
            text = f"Part {number}. " + "".join(draw.choices(sentences, k=draw.randint(5, 20)))
            line = json.dumps({"text": text}) + "\n" if file.suffix == ".jsonl" else text + "\n\n"
            stream.write(line)
            written += len(line.encode())


def memory(key: str) -> int:
    """VmRSS or VmHWM of this process in bytes."""
    status = Path("/proc/self/status").read_text()
    return 1024 * int(status.partition(f"{key}:")[2].split()[0])


def prepare(file: Path, cache: Path) -> dict[str, float]:
    """Prepare `file` in this process, and say what it took."""
    from transformers import AutoTokenizer

    from harness.config.paths import ASSETS_DIR

    tokenizer = AutoTokenizer.from_pretrained(ASSETS_DIR / "gpt2_mini")
    tokenizer(["to load what is loaded late"] * 64)
    cfg = DataConfig("bench", "text_files", path=str(file), cache_dir=str(cache))
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins here
    before, began = memory("VmRSS"), time.perf_counter()
    text = token_data.prepare(cfg, tokenizer)
    found = {
        "seconds": time.perf_counter() - began,
        "peak_mb": (memory("VmHWM") - before) / MB,
        "documents": sum(text.num_documents.values()),
        "blocks": text.num_blocks,
    }
    if text.tokenized:
        found["tokenizer_seconds"] = encode_alone(cfg, tokenizer)
    return found


def encode_alone(cfg: DataConfig, tokenizer: Any) -> float:
    """Seconds that the tokenizer takes for the text by itself, in large batches on all cores."""
    seconds, chars = 0.0, 0
    waiting: list[str] = []
    for _, _, (_, text) in documents.corpus(cfg).walk(documents.SPLITS):
        waiting.append(text)
        chars += len(text)
        if chars >= BATCH_CHARS:
            began = time.perf_counter()
            tokenizer.backend_tokenizer.encode_batch_fast(waiting)
            seconds += time.perf_counter() - began
            waiting, chars = [], 0
    began = time.perf_counter()
    tokenizer.backend_tokenizer.encode_batch_fast(waiting)
    return seconds + time.perf_counter() - began


def child(file: Path, cache: Path) -> dict[str, float]:
    """`prepare` in a fresh process."""
    done = subprocess.run(
        [sys.executable, __file__, "--prepare", str(file), str(cache)],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
    )
    if done.returncode:
        sys.exit(done.stderr[-3000:])
    return dict(json.loads(done.stdout.splitlines()[-1]))


def main() -> None:
    """Measure each size and kind, and write results.csv."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sizes", default="10,100", help="MB, by commas")
    parser.add_argument("--prepare", nargs=2, type=Path, help="FILE CACHE; used by itself")
    asked = parser.parse_args()
    if asked.prepare:
        print(json.dumps(prepare(*asked.prepare)))
        return
    rows = []
    for size in map(int, asked.sizes.split(",")):
        for kind in (".jsonl", ".txt"):
            with tempfile.TemporaryDirectory() as folder:
                file, cache = Path(folder, f"text{kind}"), Path(folder, "cache")
                make(file, size * MB)
                time.sleep(2.5)  # digests are kept of files that are left alone
                first, again = child(file, cache), child(file, cache)
            rows.append(
                {
                    "mb": size,
                    "kind": kind,
                    "documents": first["documents"],
                    "peak_mb": round(first["peak_mb"], 1),
                    "peak_again_mb": round(again["peak_mb"], 1),
                    "rate_share": round(first["tokenizer_seconds"] / first["seconds"], 2),
                    "again_share": round(again["seconds"] / first["seconds"], 4),
                }
            )
            print(rows[-1], flush=True)
    pd.DataFrame(rows).to_csv(HERE / "results.csv", index=False)


if __name__ == "__main__":
    main()
