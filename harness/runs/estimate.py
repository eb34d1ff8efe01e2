"""What a run will need, before it runs: parameters, memory by category, FLOPs.

No weights are loaded, no text is tokenised, and no network is needed: the training step itself runs
on fake tensors, which have shapes and no contents, and its live tensors are followed as in a real
run. `harness plan` prints it.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from accelerate import Accelerator
from torch import nn
from transformers import PretrainedConfig

from harness import methods
from harness.config.errors import ConfigError
from harness.config.run_config import RunConfig
from harness.data import token_data
from harness.methods import adalora, initialisation, objective, peft_adapter, positions
from harness.models import model_files, model_size, pretrained, quantized, transformer_blocks
from harness.models.next_token import NextToken
from harness.results import environment, numbers
from harness.runs.evaluation_batches import Shape, full_batch
from harness.runs.flops import Flops
from harness.system.internals import internal, prepared_models_kept
from harness.training import loop as train
from harness.training import memory, optimizers
from harness.training.averaging import Average
from harness.training.neftune import Noise

FakeTensorMode: Any = internal("FakeTensorMode")

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Prediction:
    """What a run will need; bytes, and FLOPs a token (a multiply-add is two)."""

    parameters: model_size.Parameters
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
        packing = quantized.stored_bytes(model_files.folder_of(run.model))
    model = methods.check(pretrained.on_meta(run, model_config), run)
    counted = model_size.count_parameters(model)
    transformer_blocks.checkpoint_activations(model, run.train)
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
        averages: list[torch.Tensor] = []
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
            micro, length = run.train.micro_batch, run.data.context_length
            count = run.train.batch_tokens // (micro * length)
            # With two micro-batches the second finds gradients there, as all further ones do.
            followed = min(count, 2)
            num_tokens = followed * micro * length
            penalty = objective.penalty(model, run)
            average = Average(model, run.train.ema) if run.train.ema else None
            averages = average.held() if average else []
            if run.train.neftune_alpha:
                Noise(model, run.train.neftune_alpha, run.seed)
            with memory.measured(model, optimizer, on_training, averages), Flops() as flops:
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
            memory.measured(model, optimizer, on_evaluation, averages),
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
    fakes: dict[int, Any] = {}

    def fake(tensor: torch.Tensor) -> Any:
        if id(tensor) not in fakes:
            fakes[id(tensor)] = torch.empty_strided(
                tensor.shape, tensor.stride(), dtype=tensor.dtype, device=device
            )
        return fakes[id(tensor)]

    for module in model.modules():
        for store in (module._parameters, module._buffers):
            for name, tensor in store.items():
                if tensor is None:
                    continue
                if isinstance(tensor, nn.Parameter) and id(tensor) not in fakes:
                    plain = nn.Parameter(fake(tensor), requires_grad=tensor.requires_grad)
                    fakes[id(tensor)] = quantized.as_packed(plain, tensor, fake)
                store[name] = fake(tensor)
