"""What a training step needs in memory, by category.

On a CPU the live tensors of one step are followed through a dispatch mode; on a GPU the allocator
keeps the count. The process's own peak (VmHWM) is reported beside it: it adds the interpreter and
the libraries, and the temporaries inside kernels that no tensor holds.
"""

from __future__ import annotations

import re
import weakref
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from harness.methods import adalora
from harness.models import quantized
from harness.system.internals import internal
from harness.training import sharding

FakeTensor: Any = internal("FakeTensor")
TorchDispatchMode: Any = internal("TorchDispatchMode")
tree_leaves = internal("tree_leaves")

CATEGORIES = ("frozen_weights", "trainable_weights", "gradients", "optimizer_state", "activations")


def _optimizer_tensors(optimizer: torch.optim.Optimizer | None) -> list[torch.Tensor]:
    if optimizer is None:
        return []
    return [leaf for leaf in tree_leaves(dict(optimizer.state)) if isinstance(leaf, torch.Tensor)]


def _sparse_parts(tensor: torch.Tensor) -> list[torch.Tensor]:
    """The dense tensors that a sparse one consists of; none for a dense one."""
    if tensor.layout == torch.sparse_coo:
        return [tensor._indices(), tensor._values()]
    if tensor.layout in (torch.sparse_csr, torch.sparse_bsr):
        return [tensor.crow_indices(), tensor.col_indices(), tensor.values()]
    if tensor.layout in (torch.sparse_csc, torch.sparse_bsc):
        return [tensor.ccol_indices(), tensor.row_indices(), tensor.values()]
    return []


class LiveTensors(TorchDispatchMode):
    """Follows the bytes of every live tensor storage while it is active.

    `peak` is the most that was live at once and `by_category` what it consisted of;
    `category_peaks` is the most of each category, whenever that was (gradients are complete only
    when most activations are gone). Storages that exist beforehand are passed in: parameters,
    buffers, gradients and optimizer state. All that an operation makes is an activation (or a
    temporary) until it becomes a parameter's gradient. Of a divided model
    (`harness.training.sharding`) this rank's part counts; what is gathered is a temporary.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer | None = None,
        average: Sequence[torch.Tensor] = (),
    ) -> None:
        super().__init__()
        self._category: dict[int, str] = {}  # id of a live storage object -> category
        self._size: dict[int, int] = {}  # and its bytes
        self._alive: dict[int, weakref.ref[Any]] = {}
        self._live: Counter[str] = Counter()
        self.peak = 0
        self.by_category: dict[str, int] = dict.fromkeys(CATEGORIES, 0)
        self.category_peaks: dict[str, int] = dict.fromkeys(CATEGORIES, 0)
        parameters = list(model.parameters())
        self._divided = any(isinstance(p, DTensor) for p in parameters)
        known: dict[str, list[torch.Tensor]] = {
            "trainable_weights": [p for p in parameters if p.requires_grad],
            "frozen_weights": [
                *(p for p in parameters if not p.requires_grad),
                *model.buffers(),
                *quantized.held_by_modules(model),
            ],
            "gradients": [p.grad for p in parameters if p.grad is not None],
            "optimizer_state": [
                *_optimizer_tensors(optimizer),
                *adalora.state(model, means=True).values(),
                *average,
            ],
        }
        for category, tensors in known.items():
            for tensor in tensors:
                self._follow(tensor, category)
        self._hooks = [
            p.register_post_accumulate_grad_hook(self._now_gradient)
            for p in parameters
            if p.requires_grad
        ]
        self._note_peak()

    def _follow(self, tensor: torch.Tensor, category: str) -> None:
        if parts := _sparse_parts(tensor) or quantized.parts(tensor):
            for part in parts:
                self._follow(part, category)
            return
        storage = sharding.to_local(tensor).untyped_storage()
        key, size = id(storage), storage.nbytes()
        if key in self._alive or (size == 0 and not self._divided):
            return
        self._category[key] = category
        self._size[key] = size
        self._live[category] += size

        def freed(_: Any) -> None:
            self._live[self._category.pop(key)] -= self._size.pop(key)
            del self._alive[key]

        self._alive[key] = weakref.ref(storage, freed)

    def _now_gradient(self, parameter: torch.Tensor) -> None:
        assert parameter.grad is not None
        storage = sharding.to_local(parameter.grad).untyped_storage()
        before = self._category.get(id(storage))
        if before == "activations":
            self._live[before] -= storage.nbytes()
            self._live["gradients"] += storage.nbytes()
            self._category[id(storage)] = "gradients"
            self._note_peak()

    def _resized(self) -> None:
        """Note what FSDP does to storages of gathered weights, which it keeps and empties."""
        for key, alive in list(self._alive.items()):
            storage = alive()
            if storage is not None and storage.nbytes() != self._size[key]:
                self._live[self._category[key]] += storage.nbytes() - self._size[key]
                self._size[key] = storage.nbytes()

    def _note_peak(self) -> None:
        for name in CATEGORIES:
            self.category_peaks[name] = max(self.category_peaks[name], self._live[name])
        total = self._live.total()
        if total > self.peak:
            self.peak = total
            self.by_category = {name: self._live[name] for name in CATEGORIES}

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        # Gathered weights come back into storages that were there before, empty.
        for leaf in tree_leaves((args, kwargs, result) if self._divided else result):
            if isinstance(leaf, torch.Tensor):
                self._follow(leaf, "activations")
        if self._divided:
            self._resized()
        self._note_peak()
        return result

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self.close()

    def close(self) -> None:
        """Take the hooks off the parameters again."""
        for hook in self._hooks:
            hook.remove()


@contextmanager
def measured(
    model: nn.Module,
    optimizer: torch.optim.Optimizer | None,
    report: dict[str, Any],
    average: Sequence[torch.Tensor] = (),
) -> Iterator[None]:
    """Measure the peak of the body into `report`: peak_bytes, by_category, measured_by.

    An `average` of what trains (`harness.training.averaging`) counts as the optimizer's state.
    Code under torch.compile cannot be followed: here it runs uncompiled.
    """
    first = next(model.parameters())
    if first.device.type == "cuda" and not isinstance(first, FakeTensor):
        with _by_allocator(LiveTensors(model, optimizer, average), model, report, first.device):
            yield
        return
    with torch.compiler.set_stance("force_eager"), LiveTensors(model, optimizer, average) as live:
        yield
    report |= {
        "peak_bytes": live.peak,
        "by_category": live.by_category,
        "category_peaks": live.category_peaks,
        "measured_by": "live tensors",
    }


@contextmanager
def _by_allocator(
    before: LiveTensors,
    model: nn.Module,
    report: dict[str, Any],
    device: torch.device,
) -> Iterator[None]:
    """The same from CUDA's allocator, which does not say what its peak consisted of.

    What exists before the body, and gradients in full where it makes some; the rest is activations.
    """
    torch.cuda.reset_peak_memory_stats(device)
    before.close()
    yield
    peak = torch.cuda.max_memory_allocated(device)
    categories = dict(before.by_category)
    if torch.is_grad_enabled():
        categories["gradients"] = sum(
            sharding.to_local(p).numel() * p.element_size()
            for p in model.parameters()
            if p.requires_grad
        )
    rest = peak - sum(n for name, n in categories.items() if name != "activations")
    categories["activations"] = max(0, rest)
    report |= {
        "peak_bytes": peak,
        "reserved_bytes": torch.cuda.max_memory_reserved(device),
        "by_category": categories,
        "category_peaks": categories,
        "measured_by": "cuda allocator",
    }


class ProcessPeaks:
    """The process's resident peak (VmHWM) in each phase of a run, which the kernel counts.

    The counter is set back at every change of phase. Where the system has no such counter, or none
    that can be set back, `by_phase` stays empty.
    """

    def __init__(self, phase: str) -> None:
        self._phase = phase
        self._resets = True
        self.by_phase: dict[str, int] = {}
        self.peak_bytes = process_peak_bytes()  # over all phases

    def go_on(self, by_phase: dict[str, int]) -> None:
        """Take over the peaks that an earlier process of the same run has had."""
        for name, peak in by_phase.items():
            self.by_phase[name] = max(peak, self.by_phase.get(name, 0))
            self.peak_bytes = max(peak, self.peak_bytes or 0)

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Count the body to phase `name`, and what comes before and after to the phase around."""
        before = self._phase
        self.turn(name)
        try:
            yield
        finally:
            self.turn(before)

    def turn(self, name: str) -> None:
        """Close the present phase and begin (or go on with) phase `name`."""
        peak = process_peak_bytes()
        if peak is not None:
            self.peak_bytes = max(self.peak_bytes or 0, peak)
            if self._resets:
                self.by_phase[self._phase] = max(self.by_phase.get(self._phase, 0), peak)
        try:
            Path("/proc/self/clear_refs").write_text("5")  # VmHWM := VmRSS
        except OSError:
            self._resets = False
            self.by_phase = {}
        self._phase = name


def gpu_uuids() -> list[str]:
    """UUIDs, as NVML has them, of the GPU that this process computes on; none on a CPU."""
    if not torch.cuda.is_available():
        return []
    return [f"GPU-{torch.cuda.get_device_properties(torch.cuda.current_device()).uuid}"]


def process_peak_bytes() -> int | None:
    """The process's resident peak (VmHWM), or None where the system does not tell."""
    status = Path("/proc/self/status")
    if not status.is_file():
        return None
    match = re.search(r"VmHWM:\s+(\d+) kB", status.read_text())
    return int(match[1]) * 1024 if match else None
