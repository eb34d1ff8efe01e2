"""The base is measured as such where a method changes it before the first step."""

import json

import numpy as np
import pandas as pd
import pytest
import torch
from accelerate import Accelerator

from harness import methods
from harness.evaluation import base_model
from harness.models import pretrained
from harness.models.next_token import NextToken
from harness.results import run_record
from harness.runs import worker
from harness.runs.run_directory import prepare
from harness.training import evaluator

PROMPTS = ["method=peft", "method.peft_type=PREFIX_TUNING", "+method.fields.num_virtual_tokens=4"]
STARTS = {  # overrides, and whether the method starts as the base
    "lora": (["method=lora", "method.r=4"], True),
    "pissa": (["method=pissa", "method.r=4"], True),
    "udv_keep": (["method=udv", "method.rank=8", "method.residual=keep"], True),
    "ia3": (["method=peft", "method.peft_type=IA3"], True),
    "drawn": (["method=lora", "method.r=4", "method.init=false"], False),
    "drop": (["method=udv", "method.rank=8"], False),
    "truncate": (["method=truncate", "method.rank=8"], False),
    "prefix": (PROMPTS, False),
    "prompt": (["method=peft", "method.peft_type=PROMPT_TUNING", PROMPTS[2]], False),
}


@pytest.mark.parametrize("name", STARTS)
def test_a_start_that_is_not_the_base_is_found_and_the_base_given_back(name, tiny, make_run):
    overrides, same = STARTS[name]
    run = make_run("targets=c_attn", *overrides)
    ids = torch.arange(1, 25)[None]
    with torch.no_grad():
        exact = tiny(input_ids=ids).logits
    base = base_model.Base(tiny, run, 28)
    torch.manual_seed(1)
    bare = NextToken(methods.adapt(tiny, run))
    trained = [p.requires_grad for p in bare.parameters()]
    apart = base.apart(bare, bare, tiny.config, Accelerator(cpu=True))
    assert (apart is None) == same
    if apart is not None:
        nats = torch.nn.functional.cross_entropy(exact[0, :-1], ids[0, 1:], reduction="none")
        with apart() as predicts, torch.no_grad():
            found = predicts(ids[:, :-1], ids[:, 1:]).nats[0]
        torch.testing.assert_close(found, nats, rtol=1e-5, atol=1e-5)
        with torch.no_grad():
            again = bare(ids[:, :-1], ids[:, 1:]).nats[0]
        assert (again - nats).abs().max() > 0.01
    assert [p.requires_grad for p in bare.parameters()] == trained


def test_a_base_whose_weights_the_method_has_moved_is_loaded_again(make_run):
    run = make_run("method=lora", "method.r=4", "targets=c_attn")
    config = pretrained.load_config(run.model)
    model = pretrained.load_model(run, config)
    base = base_model.Base(model, run, None)
    bare = NextToken(methods.adapt(model, run))
    bare.model.get_base_model().transformer.wte.weight.data.mul_(0.5)
    apart = base.apart(bare, bare, config, Accelerator(cpu=True))
    state = torch.get_rng_state()
    with apart() as predicts:
        assert base.is_at(predicts) and not base.is_at(bare)
    assert torch.equal(state, torch.get_rng_state())


RUN = [
    "data=text_files", "data.context_length=24", "train.batch_tokens=192", "train.steps=1",
    "evaluate.interval=1", "data.validation_share=0.2", "data.test_share=0.2", "train.threads=1",
]  # fmt: skip


def finished(tmp_path, make_run, name, *overrides):
    for text in ("mine", "other"):
        folder = tmp_path / text
        folder.mkdir(exist_ok=True)
        for i in range(15):
            (folder / f"{i}.txt").write_text(f"{text} story {i} is about {'a fox ' * (i + 3)}.")
    also = f"{{other: {{source: text_files, path: '{tmp_path}/other/*.txt'}}}}"
    run = make_run(
        *RUN, f"data.path={tmp_path}/mine/*.txt", f"evaluate.also={also}", f"run_name={name}",
        f"outputs_dir={tmp_path}/out", f"data.cache_dir={tmp_path}/cache", *overrides,
    )  # fmt: skip
    run.run_dir.mkdir(parents=True)
    prepare(run, "test")
    assert worker.main(run.run_dir, quiet=True) == 0
    return run.run_dir, json.loads((run.run_dir / "result.json").read_text())["quality"]


def test_what_is_forgotten_is_counted_from_the_base(tmp_path, make_run):
    """The figures before of a run that starts elsewhere are those of `method=none`."""
    base_dir, base = finished(tmp_path, make_run, "base", "method=none")
    run_dir, drawn = finished(
        tmp_path, make_run, "drawn", "method=lora", "method.init=false", "targets=c_attn"
    )
    name = run_record.documents_name("other", "before")
    tables = [pd.read_parquet(folder / name) for folder in (base_dir, run_dir)]
    np.testing.assert_allclose(tables[1]["nll_nats"], tables[0]["nll_nats"], rtol=1e-5)
    nats = {
        "base": base["step0"]["validation"]["nll_nats"],
        "drawn": drawn["base"]["validation"]["nll_nats"],
    }
    assert nats["drawn"] == pytest.approx(nats["base"], rel=1e-5)
    assert base["base"] == base["step0"]  # and without a further evaluation
    start = drawn["step0"]["validation"]["nll_nats"]
    assert start > nats["base"] * 1.001
    also = drawn["also"]["other"]
    assert also["step0"]["nll_nats"] > also["before"]["nll_nats"] * 1.001
    assert "step0" not in base["also"]["other"]


def test_a_method_that_starts_as_nothing_costs_no_further_evaluation(
    tmp_path, make_run, monkeypatch
):
    read = []
    nats = evaluator.Evaluator.nats

    def counted(self, name, *arguments, **named):
        read.append(name)
        return nats(self, name, *arguments, **named)

    monkeypatch.setattr(evaluator.Evaluator, "nats", counted)
    finished(tmp_path, make_run, "lora", "method=lora", "targets=c_attn")
    assert sorted(read) == ["other", "other", "test", "validation", "validation"]
