"""The model card of an exported run: every figure of it from result.json."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData

from harness.config.run_config import RunConfig
from harness.evaluation.text_metrics import METRICS
from harness.models import linear
from harness.models.pretrained import ACTIVATION_FIELDS
from harness.results import numbers
from harness.results.record_types import Record
from harness.results.run_record import get
from harness.runs import finished_run
from harness.runs.finished_run import Saved

REGISTERS = {  # what a process must import before it can load these, and why
    "UDV": "import harness.methods.udv  # makes PEFT know UDV",
    "lstm": "import harness.models  # makes transformers know the LSTM",
}


BASE, STEP0 = "quality.base.validation", "quality.step0.validation"
TEMPLATE = Path(__file__).with_suffix(".md.j2")
FOLLOWS = {  # what a document follows (`harness.evaluation.prefix`)
    "bos": "after one BOS token",
    "eos": "after one end-of-text token",
    "none": "from its second token on",
}


@dataclass(frozen=True)
class Exported:
    """Describes what an exported folder holds, and how it is loaded again."""

    whole: bool  # a model, or else an adapter
    model_type: str
    moved: float | None  # most that a logit differs from the run's model now; None: cannot differ
    measured: float | None = None  # nats a token from what the run measured; None: nothing kept
    config_notes: dict[str, tuple[Any, Any]] = field(default_factory=dict)  # (in the run, the base)
    base_options: dict[str, Any] = field(default_factory=dict)  # of an adapter's base
    peft_type: str = ""  # of an adapter
    joined_rank: int | None = None  # of an adapter on q, k, v that was written as one on c_attn
    turned: bool = False  # an adapter on nn.Linear, for a base whose Conv1D are turned first
    tied: bool = False  # a whole model's head is its embedding

    @property
    def what(self) -> str:
        """Name the export in the words of a sentence: a whole model, or an adapter."""
        return "a whole model" if self.whole else f"a {self.peft_type} adapter"

    @property
    def logits(self) -> str:
        """How its logits compare with those of the run's own model."""
        if not self.moved:
            return "identical logits"
        return f"the run's logits within {self.moved:.2g}"

    @property
    def compared(self) -> str:
        """How its nats compare with those that the run measured, as a sentence."""
        if self.measured is None:
            return (
                "Its nats are not compared with what the run measured: the run kept no documents "
                "for that."
            )
        return (
            "On a few validation documents its nats are those that the run measured, within "
            f"{self.measured:.1g} a token."
        )


def card(run: Saved, exported: Exported) -> str:
    """README.md: front matter as the hub reads it, and what a reader wants to know."""
    base, record = base_name(run.run), run.record
    filled = ModelCard.from_template(
        card_data(run, exported),
        template_path=str(TEMPLATE),
        name=run.name,
        what="Whole model" if exported.whole else "Adapter",
        on=f"`{base}`" if base else "a model with random weights",
        text=run.run.data.name,
        method=record["method"]["label"],
        code=code(run, exported),
        notes=notes(run, exported),
        reached=_reached(record),
        scores=_scores(record),
        follows=_follows(record, run.run.data.source == "pairs"),
        window=record["evaluation"],
        truncated=_is_truncated(record),
        moved=_before(record)[1],
        tested=get(record, "quality.test"),
        facts=_facts(run),
        command=get(record, "run.command") or "not recorded",
    )
    return str(filled).rstrip() + "\n"


def base_name(run: RunConfig) -> str | None:
    """Hub id, name of the shipped model or of the folder; None for random weights."""
    model = run.model
    folder = Path(model.path).name if model.path else None
    return model.id or model.asset or model.package or folder


def card_data(run: Saved, exported: Exported) -> ModelCardData:
    """Base model, library, tags, data sets and a model-index with what was measured."""
    data, method = run.run.data, run.record["method"]
    window = {key: run.record["evaluation"][key] for key in ("context_length", "stride")}
    written = get(run.record, "quality.generation") or {}
    metrics: list[tuple[str, str, str, Any, dict[str, Any] | None]] = [  # the last: how
        (split, name, name.replace("_", " "), get(run.record, f"quality.{split}.{name}"), window)
        for split in ("validation", "test")
        for name in ("perplexity", "bits_per_byte")
    ]
    metrics += [("test", name, label, written.get(name), None) for name, label in METRICS.items()]
    metrics += [
        (
            split,
            name,
            name.replace("_", " "),
            get(run.record, f"quality.classification.{split}.{name}"),
            None,
        )
        for split in ("validation", "test")
        for name in ("accuracy", "macro_f1")
    ]
    measured = [
        EvalResult(
            task_type="text-generation",
            dataset_type=data.id or data.name,
            dataset_name=data.name,
            dataset_config=data.config_name,
            dataset_split=split,
            metric_type=name,
            metric_name=label,
            metric_value=value,
            metric_args=how,
        )
        for split, name, label, value, how in metrics
        if value is not None
    ]
    return ModelCardData(
        base_model=base_name(run.run),
        library_name="transformers" if exported.whole else "peft",
        pipeline_tag="text-generation",
        tags=list(dict.fromkeys(["peft-harness", method["name"], method["label"]])),
        datasets=[data.id] if data.id and not Path(data.id).is_dir() else None,
        metrics=["perplexity", *(key for key in METRICS if key in written)],
        model_name=run.name,
        eval_results=measured or None,
    )


def code(run: Saved, exported: Exported) -> str:
    """Python that loads model and tokenizer, run in the exported folder."""
    first = [
        line for key, line in REGISTERS.items() if key in (exported.peft_type, exported.model_type)
    ]
    if exported.whole:
        return "\n".join([
            *first,
            "from transformers import AutoModelForCausalLM, AutoTokenizer",
            'model = AutoModelForCausalLM.from_pretrained(".")',
            'tokenizer = AutoTokenizer.from_pretrained(".")',
        ])  # fmt: skip
    options = "".join(
        f", {key}={value if isinstance(value, dict) else json.dumps(value)}"
        for key, value in exported.base_options.items()
    )
    source = json.dumps(finished_run.source(run.run))
    return "\n".join([
        *first,
        "from peft import PeftModel",
        "from transformers import AutoModelForCausalLM, AutoTokenizer",
        f"base = AutoModelForCausalLM.from_pretrained({source}{options})",
        *([linear.CODE] if exported.turned else []),
        'model = PeftModel.from_pretrained(base, ".")',
        'tokenizer = AutoTokenizer.from_pretrained(".")',
    ])  # fmt: skip


def notes(run: Saved, exported: Exported) -> list[str]:
    """What a reader would not expect, of the folder and of how it differs from the run's model."""
    model, method = run.run.model, run.run.method
    sentences = [exported.compared]
    if method.name == "truncate":
        sentences.append(
            "The weights are dense, as large as the base's: rank-k products, multiplied."
        )
    elif exported.whole and run.has_adapter:
        sentences.append(
            f"The adapter is merged; on a few fixed tokens it gives {exported.logits}."
        )
    elif exported.joined_rank:
        sentences.append(
            f"The run adapted q, k, v by themselves (targets `{run.run.targets.name}`). "
            f"Here they are one adapter of rank {exported.joined_rank} on `attn.c_attn`, with "
            "zeros between the parts: the same function, for use; training that went on from it "
            f"would move the zeros. On a few fixed tokens it gives {exported.logits}."
        )
    if exported.whole and run.unfused:
        sentences.append("q, k and v were three matrices in the run; they are one `c_attn` again.")
    if exported.turned:
        sentences.append(
            "The adapter is on `nn.Linear`, and the published base has `Conv1D` in its place, "
            "which the loop above turns first: the same function. `--merge` exports a model that "
            "needs no such step."
        )
    elif exported.whole and run.turned:
        sentences.append("`Conv1D` was `nn.Linear` in the run; here it is `Conv1D` again.")
    if exported.peft_type == "UDV" and not getattr(method, "store_factors", False):
        sentences.append(
            "The factors that did not train are decomposed from the base's weights on loading, "
            "which must therefore be the same. The file holds only those that the weights leave "
            "open, of singular values that are zero or equal."
        )
    if not exported.whole and (model.asset or model.path or model.package):
        sentences.append(
            f"The base, `{base_name(run.run)}`, is a folder and on no hub: put its place on your "
            "machine into the code above. `--merge` exports a model that stands by itself."
        )
    if model.quantize != "none":
        sentences.append(
            f"The base was quantised (model.quantize={model.quantize}), as the code above does "
            "with bitsandbytes."
        )
    if exported.whole and not exported.tied:
        sentences.append("The head has a weight of its own, apart from the embedding's.")
    if model.frozen_dtype == "bf16" and method.name != "full":
        note = "held in bf16 while it was frozen"
        sentences.append(
            f"The base was {note}: its rounded values are kept here, in fp32."
            if exported.whole
            else f"The base was {note}, hence the dtype above."
        )
    for name, (had, own) in exported.config_notes.items():
        if name in ACTIVATION_FIELDS:
            sentences.append(
                f"`{name}` is `{had}`, with which it was trained, where the base has `{own}`: the "
                "same function, in one kernel."
            )
        else:
            sentences.append(
                f"It was trained with `{name}` {had:g}; the configuration has the base's {own:g}."
            )
    if set(ACTIVATION_FIELDS) & exported.base_options.keys():
        sentences.append(
            "The activation above is the base's own function in one kernel, with which it was "
            "trained; without it logits agree to rounding."
        )
    return sentences


def _before(record: Record) -> tuple[str, bool]:
    """Where a record has the base's validation, and whether adapting moved it before step 1."""
    base = get(record, "quality.base.validation")
    return (BASE if base else STEP0), base is not None and base != get(record, STEP0)


def _reached(record: Record) -> list[tuple[str, str, str, str]]:
    """Rows of text, perplexity, bits per byte and predicted tokens."""
    before, moved = _before(record)
    rows = [("validation, before", before)]
    if moved:
        rows += [("validation, step 0", STEP0)]
    rows += [("validation", "quality.validation"), ("test", "quality.test")]
    for name in get(record, "quality.also") or {}:
        rows += [(f"{name}, before", f"quality.also.{name}.before")]
        rows += [(f"{name}, step 0", f"quality.also.{name}.step0")]
        rows += [(name, f"quality.also.{name}.after")]
    table = []
    for label, path in rows:
        if (quality := get(record, path)) is not None:
            perplexity, bits = quality.get("perplexity"), quality.get("bits_per_byte")
            shown = "-" if perplexity is None else numbers.perplexity(perplexity)
            tokens = numbers.count(quality.get("num_tokens", 0))
            table.append((label, shown, "-" if bits is None else f"{bits:.3f}", tokens))
    return table


def _is_truncated(record: Record) -> bool:
    """Of a record from before the base was measured by itself: `before` is after truncation."""
    method = record["method"]
    truncates = method["name"] == "truncate" or method.get("residual") == "drop"
    return truncates and not get(record, BASE)


def _follows(record: Record, is_task: bool) -> str:
    """What a document, or a reference of pairs, is predicted after."""
    if is_task:
        return "Every reference after its prompt and an end-of-text token, the prompt not counted"
    return f"Every document by itself {FOLLOWS[get(record, 'evaluation.prefix.name') or 'eos']}"


def _scores(record: Record) -> list[str]:
    """Sentences on what was measured beside perplexity."""
    sentences = []
    written = get(record, "quality.generation") or {}
    scores = [f"{label} {written[key]:.2f}" for key, label in METRICS.items() if key in written]
    if scores:
        sentences.append(
            f"Of completions of {written['num_prompts']} test prompts: {', '.join(scores)}."
        )
    labels = get(record, "quality.classification.test")
    if labels and labels["accuracy"] is not None:
        accuracy, low, high, majority = (
            numbers.share(labels[key])
            for key in ("accuracy", "accuracy_low", "accuracy_high", "majority_accuracy")
        )
        sentences.append(
            f"Accuracy by the likelihood of the labels: {accuracy} of "
            f"{labels['num_examples']:,} test examples (95 % over examples: {low} to {high}); "
            f"always the majority label: {majority}."
        )
    if protocol := get(record, "quality.test_protocol"):
        headline = protocol["headline"]
        sentences.append(
            f"By the protocol `{protocol['name']}`: {headline.replace('_', ' ')} "
            f"{numbers.perplexity(protocol[headline])}."
        )
    return sentences


def _facts(run: Saved) -> list[tuple[str, Any]]:
    """What the run was made of, as rows of a table."""
    cfg, record = run.run, run.record
    method, train, parameters = record["method"], cfg.train, record["parameters"]
    where = record.get("environment") or {}
    hardware = where.get("hardware") or {}
    trains = bool(parameters["trainable"])
    rank = method["rank"] and f"{method['rank']}" + (
        f", alpha {method['alpha']:g}" if method["alpha"] else ""
    )
    rate = method["lr"] and (
        f"{method['lr']:g} at its peak, {train.schedule}"
        + (f" ({method['lr_from']})" if method["lr_from"] not in (None, "set") else "")
    )
    rows = {
        "base": base_name(cfg) or f"random weights: {cfg.model.architecture}",
        "revision": cfg.model.revision,
        "method": method["label"],
        "targets": method["targets"] and f"{method['targets']} ({', '.join(cfg.targets.modules)})",
        "trained alone": ", ".join(getattr(cfg.method, "train_only", ())),
        "rank": rank,
        "trained parameters": f"{parameters['trainable']:,} of {parameters['total']:,} "
        f"({numbers.percent(parameters['trainable_percent'])} %)",
        "text": f"{cfg.data.name} ({cfg.data.id or cfg.data.source}), "
        + ", ".join(f"{n} {split}" for split, n in record["data"]["num_documents"].items())
        + " documents",
        "seed": cfg.seed,
        "steps": trains and f"{train.steps} of {train.batch_tokens:,} tokens; "
        f"validation chose step {get(record, 'quality.best_step')}",
        "learning rate": trains and rate,
        "precision": f"{train.precision}; base dropout {cfg.model.dropout:g}",
        "hardware": ", ".join(
            [f"{hardware.get('cores')} cores of {hardware.get('cpu')}", *hardware.get("gpus", ())]
        ),
        "processes": where.get("processes"),
        "commit": where.get("commit"),
        "versions": ", ".join(f"{k} {v}" for k, v in (where.get("versions") or {}).items()),
    }  # fmt: skip
    return [
        (key, value)
        for key, value in rows.items()
        if value not in (None, "") and value is not False
    ]
