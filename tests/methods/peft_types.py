"""What every PEFT method can do here, on a tiny GPT-2 and a tiny Llama, by doing it: conf/PEFT.md.

python tests/methods/peft_types.py > conf/PEFT.md
"""

from __future__ import annotations

import contextlib
import copy
import functools
import logging
import sys
import tempfile
import textwrap
import warnings
from dataclasses import replace
from pathlib import Path

import peft
import torch
from accelerate import Accelerator
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING

from harness import compose, methods
from harness.artifacts import export, model_card
from harness.config.errors import ConfigError
from harness.config.method_schema import AdaloraMethod
from harness.data.token_data import Batch
from harness.methods import merging, peft_adapter, weight_tying
from harness.models import linear, model_size, pretrained
from harness.models.next_token import NextToken
from harness.runs import estimate
from harness.runs.finished_run import Saved
from harness.training import checkpoint, loop, optimizers
from harness.training.buffers import BufferState

MODELS = {
    "GPT-2": "{model_type: gpt2, n_embd: 32, n_layer: 2, n_head: 2, n_positions: 128, "
    "vocab_size: 64, initializer_range: 0.2}",
    "Llama": "{model_type: llama, hidden_size: 32, num_hidden_layers: 2, num_attention_heads: 2, "
    "num_key_value_heads: 2, intermediate_size: 64, max_position_embeddings: 128, "
    "vocab_size: 64, initializer_range: 0.2, tie_word_embeddings: false}",
}
BY_TOKENS = ("CARTRIDGE", "MULTITASK_PROMPT_TUNING", "PREFIX_TUNING", "PROMPT_TUNING", "P_TUNING")
FIELDS = {name: {"num_virtual_tokens": 4} for name in BY_TOKENS} | {
    # what a method must be told, or what fits a width of 32
    "ADAMSS": {"r": 8},
    "ADAPTION_PROMPT": {"adapter_len": 4, "adapter_layers": 2},
    "C3A": {"block_size": 8},
    "CPT": {"cpt_token_ids": [1, 2, 3]},
    "FOURIERFT": {"n_frequency": 20},
    "FROD": {"progressbar": False},
    "MISS": {"r": 4},
    "OFT": {"oft_block_size": 8},
    "ROAD": {"group_size": 8},
    "SHADOW": {"auxiliary_loss_weight": 0.0},
    "SHIRA": {"r": 4},
    "TRAINABLE_TOKENS": {"token_indices": [5, 6]},
    "VBLORA": {"vector_length": 8},
    "WAVEFT": {"n_frequency": 20},
}
ATTENTION = ("VERA", "PVERA")  # one shape for all their matrices
HEAD = ["type", "on", "trains", "counts", "predicts", "resumes", "reloads", "exports", "merges"]
IDS = torch.arange(2, 34).view(2, 16)


def names() -> list[str]:
    """Every method that the installed PEFT has a configuration of."""
    found = {str(getattr(kind, "value", kind)) for kind in PEFT_TYPE_TO_CONFIG_MAPPING}
    return sorted(found - {"UDV"})


def refusal(name: str, model: str) -> str | None:
    """Why a method is refused on a model, in one line, or None where it is built."""
    run, config = setting(name, model)
    try:
        methods.adapt(pretrained.load_model(run, config), run)
    except ConfigError as error:
        return shortened(str(error))
    return None


def shortened(message: str) -> str:
    """A message as a cell of the table."""
    return textwrap.shorten(message, 160, placeholder=" …").replace("|", "\\|")


def setting(name, model):
    run, config = _base(model, "attn" if name in ATTENTION else "all")
    if name == "ADALORA":  # which has a method of its own
        return replace(run, method=AdaloraMethod("adalora")), config
    method = replace(run.method, peft_type=name, fields=copy.deepcopy(FIELDS.get(name, {})))
    return replace(run, method=method), config


@functools.cache  # composing takes longer than anything else here
def _base(model, targets):
    (run,) = compose(
        "method=peft", "method.peft_type=IA3", f"targets={targets}", "model.asset=null",
        f"+model.architecture={MODELS[model]}", "data.context_length=16", "train.micro_batch=2",
        "train.batch_tokens=32", "evaluate.batch_tokens=32",
    )  # fmt: skip
    return run, pretrained.load_config(run.model)


def outcome(name: str, model: str) -> list[str]:
    """The cells of HEAD after the type: what becomes of a method on a model."""
    if why := refusal(name, model):
        return [f"refused: {why}"]
    run, config = setting(name, model)
    accelerator = Accelerator(cpu=True)
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        torch.manual_seed(0)
        base = pretrained.load_model(run, config)
        on = "nn.Linear" if linear.is_turned(base) else "as it is"
        bare = copy.deepcopy(base)
        published = linear.as_published(copy.deepcopy(base))
        published.save_pretrained(folder / "base")
        start = copy.deepcopy(methods.adapt(base, run))  # before it is trained
        adapted, states = _trained(start, run, accelerator)
        logits = _logits(adapted)
        moved = not _same(start.state_dict(), adapted.state_dict())
        adapted.save_pretrained(folder / "adapter", save_embedding_layers=False)
        return [
            on,
            f"{model_size.count_parameters(adapted).trainable:,}"
            + ("" if moved else ", nothing moves"),
            _counts(adapted, run, config),
            "yes" if estimate.predict(run, config, accelerator) else "no",
            _resumes(start, run, accelerator, states),
            _reloads(bare, folder / "adapter", logits),
            _exports(run, folder, logits),
            _merges(adapted, logits),
        ]


def _step(model, optimizer, run, accelerator):
    loop.accumulate(NextToken(model).train(), [Batch(IDS, IDS, None)], IDS.numel(), accelerator)
    loop.apply(model, optimizer, accelerator, run.train)


def _trained(start, run, accelerator):
    """A copy of `start` after two steps; what a checkpoint after the first holds; the weights."""
    model = copy.deepcopy(start)
    optimizer = optimizers.make_optimizer(model, run.train, run.optimizer)
    buffers = BufferState(model)
    torch.manual_seed(1)
    _step(model, optimizer, run, accelerator)
    tensors = checkpoint.state_tensors(model, optimizer) | buffers.tensors(factors=True)
    tensors = {name: tensor.clone() for name, tensor in tensors.items()}
    states = tensors, torch.get_rng_state()
    _step(model, optimizer, run, accelerator)
    states += ({name: p.clone() for name, p in checkpoint.trained_state(model).items()},)
    return model.eval(), states


def _same(one, other):
    return all(torch.equal(one[key], value) for key, value in other.items())


@torch.no_grad()
def _logits(model):
    model(input_ids=IDS)  # CPT rounds its prompt to its ball in the first pass after a step
    return model(input_ids=IDS).logits


def _counts(adapted, run, config):
    """Whether the model without weights has the same counts, and PEFT counts as we do."""
    found = model_size.count_parameters(adapted)
    if found.trainable != adapted.get_nb_trainable_parameters()[0]:
        return "otherwise than PEFT"
    try:
        planned = methods.check(pretrained.on_meta(run, config), run)
    except peft_adapter.NeedsWeightsError:
        return "with weights alone"
    return "yes" if model_size.count_parameters(planned) == found else "no"


def _resumes(start, run, accelerator, states):
    """Whether a fresh model goes on from the first step's checkpoint to the same bits."""
    tensors, generator, expected = states
    model = copy.deepcopy(start)
    optimizer = optimizers.make_optimizer(model, run.train, run.optimizer)
    buffers = BufferState(model)
    checkpoint.restore(model, optimizer, tensors)
    buffers.restore(tensors)
    torch.set_rng_state(generator)
    _step(model, optimizer, run, accelerator)
    again = checkpoint.trained_state(model.eval())
    return "bit for bit" if _same(expected, again) else "no"


def _reloads(bare, folder, logits):
    try:
        again = peft.PeftModel.from_pretrained(bare, folder).eval()
    except Exception as error:  # whatever it is, it is what the table is to tell
        return f"no ({type(error).__name__})"
    return "bit for bit" if torch.equal(_logits(again), logits) else "as another"


def _exports(run, folder, logits):
    """Whether `harness export` writes it, and its card's code loads it onto the published base."""
    base = str(folder / "base")
    at = replace(run.model, architecture={}, path=base)
    saved = Saved(folder, replace(run, model=at), {"saved": ["adapter"]})
    (folder / "out").mkdir()
    try:
        exported = export._write_adapter(saved, folder / "out")
    except ConfigError as error:
        return f"no: {shortened(str(error))}"
    code = model_card.code(saved, exported).rpartition("\ntokenizer")[0]
    found = {}
    with contextlib.chdir(folder / "out"):
        exec(code, found)
    if not torch.allclose(_logits(found["model"].eval()), logits, atol=1e-5):
        return "as another"
    return "yes, base turned" if exported.turned else "yes"


def _merges(adapted, logits):
    if why := merging.reason_unsupported(adapted):
        return f"no: {shortened(why)}"
    whole = linear.as_published(weight_tying.merged(adapted))
    return "yes" if torch.allclose(_logits(whole), logits, atol=1e-3) else "as another"


WHAT = """\
`method=peft method.peft_type=NAME` with PEFT {version}, done on {models} of two layers and \
width 32, with the
fields that a method must be told. Several GPUs are left out: the machine \
that makes this table has none. ADALORA is `method=adalora`.

| column | what it says |
| --- | --- |
| on | the model `as it is`, or with `Conv1D` turned into `nn.Linear` by `model.linear=auto` |
| trains | trainable parameters, all of which are PEFT's own count; two steps move them |
| counts | `harness count` has the same numbers, without weights |
| predicts | `harness plan` gives memory and FLOPs |
| resumes | a second step from a checkpoint after the first one gives the same weights |
| reloads | `adapter/` in plain PEFT, on the base as the run had it, gives the same logits |
| exports | the code on the card of `harness export` loads it onto the published \
base in plain PEFT, with the same logits (1e-5) |
| merges | the merged model, as GPT-2 is published, gives the same logits (1e-3) |

Made by `python tests/methods/peft_types.py`, and a test keeps it true.
"""


def table() -> str:
    """conf/PEFT.md."""
    models = " and ".join(f"a {name}" for name in MODELS)
    lines = [
        "# Every PEFT method by name",
        "",
        WHAT.format(version=peft.__version__, models=models),
    ]
    for model in MODELS:
        lines += [f"## {model}", "", f"| {' | '.join(HEAD)} |", "|" + " --- |" * len(HEAD)]
        for name in names():
            cells = outcome(name, model)
            cells += [""] * (len(HEAD) - 1 - len(cells))
            lines.append(f"| {' | '.join([name, *cells])} |")
            print(lines[-1], file=sys.stderr, flush=True)
        lines.append("")
    return "\n".join(lines)


if __name__ == "__main__":
    logging.disable(logging.ERROR)
    warnings.simplefilter("ignore")
    print(table(), end="")
