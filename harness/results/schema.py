"""Every key of result.json: its type, its unit and what it says.

`python -m harness.results.schema_files` makes a page, a JSON schema and Python types of KEYS.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from typing import Any

# Groups of keys that come in several places.
PARTS = {
    "QUALITY": """
        perplexity | number? | per token | exp(nll_nats / num_tokens); null where it overflows
        nll_nats | number? | nats | negative log-likelihood of the whole text
        num_tokens | integer | tokens | that were predicted
        word_perplexity | number? | per word | exp(nll_nats / white-space words)
        bits_per_byte | number? | bits/byte | nll_nats / ln 2 / bytes of UTF-8
    """,
    "CATEGORIES": """
        frozen_weights | integer | bytes | parameters that do not train, and buffers
        trainable_weights | integer | bytes | parameters that train
        gradients | integer | bytes |
        optimizer_state | integer | bytes |
        activations | integer | bytes | all else that an operation makes
    """,
    "PEAK": """
        peak_bytes | integer | bytes | the most that was alive at once
        by_category.CATEGORIES | | | at that moment
        category_peaks.CATEGORIES | | | each category's own peak
        measured_by | string | | live tensors, or the allocator of a GPU
    """,
    "LATENCY": """
        *.seconds | array | seconds | of every repeat
        *.tokens_per_second | number | tokens/s | at the median; generated, or scored
        *.times_base | number | | seconds by those of base in the same repeat, median
        *.times_base_low | number? | | lower end of its 95 % interval, of 6 repeats or more
        *.times_base_high | number? | | upper end
        *.kv_cache | boolean | | of generation: whether the newest token was given alone
    """,
    "ACCURACY": """
        accuracy | number | share | of prompts whose most likely label is the right one
        accuracy_low | number | share | lower end of its 95 % interval
        accuracy_high | number | share | upper end
        macro_f1 | number | share | mean of F1 over labels
        log_loss | number | nats/example | of the right label among the labels
        majority_accuracy | number | share | of always the most frequent training label
        num_examples | integer | prompts |
        num_unseen | integer | prompts | whose completion is none of the labels
    """,
}
KEYS = """
    schema_version | integer | | of this file
    status | string | | finished, failed, interrupted, paused or running
    date | string | UTC | when it ended
    wall_seconds | number | seconds | of all attempts together
    failure.class | string | | oom, nan, killed, disk, config, interrupted or error
    failure.message | string | |
    failure.log_tail | array | | the last lines of the log
    failure.* | any | | of a rank: when
    problems | array | | what failed after the test set was read, in words
    run.name | string | | of its directory
    run.experiment | string | |
    run.seed | integer | |
    run.identity | string | SHA-256 | of all that can move its numbers
    run.configuration | string | SHA-256 | the same without the seed
    run.contents.* | string | | what it reads, by digest, commit or version
    run.command | string? | | as it was typed
    run.resumed_at | array | steps | where it went on from a checkpoint
    run.paused_at | integer? | step | where launch.pause_at has stopped it, unfinished
    run.ended_by | string? | | steps, max_seconds or early_stopping
    run.micro_batch | integer | sequences | after it was halved for lack of memory
    config | object | | the whole configuration, as conf/ has it
    train.micro_batch | integer | sequences | of a rank, as it was in the end
    train.micro_batch_asked | integer | sequences |
    train.groups | array | | of what trains: optimizer, lr_scale, weight_decay and parameters
    train.epochs | number | passes | over the training text
    model.name | string | |
    model.type | string | | as transformers names the architecture
    model.source | string? | | asset, folder, hub id or package
    model.revision | string? | | commit of the hub
    model.activation | string? | |
    model.tied_embeddings | boolean? | |
    model.causal | boolean? | | whether no prediction depends on later tokens; null: not told
    model.linear | boolean | | there (and true) where GPT-2's Conv1D were turned into nn.Linear
    model.weights.random | array | | with model.strict=false: weights that no file has
    model.weights.left_out | array | | and tensors of the files that the model does not have
    model.* | any | | further facts of the architecture
    data.name | string | |
    data.num_blocks | integer | sequences | of the training text
    data.num_documents.* | integer | documents | of each split
    data.rule.documents | string | | what a document is
    data.rule.split | string | | how documents were split
    data.rule.* | any | |
    data.duplicates.* | integer | documents | that are the same in two splits
    data.near_duplicates.* | integer | documents | of which most is in the training text
    data.further_in_training | any | | documents of further texts that are in the training text
    data.parts | object | | of a mixture: share, num_blocks and num_documents of each part
    data.too_long | object | | of pairs: sequences above data.context_length, and what was done
    data.* | any | | what else was found out while the text was read
    method.name | string | |
    method.label | string | | what tables call it
    method.r | integer? | | rank of LoRA
    method.rank | string? | | r of LoRA, k of U D V^T, or full; as tables show it
    method.alpha | number? | |
    method.lr | number? | | peak rate; null where nothing trains
    method.lr_from | string | | set, tuned, default, or what it was borrowed from
    method.targets | string? | |
    method.train | string? | | factors of U D V^T that train
    method.residual | string? | | drop or keep
    method.deterministic | boolean | | whether the seed moves nothing
    method.ranks | object | | rank of every matrix in the end, where they differ
    method.budget.initial | integer | triplets | of AdaLoRA: of all matrices at first
    method.budget.target | integer | triplets | that were to be left
    method.budget.reached | integer | triplets | that the chosen checkpoint has
    method.budget.parameters | integer | elements | of these, beside parameters.trainable
    method.start_passes | integer | | forward passes over training text before step 0
    method.trained | array | | weights outside of adapters that train
    method.tied | array | | sentences on tied weights
    method.* | any | | facts of the method: energy kept, seconds of an SVD
    parameters.base | integer | elements | of the base
    parameters.total | integer | elements | with adapters
    parameters.trainable | integer | elements |
    parameters.trainable_percent | number | % | of total
    parameters.factored | integer? | elements | with U, D and V in place of each W
    memory.PEAK | | | of a training step, or of evaluation where nothing trains
    memory.phase | string | | train or evaluate
    memory.evaluate.PEAK | | | of evaluation
    memory.process_peak_bytes | integer? | bytes | resident, of the whole process
    memory.process_peak_by_phase.* | integer? | bytes | resident, until the end of each phase
    predicted | object? | | what harness plan says of it; null where only a run can tell
    predicted.peak_bytes | integer | bytes | of a training step
    predicted.by_category.CATEGORIES | | |
    predicted.evaluate_peak_bytes | integer? | bytes |
    predicted.train_flops_per_token | number | FLOPs |
    predicted.evaluate_flops_per_token | number | FLOPs |
    predicted.* | any | |
    speed.tokens_per_second | number? | tokens/s | of optimizer steps after the first
    speed.train_seconds | number | seconds | of optimizer steps
    speed.evaluate_seconds | number | seconds |
    speed.setup_seconds | number | seconds | before the first step
    speed.steps | integer | steps | that were taken
    speed.tokens | integer | tokens | that were trained on
    speed.start_tokens | integer | tokens | of training text, read before step 0
    speed.start_seconds | number | seconds | that it took
    speed.start_flops | number? | FLOPs | and these; null where they are not known
    speed.gflops_per_second | number | GFLOP/s |
    costs.adapter_bytes | integer | bytes | of adapter/, or else model/'s own files
    costs.train_flops | number | FLOPs | of all optimizer steps, as predicted counts a token
    costs.evaluate_flops | number | FLOPs | of evaluation, likewise
    costs.energy.of | array | | what is counted: CPU packages, their memory, GPUs
    costs.energy.left_out | object | | RAPL or NVML -> why it counts nothing
    costs.energy.train_joules | number | joules | of optimizer steps
    costs.energy.evaluate_joules | number | joules | of evaluation
    costs.load_seconds | number? | seconds | of adapter/ onto a base in memory, or of model/
    costs.failure | string | | why evaluate.latency has measured nothing
    costs.latency.prompt_tokens | integer | tokens | given, or scored
    costs.latency.new_tokens | integer | tokens | generated after them
    costs.latency.repeats | integer | | of each measurement
    costs.latency.precision | string | | fp32 or bf16 (autocast), as the run's
    costs.latency.threads | integer | | of the CPU
    costs.latency.not_merged | string? | | why there is no merged model
    costs.latency.generate.*.LATENCY | | | batch_N; base, attached, fused or merged
    costs.latency.score.*.LATENCY | | | the same
    quality.best_step | integer | step | the checkpoint that validation chose
    quality.base.validation.QUALITY | | | of the base
    quality.step0.validation.QUALITY | | | of the adapted model before its first step
    quality.validation.QUALITY | | | of the chosen checkpoint
    quality.test.QUALITY | | | of the same checkpoint
    quality.quantization.unquantized.QUALITY | | | validation, by the base before model.quantize
    quality.quantization.quantized.QUALITY | | | by the quantised base, as quality.base
    quality.quantization.adapted.QUALITY | | | by it with the adapter, as quality.validation
    quality.quantization.merged_dequantized.QUALITY | | | merged into its weights, unpacked
    quality.quantization.merged_original.QUALITY | | | merged into the base before model.quantize
    quality.quantization.not_merged | string | | why the adapter cannot be merged
    quality.also.*.before.QUALITY | | | the base on a further text
    quality.also.*.step0.QUALITY | | | the adapted model before its first step, where it is another
    quality.also.*.after.QUALITY | | | the chosen checkpoint
    quality.test_protocol.* | any | | the test set by a published protocol
    quality.generation.bleu | number | | of the test set's completions
    quality.generation.nist | number | |
    quality.generation.meteor | number | |
    quality.generation.rouge_l | number | |
    quality.generation.cider | number | |
    quality.generation.skipped | object | | metric -> why it is missing
    quality.generation.num_prompts | integer | prompts |
    quality.generation.num_tokens | integer | tokens | that were written
    quality.generation.seconds | number | seconds |
    quality.generation.tokens_per_second | number? | tokens/s |
    quality.classification.labels | array | | completions of the training text
    quality.classification.majority | string | | the most frequent one
    quality.classification.validation.ACCURACY | | |
    quality.classification.test.ACCURACY | | |
    evaluation.context_length | integer | tokens | of the window
    evaluation.stride | integer | tokens |
    evaluation.prefix.name | string | | the token that documents follow: bos, eos or none
    evaluation.prefix.id | integer? | |
    evaluation.tokenizer | string | | digest
    evaluation.part.* | any | | of a text that is read in part: which
    environment.commit | string? | | of the harness
    environment.versions.* | string | |
    environment.hardware.cpu | string | |
    environment.hardware.cores | integer | | that the process may use
    environment.hardware.threads | integer | |
    environment.hardware.gpus | array | |
    environment.hardware.memory_bytes | integer | bytes |
    environment.processes | integer | | ranks
    environment.sharded | boolean | | whether they divide one model
    environment.runs_beside | integer? | runs | on this machine at once; null: not counted
    saved | array | | folders: adapter, model
    saved_check.nats_per_token | number? | nats/token | saved model less the evaluated one
    saved_check.failure | string? | |
"""
STATUSES = ("finished", "failed", "interrupted", "paused", "running")
JSON_TYPES = {
    "string": str, "integer": int, "number": (int, float), "boolean": bool, "array": list,
    "object": dict,
}  # fmt: skip


@dataclass(frozen=True)
class Key:
    """A key of result.json by its dotted path; `*` stands for any one name."""

    path: str
    type: str  # one of JSON_TYPES, or any
    nullable: bool
    unit: str
    what: str


@cache
def every_key() -> tuple[Key, ...]:
    """Return every key of result.json, in the order of conf/RESULT.md."""
    return tuple(expanded(KEYS))


def expanded(table: str, prefix: str = "") -> Iterator[Key]:
    """Yield the keys of a table like KEYS, with those of PARTS in their places."""
    for line in filter(None, map(str.strip, table.splitlines())):
        path, kind, unit, what = (part.strip() for part in line.split("|", 3))
        head, _, last = path.rpartition(".")
        if last in PARTS:
            for key in expanded(PARTS[last], f"{prefix}{head}."):
                yield key if key.what or not what else Key(**(vars(key) | {"what": what}))
        else:
            yield Key(f"{prefix}{path}", kind.rstrip("?"), kind.endswith("?"), unit, what)


def problems(record: dict[str, Any]) -> list[str]:
    """What of a result.json is no key of KEYS, or of another type; empty where all is well."""
    wrong = list(_problems(record, ""))
    if record.get("status") not in STATUSES:
        wrong.append(f"status is {record.get('status')!r}, expected one of {', '.join(STATUSES)}")
    return wrong


def _problems(value: dict[str, Any], prefix: str) -> Iterator[str]:
    for name, inner in value.items():
        path = f"{prefix}{name.replace('.', '/')}"  # a name of one part, as a text's in contents
        key = _find(path)
        has_inside = any(
            k.path.startswith(f"{path}.") or _is_below(k.path, path) for k in every_key()
        )
        if isinstance(inner, dict) and has_inside and (key is None or key.type == "object"):
            yield from _problems(inner, f"{path}.")
        elif key is None:
            yield f"{path} is no key of result.json"
        elif inner is None:
            if not key.nullable and key.type != "any":
                yield f"{path} is null, expected {key.type}"
        elif key.type != "any":
            right = isinstance(inner, JSON_TYPES[key.type])  # type: ignore[arg-type]  # types and tuples of them
            if not right or (isinstance(inner, bool) and key.type != "boolean"):
                yield f"{path} is {type(inner).__name__}, expected {key.type}"


def _find(path: str) -> Key | None:
    """The key of a path: by name before by `*`."""
    keys = [key for key in every_key() if _matches(key.path, path)]
    return min(keys, key=lambda key: key.path.count("*"), default=None)


def _matches(pattern: str, path: str) -> bool:
    parts, names = pattern.split("."), path.split(".")
    return len(parts) == len(names) and all(
        part in ("*", name) for part, name in zip(parts, names, strict=True)
    )


def _is_below(pattern: str, path: str) -> bool:
    """Whether a pattern has keys below a path."""
    return _matches(".".join(pattern.split(".")[: path.count(".") + 1]), path) and (
        pattern.count(".") > path.count(".")
    )


if __name__ == "__main__":
    print("python -m harness.results.schema is now: python -m harness.results.schema_files")
    importlib.import_module("harness.results.schema_files").main()  # which imports this one
