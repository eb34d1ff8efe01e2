"""Two ranks over gloo do what one process does with twice the accumulation."""

import os
import signal
import sys
from pathlib import Path

import pytest
import torch
from scored_documents import documents
from torch import distributed, multiprocessing
from torch.nn.parallel import DistributedDataParallel
from two_ranks import SAME, metrics, ranks_of, start, started
from wikitext_pages import PAGES

from harness.config.paths import CONF_DIR
from harness.evaluation import ranks, sliding_window
from harness.models.next_token import NextToken
from harness.results import run_record
from harness.runs import run_directory

ACCELERATE = [
    sys.executable, "-m", "accelerate.commands.launch",
    "--config_file", str(CONF_DIR / "accelerate" / "cpu.yaml"), "--main_process_port", "0",
]  # fmt: skip


UDV = ["method=udv", "method.train=udv", "method.rank=16", "method.orthogonality=0.1"]


@pytest.mark.slow
@pytest.mark.parametrize("method", [["method=lora"], pytest.param(UDV, marks=pytest.mark.faults)])
def test_two_ranks_take_the_steps_of_one(harness, tmp_path, method):
    # eps: A's first gradients are rounding alone, which Adam would make whole steps of.
    same = [*SAME, "train.eps=1e-4"]
    one = harness(*method, *same, "run_name=one")
    two = harness(*method, *same, "run_name=two", "launch.num_processes=2")
    assert one.returncode == two.returncode == 0, one.stderr + two.stderr
    mine, theirs = metrics(tmp_path, "one"), metrics(tmp_path, "two")
    assert len(mine) == len(theirs) == 7  # one writer
    for a, b in zip(mine, theirs, strict=True):
        assert a.keys() == b.keys() and a["step"] == b["step"]
        for key, value in a.items():
            assert b[key] == pytest.approx(value, rel=1e-5), key
    runs = dict(run_record.collect(tmp_path / "outputs" / "scratch"))
    processes = {p.name: result["environment"]["processes"] for p, result in runs.items()}
    assert processes == {"one": 1, "two": 2}
    nlls = [result["quality"]["test"]["nll_nats"] for result in runs.values()]
    assert nlls[0] == pytest.approx(nlls[1], rel=1e-5)


@pytest.mark.faults
def test_accelerate_launch_by_hand_is_one_run_and_no_sweep(tmp_path):
    run = [*ACCELERATE, "-m", "harness", *SAME, "run_name=hand"]
    by_hand = start(tmp_path, *run)
    out, errors = by_hand.communicate(timeout=300)
    assert by_hand.returncode == 0, errors
    assert out.count("finished in") == 1  # said once
    _, result = next(run_record.collect(tmp_path / "outputs" / "scratch"))
    assert result["status"] == "finished" and result["environment"]["processes"] == 2
    again = start(tmp_path, *run)
    out, _ = again.communicate(timeout=300)
    assert again.returncode == 0 and out.count("already finished") == 1
    sweep = start(tmp_path, *ACCELERATE, "-m", "harness", "-m", *SAME, "seed=0,1")
    _, errors = sweep.communicate(timeout=300)
    assert sweep.returncode != 0
    assert "harness sweep launch.num_processes=2" in errors and "seed=" in errors


def test_a_rank_that_is_faster_than_the_first_is_no_other_run(tmp_path, make_run, monkeypatch):
    """Of `accelerate launch` by hand each rank begins by itself, and opens its log at once."""
    run = make_run(f"outputs_dir={tmp_path}", "run_name=x")
    run.run_dir.mkdir(parents=True)
    log = run.run_dir / "log-rank-1.txt"
    log.write_text("begun")
    assert run_directory.found(run, None).other_files  # of a process by itself it is another run's
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert not run_directory.found(run, None).other_files
    run_directory.prepare(run, "harness")
    assert log.read_text() == "begun"
    (run.run_dir / "mine.txt").write_text("kept")
    assert run_directory.found(run, None).other_files


@pytest.mark.slow
def test_a_rank_that_is_killed_ends_the_run_and_leaves_none_behind(tmp_path):
    long = [*SAME, "train.steps=100000", "run_name=long", "launch.num_processes=2"]
    long.append(f"outputs_dir={tmp_path}/outputs")
    run_dir = tmp_path / "outputs" / "scratch" / "long"
    controller = started(tmp_path, run_dir, 3, *long)
    os.kill(ranks_of(run_dir)[-1], signal.SIGKILL)
    _, errors = controller.communicate(timeout=60)
    assert controller.returncode == 1 and "failed (killed)" in errors
    assert not ranks_of(run_dir)
    assert run_record.read(run_dir)["failure"]["class"] == "killed"


@pytest.mark.faults
def test_ranks_that_are_told_to_stop_write_a_checkpoint_and_go_on(harness, tmp_path):
    run = [*SAME, "train.steps=40", "evaluate.interval=40", "launch.num_processes=2"]
    run += [f"outputs_dir={tmp_path}/outputs"]
    assert harness(*run, "run_name=whole").returncode == 0
    run_dir = tmp_path / "outputs" / "scratch" / "cut"
    controller = started(tmp_path, run_dir, 3, *run, "run_name=cut")
    controller.send_signal(signal.SIGTERM)
    controller.communicate(timeout=60)
    assert controller.returncode == 130 and run_record.can_resume(run_dir)
    assert not ranks_of(run_dir)
    done = harness(*run, "run_name=cut")
    assert done.returncode == 0, done.stderr
    assert run_record.read(run_dir)["run"]["resumed_at"]
    assert metrics(tmp_path, "cut") == metrics(tmp_path, "whole")


# --------------------------------------------------------------------------- after the test


def _rank(rank, folder, tiny):
    """What a rank of two finds: with rank 1 failing in its share, and after that with neither."""
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0", "LOCAL_RANK": str(rank)}
    torch.set_num_threads(1)
    store = distributed.FileStore(str(folder / "store"), 2)
    distributed.init_process_group("gloo", store=store, rank=rank, world_size=2)
    from accelerate import Accelerator

    accelerator = Accelerator(cpu=True)
    tiny.register_buffer("moved", torch.full((2,), float(rank)))
    model = DistributedDataParallel(NextToken(tiny), broadcast_buffers=True)
    asked = {"context": 8, "stride": 8, "bos": 0, "batch_tokens": 16, "accelerator": accelerator}
    docs = documents([5, 9, 8, 3, 7, 12])
    found = []
    for fails in (True, False):
        hook = model.module.register_forward_pre_hook(_broken) if fails and rank else None
        try:
            found.append(sliding_window.document_nll(model, docs, **asked)[0])
        except (ranks.OtherRankError, ValueError) as error:
            found.append(f"{type(error).__name__}: {error}")
        if hook:
            hook.remove()
    torch.save([*found, tiny.moved], folder / f"{rank}.pt")
    distributed.destroy_process_group()


def _broken(*_):
    raise ValueError("broken on purpose")


@pytest.mark.slow
def test_what_fails_on_one_rank_fails_on_all_and_the_next_text_is_read(tmp_path, tiny):
    multiprocessing.spawn(_rank, (tmp_path, tiny), nprocs=2)
    first, second = (torch.load(tmp_path / f"{i}.pt", weights_only=False) for i in range(2))
    assert first[0] == "OtherRankError: rank 1 failed (ValueError: broken on purpose)"
    assert second[0] == "ValueError: broken on purpose"
    alone = {"context": 8, "stride": 8, "bos": 0, "batch_tokens": 16}
    expected, _ = sliding_window.document_nll(
        NextToken(tiny), documents([5, 9, 8, 3, 7, 12]), **alone
    )
    for found in (first, second):
        assert found[1] == pytest.approx(expected, rel=1e-6)
        assert found[2].tolist() == [0, 0]  # buffers are the first rank's, as in training


LABELS = "".join(f"item {i}||{'cheap' if i % 3 else 'dear'}\n" for i in range(40))
PAIRS = [
    "data=pairs", "data.path=pairs.txt", "data.validation_share=0.1", "data.test_share=0.1",
    "evaluate=generate", "evaluate.generate.num_beams=1", "evaluate.generate.max_new_tokens=4",
    "evaluate.generate.prompts=4", "evaluate.classify=always",
    "method=lora", "method.r=2", "train.steps=2", "evaluate.interval=2", "data.context_length=32",
    "train.micro_batch=2", "train.threads=1", "train.batch_tokens=128",
]  # fmt: skip


@pytest.mark.faults
@pytest.mark.parametrize("fails", ["0", "1", "all"])
def test_what_fails_on_a_rank_after_the_test_leaves_the_result(tmp_path, fails, monkeypatch):
    monkeypatch.setenv("FAILS", fails)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    (tmp_path / "pairs.txt").write_text(LABELS)
    (tmp_path / "pages").mkdir()
    for name in ("train", "valid", "test"):
        (tmp_path / "pages" / f"{name}.txt").write_text(PAGES, "utf-8")
    text = ["data=hub", "data.id=pages", "evaluate.protocol=lm_eval", *PAIRS[-8:]]
    runs = {"pairs": PAIRS, "text": text}
    if fails == "all":  # of a divided model, what one rank alone has ends the run
        runs["divided"] = [*text, "launch.accelerate=fsdp"]
    for name, asked in runs.items():
        program = start(
            tmp_path, *ACCELERATE, str(Path(__file__).parent / "failing_rank.py"), *asked,
            f"run_name={name}",
        )  # fmt: skip
        _, errors = program.communicate(timeout=300)
        assert program.returncode == 0, errors
    for name in runs:
        failed = ["classify", "generate"] if name == "pairs" else ["protocol"]
        record = run_record.read(tmp_path / "outputs" / "scratch" / name)
        assert record["status"] == "finished" and record["environment"]["processes"] == 2
        assert [said.split(" (")[0] for said in record["problems"]] == [
            f"evaluate.{what} failed" for what in failed
        ]
        assert all("broken on purpose" in said for said in record["problems"])
        assert record["quality"]["test"]["num_tokens"] and record["saved"] == ["adapter"]
        assert record["saved_check"]["failure"] is None
        assert not {"generation", "classification", "test_protocol"} & record["quality"].keys()
