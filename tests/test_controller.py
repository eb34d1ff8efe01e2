"""The program as a user starts it: python -m harness …, in a scratch folder, with real workers."""

import json
import os
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import pandas as pd
import pytest
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from harness.config.paths import ASSETS_DIR, REPOSITORY
from harness.config.run_config import to_dict
from harness.results import run_record

# Two steps on the beginnings of a few chapters.
QUICK = [
    "train.steps=2", "evaluate.interval=2", "data.validation_share=0.003", "data.test_share=0.003",
    "data.document_chars=500", "data.context_length=64", "train.batch_tokens=512",
    "train.micro_batch=4",
]  # fmt: skip


def only_result(tmp_path, experiment="scratch"):
    (found,) = run_record.collect(tmp_path / "outputs" / experiment)
    return found


def test_help_and_errors_come_without_torch(harness, tmp_path):
    shown = harness("run", "--help")
    assert shown.returncode == 0 and "harness run experiment=main" in shown.stdout
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
    assert done.stderr == "error: unknown key 'method.rr': did you mean 'method.r'?\n"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["method=lorra"], "method=lorra: no such option; did you mean 'lora'?"),
        (["train.lr=fast"], "train.lr=fast: expected a number, as in train.lr=2e-3"),
        (["data=text_files", "data.path=none.txt"], "data.path=none.txt: no such file"),
        (["-m", "run_name=x", "seed=1,2"], "two different runs of this sweep are named"),
        (["-m", "method.r=1,0"], "method.r=0: expected a rank of 1 or more"),
        (["outputs_dir=/proc/nowhere"], "/proc/nowhere"),
        (["experiment=null"], "experiment=null: expected an option of conf/experiment"),
        (["method.r=1,2"], "several values are a sweep: harness sweep method.r=1,2"),
        (["-m", "--cfg", "job", "seed=0,1"], "harness plan seed=0,1 lists them"),
        (["--foo"], "--foo: no such flag"),
    ],
)
def test_a_mistake_is_one_line_and_exit_status_2(harness, tmp_path, arguments, message):
    done = harness(*arguments)
    assert done.returncode == 2
    assert message in done.stderr and len(done.stderr.splitlines()) == 1
    assert not (tmp_path / "outputs").exists()


def test_a_mistake_that_needs_the_model_is_found_before_it_loads(harness, tmp_path):
    done = harness("method=full", "method.train_only=[nothing]")
    assert done.returncode == 2 and "Traceback" not in done.stderr + done.stdout
    assert "error: method.train_only: 'nothing' matches no weight" in done.stderr
    assert not (tmp_path / "outputs").exists()


def test_a_context_beyond_the_model_is_refused(harness):
    done = harness("data.context_length=512", "train.micro_batch=4")
    assert done.returncode == 2 and "512 tokens is longer than gpt2_mini's 256" in done.stderr


def test_a_hub_model_without_a_network_says_what_there_is(harness, monkeypatch, tmp_path):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    done = harness("model=gpt2")
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert "openai-community/gpt2" in done.stderr and "gpt2_mini" in done.stderr


@pytest.mark.slow
def test_the_readmes_first_command_gives_its_number(harness, tmp_path):
    readme = (REPOSITORY / "README.md").read_text("utf-8")
    first = next(line for line in readme.splitlines() if line.startswith("    harness run "))
    command, _, comment = first.strip().partition("#")
    done = harness(*command.split()[1:])
    assert done.returncode == 0, done.stderr
    _, result = only_result(tmp_path)
    said = float(comment.split("perplexity")[1])
    assert result["quality"]["test"]["perplexity"] == pytest.approx(said, rel=0.01)
    assert result["method"]["lr_from"].startswith("tuned")


def test_one_run_leaves_all_that_the_readme_lists(harness, tmp_path):
    done = harness("method=lora", "method.r=4", "targets=attn", *QUICK)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""  # no bars, no warnings off a terminal
    run_dir, result = only_result(tmp_path)
    assert f"harness report outputs{os.sep}scratch" in done.stdout
    stable = (
        "status run.name run.seed run.command method.name parameters.total parameters.trainable "
        "memory.peak_bytes memory.by_category speed.train_seconds environment.commit "
        "quality.step0.validation.perplexity quality.validation.perplexity quality.test.nll_nats "
        "quality.test.num_tokens quality.test.perplexity quality.test.word_perplexity "
        "quality.test.bits_per_byte environment.versions environment.hardware"
    )
    for path in stable.split():
        assert run_record.get(result, path) is not None, path
    assert result["parameters"]["trainable"] == 6 * 4 * 256 * 4
    assert result["run"]["command"].startswith("python -m harness method=lora method.r=4")

    rows = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [0, 1, 2, 2]

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
    stale = run_dir / "adapter" / "stale.txt"
    stale.parent.mkdir()
    stale.write_text("of an earlier run")
    assert harness("method=full", "rerun=true", *QUICK).returncode == 0
    assert not stale.exists()
    _, two = only_result(tmp_path)
    for result in (one, two):
        del result["environment"]["runs_beside"]  # whatever else this machine does
    assert two["environment"] == one["environment"] and two["wall_seconds"] != one["wall_seconds"]
    assert two["quality"] == one["quality"]
    for name, tensor in load_file(run_dir / "model" / "model.safetensors").items():
        assert tensor.equal(weights[name]), name


def test_files_that_are_no_run_are_not_cleared_away(harness, tmp_path):
    notes = tmp_path / "outputs" / "scratch" / "notes" / "mine.txt"
    notes.parent.mkdir(parents=True)
    notes.write_text("mine")
    done = harness("run_name=notes", *QUICK)
    assert done.returncode == 2 and "holds files and no result.json" in done.stderr
    assert notes.read_text() == "mine"


@pytest.mark.faults
def test_a_kill_while_the_first_record_is_written_leaves_a_run_that_can_begin(harness, tmp_path):
    """Such a kill leaves config.yaml, command.txt and a part of result.json under another name."""
    run_dir = tmp_path / "outputs" / "scratch" / "mine"
    run_dir.mkdir(parents=True)
    for name in ("config.yaml", "command.txt", ".result.json-k7_x2q1a"):
        (run_dir / name).write_text("{")
    done = harness("run_name=mine", "method=none", *QUICK)
    assert done.returncode == 0, done.stderr
    assert only_result(tmp_path)[1]["status"] == "finished"
    assert not (run_dir / ".result.json-k7_x2q1a").exists()


def test_a_name_that_is_taken_by_another_config_is_refused(harness, make_run, tmp_path):
    run_dir = tmp_path / "outputs" / "scratch" / "mine"
    run_dir.mkdir(parents=True)
    there = to_dict(make_run("run_name=mine", "seed=5"))
    run_record.write(run_dir, {"status": "finished", "run": {"identity": "x"}, "config": there})
    done = harness("run_name=mine")
    assert done.returncode == 2 and "seed: 5 there, 0 now)" in done.stderr
    assert "rerun=true" in done.stderr


@pytest.mark.slow
def test_what_full_fine_tuning_saves_is_a_base_model_by_itself(harness, tmp_path):
    assert harness("method=full", *QUICK).returncode == 0
    run_dir, first = only_result(tmp_path)
    (run_dir / "model").rename(tmp_path / "mine")
    done = harness("model=local", "model.path=mine", "method=none", "experiment_name=two", *QUICK)
    assert done.returncode == 0, done.stderr
    _, second = only_result(tmp_path, "two")
    assert second["quality"]["test"]["nll_nats"] == first["quality"]["test"]["nll_nats"]


@pytest.mark.slow
def test_the_svd_family_from_configuration_to_folders(harness, tmp_path):
    done = harness(
        "experiment=smoke", "experiment_name=svd", *QUICK,
        "hydra.sweeper.grids=[{method: udv, method.rank: 64},"
        "{method: udv, method.rank: 0.25, method.train: udv, method.orthogonality: 0.1},"
        "{method: truncate, method.energy: 0.9},{method: lora_paper},"
        "{model: lstm, targets: lstm, method: udv, method.rank: 32}]",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr + done.stdout
    found = {r["method"]["label"]: (d, r) for d, r in run_record.collect(tmp_path / "outputs/svd")}
    assert len(found) == 4  # two are udv-d, of two models
    run_dir, result = found["truncate"]
    assert result["saved"] == ["model"] and result["speed"]["steps"] == 0
    assert all(0 < k[0] <= 256 for k in result["method"]["ranks"].values())
    assert result["method"]["svd_seconds"] > 0
    assert result["parameters"]["factored"] != result["parameters"]["base"]

    # The paper's LoRA, merged and fused again, is a plain GPT-2 that knows nothing of the harness.
    run_dir, result = found["lora_paper"]
    assert result["saved"] == ["adapter", "model"]
    probe = (
        "import transformers, torch\n"
        f"model = transformers.AutoModelForCausalLM.from_pretrained({str(run_dir / 'model')!r})\n"
        f"tok = transformers.AutoTokenizer.from_pretrained({str(run_dir / 'model')!r})\n"
        "print(type(model).__name__, type(model.transformer.h[0].attn.c_attn).__name__, len(tok))\n"
    )
    shown = subprocess.run(
        [sys.executable, "-c", probe], capture_output=True, text=True, cwd=tmp_path, timeout=120
    )
    assert shown.stdout.split() == ["GPT2LMHeadModel", "Conv1D", "4096"], shown.stderr
    again = harness(
        "model=local", f"model.path={run_dir / 'model'}", "method=none", "experiment_name=m", *QUICK
    )
    assert again.returncode == 0, again.stderr
    merged = only_result(tmp_path, "m")[1]["quality"]["test"]["nll_nats"]
    assert merged == pytest.approx(result["quality"]["test"]["nll_nats"], rel=1e-5)


@pytest.mark.slow
def test_a_changed_text_is_another_run(harness, tmp_path):
    for i in range(8):
        (tmp_path / f"{i}.txt").write_text(f"The {i}th story is about a fox and a dog. " * 60)
    mine = ["data=text_files", "data.path='*.txt'", "method=none", *QUICK]
    assert "finished in" in harness(*mine).stdout
    assert "already finished" in harness(*mine).stdout
    (tmp_path / "3.txt").write_text("Another story altogether, about a cat. " * 60)
    assert "finished in" in harness(*mine).stdout


@pytest.mark.slow
def test_a_sweep_over_experiments_tells_of_each(harness, tmp_path):
    done = harness("-m", "experiment_name=one,two", "method=none", *QUICK)
    assert done.returncode == 0 and "2 runs -> outputs/one, outputs/two" in done.stdout, done
    for name in ("one", "two"):
        folder = tmp_path / "outputs" / name
        [(run_dir, _)] = run_record.collect(folder)
        assert run_record.read_sweep(folder) == {run_dir.name: ""}
        [sweep] = run_record.sweep_commands(folder)
        typed = ["python", "-m", "harness", "-m", "experiment_name=one,two", "method=none"]
        assert shlex.split(sweep["command"])[:6] == typed and sweep["runs"] == [run_dir.name]
        assert f"saved in outputs/{name}: results.csv" in done.stdout


@pytest.mark.slow
def test_a_refusal_amid_a_sweep_loses_nothing(harness, tmp_path):
    lstm = ["model=lstm", "targets=lstm", *QUICK]  # whose shapes only the worker knows
    assert harness("run_name=r4", "method.r=4", *lstm).returncode == 0
    done = harness("-m", "run_name=r${method.r}", "method.r=2,4,3000", "train.lr=1e-3", *lstm)
    assert done.returncode == 2
    assert "r4 holds a finished run of another configuration" in done.stderr
    assert "method.r=3000" in done.stderr
    folder = tmp_path / "outputs" / "scratch"
    rows = (folder / "results.csv").read_text().splitlines()
    assert len(rows) == 3 and " 2 " in done.stdout and "refused: r3000" in done.stdout
    assert not (folder / "r3000").exists()
    done = harness("-m", "run_name=r${method.r}", "method.r=1,300", *QUICK, "experiment_name=one")
    assert done.returncode == 2 and "method.r=300: attn.c_attn allows a rank" in done.stderr
    assert not (tmp_path / "outputs" / "one").exists()  # not even the first of them was begun


@pytest.mark.slow
def test_a_sweep_whose_every_run_is_refused_leaves_no_folder(harness, tmp_path):
    done = harness("-m", "method=full", "method.train_only=[nothing]", "seed=0,1", *QUICK)
    assert done.returncode == 2 and done.stderr.count("'nothing' matches no weight") == 2
    assert not (tmp_path / "outputs").exists()


@pytest.mark.slow
def test_values_that_a_method_does_not_use_make_no_other_run(harness, tmp_path):
    done = harness("-m", "method=none", "seed=0,1", "train.lr=1,2", *QUICK)
    assert done.returncode == 0, done.stderr
    assert "1 run ->" in done.stdout and "is the same: 3" in done.stdout
    only_result(tmp_path)


@pytest.mark.slow
def test_one_step_has_every_stable_key_and_compiled_code_is_followed_too(harness, tmp_path):
    assert harness(*QUICK, "train.steps=1").returncode == 0
    memory = only_result(tmp_path)[1]["memory"]
    assert memory["phase"] == "train" and memory["peak_bytes"] > 0
    assert memory["category_peaks"]["gradients"] == 4 * 16 * 8 * 256 * 4  # fp32 LoRA r=8 on all


@pytest.mark.slow
def test_precision_is_the_same_for_every_method_and_step(harness, tmp_path):
    bf16 = ["train.precision=bf16", *QUICK]
    assert harness("method=none", *bf16).returncode == 0
    assert harness("method=lora", "train.lr=1e-30", *bf16).returncode == 0
    nlls = [
        quality["nll_nats"]
        for _, result in run_record.collect(tmp_path / "outputs" / "scratch")
        for quality in (result["quality"]["validation"], result["quality"]["step0"]["validation"])
    ]
    assert len(nlls) == 4 and max(nlls) == pytest.approx(min(nlls), rel=1e-6)


@pytest.mark.slow
def test_virtual_tokens_need_room(harness):
    prompt = [
        "method=peft",
        "method.peft_type=PROMPT_TUNING",
        "+method.fields.num_virtual_tokens=16",
    ]
    done = harness(*prompt)
    assert (
        done.returncode == 2
        and "data.context_length" in done.stderr
        and "240 or less" in done.stderr
    )
    assert len(done.stderr.splitlines()) == 1 and "table" not in done.stdout


@pytest.mark.slow
def test_a_sweep_runs_a_union_of_grids_and_ends_with_the_table(harness, tmp_path):
    done = harness("experiment=smoke", *QUICK)
    assert done.returncode == 0, done.stderr
    found = dict(run_record.collect(tmp_path / "outputs" / "smoke"))
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
    shown = done.stdout[done.stdout.index(" method ") : done.stdout.index("saved in ")]
    assert report.returncode == 0 and shown.split("every column:")[0].strip() in report.stdout
    assert (tmp_path / "outputs" / "smoke" / "report" / "index.html").is_file()


def children_of(pid):
    try:
        with open(f"/proc/{pid}/task/{pid}/children") as stream:
            return [int(child) for child in stream.read().split()]
    except OSError:
        return []


def started(tmp_path, *arguments, until="log.txt"):
    """A controller whose worker has written `until`, the worker's process id, and all of them."""
    controller = subprocess.Popen(
        [sys.executable, "-m", "harness", *arguments],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(REPOSITORY)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        # A shell's background jobs ignore Ctrl-C, and what they start inherits that.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        text=True,
    )
    while controller.poll() is None:
        helpers = children_of(controller.pid)  # the fork server, and multiprocessing's own
        workers = [pid for helper in helpers for pid in children_of(helper)]
        if workers and list(tmp_path.glob(f"outputs/scratch/*/{until}")):
            return controller, workers[0], [*helpers, *workers]
        time.sleep(0.01)
    raise AssertionError(controller.communicate())


def gone(pids):
    """Whether none of the processes is left, within a few seconds."""
    for _ in range(100):
        if not any(os.path.exists(f"/proc/{pid}") for pid in pids):
            return True
        time.sleep(0.1)
    return False


def works(pid, seconds):
    """Wait until a process has computed for so many seconds more, however busy the machine is."""
    before = cpu_seconds(pid)
    while cpu_seconds(pid) < before + seconds:
        time.sleep(0.05)


def cpu_seconds(pid):
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    assert fields[0] not in "ZX", "it has ended"
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


@pytest.mark.faults
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_run_says_so_leaves_nothing_behind_and_goes_on(harness, tmp_path, number):
    long = [*QUICK, "train.steps=60", "evaluate.interval=60"]
    controller, _, pids = started(tmp_path, "run_name=mine", *long, until="metrics.jsonl")
    while not any("train/nll" in row for row in run_record.read_metrics(only_result(tmp_path)[0])):
        time.sleep(0.05)
    controller.send_signal(number)
    _, errors = controller.communicate(timeout=60)
    assert controller.returncode == 130 and "Traceback" not in errors
    assert gone(pids)
    run_dir, result = only_result(tmp_path)
    assert (result["status"], result["failure"]["class"]) == ("interrupted", "interrupted")
    assert 0 < run_record.last_metrics(run_dir)["step"] < 60
    other = harness("run_name=mine", *long, "train.lr=1e-4")  # half done: not overwritten
    rate = result["config"]["train"]["lr"]
    assert other.returncode == 2 and f"train.lr: {rate:g} there, 0.0001 now" in other.stderr
    again = harness("run_name=mine", *long)
    assert again.returncode == 0, again.stderr
    result = only_result(tmp_path)[1]
    assert result["status"] == "finished" and len(result["run"]["resumed_at"]) == 1
    assert [row["step"] for row in run_record.read_metrics(run_dir) if "train/nll" in row] == list(
        range(1, 61)
    )


@pytest.mark.faults
def test_a_second_ctrl_c_stops_at_once(tmp_path):
    endless = [*QUICK, "train.batch_tokens=1048576", "train.micro_batch=8"]  # a step takes minutes
    controller, worker, pids = started(tmp_path, *endless, until="metrics.jsonl")
    run_dir = only_result(tmp_path)[0]
    while not (run_dir / run_record.BEST).exists():  # of step 0, the last thing before the step
        time.sleep(0.05)
    works(worker, 1.0)  # which is within the step
    controller.send_signal(signal.SIGINT)
    works(worker, 0.5)
    assert controller.poll() is None  # the first one lets the step come to its end
    controller.send_signal(signal.SIGINT)
    controller.communicate(timeout=60)
    assert controller.returncode == 130 and gone(pids)
    rows = run_record.read_metrics(run_dir)
    assert not any("train/nll" in row for row in rows) and not run_record.can_resume(run_dir)


def test_a_worker_that_is_killed_is_recorded(tmp_path):
    controller, worker, pids = started(tmp_path, *QUICK)
    os.kill(worker, signal.SIGKILL)
    _, errors = controller.communicate(timeout=60)
    assert controller.returncode == 1 and gone(pids)
    assert "failed (killed): the worker was killed by SIGKILL" in errors and "log.txt" in errors
    _, result = only_result(tmp_path)
    assert (result["status"], result["failure"]["class"]) == ("failed", "killed")


@pytest.mark.faults
def test_a_worker_does_not_outlive_its_controller(harness, tmp_path):
    long = [*QUICK, "train.steps=100000"]
    controller, _, pids = started(tmp_path, *long, until="metrics.jsonl")
    controller.kill()
    controller.communicate(timeout=60)
    assert gone(pids)
    assert only_result(tmp_path)[1]["status"] == "interrupted"


@pytest.mark.slow
def test_a_failure_in_a_sweep_is_local_named_and_not_repeated_unasked(harness, tmp_path):
    sweep = ["-m", "method=full", "train.lr=1e-3,1e18", *QUICK, "train.steps=6"]
    done = harness(*sweep)
    assert done.returncode == 1
    assert "2/2" in done.stdout and "failed (nan): NonFiniteLossError: the loss is" in done.stdout
    assert "failed: full-" in done.stdout and "log.txt" in done.stdout
    assert "1 of 2 runs failed; retry=1 tries them again" in done.stderr
    states = {r["status"]: r for _, r in run_record.collect(tmp_path / "outputs" / "scratch")}
    failure = states["failed"]["failure"]
    assert failure["class"] == "nan" and "at step" in failure["message"]
    assert any("NonFiniteLossError" in line for line in failure["log_tail"])
    again = harness(*sweep)
    assert again.returncode == 1 and "already finished" in again.stdout
    logs = list(tmp_path.glob("outputs/scratch/*/log.txt"))
    assert sum(log.read_text().count("parameters:") for log in logs) == 2
    (failed,) = [log for log in logs if "NonFiniteLossError" in log.read_text()]
    before = failed.read_text()
    assert harness(*sweep, "retry=1").returncode == 1
    assert failed.read_text() != before  # done again, once: nan is not worth a second attempt
    assert failed.read_text().count("parameters:") == 1


@pytest.mark.slow
def test_a_folder_that_cannot_be_written_is_named(harness):
    done = harness("outputs_dir=/proc/here", *QUICK)
    assert done.returncode == 2 and "/proc/here" in done.stderr and "Traceback" not in done.stderr


@pytest.mark.faults
def test_a_disk_that_fills_is_told_of_and_room_lets_it_go_on(tmp_path):
    mount = f"mount -t tmpfs -o size=3m none {tmp_path}/disk"
    (tmp_path / "disk").mkdir()
    if subprocess.run(["unshare", "-rm", "sh", "-c", mount], capture_output=True).returncode:
        pytest.skip("needs unshare and a kernel that lets users mount a tmpfs")
    python = shlex.quote(sys.executable)
    run = f"{python} -m harness outputs_dir={tmp_path}/disk run_name=a method=full"
    run = f"{run} {' '.join(QUICK)}"
    script = (
        f"{mount} || exit 99; {run}; echo status $?; cat {tmp_path}/disk/scratch/a/result.json; "
        f"mount -o remount,size=300m {tmp_path}/disk; {run}; echo status $?"
    )
    done = subprocess.run(
        ["unshare", "-rm", "sh", "-c", script], cwd=tmp_path, capture_output=True, text=True,
        env=os.environ | {"PYTHONPATH": str(REPOSITORY)}, timeout=300,
    )  # fmt: skip
    _, _, record = done.stdout.partition("status 1")
    assert "failed (disk)" in done.stderr and "No space left" in done.stderr
    assert '"class": "disk"' in record and "status 0" in record and "finished in" in record


@pytest.mark.faults
@pytest.mark.parametrize("seeds", [2, 6])
def test_two_controllers_share_a_sweep(tmp_path, seeds):
    sweep = ["-m", "method=lora,full", f"seed=range({seeds})", *QUICK]
    both = [
        subprocess.Popen(
            [sys.executable, "-m", "harness", *sweep], cwd=tmp_path, text=True,
            env=os.environ | {"PYTHONPATH": str(REPOSITORY)},
            stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        )
        for _ in range(2)
    ]  # fmt: skip
    told = [controller.communicate(timeout=300) for controller in both]
    assert [controller.returncode for controller in both] == [0, 0], told
    found = list(run_record.collect(tmp_path / "outputs" / "scratch"))
    assert len(found) == 2 * seeds and all(r["status"] == "finished" for _, r in found)
    for run_dir, _ in found:  # each was done once
        assert (run_dir / "log.txt").read_text().count("INFO harness: parameters:") == 1
        steps = [row["step"] for row in run_record.read_metrics(run_dir)]
        assert steps == sorted(steps)
    assert all(f"[{2 * seeds}/{2 * seeds}]" in out for out, _ in told)
