"""Trackers beside a sweep: what they have seen, read back from their files; what they cannot do."""

import json
import os
import socket
import sqlite3
import subprocess
import sys
import time
from contextlib import closing
from pathlib import Path

import pytest
from tracked_sweeps import OFFLINE, read, runs_of, sweep

from harness.config.errors import ConfigError
from harness.config.paths import REPOSITORY
from harness.results import run_record
from harness.runs import tracking
from harness.system import atomic

wandb = pytest.importorskip("wandb")


@pytest.mark.slow
def test_thirty_runs_are_thirty_runs_and_a_summary(tmp_path, capsys):
    folder = sweep(tmp_path / "exp", 30)
    (folder / "r8-s3" / "adapter").mkdir()
    (folder / "r8-s3" / "adapter" / "adapter_model.safetensors").write_bytes(b"weights")
    with tracking.TrackerProcesses(runs_of(folder, {"wandb": OFFLINE}), sweep=True):
        pass
    said = capsys.readouterr().out
    assert said.startswith("wandb: 30 runs offline in ") and "; to upload: cd " in said
    found = read(folder)
    assert {name: len(runs) for name, runs in found.items()} == (
        {f"r8-s{seed}": 1 for seed in range(30)} | {"exp: summary": 1}
    )
    (run,) = found["r8-s3"]
    assert (run.facts.project, run.facts.run_group, run.facts.job_type) == ("p", "exp", "lora")
    assert list(run.facts.tags) == ["mini", "kjv"] and run.exit == 0
    assert run.config["train"] == {"lr": 0.01, "schedule": "cosine"}  # nested, to filter by
    assert run.config["method"]["targets"] == "all" and run.config["seed"] == 3
    rows = run_record.read_metrics(folder / "r8-s3")
    assert len(run.history) == len(rows)
    for logged, row in zip(run.history, rows, strict=True):
        assert row.items() <= logged.items()
    assert run.metrics == {"train/*": "tokens", "eval/*": "tokens"} | {
        key: value for key, value in run.metrics.items() if key not in ("train/*", "eval/*")
    }
    record = run_record.read(folder / "r8-s3")
    assert run.summary["test/perplexity"] == record["quality"]["test"]["perplexity"]
    assert run.summary["parameters/trainable"] == 8000 and run.summary["status"] == "finished"
    assert run.summary["memory/peak_gib"] == record["memory"]["peak_bytes"] / 2**30
    (artifact,) = [a for a in run.artifacts if a.type == "adapter"]
    assert json.loads(artifact.metadata)["method"]["rank"] == "8"
    assert not found["r8-s4"][0].artifacts
    (last,) = found["exp: summary"]
    assert last.facts.job_type == "summary" and last.facts.run_group == "exp"
    (logged,) = [row for row in last.history if "results/nrows" in row]
    assert logged["results/nrows"] == 1
    assert any(key.startswith("figures/") for key in logged)
    assert any(a.type == "report" for a in last.artifacts)

    with tracking.TrackerProcesses(runs_of(folder, {"wandb": OFFLINE}), sweep=False):
        pass  # the same sweep again: nothing is finished anew, nothing is tracked twice
    assert sum(map(len, read(folder).values())) == 31


@pytest.mark.faults
def test_several_trackers_follow_a_run_that_is_cut_and_goes_on(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    folder = sweep(tmp_path / "exp", 1)
    run_dir = folder / "r8-s0"
    whole, record = run_record.read_metrics(run_dir), run_record.read(run_dir)

    def state(rows, status):
        text = "".join(json.dumps(row) + "\n" for row in rows)
        atomic.write_atomically(run_dir / "metrics.jsonl", text)
        run_record.write(run_dir, record | {"status": status})

    asked = {"wandb": OFFLINE, "tensorboard": {"patience": 60}}
    state(whole[:4], "interrupted")
    with tracking.TrackerProcesses(runs_of(folder, asked), sweep=False):
        pass
    state(whole[:3], "running")  # gone on from a checkpoint before the cut
    with tracking.TrackerProcesses(runs_of(folder, asked), sweep=False):
        end = time.monotonic() + 120
        while len(list(folder.glob("wandb/offline-run-*"))) < 2:  # it follows the run again
            assert time.monotonic() < end, "no tracker has gone on with the run"
            time.sleep(0.05)
        state(whole, "finished")
    first, second = read(folder)["r8-s0"]
    assert first.facts.run_id == second.facts.run_id and (first.exit, second.exit) == (1, 0)
    assert [row["step"] for row in first.history + second.history] == [r["step"] for r in whole]
    events = EventAccumulator(str(folder / "tensorboard" / "r8-s0"))
    events.Reload()
    scalars = events.Scalars("train/nll")
    assert [event.step for event in scalars] == [r["tokens"] for r in whole if "train/nll" in r]
    assert events.Scalars("test/perplexity")


WATCH = """
import socket
_connect = socket.socket.connect
def connect(self, address):
    if self.family != socket.AF_UNIX:
        open({path!r}, "a").write(f"{{address}}\\n")
    return _connect(self, address)
socket.socket.connect = connect
"""


def test_trackio_keeps_its_runs_in_the_sweeps_folder_and_asks_nobody(tmp_path, capsys, monkeypatch):
    pytest.importorskip("trackio", reason="trackio is not installed")
    asked, hook = tmp_path / "asked", tmp_path / "hook" / "sitecustomize.py"
    hook.parent.mkdir()
    hook.write_text(WATCH.format(path=str(asked)))
    monkeypatch.setenv("PYTHONPATH", f"{hook.parent}{os.pathsep}{REPOSITORY}")
    monkeypatch.setenv("HF_TOKEN", "hf_" + "a" * 34)  # whose it is would be asked of the hub
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    folder = sweep(tmp_path / "exp", 2)
    whole, record = (f(folder / "r8-s0") for f in (run_record.read_metrics, run_record.read))
    text = "".join(json.dumps(row) + "\n" for row in whole[:4])
    atomic.write_atomically(folder / "r8-s0" / "metrics.jsonl", text)
    run_record.write(folder / "r8-s0", record | {"status": "interrupted"})
    tracker = {"trackio": {"project": "p", "patience": 120}}
    with tracking.TrackerProcesses(runs_of(folder, tracker), sweep=True) as beside:
        pass
    said = capsys.readouterr().out
    assert said.startswith("trackio: 2 runs; TRACKIO_DIR=") and "trackio show --project p" in said
    with pytest.raises(ProcessLookupError):  # nor has it left a server
        os.killpg(beside._processes["trackio"].pid, 0)
    text = "".join(json.dumps(row) + "\n" for row in whole)
    atomic.write_atomically(folder / "r8-s0" / "metrics.jsonl", text)
    run_record.write(folder / "r8-s0", record)
    with tracking.TrackerProcesses(runs_of(folder, tracker), sweep=True):
        pass
    assert not asked.exists() and not (tmp_path / "home").exists()
    with closing(sqlite3.connect(folder / "trackio" / "p.db")) as database:
        rows = database.execute("SELECT run_name, run_id, step, metrics FROM metrics ORDER BY id")
        logged = [(name, run, step, json.loads(text)) for name, run, step, text in rows]
        configs = dict(database.execute("SELECT run_name, config FROM configs").fetchall())
    assert {name for name, *_ in logged} == {"r8-s0", "r8-s1"}
    assert len({run for _, run, *_ in logged}) == 2  # what was cut has gone on as the same run
    for name in ("r8-s0", "r8-s1"):
        mine = [(step, values) for other, _, step, values in logged if other == name]
        steps = [(step, values) for step, values in mine if "test/perplexity" not in values]
        expected = run_record.read_metrics(folder / name)
        assert [step for step, _ in steps] == [row["tokens"] for row in expected]
        for (_, values), row in zip(steps, expected, strict=True):
            assert values.items() >= {k: v for k, v in row.items() if "/" in k}.items()
        quality = run_record.read(folder / name)["quality"]
        assert mine[-1][1]["test/perplexity"] == quality["test"]["perplexity"]
        config = json.loads(configs[name])
        assert config["_Group"] == "exp" and config["train"]["lr"] == 0.01


@pytest.mark.parametrize("end", ["throws", "hangs", "dies"])
def test_a_tracker_that_fails_is_told_of_and_nothing_else(tmp_path, capsys, end, monkeypatch):
    folder = sweep(tmp_path / "exp", 2)
    before = {p: p.read_bytes() for p in folder.glob("*/*") if p.is_file()}
    module = tmp_path / "broken" / "wandb"
    module.mkdir(parents=True)
    body = {"throws": "raise RuntimeError('no')", "hangs": "time.sleep(600)", "dies": "os.abort()"}
    (module / "__init__.py").write_text(f"import os, time\n{body[end]}\n")
    monkeypatch.setenv("PYTHONPATH", f"{module.parent}{os.pathsep}{REPOSITORY}")
    patience = 5 if end == "hangs" else 120
    with tracking.TrackerProcesses(
        runs_of(folder, {"wandb": OFFLINE | {"patience": patience}}), sweep=True
    ):
        pass
    said = capsys.readouterr().out
    ended = {
        "throws": "failed (exit status 1)",
        "hangs": "did not end in time and was stopped",
        "dies": "was killed by signal 6",
    }
    assert said.startswith(f"wandb: {ended[end]}") and "results are not touched" in said
    after = {p: p.read_bytes() for p in folder.glob("*/*") if p.is_file()}
    assert {p: b for p, b in after.items() if not p.name.startswith(".tracked")} == before


def test_without_a_key_the_runs_go_offline_and_the_reason_is_told(tmp_path, capsys, monkeypatch):
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    folder = sweep(tmp_path / "exp", 1)
    with tracking.TrackerProcesses(
        runs_of(folder, {"wandb": OFFLINE | {"mode": "online"}}), sweep=False
    ):
        pass
    said = capsys.readouterr().out
    assert "1 runs offline" in said and "could not be reached" in said
    assert len(read(folder)["r8-s0"]) == 1


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["refuses", "swallows"])
def test_a_service_that_cannot_be_reached_leaves_runs_offline(tmp_path, capsys, monkeypatch, kind):
    listener = socket.socket()
    listener.bind(("127.0.0.1", 0))
    if kind == "swallows":
        listener.listen(1)  # accepts, and never answers
    host = f"http://127.0.0.1:{listener.getsockname()[1]}"
    monkeypatch.setenv("WANDB_BASE_URL", host)
    monkeypatch.setenv("WANDB_API_KEY", "a" * 40)
    folder = sweep(tmp_path / "exp", 1)
    with tracking.TrackerProcesses(
        runs_of(folder, {"wandb": OFFLINE | {"mode": "online"}}), sweep=False
    ):
        pass
    listener.close()
    said = capsys.readouterr().out
    assert "1 runs offline" in said and "could not be reached" in said
    assert len(read(folder)["r8-s0"]) == 1


def test_a_tracker_ends_with_its_controller(tmp_path):
    folder = sweep(tmp_path / "exp", 1)
    code = (
        "import os, sys, signal; from types import SimpleNamespace as N; from pathlib import Path\n"
        "from harness.runs import tracking\n"
        f"run = N(run_dir=Path({str(folder / 'r8-s0')!r}), experiment_name='e', "
        "tracker={'tensorboard': {'patience': 5}})\n"
        "beside = tracking.TrackerProcesses([run], sweep=False).__enter__()\n"
        "print(beside._processes['tensorboard'].pid, flush=True)\n"
        "os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=120,
        env=os.environ | {"PYTHONPATH": str(REPOSITORY)},
    )  # fmt: skip
    pid = int(done.stdout)
    end = time.monotonic() + 60
    while Path(f"/proc/{pid}").exists() and "Z" not in state_of(pid):
        assert time.monotonic() < end, "the tracker has outlived its controller"
        time.sleep(0.2)


def state_of(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0]
    except OSError:
        return "Z"


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["tracker=wandbb"], "did you mean 'wandb'"),
        (["tracker=wandb", "tracker.wandb.mode=of"], "tracker.wandb.mode=of"),
        (["tracker=wandb", "+tracker.wandb.projet=x"], "did you mean 'project'"),
        (["+tracker.mlfow={}"], "did you mean 'mlflow'"),
    ],
)
def test_a_mistake_is_named(make_run, overrides, said):
    from hydra.errors import HydraException

    from harness.runs.composition import explain

    with pytest.raises((ConfigError, HydraException)) as error:
        make_run(*overrides)
    assert said in explain(error.value)


def test_trackers_compose_alone_and_together_and_make_no_other_run(make_run):
    from harness.config.naming import identity

    plain = make_run()
    assert plain.tracker == {}
    both = make_run("tracker=[wandb_offline,tensorboard]")
    assert set(both.tracker) == {"wandb", "tensorboard"}
    assert both.tracker["wandb"]["mode"] == "offline"
    assert make_run("tracker=wandb").tracker["wandb"]["mode"] == "online"
    assert identity(plain) == identity(both)
