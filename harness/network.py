"""The Hugging Face hub: whether it can be reached, and what of it is on this machine."""

from __future__ import annotations

import os
import socket
import sys
from pathlib import Path
from urllib.parse import urlsplit

SWITCHES = (
    ("huggingface_hub.constants", "HF_HUB_OFFLINE"),
    ("datasets.config", "HF_HUB_OFFLINE"),
    ("datasets.config", "HF_DATASETS_OFFLINE"),
)
PROXIES = ("https_proxy", "HTTPS_PROXY", "all_proxy", "ALL_PROXY")


def go_offline_if_unreachable() -> None:
    """Let the hub's libraries, imported already or not, use their cache alone.

    They try for half a minute before they give up; this tries once, for three seconds at most.
    Behind a proxy the hub is taken to be reachable.
    """
    if os.environ.get("HF_HUB_OFFLINE") or any(os.environ.get(name) for name in PROXIES):
        return
    endpoint = urlsplit(os.environ.get("HF_ENDPOINT", "https://huggingface.co"))
    port = endpoint.port or (80 if endpoint.scheme == "http" else 443)
    try:
        socket.create_connection((endpoint.hostname or "", port), timeout=3).close()
    except OSError:
        os.environ["HF_HUB_OFFLINE"] = "1"
        for name, switch in SWITCHES:  # read from the environment when they are imported
            if name in sys.modules:
                setattr(sys.modules[name], switch, True)


def cached(kind: str) -> list[str]:
    """Ids of the "models" or "datasets" in the local hub cache."""
    from huggingface_hub import constants

    folders = sorted(Path(constants.HF_HUB_CACHE).glob(f"{kind}--*"))
    return [folder.name.removeprefix(f"{kind}--").replace("--", "/") for folder in folders]


def revisions(model_id: str) -> list[str]:
    """Revisions of a model in the local hub cache."""
    from huggingface_hub import constants

    folder = Path(constants.HF_HUB_CACHE) / f"models--{model_id.replace('/', '--')}" / "snapshots"
    return sorted(path.name for path in folder.glob("*"))


def commit_of(model_id: str, revision: str | None) -> str | None:
    """The commit of a hub model that was read last: a branch's name moves."""
    from huggingface_hub import try_to_load_from_cache

    found = try_to_load_from_cache(model_id, "config.json", revision=revision)
    return Path(found).parent.name if isinstance(found, str) else None
