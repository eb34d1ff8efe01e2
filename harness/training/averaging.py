"""The moving average of what trains, which is evaluated and saved in its place (`train.ema`).

    average_1 = weights_1,   average_t = ema average_(t-1) + (1 - ema) weights_t

after optimizer steps 1, 2, …, as `torch.optim.swa_utils.AveragedModel` has it with
`get_ema_multi_avg_fn`; training goes on from the weights themselves.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn
from torch.optim.swa_utils import get_ema_multi_avg_fn

AVERAGE, COUNT = "average/", "average_count"  # names in a checkpoint


class Average:
    """Holds a copy of what trains in a model, in its dtype and on its device, and moves it."""

    def __init__(self, model: nn.Module, decay: float) -> None:
        self._trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
        self._average = {n: p.detach().clone() for n, p in self._trained.items()}
        self._move = get_ema_multi_avg_fn(decay)
        self._count = 0  # optimizer steps that are in it

    def held(self) -> list[torch.Tensor]:
        """The tensors of the average, whose bytes count as the optimizer's state."""
        return list(self._average.values())

    @torch.no_grad()
    def update(self) -> None:
        """Take in the weights after an optimizer step."""
        averages, weights = self.held(), [p.detach() for p in self._trained.values()]
        if self._count:
            self._move(averages, weights, self._count)
        else:
            for average, weight in zip(averages, weights, strict=True):
                average.copy_(weight)
        self._count += 1

    @contextmanager
    def in_model(self) -> Iterator[None]:
        """Have the average in the model, bit for bit, and the weights that train back afterwards.

        The two change places, which takes no memory.
        """
        self._swap()
        try:
            yield
        finally:
            self._swap()

    def _swap(self) -> None:
        for name, parameter in self._trained.items():
            here = parameter.data
            parameter.data = self._average[name]
            self._average[name] = here

    def tensors(self) -> dict[str, torch.Tensor]:
        """What a checkpoint keeps of the average, by name."""
        named = {AVERAGE + name: tensor for name, tensor in self._average.items()}
        return named | {COUNT: torch.tensor(self._count)}

    def restore(self, tensors: dict[str, torch.Tensor]) -> None:
        """Put back what `tensors` gave; the names must be the same."""
        for name, average in self._average.items():
            average.copy_(tensors[AVERAGE + name])
        self._count = int(tensors[COUNT])
