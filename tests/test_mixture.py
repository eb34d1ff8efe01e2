"""Mixtures of texts: shares that are exact to a block, the order of blocks, and what is refused."""

import json
import random
import shutil
import signal
from collections import Counter
from dataclasses import replace
from fractions import Fraction

import pandas as pd
import pytest
from cut_runs import finish, start

from harness.config import naming
from harness.config.errors import ConfigError
from harness.config.schema import DataConfig
from harness.data import mixture, token_data
from harness.data.token_data import batch_of, block_order
from harness.results import run_record

WORDS = ["ash", "bone", "cliff", "dune", "elm", "fern", "gull", "heath", "isle", "knoll", "loch",
         "moss"]  # fmt: skip


def text(folder, name, words, count):
    rng = random.Random(name)
    rows = [" ".join(rng.choice(words) for _ in range(60)) for _ in range(count)]
    path = folder / f"{name}.jsonl"
    records = [{"text": f"{row} {i}"} for i, row in enumerate(rows)]
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return str(path)


@pytest.fixture
def three(tmp_path):
    """Paths of three texts of words that no two share."""
    return {
        name: text(tmp_path, name, WORDS[4 * i : 4 * i + 4], 40 + 17 * i)
        for i, name in enumerate(("one", "two", "three"))
    }


def mix(folder, paths, weights, **more):
    base = {"context_length": 32, "cache_dir": str(folder / "cache")}
    parts = {
        name: {"weight": w, **vars(DataConfig(name, "text_files", path=paths[name], **base))}
        for name, w in weights.items()
    }
    return DataConfig("mix", "mix", parts=parts, **base, **more)


def part_of(ids, tokenizer):
    """Which text a block is of, by its words."""
    found = Counter()
    for word in tokenizer.decode(ids).split():
        found.update(i // 4 for i, known in enumerate(WORDS) if word == known)
    ((part, count),) = found.most_common(1)
    assert count > 5 and len(found) == 1
    return ("one", "two", "three")[part]


@pytest.mark.parametrize(
    "weights", [(9, 1), (2, 1), (1, 1, 1), (1, 997), (70, 20, 9, 1), (0, 3, 5), (0, 1), (31, 7, 13)]
)
def test_shares_are_exact_to_a_block_at_every_moment(weights):
    total = sum(weights)
    shares = [Fraction(w, total) for w in weights]
    found = mixture.turns(shares, 3000).tolist()
    counts = [0] * len(weights)
    for n, part in enumerate(found, 1):
        counts[part] += 1
        for count, share in zip(counts, shares, strict=True):
            assert abs(count - n * share) < 1
    assert mixture.turns(shares, 37).tolist() == found[:37]
    for first in (0, 1, 8, 100, 2900):
        before = Counter(found[:first])
        expected = []
        for part in found[first : first + 50]:
            expected.append((part, before[part]))
            before[part] += 1
        assert mixture.places(shares, first, 50) == expected


def test_random_shares_are_exact_too():
    rng = random.Random(0)
    for _ in range(40):
        weights = [rng.choice([rng.random(), rng.randint(0, 9), 10.0 ** -rng.randint(0, 6)])
                   for _ in range(rng.randint(2, 6))] + [0.5]  # fmt: skip
        total = sum(Fraction(str(w)) for w in weights)
        shares = [Fraction(str(w)) / total for w in weights]
        counts = Counter()
        for n, part in enumerate(mixture.turns(shares, 500).tolist(), 1):
            counts[part] += 1
            assert all(abs(counts[j] - n * share) < 1 for j, share in enumerate(shares))


def test_batches_have_the_shares_and_each_part_its_own_order(tmp_path, three, tokenizer):
    cfg = mix(tmp_path, three, {"one": 0.6, "two": 0.3, "three": 0.1})
    data = token_data.prepare(cfg, tokenizer)
    alone = {
        name: token_data.prepare(
            DataConfig(**{k: v for k, v in part.items() if k != "weight"}), tokenizer
        )
        for name, part in cfg.parts.items()
    }
    batch, steps, seen = 8, 60, {name: [] for name in three}
    for step in range(steps):
        ids = batch_of(data.blocks, data.order(5, step, batch)).ids.tolist()
        for block in ids:
            seen[part_of(block, tokenizer)].append(block)
        n = (step + 1) * batch
        counted = {name: len(blocks) for name, blocks in seen.items()}
        for name, share in (("one", 0.6), ("two", 0.3), ("three", 0.1)):
            assert abs(counted[name] - share * n) < 1
    for name, blocks in seen.items():  # over several epochs of the smaller ones
        order = block_order(5, 0, len(blocks), alone[name].num_blocks)
        assert blocks == batch_of(alone[name].blocks, order).ids.tolist()
    assert len(seen["one"]) > alone["one"].num_blocks
    assert data.order(5, 7, batch) == token_data.prepare(cfg, tokenizer).order(5, 7, batch)
    ranks = [data.order(5, step, 4) for step in (6, 7)]  # as a resume or other batches see it
    assert [*ranks[0], *ranks[1]] == data.order(5, 3, batch)
    assert data.order(6, 7, batch) != data.order(5, 7, batch)
    assert data.epochs(480) == pytest.approx(len(seen["one"]) / alone["one"].num_blocks)


def test_held_out_documents_are_those_of_the_first_part_or_the_named_one(
    tmp_path, three, tokenizer
):
    weights = {"one": 0.6, "two": 0.4}
    data = token_data.prepare(mix(tmp_path, three, weights), tokenizer)
    assert {row.split("#")[0] for row in data.held_out["test"]["id"]} == {"one.jsonl"}
    named = mix(tmp_path, three, weights, held_out_part="two")
    data = token_data.prepare(named, tokenizer)
    assert {row.split("#")[0] for row in data.held_out["test"]["id"]} == {"two.jsonl"}
    parts = data.facts["parts"]
    assert parts["one"]["share"] == 0.6 and parts["one"]["has_held_out"] == {
        "validation": 0,
        "test": 0,
    }
    assert parts["one"]["num_blocks"] + parts["two"]["num_blocks"] == data.num_blocks


def test_held_out_documents_in_another_part_are_counted_and_told(tmp_path, three, tokenizer):
    three["two"] = three["one"].replace("one", "two")
    with open(three["one"]) as one, open(three["two"], "w") as two:
        two.write(one.read() + json.dumps({"text": " ".join(WORDS * 9)}) + "\n")
    data = token_data.prepare(mix(tmp_path, three, {"one": 0.6, "two": 0.4}), tokenizer)
    assert sum(data.facts["parts"]["two"]["has_held_out"].values()) > 0
    assert any(
        "data.parts.two: " in said and "documents of one share" in said for said in data.warnings
    )


def test_a_part_without_a_share_is_not_there(tmp_path, three, tokenizer):
    with_zero = mix(tmp_path, three, {"one": 1, "two": 0})
    alone = DataConfig(**{k: v for k, v in with_zero.parts["one"].items() if k != "weight"})
    zero, plain = (token_data.prepare(cfg, tokenizer) for cfg in (with_zero, alone))
    for step in range(9):
        asked = 3, step, 8
        assert zero.order(*asked) == plain.order(*asked)
        found = (batch_of(d.blocks, d.order(*asked)).ids.tolist() for d in (zero, plain))
        assert next(found) == next(found)
    assert zero.held_out["test"]["id"] == plain.held_out["test"]["id"]


QUICK = (
    "method=lora", "method.r=2", "train.lr=0.01", "data.context_length=32",
    "train.batch_tokens=256",
    "train.micro_batch=4", "evaluate.interval=2", "train.threads=1",
)  # fmt: skip


@pytest.mark.slow
def test_a_weight_of_zero_is_bit_for_bit_the_run_without_the_part(harness, tmp_path, three):
    one = f"one:{{weight:1,source:text_files,path:{three['one']}}}"
    two = f"two:{{weight:0,source:text_files,path:{three['two']}}}"
    texts = {
        "zero": ["data=mix", f"data.parts={{{one},{two}}}"],
        "some": ["data=mix", f"data.parts={{{one},{two.replace('weight:0', 'weight:1')}}}"],
        "without": ["data=text_files", f"data.path={three['one']}"],
    }
    found = {}
    for name, asked in texts.items():
        done = harness("run", *QUICK, *asked, "train.steps=4", f"run_name={name}")
        assert done.returncode == 0, done.stderr
        (folder,) = tmp_path.glob(f"outputs/*/{name}")
        found[name] = pd.read_parquet(folder / "documents-test.parquet")
    pd.testing.assert_frame_equal(found["zero"], found["without"], check_exact=True)
    assert (found["some"].id == found["without"].id).all()
    assert (found["some"].nll_nats != found["without"].nll_nats).any()
    record = json.loads((folder.parent / "some" / "result.json").read_text())
    assert record["data"]["name"] == "one 1 + two 1"
    assert record["data"]["parts"]["two"]["share"] == 0.5


@pytest.mark.slow
def test_a_mixture_that_is_killed_goes_on_to_the_same_numbers(make_run, tmp_path, three):
    parts = [
        f"{n}:{{weight:{w},source:text_files,path:{three[n]}}}" for n, w in (("one", 2), ("two", 1))
    ]
    run = make_run(
        *QUICK, "data=mix", f"data.parts={{{','.join(parts)}}}", "train.steps=6",
        "train.checkpoint_interval=2", f"outputs_dir={tmp_path}",
        f"data.cache_dir={tmp_path / 'c'}",
    )  # fmt: skip
    found = []
    for name, kill in (("whole", {}), ("cut", {"deadly": "_generators", "number": 3})):
        one = replace(run, run_name=name)
        one.run_dir.mkdir(parents=True)
        status = finish(start(one, **kill))
        assert status == (-signal.SIGKILL if kill else 0)
        if kill:
            assert finish(start(one)) == 0
            assert run_record.read(one.run_dir)["run"]["resumed_at"]
        table = pd.read_parquet(one.run_dir / "documents-test.parquet")
        losses = [row.get("train/nll") for row in run_record.read_metrics(one.run_dir)]
        found.append((table.nll_nats.tolist(), losses))
    assert found[0] == found[1]


# --------------------------------------------------------------------------- what is refused


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        ("{kjv:0.9,docstring:0.1}", "data.parts: no data set docstring; did you mean 'docstrings'"),
        ("{kjv:0,docstrings:0}", "the weights are 0 together"),
        ("{kjv:1,docstrings:-0.1}", r"data.parts.docstrings=-0.1: expected a weight"),
        ("{kjv:1,docstrings:much}", r"data.parts.docstrings=much: expected a weight"),
        ("{kjv:1,docstrings:null}", r"data.parts.docstrings=None: expected a weight"),
        ("{kjv:1,mix:1}", "no data set mix"),
        ("{kjv:1,mine:{weight:1,source:text_files}}", r"data.parts.mine.path is missing"),
        ("{kjv:1,mine:{weight:1,source:text_files,path:no.txt}}", "no.txt: no such file"),
        ("{kjv:1,mine:{weight:1,source:kjv,shares:1}}", r"data.parts.mine.shares"),
        ("{kjv:1,e2e_nlg:1}", "pairs cannot be part of a mixture"),
        ("kjv", "data.parts=kjv: expected weights by name"),
    ],
)
def test_a_mixture_that_cannot_be_is_refused_in_a_line(make_run, asked, said):
    with pytest.raises(ConfigError, match=said) as error:
        make_run("data=mix", f"data.parts={asked}")
    assert "\n" not in str(error.value)


def test_more_that_is_refused_of_mixtures(make_run):
    mixed = ["data=mix", "data.parts={kjv:0.9,docstrings:0.1}"]
    with pytest.raises(
        ConfigError, match=r"data.held_out_part=docstring: did you mean 'docstrings'"
    ):
        make_run(*mixed, "data.held_out_part=docstring")
    with pytest.raises(ConfigError, match=r"train.epochs=1.*set train.steps"):
        make_run(*mixed, "train.epochs=1")
    with pytest.raises(ConfigError, match=r"the text that is trained on .*read once"):
        make_run(*mixed, "evaluate.also=[kjv]")
    with pytest.raises(ConfigError, match=r"parts belong to data=mix"):
        make_run("data=kjv", "data.parts={docstrings:1}")
    with pytest.raises(ConfigError, match=r"data.held_out_part=kjv: expected data=mix"):
        make_run("data=kjv", "data.held_out_part=kjv")


def test_what_makes_another_run_of_a_mixture(make_run, tmp_path, three):
    def run(parts, *more):
        return make_run("data=mix", f"data.parts={{{parts}}}", *more)

    of_files = "kjv:1,mine:{weight:1,source:text_files,path:PATH}"
    moved = tmp_path / "elsewhere" / "one.jsonl"
    moved.parent.mkdir()
    shutil.copy(three["one"], moved)
    first = run(of_files.replace("PATH", three["one"]))
    same = run(of_files.replace("PATH", str(moved)), f"data.cache_dir={tmp_path}")
    assert naming.identity(first) == naming.identity(same)
    assert set(first.contents) >= {"data.parts.kjv", "data.parts.mine"}
    others = [
        run(of_files.replace("PATH", three["two"])),
        run(of_files.replace("PATH", three["one"]).replace("kjv:1", "kjv:2")),
        make_run("data=kjv"),
    ]
    assert len({naming.identity(one) for one in [first, *others]}) == 4
    assert first.data.parts["mine"]["context_length"] == first.data.context_length


def test_a_part_that_does_not_exist_is_a_line_and_exit_status_2(harness, tmp_path):
    done = harness("run", "data=mix", "data.parts={kjv:0.9,docstring:0.1}")
    assert done.returncode == 2 and not (tmp_path / "outputs").exists()
    assert "did you mean 'docstrings'" in done.stderr and done.stderr.count("\n") == 1
