"""Models in GGUF files: where the file is, and the model in transformers' format, made once.

Reading a GGUF file dequantizes every weight, many times slower than reading the result back. So the
result is kept, keyed by the file's content: the runs of a sweep read it as any local folder.
"""

from __future__ import annotations

import hashlib
import logging
import shutil
import struct
import tempfile
from importlib.metadata import version
from pathlib import Path
from typing import Any

from harness.config.errors import ConfigError
from harness.system import digests

log = logging.getLogger(__name__)


def converted(file: Path, cache_dir: str) -> Path:
    """A folder in transformers' format with the model (fp32) and the tokenizer of a GGUF file.

    Raises:
        ConfigError: the file cannot be read, or the cache cannot be written.
    """
    key = f"{digests.of_file(file, cache_dir)}-{version('transformers')}"
    folder = Path(cache_dir) / "models" / hashlib.sha256(key.encode()).hexdigest()[:32]
    if _is_whole(folder):
        return folder
    log.info("converting %s, once", file)
    from transformers import AutoTokenizer  # here: the controller must not import torch

    try:
        model = _dense(file)
        tokenizer = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
    except ConfigError:
        raise
    except (OSError, ValueError, LookupError, NotImplementedError, struct.error) as error:
        reason = " ".join(str(error).split())[:200]
        raise ConfigError(f"model.gguf: {file} could not be read ({reason})") from error
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        scratch = Path(tempfile.mkdtemp(dir=folder.parent, prefix=".writing-"))
    except OSError as error:
        raise ConfigError(f"model.cache_dir: cannot write {folder.parent} ({error})") from error
    try:
        model.save_pretrained(scratch)
        tokenizer.save_pretrained(scratch)
        scratch.rename(folder)  # whole or not at all
    except OSError:
        if not _is_whole(folder):  # not another process that was first
            raise
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    return folder


def _dense(file: Path) -> Any:
    """The model of a GGUF file as `transformers` makes it, without what marks it as quantized."""
    import torch
    import transformers
    from transformers import AutoConfig, AutoModelForCausalLM

    from harness.models import weights

    options: dict[str, Any] = {"gguf_file": file.name}
    config = AutoConfig.from_pretrained(file.parent, **options)
    if hasattr(transformers, "GgufConfig"):  # releases that may leave weights packed
        options["quantization_config"] = transformers.GgufConfig(dequantize=True)
    read, _ = weights.load(file.parent, dtype=torch.float32, **options)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    model.load_state_dict(read.state_dict(), assign=True)
    model.tie_weights()
    return model


def _is_whole(folder: Path) -> bool:
    """Whether a conversion is there; one that was cut short on the disk is cleared away."""
    if not folder.is_dir():
        return False
    from safetensors import SafetensorError, safe_open

    try:
        for path in folder.glob("*.safetensors"):
            with safe_open(path, framework="np"):  # compares the header with the file's size
                pass
        if (folder / "tokenizer_config.json").is_file():
            return True
        reason = "a file is missing"
    except (OSError, SafetensorError) as error:
        reason = str(error)
    log.warning("the converted model in %s is damaged and made again: %s", folder, reason)
    shutil.rmtree(folder, ignore_errors=True)
    return False
