"""Types of result.json, made by `python -m harness.results.schema_files`.

What a run did not come to is not there. A mapping that also has free names, as `method`
has, is read at these by `run_record.get`.
"""

from __future__ import annotations

from typing import Any, TypedDict


class TextQuality(TypedDict, total=False):
    """The same in several places of result.json."""

    perplexity: float | None
    nll_nats: float | None
    num_tokens: int
    word_perplexity: float | None
    bits_per_byte: float | None


class Categories(TypedDict, total=False):
    """The same in several places of result.json."""

    frozen_weights: int
    trainable_weights: int
    gradients: int
    optimizer_state: int
    activations: int


class Peak(TypedDict, total=False):
    """The same in several places of result.json."""

    peak_bytes: int
    by_category: Categories
    category_peaks: Categories
    measured_by: str


class Latency(TypedDict, total=False):
    """The same in several places of result.json."""

    seconds: list[Any]
    tokens_per_second: float
    times_base: float
    times_base_low: float | None
    times_base_high: float | None
    kv_cache: bool


class Accuracy(TypedDict, total=False):
    """The same in several places of result.json."""

    accuracy: float
    accuracy_low: float
    accuracy_high: float
    macro_f1: float
    log_loss: float
    majority_accuracy: float
    num_examples: int
    num_unseen: int


# `failure` of result.json.
Failure = TypedDict(
    "Failure",
    {"class": str, "message": str, "log_tail": list[Any]},
    total=False,
)


class Run(TypedDict, total=False):
    """`run` of result.json."""

    name: str
    experiment: str
    seed: int
    identity: str
    configuration: str
    contents: dict[str, str]
    command: str | None
    resumed_at: list[Any]
    paused_at: int | None
    ended_by: str | None
    micro_batch: int


class Train(TypedDict, total=False):
    """`train` of result.json."""

    micro_batch: int
    micro_batch_asked: int
    groups: list[Any]
    epochs: float


class ModelWeights(TypedDict, total=False):
    """`model.weights` of result.json."""

    random: list[Any]
    left_out: list[Any]


class Model(TypedDict, total=False):
    """`model` of result.json."""

    name: str
    type: str
    source: str | None
    revision: str | None
    activation: str | None
    tied_embeddings: bool | None
    causal: bool | None
    linear: bool
    weights: ModelWeights


class DataRule(TypedDict, total=False):
    """`data.rule` of result.json."""

    documents: str
    split: str


class Data(TypedDict, total=False):
    """`data` of result.json."""

    name: str
    num_blocks: int
    num_documents: dict[str, int]
    rule: DataRule
    duplicates: dict[str, int]
    near_duplicates: dict[str, int]
    further_in_training: Any
    parts: dict[str, Any]
    too_long: dict[str, Any]


class MethodBudget(TypedDict, total=False):
    """`method.budget` of result.json."""

    initial: int
    target: int
    reached: int
    parameters: int


class Method(TypedDict, total=False):
    """`method` of result.json."""

    name: str
    label: str
    r: int | None
    rank: str | None
    alpha: float | None
    lr: float | None
    lr_from: str
    targets: str | None
    train: str | None
    residual: str | None
    deterministic: bool
    ranks: dict[str, Any]
    budget: MethodBudget
    start_passes: int
    trained: list[Any]
    tied: list[Any]


class Parameters(TypedDict, total=False):
    """`parameters` of result.json."""

    base: int
    total: int
    trainable: int
    trainable_percent: float
    factored: int | None


class Memory(TypedDict, total=False):
    """`memory` of result.json."""

    peak_bytes: int
    by_category: Categories
    category_peaks: Categories
    measured_by: str
    phase: str
    evaluate: Peak
    process_peak_bytes: int | None
    process_peak_by_phase: dict[str, int | None]


class Predicted(TypedDict, total=False):
    """`predicted` of result.json."""

    peak_bytes: int
    by_category: Categories
    evaluate_peak_bytes: int | None
    train_flops_per_token: float
    evaluate_flops_per_token: float


class Speed(TypedDict, total=False):
    """`speed` of result.json."""

    tokens_per_second: float | None
    train_seconds: float
    evaluate_seconds: float
    setup_seconds: float
    steps: int
    tokens: int
    start_tokens: int
    start_seconds: float
    start_flops: float | None
    gflops_per_second: float


class CostsEnergy(TypedDict, total=False):
    """`costs.energy` of result.json."""

    of: list[Any]
    left_out: dict[str, Any]
    train_joules: float
    evaluate_joules: float


class CostsLatency(TypedDict, total=False):
    """`costs.latency` of result.json."""

    prompt_tokens: int
    new_tokens: int
    repeats: int
    precision: str
    threads: int
    not_merged: str | None
    generate: dict[str, dict[str, Latency]]
    score: dict[str, dict[str, Latency]]


class Costs(TypedDict, total=False):
    """`costs` of result.json."""

    adapter_bytes: int
    train_flops: float
    evaluate_flops: float
    energy: CostsEnergy
    load_seconds: float | None
    failure: str
    latency: CostsLatency


class QualityBase(TypedDict, total=False):
    """`quality.base` of result.json."""

    validation: TextQuality


class QualityQuantization(TypedDict, total=False):
    """`quality.quantization` of result.json."""

    unquantized: TextQuality
    quantized: TextQuality
    adapted: TextQuality
    merged_dequantized: TextQuality
    merged_original: TextQuality
    not_merged: str


class QualityAlso(TypedDict, total=False):
    """`quality.also.*` of result.json."""

    before: TextQuality
    step0: TextQuality
    after: TextQuality


class QualityGeneration(TypedDict, total=False):
    """`quality.generation` of result.json."""

    bleu: float
    nist: float
    meteor: float
    rouge_l: float
    cider: float
    skipped: dict[str, Any]
    num_prompts: int
    num_tokens: int
    seconds: float
    tokens_per_second: float | None


class QualityClassification(TypedDict, total=False):
    """`quality.classification` of result.json."""

    labels: list[Any]
    majority: str
    validation: Accuracy
    test: Accuracy


class Quality(TypedDict, total=False):
    """`quality` of result.json."""

    best_step: int
    base: QualityBase
    step0: QualityBase
    validation: TextQuality
    test: TextQuality
    quantization: QualityQuantization
    also: dict[str, QualityAlso]
    test_protocol: dict[str, Any]
    generation: QualityGeneration
    classification: QualityClassification


class EvaluationPrefix(TypedDict, total=False):
    """`evaluation.prefix` of result.json."""

    name: str
    id: int | None


class Evaluation(TypedDict, total=False):
    """`evaluation` of result.json."""

    context_length: int
    stride: int
    prefix: EvaluationPrefix
    tokenizer: str
    part: dict[str, Any]


class EnvironmentHardware(TypedDict, total=False):
    """`environment.hardware` of result.json."""

    cpu: str
    cores: int
    threads: int
    gpus: list[Any]
    memory_bytes: int


class Environment(TypedDict, total=False):
    """`environment` of result.json."""

    commit: str | None
    versions: dict[str, str]
    hardware: EnvironmentHardware
    processes: int
    sharded: bool
    runs_beside: int | None


class SavedCheck(TypedDict, total=False):
    """`saved_check` of result.json."""

    nats_per_token: float | None
    failure: str | None


class Record(TypedDict, total=False):
    """The whole of result.json."""

    schema_version: int
    status: str
    date: str
    wall_seconds: float
    failure: Failure
    problems: list[Any]
    run: Run
    config: dict[str, Any]
    train: Train
    model: Model
    data: Data
    method: Method
    parameters: Parameters
    memory: Memory
    predicted: Predicted | None
    speed: Speed
    costs: Costs
    quality: Quality
    evaluation: Evaluation
    environment: Environment
    saved: list[Any]
    saved_check: SavedCheck
