"""The Hugging Face hub: whether it can be reached, and what of it is on this machine."""

from __future__ import annotations

import os
import re
import socket
import sys
import time
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
    if os.environ.get("HF_HUB_OFFLINE"):
        return
    if not is_reachable():
        os.environ["HF_HUB_OFFLINE"] = "1"
        for name, switch in SWITCHES:  # read from the environment when they are imported
            if name in sys.modules:
                setattr(sys.modules[name], switch, True)


def is_reachable() -> bool:
    """Whether the hub answers within three seconds; behind a proxy it is taken to."""
    if any(os.environ.get(name) for name in PROXIES):
        return True
    endpoint = urlsplit(os.environ.get("HF_ENDPOINT", "https://huggingface.co"))
    port = endpoint.port or (80 if endpoint.scheme == "http" else 443)
    try:
        socket.create_connection((endpoint.hostname or "", port), timeout=3).close()
    except OSError:
        return False
    return True


def cached(kind: str) -> list[str]:
    """Return the ids of the "models" or "datasets" that the local hub cache has."""
    from huggingface_hub import constants

    folders = sorted(Path(constants.HF_HUB_CACHE).glob(f"{kind}--*"))
    return [folder.name.removeprefix(f"{kind}--").replace("--", "/") for folder in folders]


def revisions(model_id: str) -> list[str]:
    """Return the revisions of a model that the local hub cache has."""
    from huggingface_hub import constants

    folder = Path(constants.HF_HUB_CACHE) / f"models--{model_id.replace('/', '--')}" / "snapshots"
    return sorted(path.name for path in folder.glob("*"))


def commit_of(model_id: str, revision: str | None) -> str | None:
    """The commit of a hub model that was read last: a branch's name moves."""
    from huggingface_hub import try_to_load_from_cache

    path = try_to_load_from_cache(model_id, "config.json", revision=revision)
    return Path(path).parent.name if isinstance(path, str) else None


# ------------------------------------------------------------------------- where a branch is now

ANSWER_SECONDS = 300.0  # for so long an answer of the hub holds: the runs of a sweep ask once
_answers: dict[tuple[str, str, str], tuple[float, str]] = {}


def content_of(kind: str, name: str, revision: str | None) -> str:
    """`commit:HASH` of one of the "models" or "datasets" of the hub, or `unknown: REASON`.

    A revision that is a commit is that. A branch or tag is at the commit that the local hub cache
    has of it, or else at the one that the hub names when it is asked.
    """
    branch = revision or "main"
    if re.fullmatch(r"[0-9a-f]{40}", branch):
        return f"commit:{branch}"
    if commit := _cached_commit(kind, name, branch):
        return f"commit:{commit}"
    question = (kind, name, branch)
    answered, answer = _answers.get(question, (0.0, ""))
    if not answer or time.monotonic() - answered > ANSWER_SECONDS:
        answer = _asked(*question)
        _answers[question] = (time.monotonic(), answer)
    return answer


def _cached_commit(kind: str, name: str, branch: str) -> str | None:
    from huggingface_hub import constants

    folder = Path(constants.HF_HUB_CACHE) / f"{kind}--{name.replace('/', '--')}"
    try:
        commit = (folder / "refs" / branch).read_text("utf-8").strip()
    except (OSError, ValueError):
        return None
    return commit if re.fullmatch(r"[0-9a-f]{40}", commit) else None


def _asked(kind: str, name: str, branch: str) -> str:
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE or os.environ.get("HF_HUB_OFFLINE"):
        return "unknown: the hub was not asked (HF_HUB_OFFLINE)"
    if not is_reachable():
        return "unknown: the hub could not be reached"
    from huggingface_hub import HfApi

    api = HfApi()
    ask = api.model_info if kind == "models" else api.dataset_info
    try:
        return f"commit:{ask(name, revision=branch, timeout=5).sha}"
    except Exception as error:  # no such model, no access, no answer: loading it says which
        return f"unknown: {type(error).__name__}"
