"""The typed form of a run's configuration; `harness.config.method_schema` has that of its method.

`harness.runs.composition` fills it in, `harness.runs.validation` says what of it cannot be,
`harness.config.naming` names it. No torch here: the controller must answer a typo in well under a
second. Checks that need the model's modules (a target that matches nothing, a rank that is too
large) are in `harness.methods`.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Any

# One dataclass per folder of conf/; conf/*.yaml hold the defaults and say what each value costs.


@dataclass(frozen=True)
class ModelConfig:
    """conf/model: which causal language model, and the choices made when it is loaded."""

    name: str  # the label in tables and run names
    asset: str | None = None  # a model that ships with the package: a folder of harness/assets
    path: str | None = None  # a local folder in transformers' format
    id: str | None = None  # a hub id
    revision: str | None = None  # git revision of the hub id
    architecture: dict[str, Any] = field(default_factory=dict)  # build from these, random weights
    tokenizer: str | None = None  # asset name, folder or hub id; null = the model's own
    dropout: float = 0.0  # probability, every dropout of the base model
    gelu: str = "fused"  # fused | as_saved; the tanh GELU as one kernel (same function)
    frozen_dtype: str = "fp32"  # fp32 | bf16: what weights that do not train are held in
    unfuse_qkv: Any = "auto"  # auto | true | false: GPT-2's c_attn as three matrices
    quantize: str = "none"  # none | int8 | nf4 | fp4: what the base's matrices are packed in
    double_quant: bool = False  # of nf4 and fp4: the scales in 8 bits, too
    compute_dtype: str = "auto"  # of nf4 and fp4: auto (train.precision) | fp32 | bf16
    linear: Any = "auto"  # auto | true | false: GPT-2's Conv1D as nn.Linear
    shape: dict[str, Any] = field(default_factory=dict)  # dimensions, for counts without files
    package: str | None = None  # an installed package that holds a GGUF file
    gguf: str | None = None  # name of the GGUF file, in the package or in path
    remote_code: str | None = None  # id or folder whose own code is to be run: the model's
    cache_dir: str = ".cache"  # what GGUF files are converted to, by content hash
    strict: bool = True  # false: weights that are missing or do not fit are drawn at random


@dataclass(frozen=True)
class DataConfig:
    """The keys of conf/data: which text, how it is split and cut into blocks."""

    name: str  # label
    source: str = ""  # a key of documents.SOURCES, or pairs
    # every source
    context_length: int = 256  # tokens a training block predicts
    validation_share: float = 0.05  # share of the documents
    test_share: float = 0.05  # share of the documents
    train_share: float = 1.0  # share of the training documents that is used
    document_chars: int | None = None  # a document's first characters; null = all of it
    split: str = "hash"  # hash | contiguous: which documents are held out, where a source has none
    cache_dir: str = ".cache"  # tokenised blocks, by content hash
    # text_files
    path: Any = None  # file, folder, glob, or a list of them
    validation_path: Any = None  # the same, of text that is validation; null = cut from path
    test_path: Any = None
    encoding: str | None = None  # of text; null = UTF-8, or what a byte-order mark says
    text_field: str = "text"  # field of records
    document_separator: str | None = None  # splits a text file; null = one document, or passages
    # hub
    id: str | None = None
    config_name: str | None = None
    revision: str | None = None
    split_names: dict[str, str] = field(default_factory=dict)  # train/validation/test -> hub split
    streaming: bool = False  # read rows as they come, without a copy of the data set on the disk
    max_rows: int | None = None  # the first rows of every split; null = all
    # docstrings
    packages: list[str] = field(default_factory=list)  # distribution names, in this order
    # pairs: `path` (a .txt of lines, or records) or `id`
    packing: str = "packed"  # packed | padded
    separator: str = "||"  # between prompt and completion of a line
    prompt_field: str = "prompt"  # field of records; a list of strings is joined by " | "
    completion_field: Any = "completion"  # field of records; of several the first not empty
    prompt_style: str = "as_is"  # as_is | e2e: name[X] as `name : X`
    record_form: str = "auto"  # auto: as the first record has it | one of harness.data.forms.FORMS
    chat_template: str = "auto"  # auto: the tokenizer's own, or else plain | plain
    loss_on: str = "assistant"  # assistant: all its turns | completion: the last one | all
    too_long: str = "refuse"  # refuse | cut | drop | window: of training, more than `context`
    # mix
    parts: dict[str, Any] | None = None  # by name: `weight` and the fields of a text
    held_out_part: str | None = None  # whose documents are validation and test; null = the first


@dataclass(frozen=True)
class TargetsConfig:
    """The keys of conf/targets: a named set of weight matrices, by role or by name."""

    name: str  # label
    modules: list[str] = field(default_factory=list)  # module name suffixes, in place of roles
    roles: list[str] = field(
        default_factory=list
    )  # of harness.config.matrix_roles, for any architecture


@dataclass(frozen=True)
class EarlyStopping:
    """train.early_stopping: training ends where validation no longer improves."""

    patience: int | None = None  # validations without improvement that end it; null = never
    min_delta: float = 0.0  # nats per token that count as an improvement


@dataclass(frozen=True)
class ParameterGroup:
    """An entry of train.groups: what trains and has this name gets another rate, or another decay.

    A name may leave out its beginning, at a dot, and is of parameters or of modules; `*` stands for
    anything but a dot. Of several entries that match, the first counts.
    """

    match: str
    lr_scale: float = 1.0  # times the rate that it would have
    weight_decay: float | None = None  # of vectors, too; null = train.weight_decay's rule


@dataclass(frozen=True)
class TrainConfig:
    """The keys of conf/train: the learning rate, its schedule, the batch and the ends."""

    steps: int = 100  # optimizer steps
    epochs: float | None = None  # passes over the training text, which become steps
    max_seconds: float | None = None  # of optimizer steps; null = no cap
    max_flops: float | None = None  # of optimizer steps; null = no cap
    early_stopping: EarlyStopping = field(default_factory=EarlyStopping)
    batch_tokens: int = 2048  # predicted tokens per optimizer step, all ranks together
    micro_batch: int = 8  # blocks per forward pass and rank; the rest is accumulation
    lr: float = (
        2e-3  # peak learning rate; in conf also `auto` and `tuned` (harness.config.rate_lookup)
    )
    rates: str | None = None  # file of conf/rates that lr=tuned reads
    lr_from: str = "set"  # how lr was found; written by the harness
    schedule: str = "cosine"  # cosine | linear | constant | wsd
    cooldown: float = 0.2  # share of the steps in which the rate of wsd falls
    warmup: float = 0.1  # share of the steps
    min_lr_ratio: float = 0.1  # share of the peak that the schedule ends at
    beta1: float = 0.9
    beta2: float = 0.999
    eps: float = 1e-8
    weight_decay: float = 0.0  # on matrices only; decoupled but for SGD
    groups: list[ParameterGroup] = field(default_factory=list)  # other rates and decays by name
    label_smoothing: float = 0.0  # share of the target spread over the vocabulary
    neftune_alpha: float | None = None  # noise on the embeddings of training; null = none
    ema: float | None = None  # decay of the weights' average, which is evaluated; null or 0 = none
    max_grad_norm: float | None = 1.0  # norm of the gradient of the mean nll; null = off
    precision: str = "fp32"  # fp32 | bf16 (autocast) | auto
    checkpointing: bool = False  # keep blocks' inputs only, run blocks again in backward
    compile: bool = False  # torch.compile of the blocks; pays on runs of thousands of steps
    threads: int | None = None  # CPU threads; null = all cores
    on_oom: str = "halve"  # halve | fail: the micro-batch where a pass does not fit
    checkpoint_interval: int | None = None  # optimizer steps; null = with every validation


@dataclass(frozen=True)
class GenerateConfig:
    """`generate` of conf/evaluate: how the prompts of the test split are completed."""

    num_beams: int = 10
    length_penalty: float = 0.8  # beams are ranked by log-likelihood / length^this
    no_repeat_ngram: int = 4  # no n-gram of a completion twice; 0 = off
    max_new_tokens: int = 64
    batch: int = 16  # prompts at a time; memory grows with it and the beams
    prompts: int | None = None  # the first so many of the test split; null = all


@dataclass(frozen=True)
class LatencyConfig:
    """`latency` of conf/evaluate: how the speed of what was saved is measured after the run."""

    prompt_tokens: int = 64  # given, or scored
    new_tokens: int = 64  # generated after them, greedily
    batch_sizes: list[int] = field(default_factory=lambda: [1, 8])  # sequences at a time
    repeats: int = 9  # of every measurement, of which the median counts


@dataclass(frozen=True)
class EvaluateConfig:
    """conf/evaluate: the sliding window, and how often validation is read."""

    context_length: int | None = None  # tokens of context at most; null = data.context_length
    stride: int | None = None  # tokens the window moves; null = context (no overlap)
    interval: int = 50  # optimizer steps between validations
    batch_tokens: int | None = None  # tokens per evaluation batch; null = by memory
    test: bool = True  # false: the test set is not even loaded, as in tuning
    validation_tokens: int | None = None  # most of validation: a fixed part of it; null = all
    test_tokens: int | None = None  # the same of test, and of each further text
    prefix: str = "auto"  # auto | bos | eos | none: the token that a document follows
    protocol: str = "documents"  # of PROTOCOLS: the test set also by a published protocol
    # Further texts, whose test split is evaluated before and after adaptation.
    also: dict[str, DataConfig] = field(default_factory=dict)
    generate: GenerateConfig | None = None  # after test, complete its prompts, and score them
    classify: str = "auto"  # auto | always | never: accuracy by the likelihood of the labels
    latency: LatencyConfig | None = None  # after the run, with the adapter attached and merged


@dataclass(frozen=True)
class LaunchConfig:
    """`launch` of conf/config.yaml: the processes of a run, and the runs of a machine."""

    num_processes: int = 1  # ranks, started by accelerate launch
    accelerate: str | None = None  # file of conf/accelerate; null = ddp on GPUs, or else cpu
    cores: int | None = None  # of a run; null = what Hydra's launcher leaves it, or all
    since: float | None = None  # seconds since 1970, set by a sweep: when it began
    pause_at: int | None = None  # optimizer step after which to stop, unfinished; null = never

    @property
    def sharded(self) -> bool:
        """Whether ranks divide one copy of the model among them (`harness.training.sharding`)."""
        return self.accelerate == "fsdp"


@dataclass(frozen=True)
class RootConfig:
    """The plain values of conf/config.yaml, which belong to no group of options."""

    experiment_name: str  # outputs/<experiment_name>/
    run_name: str | None
    outputs_dir: str
    seed: int  # moves initialisation, data order and dropout
    rerun: bool  # run again from the start, whatever is there
    retry: int  # further attempts where a run died; in a sweep, also of what failed before
    save_merged: str  # auto | always | never: the adapted model as a whole, beside the adapter
    contents: dict[
        str, str
    ]  # what it reads holds (`harness.system.contents`); written by the harness


SECTIONS: dict[str, type] = {
    "model": ModelConfig,
    "data": DataConfig,
    "targets": TargetsConfig,
    "train": TrainConfig,
    "evaluate": EvaluateConfig,
    "launch": LaunchConfig,
}


def defaults(schema: type) -> dict[str, Any]:
    """The defaults of a section's fields, in plain containers; what has none is left out."""
    values = {}
    for f in dataclasses.fields(schema):
        value = f.default
        if f.default_factory is not dataclasses.MISSING:
            value = f.default_factory()
        if value is not dataclasses.MISSING:
            values[f.name] = plain(value)
    return values


def plain(value: Any) -> Any:
    """A dataclass as a dict, also in a list; anything else as it is."""
    if isinstance(value, list):
        return [plain(item) for item in value]
    is_record = dataclasses.is_dataclass(value) and not isinstance(value, type)
    return dataclasses.asdict(value) if is_record else value
