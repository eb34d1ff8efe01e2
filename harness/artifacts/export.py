"""What a run made, as a folder that plain `transformers` or PEFT loads, with a model card.

    harness export outputs/main/RUN_NAME my-adapter
    harness export outputs/main/RUN_NAME my-model --merge

Without --merge a run that trained an adapter gives the adapter, for
`peft.PeftModel.from_pretrained(base, folder)`; a fully fine-tuned model is a whole model in any
case. With --merge the adapter is merged into the base, matrices are as GPT-2 is published (q, k and
v in one `Conv1D`), and what comes out is a model like any other. The folder is written beside its
place, loaded again as its reader will load it, compared with the run's own model, and only then
renamed to OUT. Exit status 2 for what cannot be exported.
"""

from __future__ import annotations

import argparse
import gc
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

import torch
from peft import PeftConfig, PeftModel
from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel

from harness.artifacts.model_card import Exported, card
from harness.config.errors import ConfigError
from harness.methods import joined_lora, merging, weight_tying
from harness.methods.peft_config import UNFIT
from harness.models import linear, model_files, pretrained, quantize, quantized, weights
from harness.results import numbers
from harness.runs import finished_run, saved_check
from harness.runs.finished_run import ADAPTER, Saved
from harness.system.console import quiet_command, reason

WEIGHTS = "adapter_model.safetensors"
PROBE_TOKENS = 32
# Most that logits may move when a model is merged, or its adapter joined, as a share of the largest
# logit: what rounding of fp32 comes to in deep models. A wrong merge is orders of magnitude above.
ROUNDING = 1e-3


def export(run_dir: Path, out: Path, *, merge: bool) -> Exported:
    """Write the folder `out`, whole or not at all; says what it holds.

    Raises:
        ConfigError: no finished run, nothing to export, nothing to merge, or `out` is taken.
    """
    _check_free(out)
    run = finished_run.load(run_dir)
    if own := run.run.model.remote_code:
        raise ConfigError(
            f"the base of {run_dir} brings code of its own ({own}), which an exported folder would "
            "have to bring along: load the run's own adapter/ or model/ beside that code"
        )
    whole = _is_whole(run, merge)
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        scratch = Path(tempfile.mkdtemp(dir=out.parent, prefix=f".{out.name}-"))
    except OSError as error:
        raise ConfigError(f"{out}: cannot write there ({reason(error)})") from error
    try:
        exported = _write_whole(run, scratch) if whole else _write_adapter(run, scratch)
        run.tokenizer.save_pretrained(scratch)
        (scratch / "README.md").write_text(card(run, exported), "utf-8")
        scratch.chmod(0o755)
        for path in scratch.iterdir():
            if path.is_file():
                path.chmod(0o644)  # safetensors leaves them to their owner alone
        _check_free(out)
        os.replace(scratch, out)  # onto nothing, or onto an empty folder
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    return exported


def _check_free(out: Path) -> None:
    if out.is_symlink() or (out.exists() and not out.is_dir()):
        raise ConfigError(f"{out} is not a folder: name one that is new or empty")
    if out.is_dir() and any(out.iterdir()):
        raise ConfigError(f"{out} is not empty, and nothing is overwritten: name another folder")


def _is_whole(run: Saved, merge: bool) -> bool:
    """Whether a whole model is to be written, and not an adapter; refuses what cannot be."""
    method = run.run.method
    if method.name == "none":
        raise ConfigError(
            f"{run.name} trained nothing (method=none): what there is to take away is its base, "
            f"{model_files.source_of(run.run.model) or 'with random weights'}"
        )
    if method.trains and not run.has_adapter:
        return True
    if method.name == "truncate":
        if merge:
            return True
        raise ConfigError(
            "method=truncate trains nothing and leaves no adapter: add --merge for the model with "
            "its truncated weights"
        )
    config = PeftConfig.from_pretrained(str(run.folder(ADAPTER)))
    if merge:
        if config.is_prompt_learning:
            raise ConfigError(
                f"--merge: {_kind(config)} trains prompts beside the model, which no weight can "
                "take in: leave out --merge"
            )
        return True
    reason = None
    if run.run.model.architecture:
        reason = "the run drew its base at random, and no one else has it"
    elif joined_lora.is_split(config) and (why := joined_lora.reason_unsupported(config)):
        reason = (
            "it is on q, k and v apart, which the published base has not, and cannot be written "
            f"as one on c_attn: {why}"
        )
    if reason:
        further = "" if config.is_prompt_learning else ": add --merge for a whole model"
        raise ConfigError(f"the adapter loads onto no published base, for {reason}{further}")
    return False


def _kind(config: PeftConfig) -> str:
    return str(getattr(config.peft_type, "value", config.peft_type))


# --------------------------------------------------------------------------- a whole model


def _write_whole(run: Saved, folder: Path) -> Exported:
    model, moved = merged(run)
    logits = probe(model)
    trained_with = _restore(run, model)
    model.save_pretrained(folder)
    del model
    gc.collect()
    reloaded, _ = weights.load(folder)
    _compare(probe(reloaded), logits, "the saved model, loaded again,", share=0.0)
    measured = saved_check.compare(run, reloaded.eval(), "the saved model, loaded again,")
    return Exported(
        whole=True,
        model_type=reloaded.config.model_type,
        config_notes=trained_with,
        moved=moved,
        tied=bool(getattr(reloaded.config, "tie_word_embeddings", False)),
        measured=measured,
    )


def merged(run: Saved) -> tuple[PreTrainedModel, float | None]:
    """The run's model as a plain one, in fp32, and how far merging has moved its logits at most.

    A base that was frozen in bf16 keeps its rounded values, and takes in what trained in fp32: in
    bf16 much of that would be rounded away.

    Raises:
        ConfigError: a method that cannot be merged, or whose merged model is another one.
    """
    model: Any = run.model()
    if quantized.packing_of(model.config) and (reason := merging.reason_unsupported(model)):
        raise ConfigError(f"--merge: {reason}; leave out --merge")
    model, moved = model.float(), None
    if isinstance(model, PeftModel):
        before = probe(model)
        try:
            model = weight_tying.merged(model)
        except UNFIT as error:
            kind = _kind(PeftConfig.from_pretrained(str(run.folder(ADAPTER))))
            raise ConfigError(f"--merge: PEFT cannot merge {kind}: {error}") from error
        linear.as_published(model)
        moved = _compare(probe(model), before, "the merged model", share=ROUNDING)
    else:
        linear.as_published(model)
    assert isinstance(model, PreTrainedModel)
    return model, moved


def _restore(run: Saved, model: PreTrainedModel) -> dict[str, tuple[Any, Any]]:
    """Give back the base's dropout; field -> (what the run had, what the base has) of what differs.

    The activation stays: the fused GELU is the same function, rounded otherwise.
    """
    original = finished_run.original_config(run.run)
    differs: dict[str, tuple[Any, Any]] = {}
    for name in (*pretrained.dropout_fields(original), *pretrained.ACTIVATION_FIELDS):
        if hasattr(original, name):
            had, own = getattr(model.config, name), getattr(original, name)
            if had != own:
                differs[name] = (had, own)
                if name not in pretrained.ACTIVATION_FIELDS:
                    setattr(model.config, name, own)
    return differs


# --------------------------------------------------------------------------- an adapter


def _write_adapter(run: Saved, folder: Path) -> Exported:
    source = run.folder(ADAPTER)
    config = PeftConfig.from_pretrained(str(source))
    config.base_model_name_or_path = finished_run.source(run.run)
    config.revision = run.run.model.revision
    joins = joined_lora.is_split(config)
    if joins:
        config, tensors = joined_lora.join(config, load_file(source / WEIGHTS))
        save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
    else:
        shutil.copyfile(source / WEIGHTS, folder / WEIGHTS)
    model: Any = run.model()
    turned, turns = linear.is_turned(model), linear.needs_turned_base(model)
    logits = probe(model)
    del model
    if turned and not turns and hasattr(config, "fan_in_fan_out"):
        config.fan_in_fan_out = True  # of the published base's Conv1D
    config.save_pretrained(folder)
    gc.collect()
    options = base_options(run)
    plain, _ = weights.load(finished_run.source(run.run), **options)
    quantized.keep_differentiable(plain)
    reloaded = weights.load_adapter(linear.turn(plain) if turns else plain, folder)
    # q, k and v apart are rounded as one where kernels depend on the number of columns.
    share = ROUNDING if joins or run.unfused or turned else 0.0
    what = "the adapter, loaded onto the published base,"
    moved = _compare(probe(reloaded), logits, what, share)
    measured = saved_check.compare(run, reloaded, what)
    return Exported(
        whole=False,
        model_type=plain.config.model_type,
        base_options=options,
        joined_rank=next(iter(config.rank_pattern.values())) if joins else None,
        turned=turns,
        moved=moved,
        measured=measured,
        peft_type=_kind(config),
    )


def base_options(run: Saved) -> dict[str, Any]:
    """What `from_pretrained` must be told to give the base of the run, bit for bit."""
    model = run.run.model
    options: dict[str, Any] = {"dtype": str(pretrained.dtype_of(run.run)).removeprefix("torch.")}
    if model.revision and model.id:
        options["revision"] = model.revision
    config, own = pretrained.load_config(model), finished_run.original_config(run.run)
    for name in pretrained.ACTIVATION_FIELDS:
        if (had := getattr(config, name, None)) != getattr(own, name, None):
            options[name] = had
    if packed := quantize.options(run.run):
        options["quantization_config"] = packed
    return options


# --------------------------------------------------------------------------- the same model?


@torch.no_grad()
def probe(model: Any) -> torch.Tensor:
    """Logits (1, T, V) of some fixed tokens, T at most 32."""
    base: Any = model.get_base_model() if isinstance(model, PeftModel) else model
    virtual = 0
    if isinstance(model, PeftModel) and model.active_peft_config.is_prompt_learning:
        virtual = model.active_peft_config.num_virtual_tokens
    length = min(PROBE_TOKENS, (pretrained.max_context(base.config) or PROBE_TOKENS) - virtual)
    ids = (torch.arange(1, length + 1) * 37 % base.config.vocab_size)[None]
    logits: torch.Tensor = model(input_ids=ids).logits
    return logits.float()


def _compare(logits: torch.Tensor, expected: torch.Tensor, what: str, share: float) -> float:
    """The largest difference, which must be within `share` of the largest logit."""
    difference = float((logits - expected).abs().max())
    if not difference <= share * float(expected.abs().max()):  # NaN too
        raise ConfigError(
            f"{what} is not the model of the run: its logits differ by {difference:.3g}; nothing "
            "was written" + ("" if what.startswith("the merged") else ". Try --merge")
        )
    return difference


@quiet_command
def main(arguments: list[str]) -> int:
    """The command line; returns its exit status."""
    parser = argparse.ArgumentParser(
        prog="harness export",
        description="Write what a run made as a folder that transformers or PEFT loads.",
    )
    parser.add_argument("run_dir", type=Path, help="outputs/EXPERIMENT/RUN_NAME")
    parser.add_argument("out", type=Path, help="the folder to write, new or empty")
    parser.add_argument("--merge", action="store_true", help="a whole model, without PEFT")
    args = parser.parse_args(arguments)
    exported = export(args.run_dir, args.out, merge=args.merge)
    size = sum(path.stat().st_size for path in args.out.iterdir())
    print(f"{args.out}: {exported.what}, {numbers.mib(size)} MiB, loads with {exported.logits}")
    print(exported.compared)
    return 0
