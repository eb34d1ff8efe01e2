"""Continuations side by side: transformers' own generate, prompts cut and bad input."""

import io
import logging
import re

import pytest
import torch
from accelerate import Accelerator
from peft import PeftModel
from rich.console import Console
from trained_kinds import FULL, LORA, NONE, PROMPTS, QV, TRUNCATE, UDV
from transformers import AutoModelForCausalLM

from harness.artifacts import sample
from harness.artifacts.sample import Decoding
from harness.config.errors import ConfigError
from harness.config.paths import ASSETS_DIR
from harness.config.schema import GenerateConfig
from harness.data.pairs import Pair
from harness.evaluation import generation
from harness.runs import finished_run as saved

PROMPT = "And the LORD said unto"
GREEDY = Decoding(max_new_tokens=12, temperature=None)


def shown(run, decoding, *prompts, width=100):
    console = Console(file=io.StringIO(), width=width)
    sample.side_by_side(run, decoding, iter(prompts), console)
    return console.file.getvalue()


def columns(output):
    """Texts of the cells of every table's rows, lines joined."""
    tables, rows = [], []
    for line in output.splitlines():
        if line.startswith("│"):
            rows.append([cell.strip() for cell in line.strip("│").split("│")])
        elif line.startswith("╰"):
            tables.append(["".join(cells) for cells in zip(*rows, strict=True)])
            rows = []
    return tables


def squeeze(text):
    return re.sub(r"\s", "", text)


def plain_continuation(model, tokenizer, prompt, **options):
    ids = tokenizer(prompt, return_tensors="pt")["input_ids"]
    with torch.no_grad():
        written = model.generate(
            input_ids=ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=12,
            pad_token_id=tokenizer.eos_token_id, use_cache=False, **options,
        )  # fmt: skip
    return tokenizer.decode(written[0, ids.shape[1] :], skip_special_tokens=True)


@pytest.mark.parametrize("overrides", [LORA, QV, FULL, UDV, TRUNCATE, PROMPTS, NONE])
def test_both_columns_are_what_transformers_writes(finished_run, overrides):
    run = saved.load(finished_run(*overrides))
    output = shown(run, GREEDY, PROMPT)
    (cells,) = columns(output)
    base = AutoModelForCausalLM.from_pretrained(ASSETS_DIR / "gpt2_mini", dtype="float32")
    expected = [plain_continuation(base, run.tokenizer, PROMPT)]
    if overrides in (LORA, PROMPTS):
        adapted = PeftModel.from_pretrained(base, run.run_dir / "adapter").eval()
        expected.append(plain_continuation(adapted, run.tokenizer, PROMPT))
    elif overrides is not NONE:  # the worker has left a whole model of these, but of udv
        whole = run.run_dir / "model"
        adapted = run.model() if overrides is UDV else AutoModelForCausalLM.from_pretrained(whole)
        expected.append(plain_continuation(adapted, run.tokenizer, PROMPT))
    assert len(cells) == len(expected) == (1 if overrides is NONE else 2)
    for cell, text in zip(cells, expected, strict=True):
        assert squeeze(cell).endswith(squeeze(text))
    assert PROMPT in output and "greedy, at most 12 new tokens" in output
    assert ("adapted" in cells[-1]) == (overrides is not NONE)


def test_beams_are_transformers_own(finished_run):
    run = saved.load(finished_run(*NONE))
    base = AutoModelForCausalLM.from_pretrained(ASSETS_DIR / "gpt2_mini", dtype="float32")
    expected = plain_continuation(base, run.tokenizer, PROMPT, num_beams=3)
    ids = run.tokenizer(PROMPT)["input_ids"]
    three = Decoding(12, None, num_beams=3)
    assert sample.continuation(run.base(), run.tokenizer, ids, three) == expected


def test_a_seed_gives_the_same_draws_to_every_prompt_and_model(finished_run):
    run = saved.load(finished_run(*NONE))
    first, second = columns(shown(run, Decoding(12, 1.0), PROMPT, PROMPT))
    assert first == second
    other = columns(shown(run, Decoding(12, 1.0, seed=1), PROMPT))
    assert other != [first]


@pytest.mark.parametrize(("overrides", "limit"), [(NONE, 256), (PROMPTS, 252)])
def test_a_long_prompt_loses_its_beginning(finished_run, overrides, limit):
    run = saved.load(finished_run(*overrides))
    room = sample.room_for_prompt(run, GREEDY)
    assert room == limit - 12
    ids = run.tokenizer(PROMPT * 80)["input_ids"]
    kept, dropped = sample.prompt_tokens(run, PROMPT * 80, room)
    assert kept == ids[-room:] and dropped == len(ids) - room > 0
    output = shown(run, GREEDY, PROMPT * 80)
    assert f"{dropped} of {len(ids)} tokens of the prompt are left out" in output
    with pytest.raises(ConfigError, match=f"--max-new-tokens={limit}.*at most {limit - 1}"):
        shown(run, Decoding(max_new_tokens=limit), PROMPT)


def test_an_empty_prompt_begins_a_document_and_none_is_refused(finished_run):
    run = saved.load(finished_run(*NONE))
    assert sample.prompt_tokens(run, "", 10) == ([run.tokenizer.eos_token_id], 0)
    with pytest.raises(ConfigError, match="no prompt"):
        shown(run, GREEDY)
    assert list(sample.lines(io.StringIO("one\n\n two\r\n"))) == ["one", " two"]


def test_a_task_is_asked_as_it_was_trained(finished_run, task):
    """As `evaluate=generate` completes the prompt, but for its guard against repetitions."""
    run = saved.load(finished_run(*task))
    prompt = "name : Place 7 | Type : pub"
    ids, _ = sample.prompt_tokens(run, " name[Place 7], eatType[pub]", None)
    assert ids == [*run.tokenizer(prompt)["input_ids"], run.tokenizer.eos_token_id]
    pair = Pair("test/0", prompt, ["Place 7 is a pub ."])
    asked = GenerateConfig(num_beams=1, no_repeat_ngram=0, max_new_tokens=12)
    expected = generation.complete(run.model(), run.tokenizer, [pair], asked, Accelerator(cpu=True))
    written = sample.continuation(run.model(), run.tokenizer, ids, GREEDY)
    assert [written.strip()] == expected.texts
    assert squeeze(written) in squeeze("".join(columns(shown(run, GREEDY, prompt))[0]))


def test_the_terminal_gets_no_control_sequences():
    assert sample._text("a\x1b[31mb\nc").plain == "a\ufffd[31mb\nc"


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--temperature", "0"], "--temperature=0.0: expected a number above 0"),
        (["--max-new-tokens", "0"], "--max-new-tokens=0: expected 1 or more"),
        (["--num-beams", "0"], "--num-beams=0"),
        (["--seed", "-1"], "--seed=-1"),
    ],
)
def test_numbers_out_of_range_are_named(arguments, said):
    with pytest.raises(ConfigError, match=re.escape(said)):
        sample.decoding_of(sample.arguments_of(["run", *arguments]))


def test_the_command_line(finished_run, harness, monkeypatch, capsys):
    run_dir = finished_run(*LORA)
    asked = (str(run_dir), "--prompt", PROMPT, "--prompt", "In the", "--max-new-tokens", "5")
    done = harness("generate", *asked)
    assert done.returncode == 0, done.stderr
    assert len(columns(done.stdout)) == 2 and not done.stderr
    assert "temperature 0.8, seed 0" in done.stdout
    monkeypatch.setattr(logging, "disable", lambda level: None)  # for the tests that follow
    assert sample.main([str(run_dir) + "x"]) == 2
    assert re.fullmatch(r"error: no folder .*\n", capsys.readouterr().err)
