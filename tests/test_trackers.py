"""Trackers by name: MLflow's store read back, TensorBoard's HParams, what is not installed."""

import importlib.util
import json
import os
from types import SimpleNamespace

import pytest
from tracked_sweeps import runs_of, sweep

from harness.config.errors import ConfigError
from harness.results import run_record
from harness.runs import trackers, tracking
from harness.runs.tracker_process import Follower
from harness.system import atomic

NEW = {"mlflow": "mlflow", "comet_ml": "comet_ml", "clearml": "clearml", "aim": "aim",
       "swanlab": "swanlab"}  # fmt: skip


def cut(run_dir, rows, status):
    """Leave a run with the first rows of its metrics, and a status."""
    whole, record = run_record.read_metrics(run_dir), run_record.read(run_dir)
    text = "".join(json.dumps(row) + "\n" for row in whole[:rows])
    atomic.write_atomically(run_dir / "metrics.jsonl", text)
    run_record.write(run_dir, record | {"status": status})
    return whole, record


@pytest.mark.slow
def test_a_sweep_in_mlflow_is_read_back_from_its_sqlite_store(tmp_path, capsys, monkeypatch):
    """Parameters, curves over tokens and the summary; a run that was cut is gone on with."""
    mlflow = pytest.importorskip("mlflow", reason="mlflow is not installed")
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    folder = sweep(tmp_path / "exp", 2)
    whole, record = cut(folder / "r8-s0", 3, "interrupted")
    asked = {"mlflow": {"uri": None, "patience": 400}}
    with tracking.TrackerProcesses(runs_of(folder, asked), sweep=True):
        pass
    said = capsys.readouterr().out
    assert f"2 runs; mlflow ui --backend-store-uri sqlite:///{folder}/mlflow.db" in said
    text = "".join(json.dumps(row) + "\n" for row in whole)
    atomic.write_atomically(folder / "r8-s0" / "metrics.jsonl", text)
    run_record.write(folder / "r8-s0", record)
    with tracking.TrackerProcesses(runs_of(folder, asked), sweep=True):
        pass
    client = mlflow.MlflowClient(f"sqlite:///{folder}/mlflow.db")
    (experiment,) = [e for e in client.search_experiments() if e.name == "exp"]
    runs = {run.info.run_name: run for run in client.search_runs([experiment.experiment_id])}
    assert set(runs) == {"r8-s0", "r8-s1"}
    for name, run in runs.items():
        record = run_record.read(folder / name)
        assert run.info.status == "FINISHED" and run.data.tags["status"] == "finished"
        assert run.data.params["train.lr"] == "0.01" and run.data.params["method.r"] == "8"
        assert run.data.params["seed"] == name[-1] and run.data.tags["model"] == "mini"
        test = record["quality"]["test"]["perplexity"]
        assert run.data.metrics["test/perplexity"] == pytest.approx(test)
        rows = [r for r in run_record.read_metrics(folder / name) if "train/nll" in r]
        history = client.get_metric_history(run.info.run_id, "train/nll")
        assert [(m.step, m.value) for m in history] == [(r["tokens"], r["train/nll"]) for r in rows]
    assert not (tmp_path / "mlruns").exists()


def test_tensorboard_has_the_settings_of_a_run_beside_its_numbers(tmp_path):
    """HParams: the settings by dotted keys, and the metrics' tags that the run has scalars of."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    from tensorboard.plugins.hparams import plugin_data_pb2
    from torch.utils.tensorboard import SummaryWriter

    folder = sweep(tmp_path / "exp", 1)
    record = run_record.read(folder / "r8-s0")
    with SummaryWriter(tmp_path / "events") as writer:
        trackers.write_hparams(writer, record, trackers.summary(record))
    events = EventAccumulator(str(tmp_path / "events"))
    events.Reload()
    found = {
        tag: plugin_data_pb2.HParamsPluginData.FromString(data)
        for tag, data in events.summary_metadata_by_plugin("hparams").items()
    } if hasattr(events, "summary_metadata_by_plugin") else {
        tag: plugin_data_pb2.HParamsPluginData.FromString(data)
        for tag, data in events.PluginTagToContent("hparams").items()
    }  # fmt: skip
    start = found["_hparams_/session_start_info"].session_start_info.hparams
    assert start["train.lr"].number_value == 0.01 and start["method.r"].number_value == 8
    assert start["model"].string_value == "mini" and start["data"].string_value == "kjv"
    metrics = {m.name.tag for m in found["_hparams_/experiment"].experiment.metric_infos}
    assert {"test/perplexity", "memory/peak_gib", "parameters/trainable"} <= metrics


@pytest.mark.parametrize("name", NEW)
def test_a_tracker_that_is_not_installed_is_refused_in_one_line(make_run, monkeypatch, name):
    there = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda n: None if n == name else there(n))
    with pytest.raises(ConfigError) as error:
        make_run(f"tracker={name}")
    assert str(error.value) == f"tracker={name} is not installed: pip install {NEW[name]}"


def test_trackers_that_are_installed_compose_together(make_run, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    run = make_run(f"tracker=[{','.join(NEW)},tensorboard]")
    assert set(run.tracker) == {*NEW, "tensorboard"} <= set(trackers.STARTS)
    with pytest.raises(ConfigError, match=r"tracker\.aim\.patiense: did you mean 'patience'"):
        make_run("tracker=aim", "+tracker.aim.patiense=1")


def test_names_are_those_of_accelerates_registry():
    from accelerate.tracking import LOGGER_TYPE_TO_CLASS

    assert set(trackers.STARTS) <= set(LOGGER_TYPE_TO_CLASS)


def test_a_tracker_of_one_run_a_process_never_has_two_open(tmp_path):
    """Runs side by side: the second is read when the first has ended; all of it is logged."""
    folder = sweep(tmp_path / "exp", 3)
    opened, logged, ends = [], {}, []

    def make(record, one):
        assert not opened, "two runs are open"
        name = one.run_dir.name
        opened.append(name)
        logged.setdefault(name, [])

        def end(*_):
            opened.remove(name)
            ends.append(name)

        return SimpleNamespace(
            log=lambda values, tokens: logged[name].append(tokens), end=end,
            leave=lambda: opened.remove(name),
        )  # fmt: skip

    whole, record = cut(folder / "r8-s0", 2, "running")
    spec = {"runs": [str(folder / f"r8-s{seed}") for seed in range(3)]}
    follower = Follower("mlflow", spec, make)
    follower.look()
    assert opened == ["r8-s0"] and list(logged) == ["r8-s0"]
    text = "".join(json.dumps(row) + "\n" for row in whole)
    (folder / "r8-s0" / "metrics.jsonl").write_text(text)
    run_record.write(folder / "r8-s0", record)
    cut(folder / "r8-s2", 2, "running")  # and one whose process is gone
    follower.look(last=True)
    assert ends == ["r8-s0", "r8-s1"] and not opened
    assert len(logged["r8-s1"]) == len(whole) and len(logged["r8-s2"]) == 2


def test_a_trackers_own_reports_home_are_off_unless_asked_for(tmp_path, monkeypatch):
    monkeypatch.delenv("MLFLOW_DISABLE_TELEMETRY", raising=False)
    assert tracking._environment(tmp_path)["MLFLOW_DISABLE_TELEMETRY"] == "true"
    monkeypatch.setenv("MLFLOW_DISABLE_TELEMETRY", "false")
    assert tracking._environment(tmp_path)["MLFLOW_DISABLE_TELEMETRY"] == "false"
    assert os.environ["MLFLOW_DISABLE_TELEMETRY"] == "false"
