"""The two-task model of the contract tests, and comparisons."""

import copy
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import SGD, Adam, Optimizer

from rotoopt import RotoGradOptimizer

REP_SIZE = 6

Make = Callable[[Any], Optimizer]
sgd: Make = partial(SGD, lr=0.1, momentum=0.9)
adam: Make = partial(Adam, lr=0.01)


class TwoTasks(nn.Module):
    """A backbone, and the heads ``left`` and ``right``. All parameters are matrices, which Muon requires.

    Args:
        sparse: Whether the backbone is an embedding with sparse gradients, which SparseAdam requires.
    """

    def __init__(self, *, sparse: bool = False) -> None:
        super().__init__()
        dense = nn.Sequential(nn.Linear(3, REP_SIZE, bias=False), nn.Tanh())
        self.backbone = nn.Embedding(8, REP_SIZE, sparse=True) if sparse else dense
        self.heads = nn.ModuleDict(
            {"left": nn.Linear(REP_SIZE, 1, bias=False), "right": nn.Linear(REP_SIZE, 2, bias=False)}
        )

    def inputs(self, batch: int) -> Tensor:
        generator = torch.Generator().manual_seed(batch)
        if isinstance(self.backbone, nn.Embedding):
            return torch.randint(8, (5,), generator=generator)
        return torch.randn(5, 3, generator=generator)

    def forward(self, x: Tensor) -> list[Tensor]:
        rep = self.backbone(x)
        return [head(rep) for head in self.heads.values()]

    def losses(
        self, batch: int, rotate: Callable[[Tensor], Sequence[Tensor]] | None = None
    ) -> tuple[list[Tensor], Tensor]:
        """Return the losses of one batch, and the representation.

        Args:
            batch: Seed of the batch.
            rotate: ``optimizer.rotate``, if the heads have no hooks.
        """
        rep = self.backbone(self.inputs(batch))
        reps = [rep, rep] if rotate is None else rotate(rep)
        left, right = (head(each) for head, each in zip(self.heads.values(), reps, strict=True))
        return [(left - 1).square().mean(), 0.1 * (right - rep[:, :2].detach()).square().sum()], rep


def wrap(make: Make = sgd, **options: Any) -> tuple[TwoTasks, RotoGradOptimizer]:
    """Return the model, with the same weights in every call, and an optimizer for it."""
    torch.manual_seed(0)
    model = TwoTasks()
    options = options if "num_tasks" in options else {"heads": model.heads, **options}
    return model, RotoGradOptimizer(make(model.parameters()), **options)


def back_propagate(losses: Sequence[Tensor]) -> float:
    """Call ``sum(losses).backward()`` and return the sum, as in a plain training loop."""
    total = torch.stack(list(losses)).sum()
    total.backward()  # type: ignore[no-untyped-call]
    return total.item()


def train(model: TwoTasks, optimizer: RotoGradOptimizer, *batches: int) -> None:
    for batch in batches:
        losses, rep = model.losses(batch)
        optimizer.zero_grad()
        optimizer.step(losses, rep)


def parameters(model: nn.Module) -> list[Tensor]:
    return [param.detach().clone() for param in model.parameters()]


def gradients(model: nn.Module) -> list[Tensor | None]:
    return [None if param.grad is None else param.grad.clone() for param in model.parameters()]


def snapshot(model: nn.Module, optimizer: Optimizer) -> dict[str, Any]:
    """Return copies of everything that training changes: parameters, gradients, rotations, state and counters."""
    return {
        "parameters": parameters(model),
        "gradients": gradients(model),
        "optimizer": copy.deepcopy(optimizer.state_dict()),
    }


def assert_same(actual: Any, expected: Any) -> None:
    """Assert that two nested structures of tensors and numbers are bit-identical."""
    torch.testing.assert_close(actual, expected, rtol=0.0, atol=0.0, equal_nan=True)


def assert_moved(model: TwoTasks, optimizer: RotoGradOptimizer, before: dict[str, Any]) -> None:
    """Assert that every parameter has changed, and every rotation that is updated in every step."""
    for now, then in zip(parameters(model), before["parameters"], strict=True):
        assert not torch.equal(now, then)
    if optimizer._core.engine.turn_every > 1:  # by default, the first update may come after the end of the test
        return
    for now, then in zip(optimizer.rotations.matrices, before["optimizer"]["rotograd"]["matrices"], strict=True):
        assert not torch.equal(now, then)
