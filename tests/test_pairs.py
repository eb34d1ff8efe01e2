"""Prompts and completions: reading, packing, the loss of completions only, and generation."""

import json
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from accelerate import Accelerator
from datasets import Dataset
from transformers import AutoConfig, AutoModelForCausalLM

from harness import compose
from harness.config.errors import ConfigError
from harness.config.paths import ASSETS_DIR
from harness.config.schema import DataConfig, GenerateConfig
from harness.data import pairs, sequences, token_data
from harness.data.token_tables import IGNORE
from harness.evaluation import generation, sliding_window, text_metrics
from harness.methods import adapt
from harness.models import pretrained
from harness.models.next_token import NextToken
from harness.results import run_record
from harness.training import loop

LINES = [
    (f"name : {name} | food : {food}", f"{name} serves {food} food{end} .")
    for name in ("Alpha", "Bibimbap House", "Clowns", "The Dumpling Tree", "Eagle", "Fitzbillies")
    for food in ("Chinese", "English")
    for end in ("", " near the river", ", and a great deal more of it than you can eat")
]


@pytest.fixture
def lines_file(tmp_path):
    path = tmp_path / "pairs.txt"
    path.write_text("".join(f"{prompt}||{text}\n" for prompt, text in LINES))
    return path


@pytest.fixture
def cfg(lines_file, tmp_path):
    return DataConfig(
        "p", "pairs", path=str(lines_file), context_length=96, cache_dir=str(tmp_path / "cache"),
        validation_share=0.2, test_share=0.2,
    )  # fmt: skip


@pytest.fixture(scope="module")
def mini():
    return AutoModelForCausalLM.from_pretrained(ASSETS_DIR / "gpt2_mini").eval()


def test_every_reference_of_a_prompt_stays_in_one_split(cfg):
    found = pairs.read(cfg)
    prompts = {name: {pair.prompt for pair in split} for name, split in found.items()}
    assert [len(prompts[name]) for name in ("train", "validation", "test")] == [8, 2, 2]
    assert len(set.union(*prompts.values())) == 12
    got = {(p.prompt, text) for split in found.values() for p in split for text in p.completions}
    assert got == set(LINES)


def test_a_share_of_the_training_prompts_keeps_all_completions_of_each(cfg):
    whole, half = (pairs.read(replace(cfg, train_share=share)) for share in (1, 0.5))
    assert len(half["train"]) == 4
    assert [pair for pair in whole["train"] if pair in half["train"]] == half["train"]
    assert (half["validation"], half["test"]) == (whole["validation"], whole["test"])


def test_a_folder_has_its_splits_and_a_missing_one_is_cut_from_training(cfg, tmp_path):
    folder = tmp_path / "folder"
    folder.mkdir()
    rows = [{"prompt": p, "completion": [t, t, " "]} for p, t in LINES[::3]]
    (folder / "valid.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows[:9]))
    (folder / "test.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows[9:]))
    fields = vars(cfg) | {"path": str(folder)}
    with pytest.raises(ConfigError, match="no training file among"):
        pairs.read(DataConfig(**fields))
    fields["split_names"] = {"train": "valid.jsonl", "test": "test.jsonl"}
    found = pairs.read(DataConfig(**fields))
    assert [len(found[name]) for name in ("train", "validation", "test")] == [7, 2, 3]
    assert found["test"][0].completions == [LINES[27][1]] * 2  # as often as it comes; none empty
    fields["split_names"] = {"train": "valid.json"}
    with pytest.raises(ConfigError, match=r"did you mean 'valid\.jsonl'"):
        pairs.read(DataConfig(**fields))


def test_a_hub_data_set_of_slots_and_references(cfg, tmp_path):
    for split in ("train", "test"):
        rows = [
            {
                "mr": f"name[{split} {i}], eatType[coffee shop], familyFriendly[yes]",
                "triples": [["a", "is", "b"], ["b", "has", str(i)]],
                "refs": [] if split == "train" else ["one", "two"],
                "target": "only",
            }
            for i in range(5)
        ]
        refs = pa.array([row["refs"] for row in rows], pa.list_(pa.string()))
        others = {name: [row[name] for row in rows] for name in ("mr", "triples", "target")}
        pq.write_table(pa.table(others | {"refs": refs}), tmp_path / f"{split}.parquet")
    (tmp_path / "pairs.txt").unlink()
    fields = vars(cfg) | {"path": None, "id": str(tmp_path), "completion_field": ["refs", "target"]}
    found = pairs.read(DataConfig(**fields | {"prompt_field": "mr", "prompt_style": "e2e"}))
    assert found["test"][1].prompt == "name : test 1 | Type : coffee shop | family friendly : yes"
    assert found["test"][1].completions == ["one", "two"]
    assert found["train"][0].completions == ["only"] and len(found["validation"]) == 1
    found = pairs.read(DataConfig(**fields | {"prompt_field": "triples"}))
    assert found["test"][3].prompt == "a : is : b | b : has : 3"
    with pytest.raises(ConfigError, match=r"data.prompt_field=triple: .*did you mean 'triples'"):
        pairs.read(DataConfig(**fields | {"prompt_field": "triple"}))


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("a||b\nno separator here\n", "line 2: no '||' between"),
        ("\n\n", r"has no pair|cannot be split"),
        ("a||b\n", "cannot be split"),
    ],
)
def test_a_file_that_is_no_file_of_pairs_is_named(cfg, lines_file, text, said):
    lines_file.write_text(text)
    with pytest.raises(ConfigError, match=said):
        pairs.read(cfg)


def test_a_line_of_pairs_ends_where_python_s_text_files_have_a_line_end(cfg, lines_file):
    odd = "\u2028 \u2029 \x85 \x0b \x0c \x1c \x1e"
    lines = [f"describe {i}||it is {i}{odd}see also||another line" for i in range(9)]
    for end in ("\n", "\r\n", "\r"):
        lines_file.write_bytes("\ufeff".encode() + end.join(lines).encode())
        with lines_file.open(encoding="utf-8-sig") as stream:
            expected = {tuple(line.rstrip("\n").split("||", 1)) for line in stream}
        found = [pair for split in pairs.read(cfg).values() for pair in split]
        assert {(pair.prompt, *pair.completions) for pair in found} == expected
        assert len(expected) == 9


GOOD = '{"prompt": "a", "completion": "b"}\n'
MESSAGES = '[{"role": "user", "content": "hello"}]'


@pytest.mark.parametrize(
    ("record", "said"),
    [
        (f'{{"prompt": {MESSAGES}, "completion": "b"}}', "prompt: expected text.*chat messages"),
        (
            f'{{"prompt": "a", "completion": {MESSAGES}}}',
            "completion: expected text.*chat messages",
        ),
        (
            '{"prompt": {"role": "user", "content": "x"}, "completion": "b"}',
            "chat messages are read as",
        ),
        ('{"prompt": {"a": 1}, "completion": "b"}', "prompt: expected text or a list of texts"),
        ('{"prompt": 3, "completion": "b"}', "prompt is int, not text"),
        ('{"prompt": null, "completion": "b"}', "prompt is null, not text"),
        ('{"prompt": ["a", 3], "completion": "b"}', "prompt is int, not text"),
        ('{"prompt": [["a", null]], "completion": "b"}', "prompt is null, not text"),
        ('{"prompt": [["a", ["b"]]], "completion": "b"}', "prompt is list, not text"),
        ('{"prompt": "a", "completion": 0}', "completion is int, not text"),
        ('{"prompt": "a", "completion": null}', "completion is null, not text"),
        ('{"prompt": "a", "completion": ["b", 3]}', "completion is int, not text"),
        ('{"prompt": "a", "completion": "\\ud83d y"}', r"completion: a lone surrogate .*\\ud83d"),
        ('{"prompt": "a \\udc00", "completion": "y"}', "prompt: a lone surrogate"),
        ('{"prompt": " ", "completion": "b"}', "the prompt is empty"),
        ('{"prompt": "a", "completion": "\\n"}', "the completion is empty"),
        ('{"prompt": "a", "completion": []}', "the completion is empty"),
        ('{"prompt": "a"}', "has no such field; choose one of: prompt"),
        ('{"prompt": "a", "prompt": "b", "completion": "c"}', "'prompt' twice"),
    ],
)
def test_a_record_that_is_no_pair_is_refused_with_file_and_line(cfg, tmp_path, record, said):
    path = tmp_path / "a.jsonl"
    path.write_text(GOOD * 3 + "\n" + record + "\n")
    with pytest.raises(ConfigError, match=said) as error:
        pairs.read(replace(cfg, path=str(path)))
    assert "a.jsonl, line 5" in str(error.value)


def test_pairs_are_the_same_in_every_format(cfg, tmp_path, lines_file):
    table = pd.DataFrame(LINES, columns=["prompt", "completion"])
    table.to_csv(tmp_path / "a.csv", index=False)
    table.to_parquet(tmp_path / "a.parquet")
    table.to_json(tmp_path / "A.JSONL.gz", orient="records", lines=True, compression="gzip")
    table.to_json(tmp_path / "a.json", orient="records")
    expected = pairs.read(cfg)
    for name in ("a.csv", "a.parquet", "A.JSONL.gz", "a.json"):
        assert pairs.read(replace(cfg, path=str(tmp_path / name))) == expected


def test_files_that_are_no_split_s_are_told_and_names_twice_are_refused(cfg, lines_file, tmp_path):
    folder = tmp_path / "folder"
    for name in ("Train.TXT", "more/test.txt", "more/x/data.txt", "data.txt", "README.md"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(lines_file.read_text())
    named = replace(cfg, path=str(folder))
    assert len(pairs.read(named)["test"]) == 12
    facts, (said,) = token_data.left_out(named)
    assert facts["left_out"]["files"] == 3
    assert all(name in said for name in ("README.md", "folder/data.txt", "x/data.txt"))
    with pytest.raises(ConfigError, match=r"2 files in .* are called so"):
        pairs.read(replace(named, split_names={"train": "data.txt"}))


def test_a_sequence_is_prompt_end_completion_end(cfg, tokenizer):
    (pair, *_) = pairs.read(cfg)["train"]
    first = sequences.sequences([pair], tokenizer, cfg)[0]
    prompt = [*tokenizer.encode(pair.prompt), tokenizer.eos_token_id]
    completion = [*tokenizer.encode(" " + pair.completions[0]), tokenizer.eos_token_id]
    assert first.ids == prompt + completion and first.num_prompt == len(prompt)
    assert sequences.prompt_ids(pair, tokenizer) == prompt
    with pytest.raises(ConfigError, match=r"set data.context_length=\d+ or more"):
        sequences.sequences([pair], tokenizer, replace(cfg, context_length=20))


def test_packing_holds_every_sequence_once_and_cuts_none(cfg, tokenizer):
    some = pairs.read(cfg)["train"]
    table = pa.concat_tables(sequences.blocks(some, tokenizer, cfg)[0]).to_pylist()
    found = []
    for row in table:
        assert len(row["inputs"]) == len(row["targets"]) == len(row["positions"]) == 96
        starts = [i for i, p in enumerate(row["positions"]) if p == 0] + [96]
        for start, end in pairwise(starts):
            assert row["positions"][start:end] == list(range(end - start))
            targets = row["targets"][start:end]
            if set(targets) != {IGNORE}:  # else padding
                ids = [*row["inputs"][start:end], targets[-1]]
                scored = [t for t in targets if t != IGNORE]
                assert ids[-len(scored) :] == scored
                found.append((tuple(ids), len(scored)))
    expected = sequences.sequences(some, tokenizer, cfg)
    assert sorted(found) == sorted(
        (tuple(one.ids), len(one.ids) - one.num_prompt) for one in expected
    )
    assert len(table) <= -(-sum(one.length for one in expected) // 96) + 1  # next to no waste
    assert pa.concat_tables(sequences.blocks(some[::-1], tokenizer, cfg)[0]).to_pylist() == table


def by_hand(model, some, tokenizer):
    """Nats of completions, one sequence at a time, by transformers' own loss."""
    nats, count = [], []
    for pair in some:
        for text in pair.completions:
            prompt = [*tokenizer.encode(pair.prompt), tokenizer.eos_token_id]
            completion = [*tokenizer.encode(" " + text), tokenizer.eos_token_id]
            ids = torch.tensor([prompt + completion])
            labels = ids.clone()
            labels[:, : len(prompt)] = -100
            nats.append(model(input_ids=ids, labels=labels).loss * len(completion))
            count.append(len(completion))
    return nats, count


@pytest.mark.parametrize("packing", ["packed", "padded"])
@pytest.mark.parametrize("method", ["method=full", "method=lora"])
def test_loss_and_gradient_are_those_of_every_sequence_alone(
    cfg, tokenizer, make_run, packing, method
):
    model = AutoModelForCausalLM.from_pretrained(ASSETS_DIR / "gpt2_mini").eval()
    model = adapt(model, make_run(method))
    some = pairs.read(cfg)["train"]
    blocks, _ = sequences.blocks(some, tokenizer, replace(cfg, packing=packing))
    table = Dataset(pa.concat_tables(blocks)).with_format("numpy")
    text = token_data.Data(table, {}, {}, True, "")
    order = text.by_length(list(range(len(table))))
    num_tokens = text.num_predicted(order)
    batches = [token_data.batch_of(table, order[i : i + 3]) for i in range(0, len(order), 3)]
    prepared = NextToken(model)
    total = loop.accumulate(prepared, batches, num_tokens, Accelerator(cpu=True))
    grads = {n: p.grad.clone() for n, p in model.named_parameters() if p.requires_grad}
    model.zero_grad()
    nats, count = by_hand(model, some, tokenizer)
    assert num_tokens == sum(count)
    (sum(nats) / num_tokens).backward()
    assert total.item() == pytest.approx(sum(nats).item(), rel=1e-5)
    for name, p in model.named_parameters():
        if p.requires_grad:
            torch.testing.assert_close(grads[name], p.grad, rtol=1e-3, atol=1e-5, msg=name)


def test_padded_batches_are_as_wide_as_their_longest(cfg, tokenizer):
    text = token_data.prepare(DataConfig(**vars(cfg) | {"packing": "padded"}), tokenizer)
    order = text.by_length(list(range(text.num_blocks)))
    widths = [token_data.batch_of(text.blocks, [i]).inputs.shape[1] for i in order]
    assert widths == sorted(widths) and len(set(widths)) > 3
    both = token_data.batch_of(text.blocks, [order[0], order[-1]])
    assert both.inputs.shape == (2, widths[-1]) and both.positions is None
    assert (both.targets[0, widths[0] :] == IGNORE).all()


def test_evaluation_counts_completions_only(cfg, tokenizer, mini):
    text = token_data.prepare(cfg, tokenizer)
    with torch.no_grad():
        nats, count = by_hand(mini, pairs.read(cfg)["test"], tokenizer)
    found, tokens = sliding_window.document_nll(
        NextToken(mini), text.held_out["test"], context=96, stride=96,
        bos=tokenizer.eos_token_id, batch_tokens=200,
    )  # fmt: skip
    np.testing.assert_allclose(found, [n.item() for n in nats], rtol=1e-5)
    assert tokens.tolist() == count
    words = [len(t.split()) for p in pairs.read(cfg)["test"] for t in p.completions]
    assert list(text.held_out["test"]["num_words"]) == words


@pytest.mark.parametrize("beams", [1, 4])
def test_generation_in_batches_is_generation_one_by_one(cfg, tokenizer, mini, beams):
    todo = pairs.read(cfg)["train"][:5]
    asked = GenerateConfig(num_beams=beams, max_new_tokens=12, batch=3, no_repeat_ngram=0)
    found = generation.complete(mini, tokenizer, todo, asked, Accelerator(cpu=True))
    assert found.num_tokens > 0 and found.seconds > 0
    for pair, text in zip(todo, found.texts, strict=True):
        ids = torch.tensor([sequences.prompt_ids(pair, tokenizer)])
        out = mini.generate(
            input_ids=ids, attention_mask=torch.ones_like(ids), num_beams=beams,
            max_new_tokens=12, length_penalty=0.8, do_sample=False, use_cache=True,
            pad_token_id=tokenizer.eos_token_id, eos_token_id=tokenizer.eos_token_id,
        )  # fmt: skip
        expected = tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True).strip()
        assert text == expected


def test_no_ngram_comes_twice_in_a_completion_but_once_more_than_in_the_prompt(
    cfg, tokenizer, mini
):
    todo = [pairs.Pair("x", "the model of the model of the model of the model", ["y"])]
    for n in (0, 2):
        asked = GenerateConfig(num_beams=1, max_new_tokens=40, no_repeat_ngram=n)
        (text,) = generation.complete(mini, tokenizer, todo, asked, Accelerator(cpu=True)).texts
        ids = tokenizer.encode(text)
        grams = list(pairwise(ids))
        assert (len(set(grams)) == len(grams)) == (n == 2)


def test_a_prompt_that_leaves_no_room_is_refused(cfg, tokenizer, mini):
    todo = pairs.read(cfg)["test"]
    accelerator = Accelerator(cpu=True)
    generation.check(mini, tokenizer, todo, GenerateConfig(max_new_tokens=99), accelerator, 256)
    with pytest.raises(ConfigError, match=r"set it to \d+ or less"):
        generation.check(mini, tokenizer, todo, GenerateConfig(), accelerator, 70)


def test_a_model_that_cannot_generate_is_refused_before_training(cfg, tokenizer, make_run):
    run = make_run("model=lstm", "targets=lstm", "method=full")
    lstm = pretrained.load_model(run, pretrained.load_config(run.model))
    todo = pairs.read(cfg)["test"]
    with pytest.raises(ConfigError, match="LSTMForCausalLM cannot complete prompts"):
        generation.check(lstm, tokenizer, todo, GenerateConfig(), Accelerator(cpu=True), None)
    assert not NextToken(lstm).supports_packing()


SMALL = {"num_hidden_layers": 2, "hidden_size": 32, "num_attention_heads": 2}
LLAMA = SMALL | {"intermediate_size": 64, "num_key_value_heads": 2}
OPT = SMALL | {"ffn_dim": 64, "word_embed_proj_dim": 32}
GPT = {"n_layer": 2, "n_embd": 32, "n_head": 2}


@pytest.mark.parametrize(
    ("kind", "fields", "packs"),
    [
        ("gpt2", GPT, True),
        ("opt", OPT, True),
        ("llama", LLAMA, True),
        ("gptj", GPT | {"rotary_dim": 8}, False),
        ("mistral", LLAMA | {"sliding_window": 4}, False),
    ],
)
def test_models_whose_sequences_would_see_one_another_are_told(kind, fields, packs):
    torch.manual_seed(0)
    config = AutoConfig.for_model(
        kind, vocab_size=64, initializer_range=0.3, pad_token_id=0, bos_token_id=0, eos_token_id=0,
        **fields,
    )  # fmt: skip
    assert NextToken(AutoModelForCausalLM.from_config(config).eval()).supports_packing() == packs


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["data=pairs"], "needs one of data.path"),
        (["data=pairs", "data.path=there"], "no such file"),
        (["evaluate=generate"], r"data=kjv has none"),
        (["data=e2e_nlg", "evaluate=generate", "evaluate.generate.num_beams=0"], "1 or more"),
        (["data=e2e_nlg", "data.packing=tight"], "choose one of: packed, padded"),
        (["data=e2e_nlg", "evaluate=generate", "evaluate.test=false"], "evaluate.test=false"),
        (["data=e2e_nlg", "+data.split_names={trane: x}"], "did you mean 'train'"),
    ],
)
def test_mistakes_are_named_before_anything_starts(make_run, overrides, said):
    with pytest.raises(ConfigError, match=said):
        make_run(*overrides)


SHORT = (
    "data.context_length=96", "train.steps=2", "train.batch_tokens=384", "train.micro_batch=2",
    "evaluate.interval=2", "evaluate.generate.num_beams=2", "evaluate.generate.max_new_tokens=8",
)  # fmt: skip


@pytest.mark.slow
def test_a_task_as_a_user_starts_it(harness, lines_file, tmp_path):
    done = harness("data=pairs", f"data.path={lines_file}", "evaluate=generate", *SHORT)
    assert done.returncode == 0, done.stderr
    ((run_dir, result),) = run_record.collect(tmp_path / "outputs" / "scratch")
    found = result["quality"]["generation"]
    cfg = DataConfig("p", "pairs", path=str(lines_file))
    test = pairs.read(cfg)["test"]
    rows = [json.loads(line) for line in (run_dir / "generations.jsonl").open()]
    assert [row["references"] for row in rows] == [pair.completions for pair in test]
    assert (
        found["num_prompts"]
        == len(test)
        == len(pd.read_parquet(run_dir / "documents-test.parquet"))
    )
    scores = text_metrics.score(
        [row["completion"] for row in rows], [row["references"] for row in rows]
    )
    assert {name: found[name] for name in scores.values} == pytest.approx(scores.values)
    assert found["skipped"] == scores.skipped
    assert result["speed"]["tokens"] < 2 * 384  # completions only


def test_two_files_for_one_split_are_refused(lines_file, tmp_path):
    for name in ("train.txt", "valid.txt", "dev.txt"):
        (tmp_path / name).write_text(lines_file.read_text())
    with pytest.raises(
        ConfigError, match=r"dev\.txt and .*valid\.txt could both be its validation"
    ):
        pairs.read(DataConfig("p", "pairs", path=str(tmp_path)))
    named = {"train": "train.txt", "validation": "dev.txt"}
    assert pairs.read(DataConfig("p", "pairs", path=str(tmp_path), split_names=named))


@pytest.mark.parametrize("name", ["paper_e2e_gpt2_medium", "paper_e2e_gpt2_large"])
def test_published_recipes_are_valid_at_the_scale_of_a_cpu(name, tmp_path):
    for file in ("valid.txt", "test.txt"):
        (tmp_path / file).write_text("".join(f"name : {n}||{n} is a pub .\n" for n in "ABCD"))
    full, lora = compose(f"experiment={name}", "scale=cpu", f"data.path={tmp_path}")
    assert (full.method.name, lora.method.r) == ("full", 4)
    assert full.model.name == lora.model.name == "gpt2_mini"


@pytest.mark.slow
def test_a_published_recipe_runs_at_the_scale_of_a_cpu(harness, lines_file, tmp_path):
    folder = tmp_path / "e2e"
    folder.mkdir()
    lines = lines_file.read_text().splitlines(keepends=True)
    (folder / "valid.txt").write_text("".join(lines[:24]))
    (folder / "test.txt").write_text("".join(lines[24:]))
    done = harness(
        "experiment=paper_e2e_gpt2_medium", "scale=cpu", f"data.path={folder}", *SHORT,
        "data.context_length=64", "train.batch_tokens=256", "evaluate.generate.prompts=2",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    found = run_record.collect(tmp_path / "outputs" / "paper_e2e_gpt2_medium")
    labels = {result["method"]["label"]: result for _, result in found}
    assert set(labels) == {"full", "lora_paper"}
    for result in labels.values():
        assert result["status"] == "finished"
        assert result["quality"]["generation"]["num_prompts"] == 2
