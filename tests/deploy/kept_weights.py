"""Ways to write kept weights into a model, and to evaluate it."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import vector_to_parameters
from torch.optim import SGD

from tests.contract.models import TwoTasks

WRITTEN = "Weights of a head should be replaced together with its rotation, got other weights of "
TURNING: dict[str, Any] = {"rotation_optimizer": partial(SGD, lr=1.0)}  # in every step
X = TwoTasks().inputs(99)
Params = Sequence[nn.Parameter]


@torch.no_grad()
def by_copy(params: Params, kept: Sequence[Tensor]) -> None:
    for param, value in zip(params, kept, strict=True):
        param.copy_(value)


def by_data(params: Params, kept: Sequence[Tensor]) -> None:
    for param, value in zip(params, kept, strict=True):
        param.data.copy_(value)


def by_new_data(params: Params, kept: Sequence[Tensor]) -> None:
    for param, value in zip(params, kept, strict=True):
        param.data = value.clone()


def by_vector(params: Params, kept: Sequence[Tensor]) -> None:
    vector_to_parameters(torch.cat([each.flatten() for each in kept]), params)


def by_foreach(params: Params, kept: Sequence[Tensor]) -> None:
    with torch.no_grad():
        torch._foreach_copy_(list(params), list(kept))


def by_average(params: Params, kept: Sequence[Tensor]) -> None:
    for param, value in zip(params, kept, strict=True):
        param.data.lerp_(value, 0.5)


WAYS = [by_copy, by_data, by_new_data, by_vector, by_foreach, by_average]


def kept_of(params: Params) -> list[Tensor]:
    return [param.detach().clone() for param in params]


@contextmanager
def in_eval_mode(model: nn.Module) -> Iterator[None]:
    model.eval()
    yield
    model.train()


EVALUATIONS: dict[str, Callable[[nn.Module], AbstractContextManager[Any]]] = {
    "no_grad": lambda _: torch.no_grad(),
    "inference_mode": lambda _: torch.inference_mode(),
    "eval": in_eval_mode,
}


def warned(call: Callable[[], object]) -> list[str]:
    with warnings.catch_warnings(record=True) as record:
        warnings.simplefilter("always")
        call()
    return [str(warning.message) for warning in record]


def evaluate(model: nn.Module, kind: str = "no_grad") -> list[Tensor]:
    with EVALUATIONS[kind](model):
        return [each.detach().clone() for each in model(X)]
