"""Sweeps for trackers to follow, and offline W&B runs read back from their files."""

import json
import struct
from types import SimpleNamespace

from synthetic_runs import put

from harness.results import run_record

OFFLINE = {"project": "p", "entity": None, "mode": "offline", "adapters": True, "patience": 120}


def records(path):
    """The protobuf records of a .wandb file: LevelDB's log format after a header of 7 bytes."""
    from wandb.proto import wandb_internal_pb2

    data = path.read_bytes()
    ident, magic, _ = struct.unpack("<4sHB", data[:7])
    assert (ident, magic) == (b":W&B", 0xBEE1)
    at, parts, found = 7, b"", []
    while at + 7 <= len(data):
        if (left := 2**15 - at % 2**15) < 7:  # the rest of a block that no header fits in
            at += left
            continue
        _, length, kind = struct.unpack("<IHB", data[at : at + 7])
        if not kind:
            at += left
            continue
        parts += data[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):  # whole, or the last part
            record = wandb_internal_pb2.Record()
            record.ParseFromString(parts)
            found.append(record)
            parts = b""
    return found


def read(folder):
    """Every offline W&B run of a folder, as one reads it: facts, config, history, summary."""
    runs: dict[str, list[SimpleNamespace]] = {}
    for path in sorted(folder.glob("wandb/offline-run-*/*.wandb")):
        run = SimpleNamespace(
            config={}, history=[], summary={}, metrics={}, artifacts=[], exit=None
        )
        for record in records(path):
            kind = record.WhichOneof("record_type")
            if kind == "run":
                run.facts = record.run
                run.config |= pairs(record.run.config.update)
            elif kind == "history":
                run.history.append(pairs(record.history.item))
            elif kind == "summary":
                run.summary |= pairs(record.summary.update)
            elif kind == "metric":
                name = record.metric.name or record.metric.glob_name
                run.metrics[name] = record.metric.step_metric
            elif kind == "artifact":
                run.artifacts.append(record.artifact)
            elif kind == "exit":
                run.exit = record.exit.exit_code
        runs.setdefault(run.facts.display_name, []).append(run)
    return runs


def pairs(items):
    found = {}
    for item in items:
        name = item.key or "/".join(item.nested_key)
        found[name] = json.loads(item.value_json)
    return found


def runs_of(folder, tracker):
    return [
        SimpleNamespace(run_dir=path.parent, experiment_name="exp", tracker=tracker)
        for path in sorted(folder.glob("*/result.json"))
    ]


def sweep(folder, number, **fields):
    for seed in range(number):
        run_dir = put(folder, f"r8-s{seed}", r=8, seed=seed, nll=3 + seed / 10, **fields)
        record = json.loads((run_dir / "result.json").read_text()) | {"model": {"name": "mini"}}
        record["config"]["train"] = {"lr": 0.01, "schedule": "cosine"}
        run_record.write(run_dir, record)
    return folder
