"""Folders outside of a run's own that no other user can have put there or can reach.

Names below the folder for temporary files are for everybody to take: a fixed name is used only if
what is there is a folder of this user's own with mode 0700, and a further folder has a random one.
"""

from __future__ import annotations

import os
import shutil
import stat
import tempfile
from contextlib import suppress
from multiprocessing import util
from pathlib import Path

from harness.config.errors import ConfigError

SOCKET_BYTES = 103  # of a socket's path, at most: 107 on Linux


def not_ours(folder: Path) -> str | None:
    """What is wrong with `folder` as a folder of this user alone; None if nothing is.

    Raises:
        OSError: there is nothing, or it cannot be looked at.
    """
    status = folder.lstat()
    if not stat.S_ISDIR(status.st_mode):
        return "a link" if stat.S_ISLNK(status.st_mode) else "no folder"
    if status.st_uid != os.getuid():
        return f"a folder of another user (uid {status.st_uid})"
    mode = stat.S_IMODE(status.st_mode)
    if mode != 0o700:
        return f"a folder with mode {mode:04o}"
    return None


def machine_folder() -> Path:
    """The folder in which all runs of this user on this machine meet, made if need be.

    It is in XDG_RUNTIME_DIR, if that is a folder of this user's alone, or in the folder for
    temporary files. Programs that have different ones do not see each other.

    Raises:
        PermissionError: something else has its name.
        OSError: it cannot be made.
    """
    root = Path(tempfile.gettempdir())
    if runtime := os.environ.get("XDG_RUNTIME_DIR"):
        with suppress(OSError):
            root = root if not_ours(Path(runtime)) else Path(runtime)
    folder = root / f"peft-harness-{os.getuid()}"
    with suppress(FileExistsError):
        folder.mkdir(mode=0o700)
    if wrong := not_ours(folder):
        raise PermissionError(
            f"{folder} is {wrong}, and not one of this user's own with mode 0700: remove it, or "
            "set TMPDIR to a folder of your own"
        )
    return folder


def socket_path() -> Path:
    """A path for a socket in a new folder of this user's own, which is gone when the program ends.

    A socket's path has room for some 100 bytes, which TMPDIR of a batch system may exceed: then the
    folder is elsewhere.

    Raises:
        ConfigError: no folder with so short a path can be written to.
    """
    runtime = os.environ.get("XDG_RUNTIME_DIR")
    for base in filter(None, (tempfile.gettempdir(), runtime, "/tmp", "/var/tmp", "/dev/shm")):
        with suppress(OSError):
            folder = tempfile.mkdtemp(prefix="peft-harness-", dir=base)
            path = Path(folder, "socket")
            if len(os.fsencode(path)) <= SOCKET_BYTES:
                util.Finalize(
                    None, shutil.rmtree, (folder,), {"ignore_errors": True}, exitpriority=-100
                )
                return path
            Path(folder).rmdir()
    raise ConfigError(
        f"TMPDIR={tempfile.gettempdir()}: too long for the path of a socket, and no folder with a "
        "shorter one can be written to: set TMPDIR to a shorter path"
    )
