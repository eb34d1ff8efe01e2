"""Every optimizer of conf/optimizer against its library's own class in a plain loop.

The plain loop has the harness's loss (`tests/test_train.py` has it against transformers' own) and
nothing else of it, so that numbers are equal to the bit.
"""

import copy
import itertools

import pytest
import torch
from accelerate import Accelerator
from cut_runs import finish, outcome, start
from peft.optimizers import (
    create_lorafa_optimizer,
    create_loraplus_optimizer,
    create_riemannian_optimizer,
)
from schedulefree import AdamWScheduleFree
from synthetic_runs import edit, put

from harness.config import optimizers as schemas
from harness.config.errors import ConfigError
from harness.config.paths import options
from harness.config.schema import TrainConfig
from harness.data.token_data import batch_of, block_order
from harness.methods import adapt
from harness.models.next_token import NextToken
from harness.results import run_record
from harness.system.signals import Stop
from harness.training import checkpoint, loop, memory, optimizers
from harness.training.buffers import BufferState

BLOCKS, STEPS, LR = 10, 12, 1e-2
ALL = [  # optimizer, method, further keys
    ("adamw", "lora", ()),
    ("sgd", "full", ("train.weight_decay=0.1",)),
    ("lora_plus", "lora", ("optimizer.ratio=4",)),
    ("lora_fa", "lora", ("train.eps=1e-6",)),
    ("riemannian", "lora", ()),
    ("muon", "full", ("train.weight_decay=0.1",)),
    ("muon", "lora", ()),
    ("schedule_free", "lora", ()),
    pytest.param("adamw_8bit", "full", (), marks=pytest.mark.quantised),
]
IDS = [f"{one.values[0]}" if hasattr(one, "values") else f"{one[0]}-{one[1]}" for one in ALL]


def config(make_run, name, *overrides):
    return make_run(
        "data.context_length=16", "train.batch_tokens=64", "train.micro_batch=4",
        f"train.steps={STEPS}",
        "evaluate.interval=4", f"train.lr={LR}", "train.schedule=constant", "train.warmup=0",
        f"optimizer={name}", "method.r=4" if "method=lora" in overrides else "seed=0", *overrides,
    )  # fmt: skip


def adapted(tiny, run):
    torch.manual_seed(0)
    return adapt(copy.deepcopy(tiny), run)


def train(model, text, run, *, state=None, optimizer=None, validate=lambda: 1.0, save=None):
    """The harness's loop; the losses, and the optimizer."""
    rows = []
    optimizer = optimizer or optimizers.make_optimizer(model, run.train, run.optimizer)
    accelerator = Accelerator(cpu=True)
    optimizer = accelerator.prepare_optimizer(optimizer)
    state = state or loop.State(micro_batch=4)
    checkpoint = (lambda: save(state, optimizer)) if save else (lambda: None)
    hooks = loop.Hooks(validate, lambda: None, checkpoint, rows.append)
    training = loop.Training(NextToken(model), text, run, accelerator, optimizer)
    loop.train(training, state, hooks, Stop())
    return [row["train/nll"] for row in rows if "train/nll" in row], optimizer


def plain_loop(model, text, run, made, before_step=lambda step: None):
    """Losses of the optimizers `made`, stepped by hand."""
    prepared, losses = NextToken(model), []
    prepared.train()
    trains = [p for p in model.parameters() if p.requires_grad]
    for step in range(STEPS):
        before_step(step)
        batch = batch_of(text.blocks, block_order(run.seed, step, 4, BLOCKS))
        found = prepared(*batch)
        (found.objective / 64).backward()
        torch.nn.utils.clip_grad_norm_(trains, 1.0)
        for one in made:
            one.step()
        model.zero_grad()
        losses.append(found.nats.sum().item() / 64)
    return losses


def by_hand(name, model, train_config):
    """The library's class as its documentation makes it."""
    named = {n: p for n, p in model.named_parameters() if p.requires_grad}
    decay = train_config.weight_decay
    if name == "adamw":
        return [torch.optim.AdamW(named.values(), lr=LR, weight_decay=decay, fused=True)]
    if name == "sgd":
        groups = [
            {"params": [p for p in named.values() if (p.ndim > 1) is matrix], "weight_decay": wd}
            for matrix, wd in ((True, decay), (False, 0.0))
        ]
        return [torch.optim.SGD(groups, lr=LR, momentum=0.9)]
    if name == "lora_plus":
        return [
            create_loraplus_optimizer(
                model, torch.optim.AdamW, lr=LR, loraplus_lr_ratio=4, fused=True
            )
        ]
    if name == "lora_fa":
        return [create_lorafa_optimizer(model, r=4, lora_alpha=8, lr=LR)]
    if name == "riemannian":
        made = create_riemannian_optimizer(
            model, torch.optim.AdamW, lr=LR, weight_decay=0.0, fused=True
        )
        return [made]
    if name == "muon":
        inside = [
            p for n, p in named.items() if p.ndim == 2 and ".wte" not in n and ".wpe" not in n
        ]
        wide = [p for n, p in named.items() if p.ndim == 2 and (".wte" in n or ".wpe" in n)]
        narrow = [p for p in named.values() if p.ndim < 2]
        muon = torch.optim.Muon(inside, lr=LR, weight_decay=decay, adjust_lr_fn="match_rms_adamw")
        if not wide:
            return [muon]
        groups = [
            {"params": wide, "weight_decay": decay}, {"params": narrow, "weight_decay": 0.0},
        ]  # fmt: skip
        return [muon, torch.optim.AdamW(groups, lr=LR, fused=True)]
    if name == "adamw_8bit":
        from bitsandbytes.optim import AdamW8bit

        return [AdamW8bit(named.values(), lr=LR, weight_decay=0.0)]
    assert name == "schedule_free"
    made = AdamWScheduleFree(named.values(), lr=LR, foreach=False)
    made.train()
    return [made]


def test_every_optimizer_has_a_file_and_a_test():
    assert set(options("optimizer")) == set(schemas.OPTIMIZERS) == set(optimizers.MAKERS)
    tested = {one.values[0] if hasattr(one, "values") else one[0] for one in ALL}
    assert tested == set(schemas.OPTIMIZERS)


@pytest.mark.parametrize(("name", "method", "more"), ALL, ids=IDS)
def test_losses_equal_the_librarys_own_class_in_a_plain_loop(
    tiny, make_run, text, name, method, more
):
    run = config(make_run, name, f"method={method}", *more)
    losses, _ = train(adapted(tiny, run), text, run)
    plain = adapted(tiny, config(make_run, "adamw", f"method={method}"))  # as PEFT makes it
    made = by_hand(name, plain, run.train)
    assert losses == plain_loop(plain, text, run, made)
    assert losses[-1] < losses[0]


@pytest.mark.parametrize("decay", [0.0, 0.1])
def test_lora_plus_with_a_ratio_of_one_is_adamw_bit_for_bit(tiny, make_run, text, decay):
    """With everything that has a rule of its own: vectors, embeddings, weight decay, a schedule."""
    shared = ["method=lora", "method.bias=all", "targets.modules=[attn.c_attn,wte]"]
    shared += [f"train.weight_decay={decay}", "train.schedule=cosine", "train.warmup=0.2"]
    found = []
    for overrides in (["adamw"], ["lora_plus", "optimizer.ratio=1"], ["lora_plus"]):
        name, *own = overrides
        run = config(make_run, name, *shared, *own)
        model = adapted(tiny, run)
        losses, _ = train(model, text, run)
        found.append((losses, [p.tolist() for p in model.parameters()]))
    assert found[0] == found[1] and found[0] != found[2]


def test_b_has_its_multiple_of_the_rate_at_every_step_of_the_schedule(tiny, make_run, text):
    run = config(
        make_run, "lora_plus", "method=lora", "optimizer.ratio=4", "train.schedule=cosine",
        "train.warmup=0.25", "train.weight_decay=0.1",
    )  # fmt: skip
    model = adapted(tiny, run)
    _, optimizer = train(model, text, run)
    names = {p: n for n, p in model.named_parameters()}
    rate = loop.learning_rate(STEPS - 1, run.train)
    assert rate == pytest.approx(LR * run.train.min_lr_ratio)
    for group in optimizer.param_groups:
        factors = {"B" if "lora_B" in names[p] else "A" for p in group["params"]}
        assert len(factors) == 1 and group["weight_decay"] == 0.1
        assert group["lr"] == rate * (4.0 if factors == {"B"} else 1.0)


def test_lora_fa_leaves_every_a_as_it_was(tiny, make_run, text):
    run = config(make_run, "lora_fa", "method=lora")
    model = adapted(tiny, run)
    firsts = {n: p.clone() for n, p in model.named_parameters() if "lora_A" in n}
    assert not any(p.requires_grad for n, p in model.named_parameters() if "lora_A" in n)
    train(model, text, run)
    now = dict(model.named_parameters())
    assert firsts and all(torch.equal(now[name], value) for name, value in firsts.items())
    assert all(now[name.replace("lora_A", "lora_B")].any() for name in firsts)


def test_schedule_free_is_evaluated_and_kept_at_its_average(tiny, make_run, text):
    """The weights at every validation are those of the library's eval(); training goes on as is."""
    seen, expected = [], []
    run = config(make_run, "schedule_free", "method=lora")
    model = adapted(tiny, run)
    trained = lambda m: [p.detach().clone() for p in m.parameters() if p.requires_grad]  # noqa: E731
    losses, optimizer = train(model, text, run, validate=lambda: seen.append(trained(model)) or 1.0)
    other = adapted(tiny, run)
    (plain,) = by_hand("schedule_free", other, run.train)

    def at(step):
        if step % 4 == 0:
            twin, its = copy.deepcopy((other, plain))
            its.eval()
            expected.append(trained(twin))

    assert losses == plain_loop(other, text, run, [plain], at)
    plain.eval()
    expected.append(trained(other))
    assert len(seen) == len(expected) == 4
    for ours, theirs in itertools.chain(*map(zip, seen, expected)):
        assert torch.equal(ours, theirs)
    assert not torch.equal(seen[-1][0], trained(model)[0])  # the average is another point
    assert not any(optimizers.AT_EVALUATION in state for state in optimizer.state.values())


@pytest.mark.parametrize(("name", "method", "more"), ALL, ids=IDS)
def test_what_goes_on_from_a_checkpoint_ends_at_the_same_bits(
    tiny, make_run, text, tmp_path, name, method, more
):
    run = config(make_run, name, f"method={method}", *more, "train.checkpoint_interval=3")
    taken = {}

    def save(state, optimizer):
        tensors = checkpoint.state_tensors(model, optimizer)
        folder = tmp_path / str(state.step)
        folder.mkdir()
        (folder / "best").write_bytes(b"best")
        checkpoint.save(folder, tensors, {}, folder / "best", Accelerator(cpu=True))
        taken[state.step] = copy.copy(vars(state))

    model = adapted(tiny, run)
    losses, optimizer = train(model, text, run, save=save)
    whole = checkpoint.state_tensors(model, optimizer)
    kept = {key: value.clone() for key, value in whole.items()}
    assert {3, 4, 6} <= taken.keys()
    for step in (3, 4, 6):  # between validations, and at one
        model = adapted(tiny, run)
        fresh = optimizers.make_optimizer(model, run.train, run.optimizer)
        found = checkpoint.latest(tmp_path / str(step))
        checkpoint.restore(model, fresh, found.tensors)
        state = loop.State(**taken[step])
        again, optimizer = train(model, text, run, state=state, optimizer=fresh)
        assert again == losses[step:]
        now = checkpoint.state_tensors(model, optimizer)
        assert now.keys() == kept.keys()
        assert all(torch.equal(now[key], value) for key, value in kept.items())
    assert BufferState(model).tensors(factors=True) == {}


# ------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["optimizer=lora_plus", "method=full"], "method=full has no LoRA"),
        (["optimizer=lora_fa", "method=udv"], "method=udv has no LoRA"),
        (["optimizer=riemannian", "method=mica"], "method.init=mica"),
        (["optimizer=lora_fa", "method.use_dora=true"], "use_dora"),
        (["optimizer=lora_plus", "optimizer.ratio=0"], "optimizer.ratio=0.0: expected a finite"),
        (["optimizer=lora_plus", "optimizer.ratoi=2"], "did you mean 'optimizer.ratio'"),
        (["optimizer=lora_plus", "train.lr=tuned"], "no rate for lora with optimizer=lora_plus"),
        (["optimizer=sgd"], "optimizer=sgd has no default rate"),
        (["optimizer=sgd", "train.lr=1", "train.beta1=0.5"], "optimizer=sgd has no beta1"),
        (["optimizer=sgd", "train.lr=1", "optimizer.beta1=0.5"], "optimizer=sgd has no such key"),
        (["optimizer=sgd", "train.lr=1", "optimizer.nesterov=true", "optimizer.momentum=0"],
         "optimizer.nesterov=True"),
        (["optimizer=muon", "optimizer.adjust_lr=rms"], "choose one of: match_rms_adamw, original"),
        (["optimizer=muon", "optimizer.ns_coefficients=[1,2]"], "three numbers"),
        (["optimizer=schedule_free", "train.schedule=linear"], "set train.schedule=constant"),
        (["optimizer=adamw", "optimizer.beta1=0.8", "train.beta1=0.7"], "two names of one value"),
        (["optimizer=muon", "launch.num_processes=2", "launch.accelerate=fsdp",
          "train.micro_batch=4"], "optimizer=muon reads whole matrices"),
    ],
)  # fmt: skip
def test_what_an_optimizer_cannot_do_is_refused_by_name(overrides, said):
    from harness import compose

    with pytest.raises(ConfigError) as error:
        compose(*overrides)
    assert said in str(error.value)


@pytest.mark.parametrize(
    ("optimizer", "overrides", "said"),
    [
        ("lora_plus", ["method=peft", "method.peft_type=IA3"], "no lora_B trains"),
        ("riemannian", ["method=peft", "method.peft_type=VERA"], "no lora_B trains"),
        ("lora_fa", ["method=lora", "targets.modules=[attn.c_attn,wte]"], "lora_embedding_A"),
        ("lora_fa", ["method=lora", "method.bias=lora_only", "+method.fields.lora_bias=true"],
         "lora_B.default.bias"),
        ("riemannian", ["method=lora", "targets.modules=[wte]"], "no lora_A trains"),
    ],
)  # fmt: skip
def test_an_adapter_without_the_factors_is_refused(tiny, make_run, optimizer, overrides, said):
    with pytest.raises(ConfigError) as error:
        adapt(tiny, config(make_run, optimizer, *overrides))
    assert said in str(error.value) and f"optimizer={optimizer}" in str(error.value)


def test_muon_without_a_matrix_is_refused(tiny, make_run):
    run = config(make_run, "muon", "method=full", "method.train_only=[biases]")
    with pytest.raises(ConfigError, match="nothing that trains is a matrix"):
        optimizers.make_optimizer(adapt(tiny, run), run.train, run.optimizer)


def test_a_package_that_is_not_there_is_told_with_the_pip_line(monkeypatch, make_run):
    from harness.runs import validate_optimizer

    monkeypatch.setattr(validate_optimizer.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"pip install -e '\.\[schedulefree\]'"):
        make_run("optimizer=schedule_free", "train.lr=1e-2")


def test_the_second_names_of_trains_keys_are_the_same_run(make_run):
    from harness.config.naming import identity

    one = make_run("optimizer.beta1=0.8", "train.lr=0.01")
    assert one.train.beta1 == 0.8
    assert identity(one) == identity(make_run("train.beta1=0.8", "train.lr=0.01"))
    plus = make_run("optimizer=lora_plus", "train.lr=0.01")
    assert identity(plus) not in (identity(one), identity(make_run("train.lr=0.01")))
    assert "lora_plus" in plus.run_dir.name
    base = [identity(make_run("method=none", *more)) for more in ([], ["optimizer=muon"])]
    assert base[0] == base[1]  # which trains nothing


def test_a_configuration_from_before_there_was_a_choice_is_adamws(make_run):
    from omegaconf import OmegaConf

    from harness.config.naming import identity
    from harness.config.run_config import to_dict
    from harness.runs.composition import from_hydra

    run = make_run("train.beta2=0.95", "train.lr=0.01")
    values = to_dict(run)
    values.pop("optimizer")
    before = from_hydra(OmegaConf.create(values))
    assert before.optimizer == schemas.ADAMW and identity(before) == identity(run)
    plus = make_run("optimizer=lora_plus", "optimizer.beta1=0.7", "train.lr=0.01")
    assert from_hydra(OmegaConf.create(to_dict(plus))) == plus


def test_groups_of_the_default_are_those_of_adamw(tiny):
    tiny.requires_grad_(True)
    made = optimizers.make_optimizer(tiny, TrainConfig(weight_decay=0.1))
    assert [group["weight_decay"] for group in made.param_groups] == [0.1, 0.0]
    assert all(group["lr_scale"] == 1.0 for group in made.param_groups)


# ------------------------------------------------------------------------------- whole runs

SHORT = [
    "method=lora", "method.r=2", "method.dropout=0.1", "train.steps=6", "evaluate.interval=3",
    "train.checkpoint_interval=2", "train.lr=0.02", "data.validation_share=0.003",
    "data.test_share=0.003", "data.context_length=32", "train.batch_tokens=128",
    "train.micro_batch=2",
    "train.threads=1",
]  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("name", ["schedule_free", "lora_fa", "muon", "lora_plus"])
def test_a_run_that_is_killed_goes_on_to_the_same_result(make_run, tmp_path, name):
    """Through worker and disk: the kill is within the writing of the second checkpoint."""
    import dataclasses
    import signal

    also = "evaluate.also={more: {source: docstrings, packages: [tqdm], test_share: 0.1}}"
    run = make_run(*SHORT, f"optimizer={name}", also, f"outputs_dir={tmp_path}", "run_name=whole")
    cut = dataclasses.replace(run, run_name="cut")
    for one in (run, cut):
        one.run_dir.mkdir(parents=True)
    assert finish(start(run)) == 0
    assert finish(start(cut, deadly="_generators", number=3)) == -signal.SIGKILL
    assert run_record.can_resume(cut.run_dir)
    assert finish(start(cut)) == 0
    assert outcome(cut.run_dir) == outcome(run.run_dir)
    record = run_record.read(cut.run_dir)
    assert record["run"]["resumed_at"] and record["config"]["optimizer"]["name"] == name
    assert record["saved_check"]["failure"] is None  # what is saved is what was evaluated
    expected = record["predicted"]["by_category"]["optimizer_state"]
    assert record["memory"]["by_category"]["optimizer_state"] == expected > 0


def test_a_table_has_the_optimizer_and_its_fields_where_rows_differ_in_them(tmp_path):
    """A record from before there was a choice is AdamW's."""
    from harness.report import columns, table

    def with_optimizer(**own):
        return lambda record: record["config"].update(optimizer=own)

    put(tmp_path, "old")
    edit(put(tmp_path, "new", r=4), with_optimizer(name="adamw"))
    names = [column.heading for column in columns.sheet(table.rows(tmp_path), None).columns]
    assert "optimizer" not in names
    for ratio in (4.0, 16.0):
        own = with_optimizer(name="lora_plus", ratio=ratio, embedding_ratio=1.0)
        edit(put(tmp_path, f"plus{ratio:g}"), own)
    shown = columns.sheet(table.rows(tmp_path), None)
    names = [column.heading for column in shown.columns]
    at, ratio = names.index("optimizer"), names.index("ratio")
    assert "embedding_ratio" not in names
    assert sorted((line[at].shown, line[ratio].shown) for line in shown.lines) == [
        ("adamw", "-"), ("adamw", "-"), ("lora_plus", "16"), ("lora_plus", "4"),
    ]  # fmt: skip


# ------------------------------------------------------------------------------- train.groups

LAYERWISE = (
    "train.groups=[{match: h.0.attn, lr_scale: 0.25, weight_decay: 0.2},"
    "{match: h.0, lr_scale: 0.5},{match: 'h.*.ln_1', weight_decay: 0.3},"
    "{match: wte.weight, lr_scale: 0.1, weight_decay: 0}]"
)


def test_rates_and_decays_by_name_equal_groups_by_hand(tiny, make_run, text):
    run = config(make_run, "adamw", "method=full", "train.weight_decay=0.1", LAYERWISE)
    losses, optimizer = train(adapted(tiny, run), text, run)
    plain = adapted(tiny, config(make_run, "adamw", "method=full"))
    groups = []
    for name, parameter in plain.named_parameters():
        rate, decay = LR, 0.1 if parameter.ndim > 1 else 0.0
        if ".h.0.attn." in name:
            rate, decay = LR * 0.25, 0.2  # its biases, too
        elif ".h.0." in name:
            rate = LR * 0.5  # with ln_1, whose entry comes later
        elif ".h.1.ln_1." in name:
            decay = 0.3
        elif name == "transformer.wte.weight":
            rate, decay = LR * 0.1, 0.0
        groups.append({"params": [parameter], "lr": rate, "weight_decay": decay})
    made = torch.optim.AdamW(groups, fused=True)
    assert losses == plain_loop(plain, text, run, [made])
    described = optimizers.described(optimizer)
    assert sum(group["parameters"] for group in described) == tiny.num_parameters()
    wte = tiny.transformer.wte.weight.numel()
    assert {
        "optimizer": "AdamW",
        "lr_scale": 0.1,
        "weight_decay": 0.0,
        "parameters": wte,
    } in described


def test_a_group_on_b_is_lora_plus_and_multiplies_its_ratio(tiny, make_run, text):
    found = []
    for name, *own in (
        ("lora_plus", "optimizer.ratio=4"),
        ("adamw", "train.groups=[{match: lora_B, lr_scale: 4}]"),
        ("lora_plus", "optimizer.ratio=2", "train.groups=[{match: lora_B, lr_scale: 2}]"),
    ):
        run = config(make_run, name, "method=lora", *own)
        found.append(train(adapted(tiny, run), text, run)[0])
    assert found[0] == found[1] == found[2]


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=pytest.mark.quantised if name == "adamw_8bit" else ())
        for name in schemas.OPTIMIZERS
    ],
)
def test_every_optimizer_has_the_rates_of_groups(tiny, make_run, text, name):
    groups = "train.groups=[{match: h.0, lr_scale: 0.5, weight_decay: 0.1}]"
    run = config(make_run, name, "method=lora", groups)
    model = adapted(tiny, run)
    _, optimizer = train(model, text, run)
    names = {p: n for n, p in model.named_parameters()}
    seen = set()
    for group in optimizer.param_groups:
        for p in group["params"]:
            times = 0.5 if ".h.0." in names[p] else 1.0
            times *= 16 if name == "lora_plus" and "lora_B" in names[p] else 1
            assert group["lr"] == LR * times
            assert group["weight_decay"] == (0.1 if ".h.0." in names[p] else 0.0)
            seen.add(".h.0." in names[p])
    assert seen == {True, False}


@pytest.mark.parametrize(
    ("groups", "said"),
    [
        ("[{match: lora_C}]", r"train.groups\[0\].match=lora_C matches nothing: .*'lora_B'"),
        ("[{match: wte}]", "matches nothing"),  # which does not train
        ("[{match: lora_B},{match: 'h.*.lora_B'}]", r"groups\[1\].*"),
        ("[{match: h},{match: lora_B}]", "the entries before it have all"),
        ("[{match: lora_B, lr_scale: 0}]", "lr_scale=0.0: expected a finite number above 0"),
        ("[{match: lora_B, weight_decay: -1}]", "weight_decay=-1.0: expected 0 or more"),
        ("[{match: lora_B, rate: 2}]", "unknown key"),
        ("[{lr_scale: 2}]", "match is missing"),
        ("[lora_B]", "expected a list of mappings"),
    ],
)
def test_groups_that_cannot_be_are_refused(tiny, make_run, groups, said):
    with pytest.raises(ConfigError, match=said):
        run = config(make_run, "adamw", "method=lora", f"train.groups={groups}")
        optimizers.make_optimizer(adapted(tiny, run), run.train, run.optimizer)


def test_groups_make_another_run_and_none_the_same_as_before(make_run):
    from omegaconf import OmegaConf

    from harness.config.naming import identity
    from harness.config.run_config import to_dict
    from harness.runs.composition import from_hydra

    plain = make_run("train.lr=0.01")
    assert identity(plain) == identity(make_run("train.lr=0.01", "train.groups=[]"))
    asked = make_run("train.lr=0.01", "train.groups=[{match: lora_B, lr_scale: 4}]")
    assert identity(asked) != identity(plain)
    again = from_hydra(OmegaConf.create(to_dict(asked)))
    assert again == asked and identity(again) == identity(asked)


@pytest.mark.quantised
def test_moments_in_eight_bits_are_counted_as_bytes(make_run, tiny, text):
    run = config(make_run, "adamw_8bit", "method=full")
    model = adapted(tiny, run)
    _, optimizer = train(model, text, run)
    large = [p for p in model.parameters() if p.numel() >= 4096]
    small = [p for p in model.parameters() if p.numel() < 4096]
    state = [optimizer.state[p] for p in large]
    assert large and {s["state1"].dtype for s in state} == {torch.uint8}
    assert {optimizer.state[p]["state1"].dtype for p in small} == {torch.float32}
    with memory.LiveTensors(model, optimizer) as live:
        pass
    numels = sum(p.numel() for p in large)
    blocks = sum(-(-p.numel() // 256) for p in large)
    expected = 2 * numels + 2 * 4 * blocks + 2 * 4 * 256  # codes, a scale a block, two tables
    expected += 2 * 4 * sum(p.numel() for p in small)
    assert live.by_category["optimizer_state"] == expected


def test_a_sweep_leaves_out_the_keys_that_an_optimizer_has_not(capsys):
    from harness import compose

    runs = compose("optimizer=adamw,lora_plus", "optimizer.ratio=4,16", "train.lr=0.01")
    found = [(run.optimizer.name, getattr(run.optimizer, "ratio", None)) for run in runs]
    assert found == [("adamw", None), ("lora_plus", 4.0), ("lora_plus", 16.0)]
    assert "optimizer.ratio (adamw)" in capsys.readouterr().err
    with pytest.raises(ConfigError, match="optimizer=adamw has no such key"):
        compose("optimizer.ratio=4,16")
