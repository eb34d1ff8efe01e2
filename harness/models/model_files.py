"""Where a model's files come from, and what is said where they cannot be read."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from transformers import PretrainedConfig
from transformers.models.auto.tokenization_auto import get_tokenizer_config

from harness.config.errors import ConfigError
from harness.config.paths import ASSETS_DIR
from harness.config.schema import ModelConfig
from harness.models import gguf
from harness.system import gguf_file, network


def source_of(cfg: ModelConfig) -> str:
    """Folder or hub id that the model's files come from; a GGUF file is converted first."""
    if cfg.gguf:
        return str(gguf.converted(gguf_file.file_of(cfg), cfg.cache_dir))
    return str(ASSETS_DIR / cfg.asset) if cfg.asset else cfg.path or cfg.id or ""


def folder_of(cfg: ModelConfig) -> Path:
    """Where the model's files are on this machine: a hub model's in the hub cache.

    Raises:
        OSError: a hub model that has not been loaded here.
    """
    from huggingface_hub import snapshot_download

    source = source_of(cfg)
    if cfg.id and source == cfg.id:
        return Path(snapshot_download(source, revision=cfg.revision, local_files_only=True))
    return Path(source)


def from_source(read: Callable[..., Any], cfg: ModelConfig, source: str, **options: Any) -> Any:
    """`read(source)`, a `from_pretrained`, with an error that says which models there are."""
    revision: dict[str, Any] = {}
    if cfg.revision and source == cfg.id:
        revision["revision"] = cfg.revision
    trusted = cfg.remote_code is not None and source == cfg.remote_code
    if trusted:
        _refuse_code_of_others(source, revision)
    try:
        # Said either way: left open, transformers would ask at the terminal.
        return read(source, trust_remote_code=trusted, **revision, **options)
    except ConfigError:  # which says it all
        raise
    except (OSError, ValueError) as error:
        reason = re.sub(r"\s+", " ", str(error)).strip()[:200]
        if "trust_remote_code" in str(error):
            raise ConfigError(
                f"model={cfg.name}: {source!r} brings code of its own, which is run only where it "
                f"is asked for by name: model.remote_code={source}"
            ) from error
        where = f" at revision {cfg.revision}" if revision else ""
        cached = ", ".join(network.revisions(source)) if revision else ""
        other = f"Of it the local hub cache has revision {cached}: model.revision=…. " * bool(
            cached
        )
        shipped = ", ".join(p.name for p in sorted(ASSETS_DIR.iterdir()) if p.is_dir())
        raise ConfigError(
            f"model={cfg.name}: {source!r}{where} could not be loaded ({reason}). {other}"
            f"Models that ship with the harness: {shipped}. In the local hub cache: "
            f"{', '.join(network.cached('models')) or 'none'}. Or give a folder: model.path=…"
        ) from error


def _refuse_code_of_others(source: str, revision: dict[str, Any]) -> None:
    """Raise ConfigError where a model's code is that of another repository, which nobody named."""
    try:
        configs = [
            PretrainedConfig.get_config_dict(source, **revision)[0],
            get_tokenizer_config(source, **revision),
        ]
    except (OSError, ValueError):
        return  # no such model, which loading says better
    for auto_map in (config.get("auto_map") or {} for config in configs):
        if others := set(re.findall(r"([\w./-]+)--", str(auto_map))) - {source}:
            raise ConfigError(
                f"model.remote_code={source}: its code is that of {', '.join(sorted(others))}, "
                "which is not run; give a folder that holds the code: model.path=…"
            )
