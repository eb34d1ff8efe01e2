"""Every PEFT method by name on a tiny GPT-2 and a tiny Llama, two steps each: conf/PEFT.md.

python tests/methods/peft_types.py > conf/PEFT.md
"""

from __future__ import annotations

import copy
import functools
import logging
import tempfile
import textwrap
import warnings
from dataclasses import replace

import peft
import torch
from accelerate import Accelerator
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING

from harness import compose, methods
from harness.config.errors import ConfigError
from harness.config.schema import AdaloraMethod
from harness.data.token_data import Batch
from harness.methods import merging, weight_tying
from harness.models import pretrained
from harness.models.loss import NextToken
from harness.runs import estimate
from harness.training import loop, optimizers

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
HEAD = ["type", *(f"{name}: {what}" for name in MODELS for what in ("runs", "then"))]


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
        f"+model.architecture={MODELS[model]}", "data.context=16", "train.micro_batch=2",
        "train.batch_tokens=32", "evaluate.batch_tokens=32",
    )  # fmt: skip
    return run, pretrained.load_config(run.model)


def outcome(name: str, model: str) -> tuple[str, str]:
    """What becomes of a method on a model: trainable parameters or the refusal; and the rest."""
    if why := refusal(name, model):
        return f"refused: {why}", ""
    run, config = setting(name, model)
    torch.manual_seed(0)
    base = pretrained.load_model(run, config)
    bare = copy.deepcopy(base)
    adapted = methods.adapt(base, run)
    counted = pretrained.count_parameters(adapted).trainable
    notes = [] if counted == adapted.get_nb_trainable_parameters()[0] else ["counts otherwise"]
    ids = torch.arange(2, 34).view(2, 16)
    optimizer, accelerator = (
        optimizers.make_optimizer(adapted, run.train, run.optimizer),
        Accelerator(cpu=True),
    )
    before = adapted.state_dict()
    before = {key: value.clone() for key, value in before.items()}
    for _ in range(2):
        prepared = NextToken(adapted).train()
        loop.accumulate(prepared, [Batch(ids, ids, None)], ids.numel(), accelerator)
        loop.apply(adapted, optimizer, accelerator, run.train)
    if all(torch.equal(before[key], value) for key, value in adapted.state_dict().items()):
        notes.append("nothing moves")
    adapted.eval()
    with torch.no_grad():
        adapted(input_ids=ids)  # CPT rounds its prompt to its ball in the first pass after a step
        logits = adapted(input_ids=ids).logits
        with tempfile.TemporaryDirectory() as folder:
            adapted.save_pretrained(folder)
            try:
                again = peft.PeftModel.from_pretrained(bare, folder).eval()(input_ids=ids).logits
                notes.append("reloads" if torch.equal(again, logits) else "reloads as another")
            except Exception as error:  # whatever it is, it is what the table is to tell
                notes.append(f"does not reload ({type(error).__name__})")
    found = estimate.predict(run, config, accelerator)
    notes.append("predicted" if found else "not predicted")
    if why := merging.reason_unsupported(adapted):
        notes.append(f"does not merge: {shortened(why)}")
    else:
        whole = weight_tying.merged(adapted)
        with torch.no_grad():
            near = torch.allclose(whole(input_ids=ids).logits, logits, atol=1e-3)
        notes.append("merges" if near else "merges as another")
    return f"{counted:,}", ", ".join(notes)


def table() -> str:
    """conf/PEFT.md."""
    lines = [
        "# Every PEFT method by name",
        "",
        f"`method=peft method.peft_type=NAME` with PEFT {peft.__version__}, two steps on a GPT-2 "
        "and a Llama of two layers and width 32.",
        "The number is of trainable parameters, which is PEFT's own. Reloads: `adapter/` gives the "
        "same logits bit for bit. Merges:",
        "to 1e-3. Predicted: `harness.plan` gives memory and FLOPs. Made by "
        "`python tests/methods/peft_types.py`, and a test keeps it true.",
        "ADALORA is `method=adalora`.",
        "",
        f"| {' | '.join(HEAD)} |",
        "|" + " --- |" * len(HEAD),
    ]  # fmt: skip
    for name in names():
        cells = [name, *(cell for model in MODELS for cell in outcome(name, model))]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    logging.disable(logging.ERROR)
    warnings.simplefilter("ignore")
    print(table(), end="")
