"""Forms of records, and conversations: what is read, its tokens, and what of them is predicted."""

import gzip
import json
from dataclasses import replace
from itertools import chain

import numpy as np
import pyarrow as pa
import pytest
import torch
from accelerate import Accelerator
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer

from harness.config.errors import ConfigError
from harness.config.paths import ASSETS_DIR
from harness.config.schema import DataConfig, GenerateConfig
from harness.data import chat, overlap, pairs, sequences, subset, token_data
from harness.data.token_tables import IGNORE
from harness.evaluation import generation, sliding_window
from harness.models.next_token import NextToken
from harness.training import loop

# ChatML, as Qwen and SmolLM2 have it, with the assistant's turns marked and without marks.
OPEN = "<|im_start|>assistant\n"
SAID = (
    "{{ message.content }}<|im_end|>"  # a line end after {% … %} is not written: hence {{ '\\n' }}
)
CHATML = (
    "{% for message in messages %}{% if message.role == 'assistant' %}"
    + OPEN
    + "SAID{{ '\n' }}{% else %}"
    "<|im_start|>{{ message.role }}\n" + SAID + "\n{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}" + OPEN + "{% endif %}"
)
MARKED = CHATML.replace("SAID", "{% generation %}" + SAID + "{% endgeneration %}")
UNMARKED = CHATML.replace("SAID", SAID)

TALKS = [
    [
        ("system", "Answer in a word."),
        ("user", f"What colour is number {i} of the wheels?"),
        ("assistant", f"Number {i} is red."),
        ("user", "And its hub?\nBe exact."),
        ("assistant", f"Green, {i} times over\nand over."),
    ]
    for i in range(12)
]
SHORT = [[("user", f"Say {i}"), ("assistant", f"{i}!")] for i in range(12)]


def messages(turns):
    return [{"role": role, "content": content} for role, content in turns]


def sharegpt(turns):
    names = {"user": "human", "assistant": "gpt"}
    return [{"from": names.get(role, role), "value": content} for role, content in turns]


def write(path, records):
    path.write_text("".join(json.dumps(record) + "\n" for record in records), "utf-8")
    return path


@pytest.fixture
def cfg(tmp_path):
    file = write(tmp_path / "chat.jsonl", [{"messages": messages(t)} for t in TALKS])
    return DataConfig(
        "p", "pairs", path=str(file), context_length=96, cache_dir=str(tmp_path / "cache"),
        validation_share=0.2, test_share=0.2,
    )  # fmt: skip


def with_template(template):
    """gpt2_mini's tokenizer with ChatML's tokens, whose end of a turn is its end-of-text token."""
    tokenizer = AutoTokenizer.from_pretrained(ASSETS_DIR / "gpt2_mini")
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    tokenizer.chat_template = template
    return tokenizer


@pytest.fixture(scope="module")
def mini():
    return AutoModelForCausalLM.from_pretrained(ASSETS_DIR / "gpt2_mini").eval()


def pairs_of(talks):
    return [pairs.Pair(f"train/{i}", "p", [t[-1][1]], tuple(t[:-1])) for i, t in enumerate(talks)]


# --------------------------------------------------------------------------- forms of records


def test_every_form_gives_the_pairs_that_it_says(cfg, tmp_path):
    asked = [(f"Add {i} and 1", f"{i + 1}") for i in range(9)]
    forms = {
        "pair": [{"prompt": q, "completion": a} for q, a in asked],
        "question": [{"question": q, "answer": a, "id": 7} for q, a in asked],
        "instruction": [{"instruction": q, "input": "", "output": a} for q, a in asked],
        "messages": [{"messages": messages([("user", q), ("assistant", a)])} for q, a in asked],
        "sharegpt": [
            {"conversations": sharegpt([("user", q), ("assistant", a)])} for q, a in asked
        ],
    }
    for form, records in forms.items():
        file = tmp_path / f"{form}.jsonl.gz"
        file.write_bytes(gzip.compress("".join(json.dumps(r) + "\n" for r in records).encode()))
        found = pairs.task(replace(cfg, path=str(file)))
        assert found.rule["record_form"] == form
        got = [pair for split in found.splits.values() for pair in split]
        turns = form in ("messages", "sharegpt")
        expected = {(f"user: {q}" if turns else q, a) for q, a in asked}
        assert {(pair.prompt, *pair.completions) for pair in got} == expected
        assert all(pair.turns == ((("user", pair.prompt[6:]),) if turns else ()) for pair in got)
        chosen = replace(cfg, path=str(file), record_form=form)
        assert pairs.read(chosen) == found.splits
        with pytest.raises(ConfigError, match=r"has no (such )?field"):
            other = "question" if form != "question" else "messages"
            pairs.read(replace(chosen, record_form=other))


def test_an_instruction_is_followed_by_its_input(cfg, tmp_path):
    rows = [
        {"instruction": f"Translate {i}", "input": more, "output": ["eins", "one"]}
        for i, more in enumerate(["uno\r\ndue", "", None] * 3)
    ]
    file = write(tmp_path / "a.jsonl", rows)
    found = {
        p.prompt: p.completions
        for s in pairs.read(replace(cfg, path=str(file))).values()
        for p in s
    }
    assert found["Translate 0\n\nuno\ndue"] == ["eins", "one"]
    assert {"Translate 1", "Translate 2"} <= found.keys()


def test_system_of_sharegpt_and_turns_after_the_last_answer(cfg, tmp_path):
    rows = [
        {"conversations": sharegpt([*t[1:], ("user", "Thanks")]), "system": "Answer in a word."}
        for t in TALKS
    ]
    found = pairs.task(replace(cfg, path=str(write(tmp_path / "a.jsonl", rows))))
    assert found.rule["left_out"] == "12 turns after the assistant's last one"
    assert found.splits == pairs.read(cfg)


GOOD = json.dumps({"messages": messages(SHORT[0])})


@pytest.mark.parametrize(
    ("records", "said"),
    [
        ([{"a": "x", "b": "y"}], r"line 1 has the fields a, b, and no form .* data.prompt_field"),
        ([{"text": "x"}], r"line 1 is a record of text \(text\).*use data=text_files"),
        (
            [{"question": "a", "answer": "b", "messages": []}],
            r"several forms, question and messages: .*data.record_form=question",
        ),
        (
            [GOOD, {"prompt": "a", "completion": "b"}],
            r"line 2 has no field messages, .*fields prompt, completion, the form pair: a data set",
        ),
        (
            [{"prompt": "a", "completion": "b"}, GOOD],
            r"line 2 has no such field.*; it has the form messages: a data set",
        ),
        ([{"question": "a", "answer": None}], "line 1 has the fields question, answer, and no"),
        (
            [{"question": "a", "answer": "b"}, {"question": "a"}],
            "line 2 has no field answer, .*fields question",
        ),
        (
            [{"question": "a", "answer": "b"}, {"question": " ", "answer": "b"}],
            "line 2: the prompt is empty",
        ),
        ([{"instruction": "a", "output": "b", "history": [["x", "y"]]}], "history is not read"),
        ([{"instruction": "a", "output": "b", "input": 3}], "line 1: input is int, not text"),
        ([{"messages": messages(SHORT[0]), "tools": [{"name": "f"}]}], "tools is not read"),
        ([{"messages": "hello"}], "messages: expected a list of messages, found hello"),
        ([{"messages": []}], r"messages: expected a list of messages, found \[\]"),
        ([{"messages": ["hello"]}], "line 1, message 1: expected role and content, found hello"),
        (
            [{"messages": [{"role": "user", "text": "x"}]}],
            "message 1 has no field content; it has the fields role, text",
        ),
        (
            [{"messages": messages([("user", "x"), ("asistant", "y")])}],
            "line 1, message 2: the role 'asistant' is not known; did you mean 'assistant'",
        ),
        ([{"messages": messages([("tool", "x")])}], "the role 'tool' is not known; choose one of"),
        ([{"messages": [{"role": ["user"], "content": "x"}]}], "the role .* is not known"),
        ([{"messages": messages([("user", "x"), ("assistant", " ")])}], "the assistant says nothi"),
        ([{"messages": messages([("user", "x")])}], "no turn is the assistant's"),
        ([{"messages": messages([("assistant", "x")])}], "line 1: the prompt is empty"),
        ([{"messages": [{"role": "user", "content": [{"type": "text"}]}]}], "content is list, not"),
        (
            [{"messages": [{"role": "assistant", "content": "x", "weight": 0}]}],
            "message 1: weight is not read, and would be lost",
        ),
        ([{"messages": messages([("user", "\ud83d")])}], "content: a lone surrogate"),
        ([{"conversations": [{"from": "bot", "value": "x"}]}], "the role 'bot' is not known"),
        (["[1, 2]"], r"line 1: expected a JSON object, found '\[1, 2\]'"),
        (["hello"], "line 1: not JSON"),
    ],
)  # fmt: skip
def test_a_bad_record_is_refused_by_its_place(cfg, tmp_path, records, said):
    lines = [record if isinstance(record, str) else json.dumps(record) for record in records]
    (tmp_path / "a.jsonl").write_text("\n".join(lines) + "\n")
    with pytest.raises(ConfigError, match=said) as error:
        pairs.read(replace(cfg, path=str(tmp_path / "a.jsonl")))
    assert "\n" not in str(error.value)


def test_text_files_says_who_reads_conversations(cfg):
    with pytest.raises(ConfigError, match="records of the form messages, which data=pairs reads"):
        token_data.documents.read(replace(cfg, source="text_files"))


def test_conversations_that_begin_alike_are_in_one_split(cfg, tmp_path):
    talks = [
        [*t[:3], ("user", f"More of it, {j}"), ("assistant", "No.")]
        for t in TALKS
        for j in range(3)
    ]
    file = write(tmp_path / "a.jsonl", [{"messages": messages(t)} for t in talks])
    found = pairs.read(replace(cfg, path=str(file)))
    openings = {name: {pair.opening for pair in split} for name, split in found.items()}
    assert sum(map(len, openings.values())) == len(set.union(*openings.values())) == 12
    assert sum(map(len, found.values())) == 36 and all(map(len, found.values()))


# --------------------------------------------------------------------------- templates


@pytest.mark.parametrize("talks", [TALKS, SHORT])
def test_a_marked_template_is_masked_as_transformers_masks_it(cfg, talks):
    tokenizer = with_template(MARKED)
    found = sequences.sequences(pairs_of(talks), tokenizer, cfg)
    for one, turns in zip(found, talks, strict=True):
        expected = tokenizer.apply_chat_template(
            messages(turns), return_dict=True, return_assistant_tokens_mask=True
        )
        ids, mask = expected["input_ids"], expected["assistant_masks"]
        end = len(mask) - mask[::-1].index(1)  # nothing is predicted after it
        assert one.ids == ids[:end]
        assert one.predicted == [bool(m) for m in mask[1:end]]


@pytest.mark.parametrize("talks", [TALKS, SHORT])
def test_the_turns_of_a_template_without_marks_are_found(cfg, talks):
    marked, without = (
        sequences.sequences(pairs_of(talks), with_template(t), cfg) for t in (MARKED, UNMARKED)
    )
    for a, b in zip(marked, without, strict=True):
        assert (a.pair, a.ids, a.predicted, a.scored) == (b.pair, b.ids, b.predicted, b.scored)
    tokenizer = with_template(UNMARKED)
    assert not chat.template_of(tokenizer).marked and chat.template_of(tokenizer).own


def test_the_plain_template_is_the_documented_text(cfg, tokenizer):
    (one,) = sequences.sequences(pairs_of(TALKS[:1]), tokenizer, cfg)
    parts = [
        "System: Answer in a word.\nUser: What colour is number 0 of the wheels?\nAssistant:",
        " Number 0 is red.<|endoftext|>",
        "User: And its hub?\nBe exact.\nAssistant:",
        " Green, 0 times over\nand over.<|endoftext|>",
    ]
    assert tokenizer.decode(one.ids) == "".join(parts)
    ids = [tokenizer(part)["input_ids"] for part in parts]
    assert one.ids == [*chain(*ids)]
    marks = [*chain(*([i % 2 == 1] * len(part) for i, part in enumerate(ids)))]
    assert one.predicted == marks[1:]
    asked = replace(cfg, chat_template="plain")
    assert sequences.sequences(pairs_of(TALKS[:1]), with_template(MARKED), asked)[0].ids == one.ids


@pytest.mark.parametrize("template", [None, MARKED, UNMARKED])
def test_a_prompt_is_cut_into_tokens_as_generation_sees_it(cfg, template, tokenizer):
    tokenizer = with_template(template) if template else tokenizer
    for turns in [*TALKS, *SHORT]:
        (pair,) = pairs_of([turns])
        (one,) = sequences.sequences([pair], tokenizer, replace(cfg, loss_on="completion"))
        asked = tokenizer.apply_chat_template(
            messages(turns[:-1]), chat_template=template or chat.PLAIN, add_generation_prompt=True,
            return_dict=True,
        )["input_ids"]  # fmt: skip
        assert sequences.prompt_ids(pair, tokenizer) == asked == one.ids[: one.num_prompt]


def test_an_answer_that_the_tokenizer_would_join_to_its_prompt_stays_apart(cfg):
    """Two line ends are one token at the end of a text, and two tokens before a letter."""
    tokenizer = with_template(UNMARKED.replace("assistant\n", "assistant\n\n"))
    turns = [("user", "x"), ("assistant", "abc")]
    (pair,) = pairs_of([turns])
    (one,) = sequences.sequences([pair], tokenizer, cfg)
    prompt = tokenizer.apply_chat_template(
        messages(turns[:-1]), add_generation_prompt=True, return_dict=True
    )
    whole = tokenizer.apply_chat_template(messages(turns), return_dict=True)["input_ids"]
    assert one.ids[: one.num_prompt] == prompt["input_ids"]
    assert whole[: len(prompt["input_ids"])] != prompt["input_ids"]  # or else nothing is tried here
    assert tokenizer.decode(one.ids) == tokenizer.decode(whole).removesuffix("\n")


@pytest.mark.parametrize(
    ("template", "said"),
    [
        ("{{ raise_exception('no system, please') }}", "refuses it .no system, please"),
        (UNMARKED.replace("<|im_start|>assistant\n{{ message.content }}<|im_end|>",
                          "<|im_start|>assistant\n{{ message.content | upper }}<|im_end|>"),
         "does not write a turn of the assistant as it is"),
        (UNMARKED.replace("<|im_end|>", ""), "not write a turn of the assistant as it is, with"),
        ("{% for message in messages %}{{ message.content if loop.last else '' }}#{% endfor %}"
         "{% if add_generation_prompt %}>{% endif %}", "otherwise once it has been said"),
        (MARKED.replace("{% generation %}", "{% if loop.last %}{% generation %}").replace(
            "{% endgeneration %}", "{% endgeneration %}{% endif %}"), "marks 1 turns of .* 2"),
    ],
)  # fmt: skip
def test_a_template_that_hides_the_assistant_is_refused(cfg, template, said):
    with pytest.raises(ConfigError, match=said) as error:
        sequences.sequences(pairs_of(TALKS), with_template(template), cfg)
    assert "data.chat_template=plain" in str(error.value) and "train/0" in str(error.value)


def test_a_special_token_in_a_message_is_refused(cfg, tokenizer):
    talk = [("user", "what is <|endoftext|>?"), ("assistant", "An end.")]
    with pytest.raises(ConfigError, match=r"a message holds '<.endoftext.>', a special token"):
        sequences.sequences(pairs_of([talk]), tokenizer, cfg)


def test_a_template_with_today_s_date_writes_one_date(cfg):
    dated = "{{ 'Today is ' + strftime_now('%d %b %Y') + '.' }}" + MARKED
    tokenizer = with_template(dated)
    (one,) = sequences.sequences(pairs_of(SHORT[:1]), tokenizer, cfg)
    assert tokenizer.decode(one.ids).startswith("Today is 26 Jul 2024.<|im_start|>user\nSay 0")


# --------------------------------------------------------------------------- what is predicted


def by_hand(model, tokenizer, talks, loss_on="assistant"):
    """Nats and predicted tokens of every conversation, by transformers' own loss and mask."""
    nats, counts = [], []
    for turns in talks:
        found = tokenizer.apply_chat_template(
            messages(turns), chat_template=chat.PLAIN, return_dict=True,
            return_assistant_tokens_mask=True,
        )  # fmt: skip
        ids, mask = torch.tensor([found["input_ids"]]), found["assistant_masks"]
        if loss_on == "completion":  # the last run of ones
            first = len(mask) - mask[::-1].index(0)
            mask = [0] * first + mask[first:]
        labels = ids.clone()
        labels[0, [i for i, m in enumerate(mask) if not m]] = -100
        if loss_on == "all":
            ids = torch.cat([torch.tensor([[tokenizer.eos_token_id]]), ids], 1)
            labels = ids.clone()
        count = int((labels[0, 1:] != -100).sum())
        nats.append(model(input_ids=ids, labels=labels).loss * count)
        counts.append(count)
    return nats, counts


@pytest.mark.parametrize("loss_on", ["assistant", "completion", "all"])
@pytest.mark.parametrize("packing", ["packed", "padded"])
def test_training_sees_the_loss_that_transformers_gives(cfg, tokenizer, loss_on, packing):
    model = AutoModelForCausalLM.from_pretrained(ASSETS_DIR / "gpt2_mini").eval()
    talks = [*TALKS, *SHORT]
    cfg = replace(cfg, loss_on=loss_on, packing=packing)
    table, counts = sequences.blocks(pairs_of(talks), tokenizer, cfg)
    whole = Dataset(pa.concat_tables(table)).with_format("numpy")
    data = token_data.Data(whole, {}, {}, True, "")
    order = data.by_length(list(range(data.num_blocks)))
    batches = [token_data.batch_of(data.blocks, order[i : i + 3]) for i in range(0, len(order), 3)]
    num_tokens = data.num_predicted(order)
    total = loop.accumulate(NextToken(model), batches, num_tokens, Accelerator(cpu=True))
    grads = {n: p.grad.clone() for n, p in model.named_parameters()}
    model.zero_grad()
    nats, expected = by_hand(model, tokenizer, talks, loss_on)
    (sum(nats) / sum(expected)).backward()
    assert num_tokens == sum(expected) and not counts
    assert total.item() == pytest.approx(sum(nats).item(), rel=1e-5)
    for name, p in model.named_parameters():
        torch.testing.assert_close(grads[name], p.grad, rtol=1e-3, atol=1e-5, msg=name)


@pytest.mark.parametrize("loss_on", ["assistant", "completion", "all"])
def test_evaluation_counts_the_turns_that_are_predicted(cfg, tokenizer, mini, loss_on):
    talks = [*TALKS, *SHORT]
    table = Dataset(sequences.evaluated(pairs_of(talks), tokenizer, replace(cfg, loss_on=loss_on)))
    assert ("scored" in table.column_names) == (loss_on == "assistant")
    with torch.no_grad():
        nats, counts = by_hand(mini, tokenizer, talks, loss_on)
    options = {"bos": None, "batch_tokens": 200}
    found, num = sliding_window.document_nll(
        NextToken(mini), table, context=96, stride=96, **options
    )
    np.testing.assert_allclose(found, [n.item() for n in nats], rtol=1e-5)
    assert num.tolist() == counts == subset.num_predicted(table).tolist()
    for stride in (7, 20):  # windows that are shorter than a conversation score each token once
        found, num = sliding_window.document_nll(
            NextToken(mini), table, context=20, stride=stride, **options
        )
        assert num.tolist() == counts and np.isfinite(found).all()
    words = {"assistant": 4 + 6, "completion": 6}
    if loss_on != "all":
        assert table["num_words"][0] == words[loss_on]


def test_a_window_of_a_conversation_sees_what_is_before_it(cfg, tokenizer, mini):
    """By a plain loop: windows of 20 that move by 7, of which the assistant's tokens count."""
    (one,) = sequences.sequences(pairs_of(TALKS[:1]), tokenizer, cfg)
    table = Dataset(sequences.evaluated(pairs_of(TALKS[:1]), tokenizer, cfg))
    found, _ = sliding_window.document_nll(
        NextToken(mini), table, context=20, stride=7, bos=None, batch_tokens=200
    )
    total, done = 0.0, 0
    while done < one.length:
        end = min(one.length, 20 if done == 0 else done + 7)
        start = max(0, end - 20)
        with torch.no_grad():
            logits = mini(torch.tensor([one.ids[start:end]])).logits[0].log_softmax(-1)
        for i in range(done, end):
            total -= one.predicted[i] * logits[i - start, one.ids[i + 1]].item()
        done = end
    assert found[0] == pytest.approx(total, rel=1e-5)


# --------------------------------------------------------------------------- too long


def test_what_is_longer_than_a_block_is_refused_cut_dropped_or_windowed(cfg, tokenizer):
    some = [*pairs_of(TALKS), *[replace(p, id=f"s{p.id}") for p in pairs_of(SHORT)]]
    whole = sequences.sequences(some, tokenizer, cfg)
    size = 40
    small = replace(cfg, context_length=size, packing="padded")
    with pytest.raises(ConfigError, match=r"as 12 of 24 are: .*too_long=cut, drop or window"):
        sequences.blocks(some, tokenizer, small)
    total = sum(one.num_predicted for one in whole)
    for choice in ("cut", "drop", "window"):
        coming, counts = sequences.blocks(some, tokenizer, replace(small, too_long=choice))
        table = pa.concat_tables(coming)
        kept = [
            row["inputs"][i + 1] if i + 1 < len(row["inputs"]) else t
            for row in table.to_pylist()
            for i, t in enumerate(row["targets"])
            if t != IGNORE
        ]
        expected = []
        for one in whole:
            upto = {"cut": size, "window": one.length, "drop": 0 if one.length > size else size}
            marks = one.predicted[: upto[choice]]
            expected += [t for t, p in zip(one.ids[1:], marks, strict=False) if p]
        assert sorted(kept) == sorted(expected)
        assert max(map(len, table["inputs"].to_pylist())) <= size
        assert counts == {
            "choice": choice, "sequences": 24, "longer": 12,
            "left_out": 12 if choice == "drop" else 0,
            "tokens": total, "tokens_left_out": total - len(expected),
        }  # fmt: skip
        assert (counts["tokens_left_out"] == 0) == (choice == "window")
    with pytest.raises(ConfigError, match="all 12 training sequences are longer"):
        sequences.blocks(some[:12], tokenizer, replace(small, too_long="drop"))
    cut = replace(small, context_length=8, too_long="cut")  # the prompts alone are longer
    with pytest.raises(ConfigError, match="none has a token left to predict"):
        sequences.blocks(some[:12], tokenizer, cut)


def test_what_is_too_long_is_counted_and_found_again(cfg, tokenizer):
    asked = replace(cfg, context_length=40, too_long="cut")
    for tokenized in (True, False):
        text = token_data.prepare(asked, tokenizer)
        assert text.tokenized is tokenized
        longer = text.facts["too_long"]
        assert longer["train"]["choice"] == "cut" and longer["train"]["tokens_left_out"] > 0
        assert longer["test"] == {"choice": "window", "sequences": 2, "longer": 2}
        assert text.facts["rule"]["record_form"] == "messages"
        assert text.facts["rule"]["loss_on"] == "the assistant's turns with the end of each"
        assert text.facts["rule"]["chat_template"].startswith("plain")
    whole = sum(token_data.prepare(cfg, tokenizer).held_out["test"]["skipped"])
    assert sum(text.held_out["test"]["skipped"]) == whole  # held-out text is not cut


def test_another_template_makes_other_tokens(cfg):
    marked = token_data.prepare(cfg, with_template(MARKED))
    tokenizer = with_template(MARKED.replace("assistant\n", "helper\n"))
    other = token_data.prepare(cfg, tokenizer)
    assert other.tokenized and other.tokenizer == marked.tokenizer
    assert "helper" in tokenizer.decode(other.blocks[0]["inputs"])
    assert not token_data.prepare(cfg, tokenizer).tokenized


def test_turns_that_are_in_training_too_are_found(tokenizer):
    """Each turn by itself, without its end."""
    cfg = DataConfig("", "pairs", context_length=96)
    table = sequences.evaluated(pairs_of(TALKS[:1]), tokenizer, cfg)
    said = [tokenizer(f" {t}")["input_ids"] for t in (TALKS[0][2][1], TALKS[0][4][1])]

    class Table:
        column_names = table.column_names

    old = overlap.token_tables.batches
    overlap.token_tables.batches = lambda _: table.to_batches()
    try:
        found = [ids.tolist() for _, ids in overlap._spans(Table)]
    finally:
        overlap.token_tables.batches = old
    assert found == said


# --------------------------------------------------------------------------- generation


def test_generation_stops_where_the_template_ends_a_turn(mini):
    tokenizer = with_template(MARKED)
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert sequences.stops(pairs_of(SHORT), tokenizer) == (tokenizer.eos_token_id, end)
    assert sequences.stops(pairs_of(SHORT), tokenizer, "plain") == (tokenizer.eos_token_id,)
    assert sequences.stops([pairs.Pair("", "a", ["b"])], tokenizer) == (tokenizer.eos_token_id,)
    model = AutoModelForCausalLM.from_pretrained(ASSETS_DIR / "gpt2_mini").eval()
    model.resize_token_embeddings(len(tokenizer))
    with torch.no_grad():  # a model that says <|im_end|> at once, whatever it is asked
        model.transformer.ln_f.weight.zero_()
        model.transformer.ln_f.bias.copy_(direction := torch.randn(256))
        model.lm_head.weight[end] = 10 * direction
    asked = GenerateConfig(num_beams=1, max_new_tokens=5, no_repeat_ngram=0)
    found = generation.complete(model, tokenizer, pairs_of(SHORT[:3]), asked, Accelerator(cpu=True))
    assert found.texts == [""] * 3 and found.num_tokens == 3


@pytest.mark.slow
def test_a_run_on_conversations_from_start_to_end(harness, tmp_path, cfg):
    asked = [
        "method=lora", "method.r=2", "data=pairs", f"data.path={cfg.path}",
        "data.context_length=96",
        "data.validation_share=0.2", "data.test_share=0.2", "train.steps=2", "evaluate.interval=2",
        "train.batch_tokens=384", "train.micro_batch=2", "evaluate=generate", "run_name=one",
        "evaluate.generate.num_beams=1", "evaluate.generate.max_new_tokens=4",
    ]  # fmt: skip
    done = harness("run", *asked)
    assert done.returncode == 0, done.stderr
    (folder,) = tmp_path.glob("outputs/*/one")
    record = json.loads((folder / "result.json").read_text())
    rule = record["data"]["rule"]
    assert rule["record_form"] == "messages" and rule["chat_template"].startswith("plain")
    assert "'record_form': 'messages'" in (folder / "log.txt").read_text()
    assert record["saved_check"]["failure"] is None
    lines = [json.loads(line) for line in (folder / "generations.jsonl").read_text().splitlines()]
    assert len(lines) == 2 and lines[0]["prompt"].startswith("system: Answer in a word.\nuser: ")
    said = harness("generate", str(folder), "--prompt", "Say 3", "--max-new-tokens", "4")
    assert said.returncode == 0, said.stderr


@pytest.mark.parametrize(
    ("key", "said"),
    [
        ("record_form=chat", "data.record_form=.chat.: choose one of: auto, instruction, messages"),
        ("loss_on=assistent", "did you mean 'assistant'"),
        ("too_long=truncate", "data.too_long=.truncate.: choose one of"),
        ("chat_template=own", "data.chat_template=.own.: choose one of: auto, plain"),
    ],
)
def test_a_choice_that_is_none_is_named(make_run, cfg, key, said):
    with pytest.raises(ConfigError, match=said):
        make_run("data=pairs", f"data.path={cfg.path}", "data.context_length=96", f"data.{key}")


def test_a_choice_about_conversations_is_none_about_other_text(make_run):
    for key in ("record_form=pair", "loss_on=all", "too_long=cut", "chat_template=plain"):
        with pytest.raises(ConfigError, match="expected data=pairs, and this is data=kjv"):
            make_run("data=kjv", f"data.{key}")


def test_a_bad_record_is_a_line_and_exit_status_2(harness, tmp_path):
    bad = [GOOD, json.dumps({"messages": messages([("user", "x"), ("robot", "y")])})]
    (tmp_path / "bad.jsonl").write_text("\n".join(bad) + "\n")
    done = harness("run", "data=pairs", "data.path=bad.jsonl")
    assert done.returncode == 2 and not (tmp_path / "outputs").exists()
    said = "error: bad.jsonl, line 2, message 2: the role 'robot' is not known"
    assert done.stderr.startswith(said) and done.stderr.count("\n") == 1
    assert "Traceback" not in done.stdout + done.stderr
