"""Models whose weights were moved by known numbers."""

import copy

import torch

from harness.artifacts.anatomy import updates


def drawn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def pair_of(base, adapted):
    dtypes = {n: p.dtype for n, p in base.named_parameters(remove_duplicate=False)}
    return updates.Pair(copy.deepcopy(base).float(), copy.deepcopy(adapted).float(), dtypes)


def moved(model, *names, scale=0.05):
    """A copy of `model` in which the parameters with these names, or all, are other numbers."""
    model = copy.deepcopy(model)
    with torch.no_grad():
        for i, (name, parameter) in enumerate(model.named_parameters()):
            if not names or name in names:
                parameter += scale * drawn(*parameter.shape, seed=i).to(parameter.dtype)
    return model
