"""A real model and its tasks, and its true gradients."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from importlib import import_module
from typing import Any

import pytest
import torch
from torch import Tensor, nn

Head = nn.Module | Sequence[nn.Module | nn.Parameter]


@dataclass
class Case:
    """A model with random weights, and one batch for it.

    Attributes:
        model: The model, or several in a ``ModuleDict``.
        heads: Argument of the optimizer.
        own: By task, prefixes of the names of the parameters that belong to it alone.
        losses: Computes the losses of a model, which may be a copy, on the batch.
        options: Further options of the optimizer.
    """

    model: nn.Module
    heads: Mapping[str, Head]
    own: Mapping[str, tuple[str, ...]]
    losses: Callable[[Any], dict[str, Tensor]]
    options: Mapping[str, Any] = field(default_factory=dict)

    def owner(self, name: str) -> str | None:
        """Return the task that the parameter ``name`` belongs to, None if it is shared."""
        return next((task for task, prefixes in self.own.items() if name.startswith(prefixes)), None)


def library(name: str) -> Any:
    """Return a library; skip the test if it is missing, or incompatible with the installed torchvision."""
    try:
        with suppress(ImportError):
            import_module("torchvision")  # imported first, because others import it late and hide its error
        return pytest.importorskip(name)
    except RuntimeError as error:
        if "operator torchvision::" not in str(error):
            raise
        pytest.skip(f"torchvision was made for another build of torch: {error}")


def untied(model: nn.Module) -> nn.Module:
    """Return a copy without tied weights: every module has its own parameters and gradients."""
    twin = copy.deepcopy(model)
    for module in twin.modules():
        for name, param in list(module.named_parameters(recurse=False)):
            setattr(module, name, nn.Parameter(param.detach().clone()))
    return twin


def true_gradients(case: Case, twin: nn.Module, weights: Mapping[str, float], seed: int) -> dict[int, Tensor]:
    r"""Return the expected gradients, by the ids of the parameters of the model.

    :math:`\sum_k w_k \nabla L_k` where tasks share, and the plain gradient of its own loss in each head. A weight
    that is tied across this border gets one part of each kind.

    Args:
        case: The model, and its losses.
        twin: Its copy from :func:`untied`, never wrapped.
        weights: :math:`w_k`.
        seed: Seed of the dropout.
    """
    twin.load_state_dict(case.model.state_dict())
    params = dict(twin.named_parameters())
    trained = dict(case.model.named_parameters(remove_duplicate=False))
    truth = {id(param): torch.zeros_like(param) for param in trained.values()}
    torch.manual_seed(seed)
    for task, loss in case.losses(twin).items():
        grads = torch.autograd.grad(loss, list(params.values()), allow_unused=True, retain_graph=True)
        for name, grad in zip(params, grads, strict=True):
            if grad is not None:
                owner = case.owner(name)
                assert owner in (None, task)
                truth[id(trained[name])] += grad * (weights[task] if owner is None else 1.0)
    return truth
