"""What a run saves at its end: asked for before training, and never at the price of its result."""

import copy
import json
import re

import peft
import pytest
import torch
from datasets import Dataset
from peft import PeftModel, get_peft_model

from harness.config.errors import ConfigError
from harness.config.schema import DataConfig
from harness.data.token_data import Data
from harness.methods import adapt, invocation, merging
from harness.results import run_record, schema
from harness.runs import failures, predictions, run_directory, worker
from harness.training import checkpoint

IDS = torch.arange(24).reshape(2, 12)


def logits(model):
    with torch.no_grad():
        return model.eval()(input_ids=IDS).logits


def test_a_random_pissa_start_is_saved_as_a_plain_lora(tiny, make_run, tokenizer, tmp_path):
    base = copy.deepcopy(tiny)
    torch.manual_seed(0)
    run = make_run("method=lora", "method.r=3", "method.init=pissa_niter_4", "targets=all")
    model = adapt(tiny, run)
    checkpoint.keep_initial(model, tmp_path)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * 0.05)
    expected = logits(model)
    assert (expected - logits(base)).abs().max() > 0.1
    assert checkpoint.export(model, tokenizer, tmp_path, merged=False) == ["adapter"]
    assert [path.name for path in tmp_path.iterdir()] == ["adapter"]

    torch.manual_seed(5)  # another process draws other numbers
    loaded = PeftModel.from_pretrained(base, str(tmp_path / "adapter"))
    assert loaded.peft_config["default"].init_lora_weights is True
    assert loaded.peft_config["default"].r == 6
    torch.testing.assert_close(logits(loaded), expected, rtol=1e-4, atol=1e-4)
    with loaded.disable_adapter():
        torch.testing.assert_close(logits(loaded), logits(copy.deepcopy(base)))


def test_a_random_pissa_start_that_peft_cannot_convert_is_refused(tiny, tmp_path):
    config = peft.LoraConfig(
        r=2, init_lora_weights="pissa_niter_2", use_rslora=True, rank_pattern={"c_attn": 3},
        target_modules=["c_attn"], fan_in_fan_out=True,
    )  # fmt: skip
    with pytest.raises(ConfigError, match=r"pissa_niter_2.*rank_pattern"):
        checkpoint.keep_initial(get_peft_model(tiny, config), tmp_path)


MERGED = {
    "lora": (lambda: peft.LoraConfig(target_modules=["c_attn"], fan_in_fan_out=True), None),
    "alora": (
        lambda: peft.LoraConfig(
            target_modules=["c_attn"], fan_in_fan_out=True, alora_invocation_tokens=[1, 2],
            task_type="CAUSAL_LM",
        ),
        "LORA cannot be merged .*aLoRA",
    ),
    "lily": (lambda: peft.LilyConfig(target_modules=["lm_head"], r=2), "LILY cannot be merged"),
    "prompts": (
        lambda: peft.PromptTuningConfig(num_virtual_tokens=2, task_type="CAUSAL_LM"),
        "PROMPT_TUNING has nothing to merge",
    ),
}  # fmt: skip


@pytest.mark.parametrize("kind", MERGED)
def test_merging_is_tried_without_moving_anything(tiny, kind):
    make, expected = MERGED[kind]
    model = get_peft_model(tiny, make())
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    state = torch.get_rng_state()
    reason = merging.reason_unsupported(model)
    if expected is None:
        assert reason is None
    else:
        assert re.match(expected, reason)
    after = model.state_dict()
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
    assert torch.equal(torch.get_rng_state(), state)


def test_a_failure_after_the_test_is_a_note_and_a_full_disk_is_not(capsys):
    result = {"status": "failed"}
    with failures.kept_result(result, "the adapter could not be saved"):
        raise NotImplementedError("not supported")
    assert result["problems"] == [
        "the adapter could not be saved (NotImplementedError: not supported)"
    ]
    assert "warning: the adapter could not be saved" in capsys.readouterr().err
    with pytest.raises(OSError, match="disk"), failures.kept_result(result, "saving failed"):
        raise OSError(28, "No space left on device: disk")


FEW = ("data.validation_share=0.003", "data.test_share=0.003")


def test_what_fails_at_the_end_of_a_run_is_noted_and_the_test_stands(
    tmp_path, make_run, monkeypatch
):
    """Predicting and saving come last, with memory of their own."""

    def broken(*_, **__):
        raise MemoryError("no room")

    monkeypatch.setattr(predictions, "recorded", broken)
    monkeypatch.setattr(checkpoint, "export", broken)
    run = make_run(
        *SHORT, *FEW, "method=lora", "method.r=2", f"outputs_dir={tmp_path}", "run_name=x"
    )
    run.run_dir.mkdir(parents=True)
    run_directory.prepare(run, "test")
    assert worker.main(run.run_dir, quiet=True) == 0
    record = run_record.read(run.run_dir)
    assert record["status"] == "finished" and schema.problems(record) == []
    assert record["quality"]["test"]["num_tokens"] and record["predicted"] is None
    assert record["problems"] == [
        "memory and FLOPs could not be predicted (MemoryError: no room)",
        "what was trained could not be saved (MemoryError: no room)",
    ]


SHORT = (
    "train.steps=2", "evaluate.interval=2", "data.context_length=32", "train.batch_tokens=128",
    "train.micro_batch=2", "data.document_chars=300", "train.threads=1",
)  # fmt: skip


def pairs_file(path, word):
    rows = [{"prompt": f"{i} {word}", "completion": f"the word {i}"} for i in range(40)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


PROMPTS = {"first": 5, "tokens": [1, 2, 3, 4], "skipped": 2}  # 5 1 2 | 3 4
ONCE, NEVER, REST, TWICE = (
    PROMPTS,
    PROMPTS | {"tokens": [6, 7, 3, 4]},
    PROMPTS | {"tokens": [6, 7, 1, 2]},
    PROMPTS | {"tokens": [1, 2, 1, 2]},
)


@pytest.mark.parametrize(
    ("rows", "said", "refused"),
    [
        ([ONCE, ONCE], None, None),
        ([ONCE, NEVER], "evaluate.also.more: 1 of 2 rows do not hold", None),
        ([{"tokens": [3, 4, 5]}], "1 of 1 rows do not hold", None),
        ([ONCE, REST], None, "evaluate.also.more: 1 of 2 rows hold"),
        ([ONCE, TWICE], None, "1 of 2 rows hold"),
        ([{"tokens": [3, 1, 2]}], None, "1 of 1 rows hold"),
    ],
)
def test_further_texts_are_looked_through_for_aloras_tokens(tiny, rows, said, refused):
    model = get_peft_model(tiny, MERGED["alora"][0]())
    data = DataConfig("pairs", source="pairs", packing="padded")
    right = Dataset.from_list([ONCE]).with_format("numpy")
    inputs = {"inputs": [5, 1, 2, 3], "targets": [-100, -100, 3, 4]}
    blocks = Dataset.from_list([inputs]).with_format("numpy")
    text = Data(blocks, {"test": right}, {"test": 1}, False, "")
    further = {"more": Dataset.from_list(rows).with_format("numpy")}
    if refused:
        with pytest.raises(ConfigError, match=refused):
            invocation.check(model, data, text, further)
    else:
        found = invocation.check(model, data, text, further)
        assert len(found) == bool(said) and (not said or said in found[0])
    assert invocation.check(tiny, data, text, further) == []


@pytest.mark.slow
def test_alora_needs_its_tokens_and_is_never_merged_by_mistake(harness, tokenizer, tmp_path):
    pairs_file(tmp_path / "p.jsonl", "Answer now")
    tokens = tokenizer("Answer now", add_special_tokens=False)["input_ids"][1:]
    spelled = "+method.fields.alora_invocation_tokens=" + str(tokens).replace(" ", "")
    data = ("data=pairs", "data.path=p.jsonl", "data.packing=padded")
    common = ("method=lora", "targets=qv", spelled, *SHORT)

    refused = harness(*common)
    assert refused.returncode == 2 and "use data=pairs and data.packing=padded" in refused.stderr
    refused = harness(*common, *data, "save_merged=always", "run_name=always")
    assert refused.returncode == 2
    assert "save_merged=always: LORA cannot be merged" in refused.stderr
    also = "evaluate.also={more: {source: docstrings, packages: [tqdm], test_share: 0.1}}"
    kept = harness(*common, *data, also, "run_name=kept")
    assert kept.returncode == 0, kept.stderr
    assert "warning: evaluate.also.more: " in kept.stderr
    folder = tmp_path / "outputs" / "scratch" / "kept"
    assert (folder / "adapter").is_dir() and not (folder / "model").exists()

    pairs_file(tmp_path / "p.jsonl", "Something else")
    refused = harness(*common, *data, "run_name=other")
    assert refused.returncode == 2 and "prompts of the train split do not hold" in refused.stderr


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "field"),
    [("SHADOW", "auxiliary_loss_weight=0"), ("LILY", "r=4"), ("BEFT", "init_weights=true")],
)
def test_what_peft_cannot_merge_finishes_on_a_base_drawn_at_random(harness, tmp_path, name, field):
    """Where a whole model would be saved, if it could be merged."""
    base = (
        "model.asset=null", "model.tokenizer=gpt2_mini",
        "+model.architecture={model_type: llama, vocab_size: 4096, "
        "hidden_size: 32, num_hidden_layers: 2, num_attention_heads: 2, intermediate_size: 48, "
        "max_position_embeddings: 64}",
    )  # fmt: skip
    asked = (
        "method=peft",
        f"method.peft_type={name}",
        f"+method.fields.{field}",
        *base,
        *SHORT,
        *FEW,
    )
    done = harness(*asked, "run_name=x")
    assert done.returncode == 0, done.stderr
    folder = tmp_path / "outputs" / "scratch" / "x"
    record = run_record.read(folder)
    assert record["status"] == "finished" and record["saved"] == ["adapter"]
    assert record["saved_check"]["failure"] is None and not record.get("problems")
    assert f"no model/ will be saved: {name} cannot be merged" in (folder / "log.txt").read_text()
    refused = harness(*asked, "save_merged=always", "run_name=y")
    assert refused.returncode == 2 and f"{name} cannot be merged" in refused.stderr
    assert not (folder.parent / "y").exists()
