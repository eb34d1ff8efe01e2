"""What is predicted from fake tensors against what a real step of the same run takes."""

import dataclasses
import itertools
import json

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from measured_step import UDV, measured

from harness import compose
from harness import plan as harness_plan
from harness.commands import plan
from harness.config.errors import ConfigError
from harness.config.optimizers import OPTIMIZERS
from harness.data import documents
from harness.models import pretrained
from harness.results import run_record
from harness.runs import composition, estimate, evaluation_batches, predictions
from harness.training import memory

TINY = [
    "model=gpt2_mini_init", "model.architecture.n_embd=64", "model.architecture.n_layer=3",
    "model.architecture.vocab_size=1000", "model.architecture.n_positions=64",
    "data.context_length=32", "train.batch_tokens=256", "train.micro_batch=4",
    "evaluate.context_length=32",
]  # fmt: skip
MINI = ["data.context_length=64", "train.batch_tokens=512", "evaluate.batch_tokens=512"]
WIDE = [
    "model.architecture.n_embd=768", "model.architecture.n_head=12", "model.architecture.n_layer=2",
    "model.architecture.vocab_size=50257", "train.batch_tokens=128",
]  # fmt: skip
followed = estimate._followed
# methods x targets x batch x length x precision x checkpointing x accumulation
CONFIGURATIONS = [
    [*TINY, "method=full"],
    [*TINY, "method=full", "train.checkpointing=true"],
    [*TINY, "method=full", "train.precision=bf16"],
    [*TINY, "method=full", "train.micro_batch=8"],
    [*TINY, "method=full", "train.micro_batch=1"],
    [*TINY, "method=full", "train.label_smoothing=0.1", "train.max_grad_norm=null"],
    [*TINY, "method=lora"],
    [*TINY, "method=lora", "targets=c_attn", "method.r=64"],
    [*TINY, "method=lora", "targets=mlp", "data.context_length=64"],
    [*TINY, "method=lora", "targets=qv"],
    [*TINY, "method=lora", "train.checkpointing=true"],
    [*TINY, "method=lora", "train.precision=bf16"],
    [*TINY, "method=lora", "train.precision=bf16", "model.frozen_dtype=bf16"],
    [*TINY, "method=lora", "method.dropout=0.1", "model.dropout=0.1"],
    [*TINY, "method=lora", "method.bias=all"],
    [*TINY, "method=lora", "model.gelu=as_saved", "train.micro_batch=8"],
    [*TINY, "method=lora", "method.use_dora=true"],
    [*TINY, *UDV],
    [*TINY, *UDV, "method.residual=keep", "train.checkpointing=true"],
    [*TINY, *UDV, "method.train=udv", "method.orthogonality=0.1"],
    [*TINY, *UDV, "method.train=udv", "train.precision=bf16", "model.frozen_dtype=bf16"],
    [*TINY, "method=udv", "method.rank=full"],
    [*TINY, "method=peft", "method.peft_type=IA3"],
    [*TINY, "method=peft", "method.peft_type=PREFIX_TUNING", "+method.fields.num_virtual_tokens=4"],
    [*TINY, "method=mica", "method.r=4"],
    [*TINY, "method=adalora", "method.target_r=4", "train.steps=20"],
    [*TINY, "method=lora", "method.r=4", "method.rank_pattern={h.0.attn.c_attn: 8}"],
    [*TINY, "method=truncate", "method.rank=8"],
    *(
        pytest.param(
            [*TINY, "method=lora", f"optimizer={name}", "train.lr=0.01"],
            marks=[] if name in ("lora_plus", "schedule_free") else pytest.mark.slow,
        )
        for name in OPTIMIZERS
        if name != "adamw_8bit"
    ),
    *([*TINY, "method=full", f"optimizer={name}", "train.lr=0.01"] for name in ("sgd", "muon")),
    [*TINY, "method=lora", "data=e2e_nlg", "data.context_length=32"],
    [*TINY, "method=lora", "data=e2e_nlg", "data.context_length=32", "data.packing=padded"],
    [*MINI, "method=none"],
    [*MINI, "method=lora", "targets=attn", "train.micro_batch=4"],
    [*MINI, "method=full"],
    # GPT-2's own width, heads and vocabulary, where a chunk of logits is the largest tensor.
    [*TINY, *WIDE, "method=lora", "targets=c_attn"],
    [*TINY, *WIDE, "method=full"],
]


def accelerator(run):
    AcceleratorState._reset_state(reset_partial_state=True)
    return Accelerator(
        mixed_precision={"fp32": "no", "bf16": "bf16"}[run.train.precision], cpu=True
    )


@pytest.mark.parametrize("overrides", CONFIGURATIONS, ids=lambda o: " ".join(o[-3:]))
def test_the_predicted_peak_is_the_measured_one(make_run, overrides):
    run = make_run(*overrides)
    config = pretrained.load_config(run.model)
    found = estimate.predict(run, config, accelerator(run))
    expected, evaluated = measured(run, config, accelerator(run))
    assert found.evaluate["peak_bytes"] == pytest.approx(evaluated["peak_bytes"], rel=0.05)
    main = found.train or found.evaluate
    assert main["peak_bytes"] == pytest.approx(expected["peak_bytes"], rel=0.05)
    for name in ("frozen_weights", "trainable_weights", "optimizer_state"):
        assert main["by_category"][name] == expected["by_category"][name], name


@pytest.mark.parametrize("evaluated", [None, (3, 9)], ids=["long", "short"])
@pytest.mark.parametrize("steps", [1, 2])
@pytest.mark.parametrize("method", [["method=full"], ["method=lora"], [*UDV, "method.train=udv"]])
def test_the_first_step_and_a_short_text_need_less(make_run, method, steps, evaluated):
    run = make_run(*TINY, *method, f"train.steps={steps}", "evaluate.batch_tokens=2048")
    config = pretrained.load_config(run.model)
    found = estimate.predict(run, config, accelerator(run), evaluated)
    expected, on_evaluation = measured(run, config, accelerator(run), evaluated)
    assert found.peak_bytes == pytest.approx(expected["peak_bytes"], rel=0.05)
    assert found.evaluate["peak_bytes"] == pytest.approx(on_evaluation["peak_bytes"], rel=0.05)
    for name in memory.CATEGORIES[:4]:
        main = found.train or found.evaluate
        assert main["by_category"][name] == expected["by_category"][name], name


def notes(path, documents, words):
    """A file of `documents`, one a line."""
    line = [
        "river",
        "stone",
        "light",
        "morning",
        "people",
        "walked",
        "slowly",
        "old",
        "house",
        "bread",
    ]
    texts = [
        " ".join([f"Note {i}.", *(line[(i * j) % 10] for j in range(words))])
        for i in range(documents)
    ]
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return str(path)


def test_an_evaluation_batch_is_no_larger_than_the_text(make_run, tmp_path, tokenizer):
    """Two documents a split: what `datasets` and the tokenizer say of them is the batch."""
    path = notes(tmp_path / "short.jsonl", 40, 30)
    run = make_run("data=text_files", f"data.path={path}", "data.context_length=32",
                   "evaluate.stride=16",
                   "train.batch_tokens=256")  # fmt: skip
    config = pretrained.load_config(run.model)
    sizes = [
        [len(tokenizer(text)["input_ids"]) for _, text in documents.read(run.data)[split]]
        for split in ("validation", "test")
    ]
    windows = max(sum(1 + -(-max(0, n - 32) // 16) for n in split) for split in sizes)
    assert evaluation_batches.largest_batch(run, config) == (windows, 32)
    full = evaluation_batches.full_batch(run, config)
    assert full[0] > windows
    # Two thousand words are longer than any batch, and so is what is not here to be read.
    long = notes(tmp_path / "long.jsonl", 20, 20_000)
    for other in (["data=text_files", f"data.path={long}"], ["data=wikitext2"]):
        more = make_run(*other, "data.context_length=32", "train.batch_tokens=256")
        assert evaluation_batches.largest_batch(more, config) == full
    # Without the tokenizer a byte is a token, which is an upper bound.
    bare = dataclasses.replace(run, model=dataclasses.replace(run.model, asset=None, id="far/away"))
    assert windows < evaluation_batches.largest_batch(bare, config)[0] <= full[0]
    assert (
        evaluation_batches.largest_batch(
            make_run("evaluate.protocol=hf_guide", "data=wikitext2"), config
        )[1]
        == 256
    )


@pytest.mark.slow
@pytest.mark.parametrize("documents", [(30, 60), (200, 600)], ids=["short", "long"])
@pytest.mark.parametrize(
    ("method", "steps"),
    [("none", 0), *itertools.product(["full", "lora", "udv"], [1, 2, 80])],
)
def test_a_runs_prediction_is_what_it_took(finished_run, tmp_path, method, documents, steps):
    path = notes(tmp_path / "notes.jsonl", *documents)
    run_dir = finished_run(
        f"method={method}", "data=text_files", f"data.path={path}", f"train.steps={steps}",
        "data.validation_share=0.05", "data.test_share=0.05", "train.micro_batch=4",
        "data.document_chars=null",
    )  # fmt: skip
    record = run_record.read(run_dir)
    found, took = record["predicted"], record["memory"]
    assert found["peak_bytes"] == pytest.approx(took["peak_bytes"], rel=0.05)
    on_evaluation = took["evaluate"]["peak_bytes"]
    assert found["evaluate_peak_bytes"] == pytest.approx(on_evaluation, rel=0.05)
    planned = harness_plan(composition.load(run_dir / "config.yaml"))
    assert planned.peak_bytes == pytest.approx(took["peak_bytes"], rel=0.05)
    assert planned.evaluate["peak_bytes"] == pytest.approx(on_evaluation, rel=0.05)


def test_what_was_halved_is_predicted_as_it_was_done(make_run, tmp_path):
    """The recorded prediction is of the micro-batch that fitted, and of the steps taken."""
    cache = f"data.cache_dir={tmp_path / 'cache'}"
    asked, done, one = (
        make_run(*TINY, "method=full", cache, *more)
        for more in (["train.micro_batch=8"], ["train.micro_batch=4"], ["train.steps=1"])
    )
    config = pretrained.load_config(asked.model)
    peaks = {
        name: predictions.recorded(run, config, accelerator(run))["peak_bytes"]
        for name, run in (("asked", asked), ("done", done), ("one", one))
    }
    assert peaks["one"] < peaks["done"] < peaks["asked"]


def test_an_lstm_is_predicted_without_the_workspace_of_its_kernel(make_run):
    run = make_run(*MINI, "model=lstm", "method=full")
    config = pretrained.load_config(run.model)
    found = estimate.predict(run, config, accelerator(run))
    peak = measured(run, config, accelerator(run))[0]["peak_bytes"]
    assert 0.8 * peak < found.train["peak_bytes"] < peak


@pytest.mark.parametrize(
    ("device", "capability", "expected"),
    [("cpu", None, 0), ("cuda", (9, 0), 64 * 2**20), ("cuda", (8, 0), 2 * 8_519_680)],
)
def test_a_gpus_library_keeps_two_workspaces(monkeypatch, device, capability, expected):
    """8,519,680 bytes is what torch's notes on CUBLAS_WORKSPACE_CONFIG=:4096:2:16:8 come to."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: capability)
    assert estimate.library_bytes(torch.device(device)) == expected


def test_flops_are_the_closed_form(make_run):
    # 2 FLOPs a weight and token forward, 4 backward where it trains, 2 where only its input's
    # gradient is needed; attention 4 T d forward (scores, then values) and 2.5 times that backward.
    full, lora = (
        estimate.predict(run, pretrained.load_config(run.model), accelerator(run))
        for run in (make_run(*TINY, f"method={name}") for name in ("full", "none"))
    )
    d, layers, vocabulary, context = 64, 3, 1000, 32
    matrices = 12 * d * d * layers + d * vocabulary
    attention = 4 * context * d * layers
    assert full.train_flops_per_token == 6 * matrices + 3.5 * attention
    assert (
        full.evaluate_flops_per_token == lora.evaluate_flops_per_token == (2 * matrices + attention)
    )
    assert lora.train_flops_per_token == 0 and not lora.train


def test_flops_of_lora_are_the_closed_form(make_run):
    # A frozen matrix costs 2 FLOPs a weight and token forward and 2 for its input's gradient, of
    # which the first c_attn needs none: nothing before it trains. A and B cost 6 each.
    r, d, layers, vocabulary, context = 8, 64, 3, 1000, 32
    run = make_run(*TINY, "method=lora", f"method.r={r}", "targets=c_attn")
    found = estimate.predict(run, pretrained.load_config(run.model), accelerator(run))
    matrices = 12 * d * d * layers + d * vocabulary
    adapter = r * (d + 3 * d) * layers
    attention = 3.5 * 4 * context * d * layers
    first = 2 * (3 * d * d) + 2 * r * d  # of W and of A in the first layer
    assert found.train_flops_per_token == 4 * matrices + 6 * adapter + attention - first


def test_a_sweep_over_seeds_and_rates_asks_for_one_prediction(make_run, tmp_path, monkeypatch):
    made = []
    monkeypatch.setattr(estimate, "_followed", lambda *a: made.append(a) or followed(*a))
    one, same, other = (
        make_run(*TINY, "method=lora", f"data.cache_dir={tmp_path / 'cache'}", *more)
        for more in (["seed=0"], ["seed=1", "train.lr=0.5", "train.steps=7"], ["method.r=3"])
    )
    config = pretrained.load_config(one.model)
    first = predictions.recorded(one, config, accelerator(one))
    assert first == predictions.recorded(same, config, accelerator(same)) and len(made) == 1
    assert first != predictions.recorded(other, config, accelerator(other)) and len(made) == 2


def test_what_looks_at_values_leaves_the_rest_of_the_table(capsys):
    assert plan.main(["method=peft", "method.peft_type=WAVEFT,IA3"]) == 0
    table = [line for line in capsys.readouterr().out.splitlines() if "-s0-" in line]
    rows = {line.split("-")[0].strip(): line for line in table}
    assert "only a run can tell" in rows["waveft"] and "only a run" not in rows["ia3"]


def test_only_the_weights_can_tell_a_rank_by_energy(make_run):
    run = make_run(*TINY, "method=udv", "method.energy=0.9")
    assert estimate.predict(run, pretrained.load_config(run.model), accelerator(run)) is None


@pytest.mark.parametrize(
    ("text", "size"),
    [("8GiB", 8 * 2**30), ("500MB", 5 * 10**8), ("1.5e9", 1.5e9), ("64 KiB", 65536), ("7B", 7)],
)
def test_sizes(text, size):
    assert plan.parse_bytes(text) == size


@pytest.mark.parametrize("text", ["8 gigs", "", "-1GiB", "GiB", "1.2.3GiB", "."])
def test_what_is_no_size_is_refused(text):
    with pytest.raises(ConfigError, match=r"plan\.limit=.*8GiB"):
        plan.parse_bytes(text)


@pytest.mark.slow
def test_a_sweep_of_hub_sizes_without_weights_or_network(harness):
    done = harness(
        "model=gpt2,gpt2_medium", "method=lora", "plan.limit=3GiB", module="harness.plan"
    )
    assert done.returncode == 1, done.stderr  # GPT-2 medium does not fit
    assert "the marked runs do not fit into plan.limit=3GiB" in done.stdout
    rows = [line for line in done.stdout.splitlines() if line.lstrip().startswith("lora-")]
    assert len(rows) == 2 and "does not fit" in rows[1] and "does not fit" not in rows[0]
    # 16 r d L on all four matrices
    assert "1,179,648" in rows[0] and "3,145,728" in rows[1]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["plan.limt=8GiB"], "did you mean 'plan.limit'"),
        (["method=lora", "method.r=8,9999"], "method.r=9999"),
        (["data.context_length=512", "train.batch_tokens=4096"], "longer than gpt2_mini's 256"),
        (["method=lroa"], "did you mean 'lora'"),
        (["plan.limit=8"], "plan.limit=8: 8 of what? Expected a size, e.g. 8GiB"),
        (["plan.limit"], "plan.limit: did you mean 'plan.limit' (plan.limit=SIZE"),
        (["method=lora", "train.lr=1e-3,-1"], "train.lr=-1"),
        (["model.frozen_dtype=bf16", "train.precision=auto"], "set train.precision=bf16"),
    ],
)
def test_mistakes_are_answered_in_a_line(capsys, arguments, message):
    assert plan.main(arguments) == 2
    told = capsys.readouterr().err
    assert message in told and told.count("\n") == 1


def test_runs_are_called_as_they_will_be(capsys):
    asked = ["method=none,lora"]
    assert plan.main(asked) == 0
    shown = {line.split()[0] for line in capsys.readouterr().out.splitlines() if line.strip()}
    assert {run.run_dir.name for run in compose(*asked)} <= shown


@pytest.mark.slow
def test_a_plan_is_of_every_seed_of_a_sweep():
    runs = compose("experiment=main_seeds")
    trained = [run for run in runs if run.method.name not in ("none", "truncate")]
    assert len(runs) == 3 + len(trained) and len(trained) == 3 * 13
    assert {run.seed for run in trained} == {0, 1, 2}
    assert {run.train.lr_from for run in trained} == {"tuned"}
