"""The size of a model: how many parameters it has, and the shapes of its weight matrices."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn
from transformers.pytorch_utils import Conv1D


@dataclass(frozen=True)
class Parameters:
    """Numbers of elements, tied weights counted once."""

    total: int
    trainable: int

    @property
    def trainable_percent(self) -> float:
        """Return the trainable share of all parameters, in per cent."""
        return 100 * self.trainable / self.total


def count_parameters(model: nn.Module) -> Parameters:
    """Elements of `model`'s parameters; `named_parameters` lists a tied tensor once."""
    parameters = list(model.parameters())
    return Parameters(
        total=sum(map(_elements, parameters)),
        trainable=sum(_elements(p) for p in parameters if p.requires_grad),
    )


def _elements(parameter: nn.Parameter) -> int:
    """Elements before they were packed: bitsandbytes holds two of 4 bits in a byte, as PEFT counts.

    Source: `peft.PeftModel.get_nb_trainable_parameters`.
    """
    packed = type(parameter).__name__ == "Params4bit"
    return parameter.numel() * (2 * parameter.element_size() if packed else 1)


def matrices(model: nn.Module) -> dict[str, tuple[int, int]]:
    """Name -> (in, out) of every weight matrix a method can adapt."""
    shapes = {}
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear):
            shapes[name] = (module.in_features, module.out_features)
        elif isinstance(module, Conv1D):
            shapes[name] = (module.nx, module.nf)
        elif isinstance(module, nn.Embedding):
            shapes[name] = (module.num_embeddings, module.embedding_dim)
    return shapes
