"""Fixtures: a tiny GPT-2, a tokenizer, composed configs, and the program as a user starts it."""

from __future__ import annotations

import multiprocessing
import os
import shlex
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from hydra import compose, initialize_config_dir
from transformers import AutoTokenizer, GPT2Config, GPT2LMHeadModel

from harness.config.paths import ASSETS_DIR, CONF_DIR, REPOSITORY
from harness.config.run_config import RunConfig
from harness.config.schema import DataConfig
from harness.data.token_data import Data
from harness.methods.svd import CACHE_ENV
from harness.methods.udv import UDVLinear
from harness.results import run_record, schema
from harness.runs import run_directory, worker
from harness.runs.composition import from_hydra


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items):
    """Tests that want a finished run of every kind are slow: it takes nine to make them."""
    for item in items:
        if "finished_run" in item.fixturenames:
            item.add_marker("slow")


@pytest.fixture(autouse=True)
def no_ambient_cache(monkeypatch):
    """Factors that another test, or the shell that tests started from, has kept are not read."""
    monkeypatch.delenv(CACHE_ENV, raising=False)


@pytest.fixture(params=["factored", "dense"])
def form(request, monkeypatch):
    """Force one of the two ways that `udv` computes, which the batch size would choose."""
    answer = request.param == "factored"
    monkeypatch.setattr(UDVLinear, "_factored_is_cheaper", lambda *_: answer)
    return request.param


@pytest.fixture
def tiny() -> GPT2LMHeadModel:
    """Two layers, width 32, 64 tokens, context 32; random weights large enough to matter."""
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=64, n_positions=32, n_embd=32, n_layer=2, n_head=2, initializer_range=0.2,
        resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, use_cache=False,
        bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    return GPT2LMHeadModel(config).eval()


@pytest.fixture
def text() -> Data:
    """Ten blocks of 16 random tokens to train the tiny model on."""
    torch.manual_seed(1)
    rows = torch.randint(1, 64, (10, 17)).tolist()
    return Data(Dataset.from_dict({"tokens": rows}).with_format("numpy"), {}, {}, False, "")


@pytest.fixture(scope="session")
def tokenizer():
    return AutoTokenizer.from_pretrained(ASSETS_DIR / "gpt2_mini")


@pytest.fixture
def corpus(tmp_path: Path) -> DataConfig:
    """Twelve short stories, one file each, which a tenth of are validation, and a tenth test."""
    for i in range(12):
        (tmp_path / f"{i}.txt").write_text(f"The {i}th story is about a fox and a dog. " * 20)
    return DataConfig(
        "mine", "text_files", path=str(tmp_path / "*.txt"), context_length=32, validation_share=0.1,
        test_share=0.1, cache_dir=str(tmp_path / "cache"),
    )  # fmt: skip


@pytest.fixture
def make_run() -> Callable[..., RunConfig]:
    """Compose and validate a config from overrides."""

    def make(*overrides: str) -> RunConfig:
        with initialize_config_dir(str(CONF_DIR), version_base="1.3"):
            return from_hydra(compose("config", list(overrides)))

    return make


@pytest.fixture
def harness(tmp_path: Path) -> Callable[..., subprocess.CompletedProcess[str]]:
    """Start `python -m harness …` as a user does, in a scratch folder."""

    def start(*arguments: str, module: str = "harness") -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-m", module, *arguments],
            cwd=tmp_path,
            env=os.environ | {"PYTHONPATH": os.pathsep.join([str(REPOSITORY), *sys.path])},
            capture_output=True,
            text=True,
            timeout=300,
        )

    return start


# Two steps that help, on the beginnings of chapters; four of them are evaluated.
SHORT = [
    "train.steps=2", "evaluate.interval=2", "train.warmup=0", "train.threads=1",
    "data.validation_share=0.003", "data.test_share=0.003", "data.document_chars=500",
    "data.context_length=64", "train.batch_tokens=512", "train.micro_batch=8",
]  # fmt: skip


@pytest.fixture(scope="session")
def task(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, ...]:
    """Overrides of a short run on prompts and completions, which are slots and sentences."""
    file = tmp_path_factory.mktemp("task") / "pairs.txt"
    places = [f"name[Place {i}], eatType[pub]||Place {i} is a pub .\n" for i in range(40)]
    file.write_text("".join(places), "utf-8")
    return (
        "method=lora", "method.r=4", "train.lr=0.02", "data=pairs", f"data.path={file}",
        "data.prompt_style=e2e", "data.validation_share=0.1", "data.test_share=0.1",
        "evaluate=generate", "evaluate.generate.num_beams=2", "evaluate.generate.max_new_tokens=8",
        "evaluate.generate.prompts=2",
    )  # fmt: skip


@pytest.fixture(scope="session")
def finished_run(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """The directory of a finished short run by its overrides; each is run once in a session."""
    folder = tmp_path_factory.mktemp("runs")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["harness.runs.worker"])
    made: dict[tuple[str, ...], Path] = {}

    def make(*overrides: str) -> Path:
        if overrides not in made:
            with initialize_config_dir(str(CONF_DIR), version_base="1.3"):
                settings = [*SHORT, *overrides, f"outputs_dir={folder}"]
                run = from_hydra(compose("config", settings))
            run.run_dir.mkdir(parents=True)
            run_directory.prepare(run, shlex.join(["python", "-m", "harness", *overrides]))
            process = context.Process(
                target=worker.main, args=(run.run_dir,), kwargs={"quiet": True}
            )
            process.start()
            process.join(120)
            record = run_record.read(run.run_dir)
            assert record is not None and record["status"] == "finished", record
            assert schema.problems(record) == []
            made[overrides] = run.run_dir
        return made[overrides]

    return make


@pytest.fixture(autouse=True)
def same_threads():
    """Leave torch's threads as they were: factors of an SVD are kept by their number."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def browser():
    """A browser for the tests of a module: see page_in_browser.py."""
    import page_in_browser

    driver = page_in_browser.start()
    yield driver
    driver.quit()
