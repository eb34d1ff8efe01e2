"""A finished run, read back: its configuration, its record, its base and the model it made."""

from __future__ import annotations

import copy
import os
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import transformers
from accelerate.utils import set_seed
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from harness import methods
from harness.config.errors import ConfigError, nearest
from harness.config.paths import ASSETS_DIR
from harness.config.run_config import RunConfig
from harness.methods.svd import CACHE_ENV
from harness.models import linear, model_files, pretrained, weights
from harness.results import run_record
from harness.results.record_types import Record
from harness.runs import composition
from harness.system import contents, network

ADAPTER, MODEL = "adapter", "model"  # folders of a run directory (`checkpoint.export`)


@dataclass(frozen=True)
class Saved:
    """What `load` found; models are loaded when asked for, a new one every time."""

    run_dir: Path
    run: RunConfig  # with the base's folders as they are found now
    record: Record  # result.json

    @cached_property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The run's tokenizer, read when it is asked for first."""
        return pretrained.load_tokenizer(self.run.model, pretrained.load_config(self.run.model))

    @property
    def name(self) -> str:
        """Return the name of the run, which is that of its directory."""
        return str(self.record["run"]["name"])

    @property
    def has_adapter(self) -> bool:
        """Whether the run left an adapter, rather than a whole model or nothing."""
        return self.run.method.leaves_adapter

    @property
    def unfused(self) -> bool:
        """Whether q, k and v were three matrices in the run."""
        return pretrained.wants_unfused(self.run, pretrained.load_config(self.run.model))

    @property
    def turned(self) -> bool:
        """Whether GPT-2's `Conv1D` were `nn.Linear` in the run."""
        config = pretrained.load_config(self.run.model)
        return linear.is_turned(pretrained.on_meta(self.run, config))

    def folder(self, name: str) -> Path:
        """The folder `adapter/` or `model/` of the run.

        Raises:
            ConfigError: it is gone.
        """
        path = self.run_dir / name
        if not path.is_dir():
            folders = ", ".join(sorted(p.name for p in self.run_dir.iterdir() if p.is_dir()))
            raise ConfigError(
                f"{path}, which the run wrote, is not there (folders there: {folders or 'none'}): "
                "the same command with rerun=true makes it again"
            )
        return path

    def base(self) -> PreTrainedModel:
        """The base as the run loaded it, in eval mode."""
        set_seed(self.run.seed)  # as the worker does: of a base that is drawn, these are the draws
        base = pretrained.load_model(self.run, pretrained.load_config(self.run.model))
        return _with_cache(base).eval()

    def model(self) -> nn.Module:
        """The model that was evaluated on test, in eval mode: the base with what the run saved.

        Adapters are PEFT's own layers here, which agree to rounding with the fused ones of
        training (`harness.methods.lora_layer`) and bit for bit with what PEFT loads elsewhere.
        """
        if self.run.method.trains and not self.has_adapter:
            whole, _ = weights.load(self.folder(MODEL))
            return _with_cache(whole).eval()
        base = self.base()
        if not self.has_adapter:
            return methods.adapt(base, self.run).eval()
        # Straight after the base, as in training: some starts are drawn and taken off its weights.
        return weights.load_adapter(base, self.folder(ADAPTER))


def load(run_dir: Path) -> Saved:
    """Read a finished run; no weights are loaded yet.

    Raises:
        ConfigError: no run directory, an unfinished or failed run, or one whose base is gone or
            holds other weights now.
    """
    record = finished(run_dir)
    path = run_dir / "config.yaml"
    if not path.is_file():
        raise ConfigError(f"{run_dir} holds no config.yaml, which says what the base was")
    started = _started(run_dir, record)
    run = _with_folders(composition.load(path, validated=False), started)
    contents.check_model(
        run, "put back the files that the run had, or rerun=true of the same command", "done"
    )
    run = contents.pinned(run)
    transformers.utils.logging.disable_progress_bar()
    if run.model.id or run.model.tokenizer:
        network.go_offline_if_unreachable()
    if (cache := started / run.data.cache_dir).is_dir():
        os.environ.setdefault(CACHE_ENV, str(cache))  # the factors that the run computed
    saved = Saved(run_dir, run, record)
    _ = saved.tokenizer  # or it is refused here
    return saved


def finished(run_dir: Path) -> Record:
    """The result of a finished run.

    Raises:
        ConfigError: says what `run_dir` is instead, and which finished runs there are near it.
    """
    if not run_dir.is_dir():
        raise ConfigError(f"no folder {run_dir}; {_runs(run_dir.parent, run_dir.name)}")
    record = run_record.read(run_dir)
    if record is None:
        inside = next(run_record.collect(run_dir), None)
        what = "an experiment's folder, not a run's" if inside else "not a run directory"
        near = _runs(run_dir if inside else run_dir.parent, run_dir.name)
        raise ConfigError(f"{run_dir} is {what}: it has no {run_record.FILE_NAME} to read; {near}")
    status = record["status"]
    if status != "finished":
        failure = record.get("failure") or {}
        why = (failure.get("message") or "").splitlines()
        detail = f" ({failure.get('class')}: {why[0]})" if why and status == "failed" else ""
        raise ConfigError(
            f"{run_dir} is not finished: its status is {status}{detail}; "
            f"{_runs(run_dir.parent, run_dir.name)}"
        )
    return record


def source(run: RunConfig) -> str:
    """What `from_pretrained` takes for the run's base: a hub id, or a folder's absolute path."""
    base = model_files.source_of(run.model)
    return base if run.model.id else str(Path(base).resolve())


def original_config(run: RunConfig) -> PretrainedConfig:
    """The base's configuration as published, without what the harness writes into it."""
    if run.model.architecture:
        fields = {"model_type": "gpt2", **run.model.architecture}
        return transformers.AutoConfig.for_model(**fields)
    revision = {"revision": run.model.revision} if run.model.revision and run.model.id else {}
    return transformers.AutoConfig.from_pretrained(source(run), **revision)


def _runs(folder: Path, name: str) -> str:
    """Names of the finished runs in `folder`, for the end of a message."""
    names = [p.name for p, record in run_record.collect(folder) if record["status"] == "finished"]
    return f"finished runs in {folder}: {nearest(name, names)}"


def _started(run_dir: Path, record: Record) -> Path:
    """The folder where the run was started, to which its paths are relative."""
    settings = record["config"]
    inside = Path(settings["outputs_dir"], settings["experiment_name"], record["run"]["name"])
    parts, whole = inside.parts, run_dir.resolve()
    if not inside.is_absolute() and whole.parts[-len(parts) :] == parts:
        return whole.parents[len(parts) - 1]
    return Path.cwd()  # moved, or written elsewhere


def _with_folders(run: RunConfig, started: Path) -> RunConfig:
    """`run` with the folders of its base and tokenizer found where it was started, or here.

    Raises:
        ConfigError: the base's folder is in neither place.
    """
    model = run.model
    if model.asset and not (ASSETS_DIR / model.asset).is_dir():
        assets = [p.name for p in ASSETS_DIR.iterdir() if p.is_dir()]
        raise ConfigError(
            f"model.asset={model.asset!r} is not there: {nearest(model.asset, assets)}"
        )
    places = list(dict.fromkeys((started, Path.cwd())))
    if model.path:
        path = next((p / model.path for p in places if (p / model.path).is_dir()), None)
        if path is None:
            looked = " and ".join(str(place) for place in places)
            raise ConfigError(
                f"model.path={model.path!r}, the base of this run, is not there (looked from "
                f"{looked}): call this from the folder where the run was started, or put it back"
            )
        model = replace(model, path=str(path.resolve()))
    if model.tokenizer and not (ASSETS_DIR / model.tokenizer).is_dir():
        folder = started / model.tokenizer
        if folder.is_dir():
            model = replace(model, tokenizer=str(folder.resolve()))
    return replace(run, model=model)


def _with_cache(model: PreTrainedModel) -> PreTrainedModel:
    """Let `model` keep keys and values between tokens, where its kind can: training did without."""
    kept = getattr(type(model.config)(), "use_cache", None)
    model.config.use_cache = kept
    own = model.generation_config
    if own is not None and getattr(
        own, "_from_model_config", False
    ):  # or else the base's, as it is
        changed = copy.deepcopy(own)
        changed.use_cache = kept
        with suppress(ValueError):  # transformers saves invalid ones only where they are unchanged
            changed.validate(strict=True)
            model.generation_config = changed
    return model
