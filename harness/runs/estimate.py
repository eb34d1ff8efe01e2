"""What a run will need, before it runs: parameters, memory by category, FLOPs.

No weights are loaded, no text is tokenised, and no network is needed: the training step itself runs
on fake tensors, which have shapes and no contents, and its live tensors are followed as in a real
run. `harness plan` prints it.
"""

from __future__ import annotations

import hashlib
import json
import logging
import statistics
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import nn
from torch.utils.flop_counter import (
    flop_registry,
    sdpa_backward_flop_count,
    sdpa_flop_count,
)
from transformers import PretrainedConfig

from harness import methods
from harness.config.errors import ConfigError
from harness.config.paths import PACKAGE
from harness.config.run_config import RunConfig
from harness.data import token_data
from harness.evaluation import sliding_window as evaluate
from harness.methods import adalora, initialisation, objective, peft_adapter, positions
from harness.models import pretrained, quantized
from harness.models.loss import NextToken
from harness.results import environment, numbers
from harness.system.atomic import write_atomically
from harness.system.internals import internal, prepared_models_kept
from harness.training import loop as train
from harness.training import memory, optimizers
from harness.training.averaging import Average
from harness.training.neftune import Noise

FakeTensorMode: Any = internal("FakeTensorMode")
TorchDispatchMode: Any = internal("TorchDispatchMode")

log = logging.getLogger(__name__)

aten = torch.ops.aten
Shape = tuple[int, int]  # of a batch: rows, tokens


def _in_place_product(out: Any, a: Any, b: Any, *_: Any, **__: Any) -> int:
    return int(2 * a.shape[0] * a.shape[1] * b.shape[1])


def _packed_product(a: Any, b: Any, shape: Any, *_: Any, **__: Any) -> int:
    return int(2 * (a.numel() // a.shape[-1]) * shape[0] * shape[1])


def _scaled_product(a: Any, b: Any, *_: Any, **__: Any) -> int:
    return int(2 * (a.numel() // a.shape[-1]) * b.shape[0] * b.shape[1])


def _attention(q: Any, k: Any, v: Any, *_: Any, **__: Any) -> int:
    return int(sdpa_flop_count(q.shape, k.shape, v.shape))


def _attention_backward(grad: Any, q: Any, k: Any, v: Any, *_: Any, **__: Any) -> int:
    return int(sdpa_backward_flop_count(grad.shape, q.shape, k.shape, v.shape))


# Formulas that torch lacks; of attention the masked half counts too. They are kept here: torch's
# own table belongs to the whole process, and takes one formula for an operation.
FORMULAS: dict[Any, Callable[..., int]] = {
    aten.addmm_: _in_place_product,
    aten._scaled_dot_product_flash_attention_for_cpu: _attention,
    aten._scaled_dot_product_flash_attention_for_cpu_backward: _attention_backward,
}
# Those of bitsandbytes, which is there only where it is used.
BY_NAME: dict[str, Callable[..., int]] = {
    "bitsandbytes.gemm_4bit": _packed_product,
    "bitsandbytes.int8_scaled_mm": _scaled_product,
}


@dataclass(frozen=True)
class Prediction:
    """What a run will need; bytes, and FLOPs a token (a multiply-add is two)."""

    parameters: pretrained.Parameters
    train: dict[str, Any]  # as memory.measured reports it; empty where nothing trains
    evaluate: dict[str, Any]
    train_flops_per_token: float
    evaluate_flops_per_token: float

    def __repr__(self) -> str:
        parts = (self.train or self.evaluate)["by_category"]
        sizes = ", ".join(f"{name} {numbers.mib(size)}" for name, size in parts.items() if size)
        flops = self.train_flops_per_token or self.evaluate_flops_per_token
        return (
            f"Prediction({numbers.count(self.parameters.trainable)} of "
            f"{numbers.count(self.parameters.total)} parameters "
            f"train; {numbers.mib(self.peak_bytes)} MiB at peak: {sizes}; "
            f"{flops / 1e6:,.1f} MFLOP a token)"
        )

    @property
    def peak_bytes(self) -> int:
        """As a result's memory.peak_bytes: of a training step, or of evaluation without one."""
        return int((self.train or self.evaluate)["peak_bytes"])

    @property
    def needed_bytes(self) -> int:
        """The most of any phase, which the device must have."""
        return max(self.peak_bytes, int(self.evaluate["peak_bytes"]))

    def as_record(self) -> dict[str, Any]:
        """Return the prediction as result.json has it, beside what was measured."""
        main = self.train or self.evaluate
        return {
            "peak_bytes": self.peak_bytes,
            "by_category": main["by_category"],
            "evaluate_peak_bytes": self.evaluate["peak_bytes"],
            "train_flops_per_token": self.train_flops_per_token,
            "evaluate_flops_per_token": self.evaluate_flops_per_token,
        }


def setting(run: RunConfig) -> tuple[RunConfig, PretrainedConfig, Accelerator]:
    """The run without the files that it would load, its model's shape, and this machine.

    Sets torch's threads and Accelerate's state, as the run's own process would.

    Raises:
        ConfigError: the shape is not known without files, or the context is too long for it.
    """
    run = pretrained.without_files(run)
    model_config = pretrained.load_config(run.model)
    positions.check_context(run, pretrained.max_context(model_config))
    torch.set_num_threads(run.train.threads or environment.usable_cores())
    internal("AcceleratorState._reset_state")(reset_partial_state=True)
    mixed = environment.mixed_precision(environment.precision_of(run))
    return run, model_config, Accelerator(mixed_precision=mixed)


def predict(
    run: RunConfig,
    model_config: PretrainedConfig,
    accelerator: Accelerator,
    evaluated: Shape | None = None,
) -> Prediction | None:
    """Run one training step and one evaluation batch of `run` on fake tensors, and follow them.

    The step is the one that a run follows: the second, or the only one, whose backward pass has no
    optimizer state beside it. `evaluated` is the shape of the evaluation batch; None stands for a
    full one, as a long text makes. `accelerator` gives the device and the precision. An LSTM's
    kernel has a workspace that its fake counterpart does not show: its peak is predicted up to a
    sixth too low. None for what only a run can tell: a rank by energy, ranks that EVA moves,
    methods that read the weights to be built, or look at values, which fake tensors have not; and
    where ranks divide the model among them, which no fake tensor does; and for
    optimizer=adamw_8bit, whose kernels look at values.
    """
    if getattr(run.method, "energy", None) is not None or run.launch.sharded:
        return None
    if initialisation.moves_ranks(run):  # EVA, by what the text is like
        return None
    try:
        return _followed(run, model_config, accelerator, evaluated or full_batch(run, model_config))
    except peft_adapter.NeedsWeightsError:
        return None
    except ConfigError:
        raise
    except Exception:  # of any kind, from within a model or an adapter of others
        log.info("no prediction", exc_info=True)
        return None


def _followed(
    run: RunConfig, model_config: PretrainedConfig, accelerator: Accelerator, evaluated: Shape
) -> Prediction:
    """The prediction of a run that can be followed.

    A base of quantised weights is followed as if it were not, and has its files' bytes: beyond
    these its products need up to 6 % more (measured: torchao's 8 bits), for weights unpacked.
    """
    packing = None
    if quantized.packing_of(model_config):
        packing = quantized.stored_bytes(pretrained.folder_of(run.model))
    model = methods.check(pretrained.on_meta(run, model_config), run)
    counted = pretrained.count_parameters(model)
    pretrained.checkpoint_activations(model, run.train)
    bare = NextToken(model, run.train.label_smoothing)
    on_training: dict[str, Any] = {}
    on_evaluation: dict[str, Any] = {}
    evaluate_flops = train_flops = 0.0
    # PEFT keeps the ids of its prompts outside of parameters and buffers: these stay real.
    with FakeTensorMode(allow_non_fake_inputs=True):
        _as_fake(bare, accelerator.device)
        with prepared_models_kept(accelerator):
            prepared = accelerator.prepare_model(bare, device_placement=False, evaluation_mode=True)
        optimizer = None
        held: list[torch.Tensor] = []
        trainable = [p for p in model.parameters() if p.requires_grad]
        if run.train.steps and trainable:
            prepared.train()
            optimizer = optimizers.make_optimizer(model, run.train, run.optimizer)
            optimizers.start(optimizer)
            stepped = adalora.after_step(model, run, cuts=False)
            if run.train.steps > 1:  # a step that makes the optimizer's state
                for parameter in trainable:
                    parameter.grad = torch.zeros_like(parameter)
                optimizer.step()
                if stepped:
                    stepped(0)
                optimizer.zero_grad()
            micro, length = run.train.micro_batch, run.data.context
            count = run.train.batch_tokens // (micro * length)
            # With two micro-batches the second finds gradients there, as all further ones do.
            followed = min(count, 2)
            num_tokens = followed * micro * length
            penalty = objective.penalty(model, run)
            average = Average(model, run.train.ema) if run.train.ema else None
            held = average.held() if average else []
            if run.train.neftune_alpha:
                Noise(model, run.train.neftune_alpha, run.seed)
            with memory.measured(model, optimizer, on_training, held), Flops() as flops:
                batches = [_batch(run, micro, length) for _ in range(count)]  # all are held
                train.accumulate(prepared, batches[:followed], num_tokens, accelerator, penalty)
                train.apply(
                    model, optimizer, accelerator, run.train, stepped and partial(stepped, 1)
                )
                if average:
                    average.update()
            train_flops = flops.total / num_tokens
        prepared.eval()  # after a step, if there is one: the optimizer's state is there
        ids = torch.zeros(evaluated, dtype=torch.int64)
        ids = ids.to(accelerator.device)
        with (
            optimizers.evaluation(optimizer),
            torch.no_grad(),
            memory.measured(model, optimizer, on_evaluation, held),
            Flops() as flops,
        ):
            prepared(ids, ids)
        evaluate_flops = flops.total / ids.numel()
    for phase in filter(None, (on_training, on_evaluation)):
        phase["peak_bytes"] += (kept := library_bytes(accelerator.device))
        phase["by_category"]["activations"] += kept
        if packing is not None:
            phase["peak_bytes"] += packing - phase["by_category"]["frozen_weights"]
            phase["by_category"]["frozen_weights"] = packing
    return Prediction(counted, on_training, on_evaluation, train_flops, evaluate_flops)


def _batch(run: RunConfig, rows: int, length: int) -> token_data.Batch:
    """A training batch of zeros, in tensors as `token_data.batch_of` makes them."""
    if run.data.source != "pairs":
        ids = torch.zeros(rows, length + 1, dtype=torch.int64)
        return token_data.Batch(ids[:, :-1], ids[:, 1:], None)
    inputs, targets, positions = (torch.zeros(rows, length, dtype=torch.int64) for _ in range(3))
    packed = run.data.packing == "packed"
    return token_data.Batch(inputs, targets, positions if packed else None)


def full_batch(run: RunConfig, model_config: PretrainedConfig) -> Shape:
    """The evaluation batch of a text that fills it with windows of the whole context."""
    tokens, context = _batch_tokens(run, model_config), run.evaluation_context
    return max(1, tokens // context), context


def _batch_tokens(run: RunConfig, model_config: PretrainedConfig) -> int:
    return run.evaluate.batch_tokens or evaluate.batch_tokens(model_config)


def batches_of(
    run: RunConfig,
    model_config: PretrainedConfig,
    num_tokens: list[int],
    batching: str = evaluate.PADDED,
) -> list[Shape]:
    """The evaluation batches of a text with documents of `num_tokens`; none of an empty one."""
    context = run.evaluation_context
    stride, tokens = run.evaluate.stride or context, _batch_tokens(run, model_config)
    return evaluate.batch_shapes(num_tokens, context, stride, tokens, batching)


def largest_batch(run: RunConfig, model_config: PretrainedConfig) -> Shape:
    """The largest evaluation batch that `run` will make of its held-out texts, before it runs.

    Texts that are on this machine are read, and tokenised where the tokenizer is, too; without it a
    document is taken for as many tokens as it has bytes. A full batch stands for text that is not
    here (a hub's), or is long, and for a published protocol, which joins documents. `run` is the
    run as composed, with the files that `setting` leaves out.
    """
    full = full_batch(run, model_config)
    if run.evaluate.protocol != "documents":
        return full
    splits = ("validation", "test") if run.evaluate.test else ("validation",)
    asked = [(run.data, splits), *((cfg, ("test",)) for cfg in run.evaluate.also.values())]
    tokenizer = pretrained.tokenizer_at_hand(run.model, model_config)
    found: list[Shape] = []
    for cfg, wanted in asked:
        for num_tokens in token_data.held_out_sizes(
            cfg, wanted, tokenizer, token_data.most_tokens(run)
        ):
            if num_tokens is None:
                return full
            found += batches_of(run, model_config, num_tokens)
    return max(found, key=lambda shape: (shape[0] * shape[1], shape), default=full)


def spent_flops(
    run: RunConfig, state: train.State, predicted: dict[str, Any] | None
) -> dict[str, float]:
    """FLOPs of all optimizer steps, and of validation, test and further texts; none if unknown.

    By the FLOPs of a token that `predicted` counts, and the positions that were computed: padding
    and prompts, which nothing is predicted for, cost as much. An evaluated token counts as one of
    the largest batch.
    """
    if predicted is None:
        return {}
    steps = state.step * run.train.batch_tokens
    return {
        "train_flops": predicted["train_flops_per_token"] * steps,
        "evaluate_flops": predicted["evaluate_flops_per_token"] * state.evaluated_positions,
    }


# What moves no byte: rates, seeds, the text itself. Sweeps over these ask for one prediction.
_NO_MATTER = {
    "train": ("lr", "lr_from", "rates", "schedule", "warmup", "final_lr", "beta1", "beta2", "eps",
              "weight_decay", "steps", "threads", "on_oom", "checkpoint_every", "epochs",
              "max_seconds", "max_flops", "early_stopping", "groups", "cooldown"),
    "evaluate": ("stride", "every"),
    "method": ("label",),
}  # fmt: skip


def recorded(
    run: RunConfig,
    model_config: PretrainedConfig,
    accelerator: Accelerator,
    evaluated: Shape | None = None,
) -> dict[str, Any] | None:
    """`predict` as result.json records it, from data.cache_dir if this code has made it before.

    `run` is the run as it was done: with the micro-batch that fitted.
    """
    values: dict[str, Any] = {
        k: v for k, v in vars(run).items() if k in ("model", "targets", "optimizer")
    }
    for section, names in _NO_MATTER.items():
        fields = vars(getattr(run, section))
        values[section] = {k: v for k, v in fields.items() if k not in names}
    values["steps"] = min(run.train.steps, 2)  # none, the first alone, or one after it
    values["evaluated"] = evaluated or full_batch(run, model_config)
    values["blocks"] = [run.data.context, run.data.source == "pairs" and run.data.packing]
    values["on"] = [str(accelerator.device), accelerator.num_processes, environment.versions()]
    values["sharded"] = run.launch.sharded
    digest = hashlib.sha256(repr(values).encode())
    for source in sorted(PACKAGE.rglob("*.py")):
        digest.update(source.read_bytes())
    path = Path(run.data.cache_dir) / "predictions" / f"{digest.hexdigest()[:32]}.json"
    with suppress(OSError, ValueError):
        return dict(json.loads(path.read_text("utf-8")))
    found = predict(run, model_config, accelerator, evaluated)
    if found is None:
        return None
    with suppress(OSError):  # a disk without room costs the next run half a second
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, json.dumps(found.as_record()))
    return found.as_record()


class Flops(TorchDispatchMode):
    """Counts FLOPs by formula. FlopCounterMode does, too, and keeps tensors alive."""

    def __init__(self) -> None:
        super().__init__()
        self.total = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        operation = func._overloadpacket
        formula = FORMULAS.get(operation) or flop_registry.get(operation)
        if formula := formula or BY_NAME.get(str(operation)):
            self.total += formula(*args, **(kwargs or {}), out_val=result)
        return result


def library_bytes(device: torch.device) -> int:
    """What cuBLAS takes from torch's allocator for itself once it has multiplied.

    Two workspaces of torch's default size (its notes on CUBLAS_WORKSPACE_CONFIG): beyond the live
    tensors an H100 took these 64 MiB, and 3 to 15 MiB of rounding (experiments/bench/prediction).
    """
    if device.type != "cuda":
        return 0
    hopper = torch.cuda.get_device_capability(device)[0] >= 9
    return 2 * (32 * 2**20 if hopper else 4096 * 2 * 1024 + 16 * 8 * 1024)


def _as_fake(model: nn.Module, device: torch.device) -> None:
    """Put a model of the meta device on a fake `device`, tied parameters tied, in place."""
    made: dict[int, Any] = {}

    def fake(tensor: torch.Tensor) -> Any:
        if id(tensor) not in made:
            made[id(tensor)] = torch.empty_strided(
                tensor.shape, tensor.stride(), dtype=tensor.dtype, device=device
            )
        return made[id(tensor)]

    for module in model.modules():
        for store in (module._parameters, module._buffers):
            for name, tensor in store.items():
                if tensor is None:
                    continue
                if isinstance(tensor, nn.Parameter) and id(tensor) not in made:
                    plain = nn.Parameter(fake(tensor), requires_grad=tensor.requires_grad)
                    made[id(tensor)] = quantized.as_packed(plain, tensor, fake)
                store[name] = fake(tensor)


def gemm_rate(run: RunConfig, width: int, precision: str, seconds: float = 2.0) -> float:
    """FLOPs a second of this machine's matrix products, in the shape of the run's MLP: a median."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    tokens = run.train.micro_batch * run.data.context
    x = torch.randn(tokens, width, dtype=dtype, device=device)
    w = torch.randn(width, 4 * width, dtype=dtype, device=device)
    rates: list[float] = []
    stop = time.perf_counter() + seconds
    while time.perf_counter() < stop or len(rates) < 3:
        start = time.perf_counter()
        torch.mm(x, w)
        if device == "cuda":
            torch.cuda.synchronize()
        rates.append(2 * tokens * w.numel() / (time.perf_counter() - start))
    return statistics.median(rates[1:])
