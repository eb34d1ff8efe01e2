"""`make wandb-sync` against a server that is no more than it needs: everything goes up once."""

import json
import os
import re
import subprocess
import sys
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from tracked_sweeps import OFFLINE, read, runs_of, sweep

from harness.config.paths import REPOSITORY
from harness.results import run_record
from harness.runs import tracking

pytest.importorskip("wandb")


class Keeping(ThreadingHTTPServer):
    """Keeps what was asked of it, its streams of history, and what was uploaded."""

    def __init__(self, *arguments):
        super().__init__(*arguments)
        self.asked: list[tuple[str, dict]] = []
        self.streamed: list[tuple[str, dict]] = []
        self.uploaded: list[tuple[str, bytes]] = []


class Server(BaseHTTPRequestHandler):
    """Answers wandb-core's GraphQL, its stream of history and its uploads, and keeps all of it."""

    protocol_version = "HTTP/1.1"

    server: Keeping

    def do_POST(self):
        body = self.rfile.read(int(self.headers["Content-Length"]))
        told = json.loads(body)
        if self.path == "/graphql":
            name = re.search(r"(?:query|mutation)\s+(\w+)", told["query"])[1]
            variables = told.get("variables") or {}
            self.server.asked.append((name, variables))
            self.answer({"data": self.graphql(name, variables)})
        else:  # /files/ENTITY/PROJECT/RUN/file_stream
            self.server.streamed.append((self.path.split("/")[4], told))
            self.answer({})

    def do_PUT(self):
        self.server.uploaded.append(
            (self.path, self.rfile.read(int(self.headers["Content-Length"])))
        )
        self.answer({})

    def graphql(self, name, variables):
        project = {"id": "p", "name": "p", "entity": {"id": "e", "name": "me"}}
        if name == "UpsertBucket":
            bucket = {
                "id": variables.get("name"), "name": variables.get("name"), "description": "",
                "displayName": variables.get("displayName"), "config": "{}", "sweepName": None,
                "project": project, "historyLineCount": 0,
            }  # fmt: skip
            return {"upsertBucket": {"bucket": bucket, "inserted": True}}
        if name == "CreateRunFiles":
            url = f"http://127.0.0.1:{self.server.server_port}/upload"
            files = [{"name": f, "uploadUrl": f"{url}/{f}"} for f in variables["files"]]
            return {
                "createRunFiles": {
                    "runID": variables["run"], "uploadHeaders": [], "files": files,
                }
            }  # fmt: skip
        if name == "CreateArtifact":
            sequence = {"id": "s", "latestArtifact": {"id": "a", "versionIndex": 0}}
            artifact = {"id": "a", "state": "COMMITTED", "artifactSequence": sequence}
            return {"createArtifact": {"artifact": artifact}}
        return {
            "ServerFeaturesQuery": {"serverInfo": {"features": []}},
            "RunResumeStatus": {"model": project | {"bucket": None}},
            "Viewer": {"viewer": {"id": "me", "entity": "me", "username": "me", "flags": "{}"}},
        }.get(name, {})

    def answer(self, value):
        body = json.dumps(value).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_):
        pass


@contextmanager
def server():
    with Keeping(("127.0.0.1", 0), Server) as found:
        threading.Thread(target=found.serve_forever, daemon=True).start()
        yield found
        found.shutdown()


def key_for(port):
    return {"WANDB_BASE_URL": f"http://127.0.0.1:{port}", "WANDB_API_KEY": "a" * 40}


def sync(tree, experiment, port):
    """`make wandb-sync` in a tree of its own: its rule as it is, by the shell that make calls."""
    rule = re.search(r"^wandb-sync: .*\n(\t.*\n)", (REPOSITORY / "Makefile").read_text(), re.M)
    python = f"RUN := .venv/bin/python\nwandb-sync:\n{rule[1]}"
    (tree / "Makefile").write_text(python)
    (tree / ".venv" / "bin").mkdir(parents=True, exist_ok=True)
    program = tree / ".venv" / "bin" / "python"
    program.write_text(f'#!/bin/sh\nexec "{sys.executable}" "$@"\n')
    program.chmod(0o755)
    return subprocess.run(
        ["make", "wandb-sync", f"EXPERIMENT={experiment}"],
        cwd=tree, capture_output=True, text=True, timeout=120,
        env=os.environ | key_for(port),
    )  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("place", ["plain", "a b"])
def test_every_run_is_uploaded_once(tmp_path, place, capsys):
    tree = tmp_path / place
    folder = sweep(tree / "outputs" / "exp", 3)
    with tracking.TrackerProcesses(runs_of(folder, {"wandb": OFFLINE}), sweep=True):
        pass
    told = capsys.readouterr().out.partition("to upload: ")[2].strip()
    offline = read(folder)
    with server() as there:
        done = subprocess.run(  # the line that the tracker says, from another folder
            told, shell=True, cwd="/", capture_output=True, text=True, timeout=120,
            env=os.environ | key_for(there.server_port),
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        first = len(there.asked), len(there.streamed), len(there.uploaded)
        again = sync(tree, "exp", there.server_port)
        assert again.returncode == 0
        assert "No runs to sync" in again.stderr and "Skipped 4 synced" in again.stderr
        assert (len(there.asked), len(there.streamed), len(there.uploaded)) == first
    made: dict[str, dict] = {}
    for name, variables in there.asked:
        if name == "UpsertBucket":
            made.setdefault(variables["name"], {}).update(
                {key: value for key, value in variables.items() if value is not None}
            )
    assert {run["displayName"] for run in made.values()} == set(offline)
    for run_id, run in made.items():
        if run["jobType"] == "summary":
            continue
        assert (run["groupName"], run["jobType"], run["tags"]) == ("exp", "lora", ["mini", "kjv"])
        config = json.loads(run["config"])
        assert config["train"]["value"] == {"lr": 0.01, "schedule": "cosine"}
        lines = [
            json.loads(line)
            for stream_id, told in there.streamed
            if stream_id == run_id
            for line in told.get("files", {}).get("wandb-history.jsonl", {}).get("content", [])
        ]
        expected = run_record.read_metrics(folder / run["displayName"])
        assert [line["tokens"] for line in lines] == [row["tokens"] for row in expected]
