"""A wrapped model that branches, and its unwrapped twin, from which the expected gradients are computed."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import SGD
from torch.utils._pytree import tree_map_only

from rotoopt import RotoGradOptimizer
from rotoopt.testing._branching import BRANCHING
from rotoopt.testing._branching.model import Branching, Sizes, built, inputs

Make = Callable[[Sizes], Branching]
Way = Callable[[RotoGradOptimizer, Mapping[str, Tensor]], object]
NAMES = [make.__name__ for make in BRANCHING]


def any_depends(tensor: Tensor, on: list[Tensor]) -> bool:
    """Whether ``tensor`` was computed from one of the other tensors."""
    found = torch.autograd.grad(tensor.sum(), on, retain_graph=True, allow_unused=True)
    return any(grad is not None for grad in found)


# Sums in another order over a few layers, relative to the sum of the norms of the parts.
TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-5}


def own_backward(optimizer: RotoGradOptimizer, losses: Mapping[str, Tensor]) -> None:
    torch.stack(list(losses.values())).sum().backward()  # type: ignore[no-untyped-call]


def backward(optimizer: RotoGradOptimizer, losses: Mapping[str, Tensor]) -> None:
    optimizer.backward(losses)


def one_by_one(optimizer: RotoGradOptimizer, losses: Mapping[str, Tensor]) -> None:
    """``torch.autograd.backward`` of a list is a single pass as well."""
    torch.autograd.backward(list(losses.values()))


WAYS: dict[str, Way] = {"backward(losses)": backward, "sum(losses).backward()": own_backward, "list": one_by_one}


@dataclass
class Twins:
    """A wrapped model and its twin, with the same weights.

    Attributes:
        wrapped: The model that is wrapped.
        bare: Its twin.
        optimizer: The optimizer of ``wrapped``.
        scales: Factor of each loss.
        dtype: The dtype of both.
    """

    wrapped: Branching
    bare: Branching
    optimizer: RotoGradOptimizer
    scales: dict[str, float]
    dtype: torch.dtype

    @staticmethod
    def of(
        make: Make,
        seed: int,
        dtype: torch.dtype = torch.float64,
        sizes: Sizes = Sizes(),  # noqa: B008 - it is frozen
        log_scales: Collection[float] = (),
        **options: Any,
    ) -> Twins:
        """Return twins with rotations at I, as the bare one has none. Learning rates are low: losses may be large."""
        wrapped, bare = (built(make, sizes, seed, dtype) for _ in range(2))
        sgd = SGD(wrapped.modules().parameters(), lr=1e-5)
        optimizer = RotoGradOptimizer(sgd, wrapped.heads, rotation_lr=0.0, **wrapped.options, **options)
        scales = dict.fromkeys(wrapped.heads, 1.0)
        scales.update(zip(wrapped.heads, (10.0**each for each in log_scales), strict=False))
        return Twins(wrapped, bare, optimizer, scales, dtype)

    def batch(self, seed: int, size: int = 4) -> Tensor:
        return inputs(seed, size, self.dtype)

    def losses(self, x: Tensor, seed: int, tasks: Collection[str] | None = None) -> dict[str, Tensor]:
        """Return the losses of the wrapped model; ``seed`` is the seed of dropout."""
        return self._losses(self.wrapped, x, seed, tasks)

    def _losses(self, model: Branching, x: Tensor, seed: int, tasks: Collection[str] | None) -> dict[str, Tensor]:
        torch.manual_seed(seed)
        losses = model.losses(x)
        return {name: losses[name] * self.scales[name] for name in model.heads if tasks is None or name in tasks}

    def follow(self) -> None:
        """Copy the weights of the wrapped model to the twin."""
        self.bare.modules().load_state_dict(self.wrapped.modules().state_dict())

    def true_gradients(self, x: Tensor, seed: int, task: str) -> dict[str, Tensor]:
        """Return the gradient of one loss at all parameters of the twin, by name."""
        loss = self._losses(self.bare, x, seed, None)[task]
        named = dict(self.bare.modules().named_parameters())
        grads = torch.autograd.grad(loss, list(named.values()), allow_unused=True, materialize_grads=True)
        return dict(zip(named, grads, strict=True))

    def true_norm(self, x: Tensor, seed: int, task: str) -> float:
        """Return the norm of the gradient of one loss at everything that enters its head from outside."""
        entered: dict[int, tuple[Tensor, Tensor]] = {}  # keeps the tensor, so that its id is not reused

        def view(tensor: Tensor) -> Tensor:
            views = [viewed for _, viewed in entered.values()]
            if not tensor.requires_grad or (views and any_depends(tensor, views)):
                return tensor
            return entered.setdefault(id(tensor), (tensor, tensor.view_as(tensor)))[1]

        def note(_: nn.Module, args: Any, kwargs: Any) -> Any:
            return tree_map_only(Tensor, view, (args, kwargs))

        handles = [module.register_forward_pre_hook(note, with_kwargs=True) for module in self.bare.modules_of(task)]
        loss = self._losses(self.bare, x, seed, None)[task]
        for handle in handles:
            handle.remove()
        grads = torch.autograd.grad(loss, [viewed for _, viewed in entered.values()])
        return float(torch.stack([grad.double().norm() for grad in grads]).norm())

    def own_names(self) -> set[str]:
        """Return the names of the parameters that belong to one task alone."""
        shared = {id(param) for module in self.wrapped.shared for param in module.parameters()}
        return {name for name, param in self.wrapped.modules().named_parameters() if id(param) not in shared}

    def weights(self) -> dict[str, float]:
        """Return the weights of the latest backward pass."""
        record = self.optimizer.last_step
        assert record is not None
        return dict(zip(self.optimizer.task_names, record.weights.tolist(), strict=True))

    def assert_gradients(self, parts: Collection[tuple[float, dict[str, Tensor]]], tolerance: float) -> None:
        """Assert that ``.grad`` is the weighted sum of true gradients, and the plain sum at parameters of a task.

        Args:
            parts: Weights, and true gradients.
            tolerance: Relative to the sum of the norms of the parts.
        """
        own, params = self.own_names(), dict(self.wrapped.modules().named_parameters())
        for names, weighted in ((own, False), (params.keys() - own, True)):
            error = total = 0.0
            factors = [weight if weighted else 1.0 for weight, _ in parts]
            for name in sorted(names):
                grad = params[name].grad
                terms = [factor * grads[name] for factor, (_, grads) in zip(factors, parts, strict=True)]
                got = torch.zeros_like(terms[0]) if grad is None else grad
                error += float((got - sum(terms)).detach().double().square().sum())
                total += float(sum(term.detach().double().norm() for term in terms)) ** 2
            assert error**0.5 <= tolerance * total**0.5
