"""harness serve OUTPUTS: all experiments of a folder in the browser of this machine.

harness serve outputs                http://127.0.0.1:8765/
harness serve outputs --port 9000    another port; 0 takes any that is free

It serves files and makes the index; it changes nothing. It listens on the loopback address alone:
from another machine, `ssh -L 8765:127.0.0.1:8765 HOST`.
"""

from __future__ import annotations

import sys
import threading
import time
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

from harness.config.errors import ConfigError, nearest
from harness.system.console import command, reason

HOST, PORT = "127.0.0.1", 8765
KINDS = {  # the files that are served
    ".html": "text/html", ".svg": "image/svg+xml", ".png": "image/png", ".pdf": "application/pdf",
    ".csv": "text/csv", ".json": "application/json", ".jsonl": "text/plain", ".md": "text/plain",
    ".tex": "text/plain", ".txt": "text/plain", ".yaml": "text/plain",
}  # fmt: skip
SECONDS = 5.0  # for which an index stands before it is made again


class Server(ThreadingHTTPServer):
    """The experiments below `root`, on the loopback address."""

    daemon_threads = True

    def __init__(self, root: Path, port: int = PORT) -> None:
        super().__init__((HOST, port), Handler)
        self.root = root.resolve()
        self._made = threading.Lock()
        self._page, self._until = b"", 0.0

    @property
    def address(self) -> str:
        """Where a browser finds it."""
        return f"http://{HOST}:{self.server_port}/"

    def index(self) -> bytes:
        """The page over all experiments, a few seconds old at most."""
        from harness.report import index

        with self._made:
            if time.monotonic() >= self._until:
                self._page = index.text(self.root).encode()
                self._until = time.monotonic() + SECONDS
            return self._page

    def file(self, url_path: str) -> Path | None:
        """The file that a URL's path names, or None where it may not have one.

        It lies below `root`, links followed, is of one of KINDS, and no part of its path is hidden.
        """
        parts = [part for part in unquote(url_path).split("/") if part]
        if any(part.startswith(".") or "\\" in part or "\0" in part for part in parts):
            return None
        try:
            path = self.root.joinpath(*parts).resolve(strict=True)
        except (OSError, ValueError, RuntimeError):
            return None
        inside = path.is_relative_to(self.root) and path.suffix in KINDS and path.is_file()
        hidden = inside and any(p.startswith(".") for p in path.relative_to(self.root).parts)
        return path if inside and not hidden else None


class Handler(BaseHTTPRequestHandler):
    """GET and HEAD of the index and of files."""

    server: Server
    server_version, sys_version = "harness", ""

    def do_GET(self) -> None:
        """Answer with the index or a file."""
        self._answer(body=True)

    def do_HEAD(self) -> None:
        """Answer without the body."""
        self._answer(body=False)

    def _answer(self, *, body: bool) -> None:
        # A page of another site whose name leads here (DNS rebinding) has that name as its host.
        names = {f"{name}:{self.server.server_port}" for name in (HOST, "localhost")}
        if self.headers.get("Host") not in names:
            self.send_error(HTTPStatus.FORBIDDEN, "only by 127.0.0.1 or localhost")
            return
        path = urlsplit(self.path).path
        try:
            if path in ("/", "/index.html"):
                content, kind = self.server.index(), ".html"
            elif (file := self.server.file(path)) is not None:
                content, kind = file.read_bytes(), file.suffix
            else:
                self.send_error(HTTPStatus.NOT_FOUND, "no such file")
                return
        except (OSError, ConfigError) as error:
            self.send_error(HTTPStatus.NOT_FOUND, explain=str(error))
            return
        self.send_response(HTTPStatus.OK)
        text = "" if kind in (".png", ".pdf") else "; charset=utf-8"
        self.send_header("Content-Type", KINDS[kind] + text)
        self.send_header("Content-Length", str(len(content)))
        self.send_header("X-Content-Type-Options", "nosniff")
        self.send_header("Cache-Control", "no-store")
        self.end_headers()
        if body:
            self.wfile.write(content)

    def log_message(self, format: str, *args: object) -> None:
        """Say nothing of what was asked for."""


@command
def main(arguments: list[str]) -> int:
    """The command line; returns its exit status: 2 for a folder or a port that cannot be."""
    if {"-h", "--help"} & set(arguments):
        print(__doc__)
        return 0
    port, rest = str(PORT), list(arguments)
    if "--port" in rest:
        position = rest.index("--port")
        port = rest[position + 1] if position + 1 < len(rest) else ""
        del rest[position : position + 2]
    if len(rest) != 1 or rest[0].startswith("-"):
        print("usage: harness serve OUTPUTS [--port N]", file=sys.stderr)
        return 2
    if not port.isdigit() or int(port) > 65535:
        print(f"error: --port {port}: expected a number from 0 to 65535", file=sys.stderr)
        return 2
    root = Path(rest[0]).expanduser()
    if not root.is_dir():
        folders = [p.name for p in root.parent.glob("[!.]*") if p.is_dir()]
        print(f"error: no folder {root}; {nearest(root.name, folders)}", file=sys.stderr)
        return 2
    try:
        server = Server(root, int(port))
        server.index()
    except OSError as error:
        print(f"error: --port {port}: {reason(error)}; another one: --port 0", file=sys.stderr)
        return 2
    print(f"serving {root} at {server.address} (this machine only; Ctrl-C ends it)", flush=True)
    try:
        server.serve_forever()
    except KeyboardInterrupt:
        return 0
    finally:
        server.server_close()
    return 0
