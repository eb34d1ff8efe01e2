"""The program as a user starts it: python -m harness …, in a scratch folder, with real workers."""

import json
import os
import signal
import subprocess
import sys

import pandas as pd
import pytest
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from harness import results
from harness.config import ASSETS_DIR, REPOSITORY, to_dict

# Two steps on a few short chapters.
QUICK = [
    "train.steps=2", "evaluate.every=2", "data.validation_share=0.003", "data.test_share=0.003",
    "data.context=64", "train.batch_tokens=512", "train.micro_batch=4",
]  # fmt: skip


def only_result(tmp_path, experiment="scratch"):
    (found,) = results.collect(tmp_path / "outputs" / experiment)
    return found


def test_help_and_errors_come_without_torch(harness, tmp_path):
    shown = harness("--help")
    assert shown.returncode == 0 and "python -m harness experiment=main" in shown.stdout
    assert "lora" in shown.stdout and "gpt2_mini" in shown.stdout
    probe = (
        "import sys, runpy\n"
        "sys.argv = ['harness', 'method.rr=3']\n"
        "try: runpy.run_module('harness', run_name='__main__', alter_sys=True)\n"
        "except SystemExit as e: print('exit', e.code)\n"
        "heavy = {'torch', 'transformers', 'peft', 'accelerate', 'datasets'} & set(sys.modules)\n"
        "print('heavy', sorted(heavy))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", probe], capture_output=True, text=True, cwd=REPOSITORY, timeout=60
    )
    assert "exit 2" in done.stdout and "heavy []" in done.stdout
    assert done.stderr == "error: unknown key 'method.rr': did you mean 'r'?\n"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["method=lorra"], "method=lorra: no such option; did you mean 'lora'?"),
        (["train.lr=fast"], "train.lr: Value 'fast'"),
        (["data=text_files", "data.path=none.txt"], "data.path=none.txt: no such file"),
        (["-m", "seed=1,1"], "two runs of this sweep are the same"),
        (["-m", "method.r=1,0"], "method.r=0: expected a rank of 1 or more"),
        (["outputs_dir=/proc/nowhere"], "/proc/nowhere"),
    ],
)
def test_a_mistake_is_one_line_and_exit_status_2(harness, tmp_path, arguments, message):
    done = harness(*arguments)
    assert done.returncode == 2
    assert message in done.stderr and len(done.stderr.splitlines()) == 1
    assert not list(tmp_path.glob("outputs/*/*/result.json"))


def test_a_mistake_that_needs_the_model_is_found_before_it_loads(harness, tmp_path):
    done = harness("method=lora", "method.r=257")
    assert done.returncode == 2 and "Traceback" not in done.stderr + done.stdout
    assert "method.r=257: " in done.stderr and "a rank of 256 at most" in done.stderr
    run_dir, result = only_result(tmp_path)
    assert result["status"] == "failed" and result["failure"]["class"] == "config"
    assert "Traceback" in (run_dir / "log.txt").read_text()
    assert "parameters" not in result


def test_a_context_beyond_the_model_is_refused(harness):
    done = harness("data.context=512", "train.micro_batch=4")
    assert done.returncode == 2 and "512 tokens is longer than gpt2_mini's 256" in done.stderr


def test_a_hub_model_without_a_network_says_what_there_is(harness, monkeypatch, tmp_path):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    done = harness("model=gpt2")
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert "openai-community/gpt2" in done.stderr and "gpt2_mini" in done.stderr


def test_one_run_leaves_all_that_the_readme_lists(harness, tmp_path):
    done = harness("method=lora", "method.r=4", "targets=attn", *QUICK)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""  # no bars, no warnings off a terminal
    run_dir, result = only_result(tmp_path)
    assert f"python -m harness.report outputs{os.sep}scratch" in done.stdout
    stable = (
        "status run.name run.seed run.command method.name parameters.total parameters.trainable "
        "memory.peak_bytes memory.by_category speed.train_seconds environment.commit "
        "quality.step0.validation.perplexity quality.validation.perplexity quality.test.nll_nats "
        "quality.test.num_tokens quality.test.perplexity quality.test.word_perplexity "
        "quality.test.bits_per_byte environment.versions environment.hardware"
    )
    for path in stable.split():
        assert results.get(result, path) is not None, path
    assert result["parameters"]["trainable"] == 6 * 4 * 256 * 4
    assert result["run"]["command"].startswith("python -m harness method=lora method.r=4")

    rows = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [0, 1, 2]

    for split in ("validation", "test"):  # the sums can be recomputed from the documents
        table = pd.read_parquet(run_dir / f"documents-{split}.parquet")
        quality = result["quality"][split]
        assert table.nll_nats.sum() == pytest.approx(quality["nll_nats"])
        assert table.num_tokens.sum() == quality["num_tokens"]

    base = AutoModelForCausalLM.from_pretrained(ASSETS_DIR / "gpt2_mini")
    assert PeftModel.from_pretrained(base, run_dir / "adapter").peft_config["default"].r == 4


def test_the_same_config_gives_the_same_bits_and_is_not_run_twice(harness, tmp_path):
    first = harness("method=full", *QUICK)
    assert first.returncode == 0, first.stderr
    run_dir, one = only_result(tmp_path)
    weights = load_file(run_dir / "model" / "model.safetensors")
    again = harness("method=full", *QUICK)
    assert "already finished" in again.stdout and only_result(tmp_path)[1] == one
    assert harness("method=full", "rerun=true", *QUICK).returncode == 0
    _, two = only_result(tmp_path)
    assert two["environment"] == one["environment"] and two["wall_seconds"] != one["wall_seconds"]
    assert two["quality"] == one["quality"]
    for name, tensor in load_file(run_dir / "model" / "model.safetensors").items():
        assert tensor.equal(weights[name]), name


def test_a_name_that_is_taken_by_another_config_is_refused(harness, make_run, tmp_path):
    run_dir = tmp_path / "outputs" / "scratch" / "mine"
    run_dir.mkdir(parents=True)
    there = to_dict(make_run("run_name=mine", "seed=5"))
    results.write(run_dir, {"status": "finished", "run": {"identity": "x"}, "config": there})
    done = harness("run_name=mine")
    assert done.returncode == 2 and "(seed: 5 there, 0 now)" in done.stderr
    assert "rerun=true" in done.stderr


def test_a_sweep_runs_a_union_of_grids_and_ends_with_the_table(harness, tmp_path):
    done = harness("experiment=smoke", *QUICK)
    assert done.returncode == 0, done.stderr
    found = dict(results.collect(tmp_path / "outputs" / "smoke"))
    assert {r["method"]["name"] for r in found.values()} == {"none", "full", "lora"}
    assert all(r["status"] == "finished" for r in found.values())
    table = done.stdout[done.stdout.index("method") :]
    first_words = [line.split()[0] for line in table.splitlines() if line.strip()]
    assert first_words[2:5] == ["none", "full", "lora"]
    assert (tmp_path / "outputs" / "smoke" / "results.csv").is_file()
    by_method = {r["method"]["name"]: r for r in found.values()}
    steps = {r["quality"]["step0"]["validation"]["nll_nats"] for r in found.values()}
    assert len(steps) == 1  # every method starts from the same model, to the bit
    untouched = by_method["none"]["quality"]
    assert untouched["validation"] == untouched["step0"]["validation"]
    again = harness("experiment=smoke", *QUICK)
    assert again.stdout.count("already finished") == 3
    report = harness("outputs/smoke", module="harness.report")
    assert report.stdout.splitlines()[-1] in done.stdout


def test_a_worker_that_is_killed_is_recorded(tmp_path):
    controller = subprocess.Popen(
        [sys.executable, "-m", "harness", *QUICK],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(REPOSITORY)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    children = f"/proc/{controller.pid}/task/{controller.pid}/children"
    worker = 0
    while controller.poll() is None and not worker:
        with open(children) as stream:
            listed = stream.read().split()
        log = list(tmp_path.glob("outputs/scratch/*/log.txt"))
        worker = int(listed[0]) if listed and log else 0
    os.kill(worker, signal.SIGKILL)
    _, errors = controller.communicate(timeout=60)
    assert controller.returncode == 1
    assert "killed by SIGKILL" in errors
    _, result = only_result(tmp_path)
    assert (result["status"], result["failure"]["class"]) == ("failed", "killed")
