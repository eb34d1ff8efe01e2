"""Accelerate's trackers, each by its name, with the harness's conventions for a run's facts.

A run's name, group and settings go where the tracker has a place for them; tokens are the steps of
its curves; a result's numbers have plain names (test/perplexity, memory/peak_gib).
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from harness.evaluation import text_metrics
from harness.results import run_record
from harness.results.record_types import Record
from harness.results.run_record import flat

# Trackers that know one run a process: another is started when it has ended. Accelerate's trackers
# of these log to whatever run is the process's own.
ONE_AT_A_TIME = ("mlflow", "comet_ml", "clearml", "aim", "swanlab")
RESUMES = ("wandb", "trackio", "tensorboard", "mlflow")  # others begin a cut run anew
OF_A_RUN = ("method", "model", "data", "train", "targets", "seed")  # settings for parallel axes


class Adapter:
    """Accelerate's tracker for one run; `one` is what is kept of it (`follow.Followed`)."""

    def __init__(self, name: str, spec: dict[str, Any], record: Record, followed: Any) -> None:
        from accelerate import PartialState  # imports torch: here, at idle priority

        PartialState(cpu=True)  # which Accelerate's logging asks for
        self.name, self.options, self.record = name, spec["options"], record
        settings = {**record["config"], "method": record["config"]["method"] | record["method"]}
        if name not in RESUMES:
            followed.last = {}
        self.inner = STARTS[name](spec, record, followed, settings)

    def log(self, values: dict[str, Any], tokens: int) -> None:
        """Send one row of metrics to the tracker."""
        if self.name == "wandb":
            self.inner.log(values)  # with its tokens, which define_metric makes the step axis
        else:
            self.inner.log({k: v for k, v in values.items() if "/" in k}, step=tokens)

    def end(self, run_dir: Path, record: Record) -> None:
        """Send the summary and the adapter, and end the tracker's run."""
        values = summary(record)
        if self.name == "wandb":
            self._end_wandb(run_dir, record, values)
            return
        self.inner.log(values, step=run_record.last_metrics(run_dir).get("tokens", 0))
        if self.name == "tensorboard":
            write_hparams(self.inner.tracker, record, values)
        if self.name == "mlflow":
            import mlflow

            mlflow.set_tag("status", record["status"])
            ends = {"finished": "FINISHED", "interrupted": "KILLED"}
            mlflow.end_run(ends.get(record["status"], "FAILED"))
        else:
            self.inner.finish()

    def leave(self) -> None:
        """Close a run that has not ended; a later sweep goes on with it where the tracker can."""
        self.inner.finish()

    def _end_wandb(self, run_dir: Path, record: Record, values: dict[str, float]) -> None:
        run = self.inner.tracker
        run.summary.update(values | {"status": record["status"]})
        if self.options["adapters"] and (run_dir / "adapter").is_dir():
            import wandb

            metadata = {
                "method": record["method"],
                "data": record["data"],
                "model": record["model"],
            }
            artifact = wandb.Artifact(f"adapter-{run.id}", "adapter", metadata=metadata | values)
            artifact.add_dir(str(run_dir / "adapter"))
            run.log_artifact(artifact)
        run.finish(exit_code=0 if record["status"] == "finished" else 1)


# ------------------------------------------------------------------------------- one start a name


def _wandb(spec: dict[str, Any], record: Record, followed: Any, settings: Any) -> Any:
    import wandb
    from accelerate import tracking

    inner = tracking.WandBTracker(
        spec["options"]["project"], entity=spec["options"]["entity"], mode=spec["mode"],
        dir=spec["folder"], id=followed.id, resume="allow", name=record["run"]["name"],
        group=spec["experiment"], job_type=record["method"]["label"], tags=_tags(record),
        config=settings, reinit="create_new", save_code=False,
        settings=wandb.Settings(init_timeout=15, x_disable_stats=True, console="off"),
    )  # fmt: skip
    inner.start()
    for metrics in ("train/*", "eval/*"):
        inner.tracker.define_metric(metrics, step_metric="tokens")
    return inner


def _tensorboard(spec: dict[str, Any], record: Record, followed: Any, settings: Any) -> Any:
    from accelerate import tracking

    folder = Path(spec["folder"]) / "tensorboard"
    inner = tracking.TensorBoardTracker(record["run"]["name"], logging_dir=folder)
    inner.start()
    inner.tracker.add_text("config", f"```json\n{json.dumps(settings, indent=1)}\n```")
    return inner


def _trackio(spec: dict[str, Any], record: Record, followed: Any, settings: Any) -> Any:
    from accelerate import tracking
    from trackio import context_vars

    context_vars.current_run.set(None)  # or it ends the run that is under way beside it
    inner = tracking.TrackioTracker(
        spec["options"]["project"], name=record["run"]["name"], group=spec["experiment"],
        config=settings, resume="allow" if followed.last else "never", auto_log_cpu=False,
        auto_log_gpu=False,
    )  # fmt: skip
    inner.start()
    return inner


def _mlflow(spec: dict[str, Any], record: Record, followed: Any, settings: Any) -> Any:
    import mlflow
    from accelerate import tracking

    uri = mlflow_uri(spec)
    mlflow.set_tracking_uri(uri)
    artifacts = None
    if uri.startswith("sqlite:"):  # or the server's own place
        artifacts = (Path(spec["folder"]) / "mlflow-artifacts").as_uri()
    goes_on = bool(followed.last)
    tags = {"method": record["method"]["label"], "group": spec["experiment"]}
    inner = tracking.MLflowTracker(
        experiment_name=spec["experiment"], logging_dir=artifacts,
        run_id=followed.id if goes_on else None, run_name=record["run"]["name"],
        tags=tags | dict(zip(("model", "data"), _tags(record), strict=True)),
    )  # fmt: skip
    inner.start()
    followed.id = inner.tracker.info.run_id
    if not goes_on:
        inner.store_init_configuration(flat(settings))
    return inner


def mlflow_uri(spec: dict[str, Any]) -> str:
    """Where MLflow's runs go: the option's, the environment's, or a SQLite file of the sweep."""
    own = f"sqlite:///{Path(spec['folder']) / 'mlflow.db'}"
    return str(spec["options"].get("uri") or os.environ.get("MLFLOW_TRACKING_URI") or own)


def _comet_ml(spec: dict[str, Any], record: Record, followed: Any, settings: Any) -> Any:
    from accelerate import tracking

    inner = tracking.CometMLTracker(spec["options"]["project"], **spec["options"]["init"])
    inner.start()
    inner.tracker.set_name(record["run"]["name"])
    inner.tracker.add_tags([spec["experiment"], *_tags(record)])
    inner.store_init_configuration(flat(settings))
    return inner


def _clearml(spec: dict[str, Any], record: Record, followed: Any, settings: Any) -> Any:
    from accelerate import tracking

    inner = tracking.ClearMLTracker(
        project_name=spec["options"]["project"], task_name=record["run"]["name"],
        tags=[spec["experiment"], *_tags(record)], reuse_last_task_id=False,
        auto_connect_frameworks=False, auto_resource_monitoring=False, **spec["options"]["init"],
    )  # fmt: skip
    inner.start()
    inner.store_init_configuration(settings)
    return inner


def _aim(spec: dict[str, Any], record: Record, followed: Any, settings: Any) -> Any:
    from accelerate import tracking

    inner = tracking.AimTracker(
        record["run"]["name"], logging_dir=spec["folder"],
        **{"experiment": spec["experiment"], "system_tracking_interval": None}
        | spec["options"]["init"],
    )  # fmt: skip
    inner.start()
    inner.store_init_configuration(settings)
    return inner


def _swanlab(spec: dict[str, Any], record: Record, followed: Any, settings: Any) -> Any:
    from accelerate import tracking

    inner = tracking.SwanLabTracker(
        spec["options"]["project"],
        **{
            "experiment_name": record["run"]["name"], "logdir": f"{spec['folder']}/swanlab",
            "tags": [spec["experiment"], *_tags(record)],
        }
        | spec["options"]["init"],
    )  # fmt: skip
    inner.start()
    inner.store_init_configuration(flat(settings))
    return inner


STARTS = {
    "wandb": _wandb,
    "tensorboard": _tensorboard,
    "trackio": _trackio,
    "mlflow": _mlflow,
    "comet_ml": _comet_ml,
    "clearml": _clearml,
    "aim": _aim,
    "swanlab": _swanlab,
}


def where(name: str, spec: dict[str, Any]) -> str:
    """How to look at what was tracked, in a line."""
    if name == "mlflow":
        return f"mlflow ui --backend-store-uri {mlflow_uri(spec)}"
    if name == "aim":
        return f"aim up --repo {spec['folder']}"
    return f"in {name}, project {spec['options']['project']}"


# ------------------------------------------------------------------------------------ what is told


def write_hparams(writer: Any, record: Record, values: dict[str, float]) -> None:
    """TensorBoard's HParams: a run's settings beside its numbers, in the run's own events."""
    from torch.utils.tensorboard.summary import hparams

    settings = record["config"] | {"method": record["config"]["method"] | record["method"]}
    own = {key: value for key, value in settings.items() if key in OF_A_RUN}
    own["model"], own["data"] = dict(zip(("model", "data"), _tags(record), strict=True)).values()
    known = {key: value for key, value in flat(own).items() if value not in (None, "")}
    for summary_of in hparams(known, values):
        writer.file_writer.add_summary(summary_of)
    writer.flush()


def _tags(record: Record) -> list[str]:
    return [record["model"]["name"], record["data"]["name"]]


def summary(record: Record) -> dict[str, float]:
    """A result's numbers under plain names."""
    paths = {
        "parameters/trainable": "parameters.trainable",
        "parameters/total": "parameters.total",
        "parameters/trainable_percent": "parameters.trainable_percent",
        "speed/tokens_per_second": "speed.tokens_per_second",
        "speed/train_seconds": "speed.train_seconds",
        "step0/perplexity": "quality.step0.validation.perplexity",
        "validation/perplexity": "quality.validation.perplexity",
        "test/perplexity": "quality.test.perplexity",
        "test/word_perplexity": "quality.test.word_perplexity",
        "test/bits_per_byte": "quality.test.bits_per_byte",
        "validation/accuracy": "quality.classification.validation.accuracy",
        "test/accuracy": "quality.classification.test.accuracy",
        "test/majority_accuracy": "quality.classification.test.majority_accuracy",
    } | {f"test/{name}": f"quality.generation.{name}" for name in text_metrics.METRICS}
    values = {name: run_record.get(record, path) for name, path in paths.items()}
    for text, quality in (run_record.get(record, "quality.also") or {}).items():
        for when, value in quality.items():
            values[f"{text}/perplexity_{when}"] = value["perplexity"]
    memory = record.get("memory") or {}
    categories = memory.get("by_category") or {}
    sizes: dict[str, Any] = {"memory/peak_gib": memory.get("peak_bytes")}
    sizes |= {f"memory/{name}_gib": size for name, size in categories.items()}
    values |= {name: size / 2**30 for name, size in sizes.items() if size is not None}
    return {name: value for name, value in values.items() if value is not None}
