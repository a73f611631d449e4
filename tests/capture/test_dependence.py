"""Which tasks each element of a tensor depends on, inferred from the graph, equals what gradients show."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import SGD
from torch.testing import assert_close

from rotoopt import RotoGradOptimizer
from rotoopt._capture.dependence import Dependence
from rotoopt._capture.graph import made_by
from rotoopt._capture.labels import MIXED, NONE
from tests.contract.models import back_propagate
from tests.samplers import SEEDS


def every_second(x: Tensor) -> Tensor:
    return (torch.arange(x.numel()) % 2 == 0).reshape(x.shape)


def like(x: Tensor, *shape: int) -> Tensor:
    return torch.randn(shape, dtype=x.dtype)


def put(x: Tensor, mask: Tensor, values: Tensor) -> Tensor:
    x = x.clone()
    x[mask] = values
    return x


def changed(x: Tensor, by: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
    x = x.clone()
    by(x[..., 0], x[..., -1].clone())
    return x


def put_columns(x: Tensor, end: int) -> Tensor:
    """Return ``x``, a view, after a change of its columns up to ``end``."""
    x[:, :end] = x[:, :end].exp() + 1
    return x


def moved_within(x: Tensor) -> Tensor:
    """Return a view of a copy of ``x`` in which entries of several tasks are replaced by others."""
    x = x.clone().transpose(0, -1)
    x[..., :-1] = 2 * x[..., 1:].clone()
    return x


def scaled_losses(losses: Sequence[Tensor]) -> Tensor:
    """Return the losses of Ultralytics YOLO: added to zeros, and scaled there."""
    out = torch.zeros(len(losses) + 1)
    out[-1] = losses[0]
    for k, loss in enumerate(losses):
        out[k] += loss
        out[k] *= 7.5
    return 8 * out


def in_rows(losses: Sequence[Tensor]) -> Tensor:
    """Return a matrix with each loss in two places of its row."""
    out = torch.zeros(len(losses), 3)
    for k, loss in enumerate(losses):
        out[k, 0] += loss
        out[k, k] += loss
    return out


def in_columns(columns: Sequence[Tensor]) -> Tensor:
    """Return what ``torch.stack(columns, -1)`` returns, made column by column."""
    out = columns[0].new_zeros(*columns[0].shape, len(columns))
    for k, column in enumerate(columns):
        out[..., k] = column
    return out


TOLD: dict[str, Callable[[Tensor], Tensor]] = {  # for these, the graph determines the tasks exactly
    "scaled": lambda x: 2 * x - 1,
    "with a constant": lambda x: x + torch.randn(x.shape),
    "squares": torch.square,
    "softplus": F.softplus,
    "with itself": lambda x: x * x.sigmoid(),
    "where": lambda x: torch.where(torch.ones(x.shape) > 0, x, -x),
    "double": lambda x: x.double(),
    "select": lambda x: x.select(0, -1) if x.ndim > 1 else x,
    "last": lambda x: x[..., -1] if x.ndim > 1 else x,
    "slice": lambda x: x[..., :2],
    "every second": lambda x: x[::2],
    "from the end": lambda x: x[..., -2:],
    "split": lambda x: torch.split(x, 2, -1)[-1],
    "split by sizes": lambda x: torch.split(x, [x.shape[-1] - 1, 1], -1)[0] if x.shape[-1] > 1 else x,
    "unbind": lambda x: x.unbind(-1)[0] if x.ndim > 1 else x,
    "transposed": lambda x: x.transpose(0, -1),
    "matrix transposed": lambda x: x.t() if x.ndim == 2 else x,
    "permuted": lambda x: x.permute(*range(1, x.ndim), 0),
    "flat": lambda x: x.reshape(-1),
    "flat pairs": lambda x: x.flatten(0, 1) if x.ndim > 1 else x,
    "unsqueezed": lambda x: x.unsqueeze(1),
    "squeezed": lambda x: x[:, None].squeeze(1),
    "expanded": lambda x: x[None].expand(2, *x.shape),
    "sum": lambda x: x.sum(0) if x.ndim > 1 else x,
    "mean": lambda x: x.mean(-1, keepdim=True),
    "norm": lambda x: x.norm(dim=-1) if x.ndim > 1 else x,
    "logsumexp": lambda x: x.logsumexp(0) if x.ndim > 1 else x,
    "log_softmax": lambda x: F.log_softmax(x, -1) if x.shape[-1] > 1 else x,
    "twice": lambda x: torch.cat([x, x], 0),
    "with constants": lambda x: torch.cat([torch.zeros(x.shape), x], -1),
    "stacked": lambda x: torch.stack([x, 3 * x], 1),
    "squared errors": lambda x: F.mse_loss(x, torch.zeros(x.shape), reduction="none"),
    "backwards": lambda x: x[torch.arange(len(x) - 1, -1, -1)],
    "indexed": lambda x: x[..., [-1]],
    "indexed by a matrix": lambda x: x[torch.arange(len(x) - 1, -1, -1).expand(2, -1)],
    "indexed twice": lambda x: x[[-1], ..., [0]] if x.ndim > 1 else x,
    "masked": lambda x: x[every_second(x)],
    "index_select": lambda x: x.index_select(-1, torch.arange(x.shape[-1] - 1, -1, -1)),
    "masked_select": lambda x: x.masked_select(every_second(x)),
    "gathered": lambda x: x.gather(-1, torch.arange(x.numel()).reshape(x.shape) % x.shape[-1]),
    "one of two": lambda x: torch.where(every_second(x), x, x[torch.arange(len(x) - 1, -1, -1)]),
    "flipped": lambda x: x.flip(0),
    "rolled": lambda x: x.roll(1, -1),
    "sorted": lambda x: x.sort(0).values,
    "largest": lambda x: x.topk(1, -1).values,
    "filled": lambda x: x.masked_fill(every_second(x), 3.0),
    "filled by one": lambda x: x.masked_fill(every_second(x), x.flatten()[0]),
    "put": lambda x: put(torch.zeros_like(x), every_second(x), x[every_second(x)]),
    "put into itself": lambda x: put(x, every_second(x), 2 * x[every_second(x)]),
    "index_copy": lambda x: torch.zeros_like(x).index_copy(0, torch.arange(len(x) - 1, -1, -1), x),
    "index_copy of some": lambda x: x.index_copy(0, torch.tensor([0]), x[-1:]),
    "index_add to zeros": lambda x: x.new_zeros(len(x) + 1, *x.shape[1:]).index_add(0, torch.arange(len(x)), x),
    "masked_scatter": lambda x: x.flip(0).masked_scatter(every_second(x), x),
    "masked_scatter to zeros": lambda x: torch.zeros_like(x).masked_scatter(every_second(x), x),
    "without NaN": lambda x: x.nan_to_num(),
    "angle": torch.atan,
    "moved within": moved_within,
    "matrix product": lambda x: x @ like(x, x.shape[-1], 2) if x.ndim > 1 else x,
    "matrix product from the left": lambda x: like(x, 2, x.shape[-2]) @ x if x.ndim > 1 else x,
    "linear": lambda x: F.linear(x, like(x, 2, x.shape[-1]), like(x, 2)) if x.ndim > 1 else x,
    "product of matrices": lambda x: torch.baddbmm(x, x, like(x, len(x), *[x.shape[-1]] * 2)) if x.ndim == 3 else x,
    "part multiplied": lambda x: changed(x, Tensor.mul_),
    "part added to": lambda x: changed(x, Tensor.add_),
    "part times a constant": lambda x: changed(x, lambda part, _: part.mul_(2.0)),
    "part without gradient": lambda x: changed(x, lambda part, _: part.zero_()),
    "part subtracted from": lambda x: changed(x, lambda part, y: part.sub_(y, alpha=0.5)),  # not 0 if it is the same
    "part through a function": lambda x: changed(x, lambda part, _: part.sigmoid_()),
}
UNTOLD: dict[str, Callable[[Tensor], Tensor]] = {  # for these it does not, and too many tasks are reported
    "product with itself": lambda x: x @ x.mT.tanh() if x.ndim > 1 else x,
    "assigned": lambda x: in_columns(x.unbind(-1)) if x.ndim > 1 else x,
    "part added to, broadcast": lambda x: changed(x, lambda part, y: part.add_(y.flatten()[0])),
    "part normalized": lambda x: changed(x, lambda part, _: part.sub_(part.mean())),
    "added at an index": lambda x: x.clone().index_put_((torch.tensor([0]),), x[-1:], accumulate=True),
    "added by index": lambda x: x.index_add(0, torch.tensor([0]), x[-1:]),
    "copied twice to an index": lambda x: x.index_copy(0, torch.tensor([0, 0]), x[[-1, -1]]),
    "repeated": lambda x: x.repeat(*[2] * x.ndim),
}
OPERATIONS = TOLD | UNTOLD


def outputs(seed: int, size: int = 3) -> tuple[list[Tensor], list[Tensor]]:
    """Return the inputs of three functional heads, and their outputs, ``(2, size)``."""
    torch.manual_seed(seed)
    bare = SGD([nn.Parameter(torch.zeros(1))], lr=0.1)
    optimizer = RotoGradOptimizer(bare, num_tasks=3, rotate=False)
    fed = optimizer.rotate(torch.randn(2, 4, requires_grad=True))
    return list(fed), [each @ torch.randn(4, size) for each in fed]


def labels_by_gradients(x: Tensor, fed: list[Tensor]) -> Tensor:
    found = []
    for number in x.reshape(-1):
        grads = torch.autograd.grad(number, fed, retain_graph=True, allow_unused=True) if x.requires_grad else []
        tasks = [task for task, grad in enumerate(grads) if grad is not None and grad.any()]
        found.append(NONE if not tasks else MIXED if len(tasks) > 1 else tasks[0])
    return torch.tensor(found, dtype=torch.int16).reshape(x.shape)


def assert_labels(x: Tensor, fed: list[Tensor], names: Collection[str]) -> None:
    """Assert that the labels of ``x``, computed by the operations ``names``, equal those from gradients."""
    edge = made_by(x)
    labels, expected = Dependence([edge])._label(edge).expand(x.shape), labels_by_gradients(x, fed)
    told = TOLD.keys() >= set(names)
    assert torch.equal(labels, expected) or not told
    assert ((labels == expected) | (labels == MIXED) | (expected == NONE)).all()


@given(seed=SEEDS, names=st.lists(st.sampled_from(sorted(OPERATIONS)), max_size=5), dim=st.integers(-2, 2))
def test_labels_are_those_of_gradients(seed: int, names: list[str], dim: int) -> None:
    fed, parts = outputs(seed)
    x = torch.stack(parts, dim)
    for name in names:
        if x.numel() < 200 and x.ndim < 5:
            x = OPERATIONS[name](x)
            x = 3 * x / x.detach().abs().max().clamp(min=3)  # else squares saturate a softmax: its gradient is rounded
    assert_labels(x, fed, names)


@pytest.mark.parametrize("dim", [0, 1, 2])
@pytest.mark.parametrize("name", OPERATIONS)
def test_labels_of_each_operation(name: str, dim: int) -> None:
    fed, parts = outputs(0)
    for x in (torch.stack(parts, dim), torch.cat(parts, min(dim, 1))):
        assert_labels(OPERATIONS[name](x), fed, [name])


APART: dict[str, Callable[[list[Tensor], Tensor], Tensor]] = {
    "mean of a matrix of errors": lambda outs, y: (torch.cat(outs, 1) - y).square().mean(),
    "mse_loss of all outputs": lambda outs, y: F.mse_loss(torch.cat(outs, 1), y),
    "mse_loss of all outputs, stacked": lambda outs, y: F.mse_loss(torch.stack(outs), y.T[..., None]),
    "errors of samples, added": lambda outs, y: sum(out.square() for out in outs).mean(),  # type: ignore[union-attr]
    "errors of columns": lambda outs, y: (torch.cat(outs, 1) - y).abs().sum(1).mean(),
    "masked errors": lambda outs, y: ((torch.cat(outs, 1) - y).square() * (y > 0)).sum() / (y > 0).sum(),
    "errors of samples by the number of labels": lambda outs, y: (
        (torch.cat(outs, 1) - y).abs().sum(1) / (1 + (y > 0).sum(1))
    ).mean(),
    "errors where there are labels": lambda outs, y: (torch.cat(outs, 1) - y).square()[y > 0].mean(),
    "classes": lambda outs, y: F.cross_entropy(
        torch.stack([torch.cat([out, -out], 1) for out in outs], 2), (y > 0).long()
    ),
    "losses in a vector": lambda outs, y: (torch.cat(outs, 1) - y).square().mean(0).log().sum(),
    "largest loss": lambda outs, y: torch.stack([out.square().mean() for out in outs]).max(),
    "product of losses": lambda outs, y: torch.stack([out.square().mean() for out in outs]).prod(),
    "losses added to a vector, and scaled there": lambda outs, y: scaled_losses([o.abs().mean() for o in outs]).sum(),
    "losses assigned to a vector": lambda outs, y: in_columns([out.square().mean() for out in outs]).sum(),
    "errors put where their labels are": lambda outs, y: put(y.T, y.T > 0, torch.stack(outs)[..., 0][y.T > 0]).mean(),
    "errors added up by index": lambda outs, y: (
        torch.zeros(3).index_add(0, torch.arange(3), torch.cat(outs, 1).square().T.mean(1)).sum()
    ),
    "errors without NaN": lambda outs, y: torch.where(y > 0, torch.cat(outs, 1).square(), torch.nan).nanmean(),
    "softmax of losses": lambda outs, y: torch.stack([out.square().mean() for out in outs]).logsumexp(0),
    "Gaussian, of two matrices": lambda outs, y: (
        (torch.cat(outs, 1) - y).square() * torch.cat([-out for out in outs], 1).exp() + torch.cat(outs, 1)
    ).mean(),
}
MIXTURES: dict[str, Callable[[list[Tensor], Tensor], Tensor]] = {
    "distance of outputs": lambda outs, y: (outs[0] - outs[1]).square().mean(),
    "distance of columns": lambda outs, y: (torch.cat(outs, 1)[:, 0] - torch.cat(outs, 1)[:, 1]).square().mean(),
    "distance of means over features": lambda outs, y: (outs[0].mean(1) - outs[1].mean(1)).square().sum(),
    "product of outputs": lambda outs, y: (outs[0] * outs[1]).sum(),
    "quotient of a constant": lambda outs, y: (y[:, :1] / (1 + outs[0].square() + outs[1].square())).sum(),
    "norm of a sum": lambda outs, y: (outs[0] + outs[1]).norm(),
    "one softmax over tasks": lambda outs, y: F.cross_entropy(torch.cat(outs, 1), (y[:, 0] > 0).long()),
    "norm over tasks": lambda outs, y: torch.cat(outs, 1).norm(dim=1).sum(),
    "a layer over tasks": lambda outs, y: (torch.cat(outs, 1) @ torch.ones(3, 1)).square().mean(),
}


class Heads:
    """A wrapped model with three heads, and a batch; ``paused()`` gives the true gradients."""

    def __init__(self, size: int) -> None:
        torch.manual_seed(size)
        self.backbone, self.heads = nn.Linear(5, 4), nn.ModuleList(nn.Linear(4, 1) for _ in range(3))
        self.params = [*self.backbone.parameters(), *self.heads.parameters()]
        self.optimizer = RotoGradOptimizer(SGD(self.params, lr=0.1), self.heads, rotate=False)
        self.x, self.y = torch.randn(size, 5), torch.randn(size, 3)

    def outputs(self) -> list[Tensor]:
        z = self.backbone(self.x)
        return [head(z) for head in self.heads]

    def true_gradient(self, loss: Callable[[list[Tensor], Tensor], Tensor], task: int) -> Tensor:
        """Return the gradient of the backbone through the head of ``task``."""
        with self.optimizer.paused():
            outs = [out if k == task else out.detach() for k, out in enumerate(self.outputs())]
            return torch.autograd.grad(loss(outs, self.y), self.backbone.weight)[0]


@pytest.mark.parametrize("size", [1, 2, 3, 8])
@pytest.mark.parametrize("name", APART)
def test_a_loss_that_separates_the_outputs_of_heads_is_the_sum_of_their_losses(name: str, size: int) -> None:
    """In the user's own backward, each head gets its own gradient, and the backbone their weighted sum."""
    bench, loss = Heads(size), APART[name]
    bench.y[0] = torch.tensor([1.0, 2.0, 3.0])  # no task without labels
    for _ in range(3):
        true = [bench.true_gradient(loss, task) for task in range(3)]
        bench.optimizer.zero_grad()
        back_propagate([loss(bench.outputs(), bench.y)])
        weights = bench.optimizer.last_step.weights  # type: ignore[union-attr]
        expected = sum(weight * grad for weight, grad in zip(weights.nan_to_num(), true, strict=True))
        assert_close(bench.backbone.weight.grad, expected)
        bench.optimizer.step()


@pytest.mark.parametrize("size", [1, 3, 8])
@pytest.mark.parametrize("name", MIXTURES)
def test_a_loss_that_mixes_the_outputs_of_heads_is_rejected_for_any_batch_size(name: str, size: int) -> None:
    bench = Heads(size)
    outs = bench.outputs()
    losses = sum(out.square().mean() for out in outs)
    with pytest.raises(RuntimeError, match=r"The loss of heads\[0\] must be computed from the output of its own head"):
        back_propagate([losses + MIXTURES[name](outs, bench.y)])


COLUMNS: dict[str, Callable[[Tensor, Tensor], list[Tensor]]] = {
    "column": lambda out, y: [(out[:, k] - y[:, k]).square().mean() for k in range(3)],
    "slice": lambda out, y: [F.mse_loss(out[:, k : k + 1], y[:, k : k + 1]) for k in range(3)],
    "split": lambda out, y: [each.square().mean() for each in torch.split(out - y, 1, 1)],
    "mean over samples": lambda out, y: list((out - y).square().mean(0)),
    "sum over samples by the number of labels": lambda out, y: list(((out - y).square() * (y > 0)).sum(0) / len(y)),
    "norms": lambda out, y: list((out - y).norm(dim=0)),
    "index": lambda out, y: [out[:, [k, k]].square().mean() for k in range(3)],
    "mask": lambda out, y: [out[torch.arange(len(y)) % 3 == k, k].square().mean() for k in range(3)],
    "row by row, by the number of its task": lambda out, y: [
        out[torch.arange(8), torch.arange(8) % 3][torch.arange(8) % 3 == k].square().mean() for k in range(3)
    ],
    "assigned": lambda out, y: [each.square().mean() for each in in_columns(out.unbind(1)).unbind(1)],
    "added to a vector, and scaled there": lambda out, y: list(
        scaled_losses([(out[:, k] - y[:, k]).abs().mean() for k in range(3)])[:3]
    ),
    "added to a matrix, by rows": lambda out, y: list(
        in_rows([(out[:, k] - y[:, k]).abs().mean() for k in range(3)]).sum(1)
    ),
    "parts of a view assigned": lambda out, y: [  # as in YOLOX
        (each - y[:, k]).square().mean()
        for k, each in enumerate(put_columns(out.view(8, 3, 1), 2).squeeze(-1).unbind(1))
    ],
}


@pytest.mark.parametrize("name", COLUMNS)
def test_each_loss_may_read_its_part_of_the_outputs_of_all_heads(name: str) -> None:
    bench, losses = Heads(8), COLUMNS[name]
    for _ in range(3):
        true = [
            bench.true_gradient(lambda outs, y, k=task: losses(torch.cat(outs, 1), y)[k], task)  # type: ignore[misc]
            for task in range(3)
        ]
        bench.optimizer.zero_grad()
        bench.optimizer.backward(losses(torch.cat(bench.outputs(), 1), bench.y))
        weights = bench.optimizer.last_step.weights  # type: ignore[union-attr]
        assert_close(bench.backbone.weight.grad, sum(w * grad for w, grad in zip(weights, true, strict=True)))
        bench.optimizer.step()
    losses_of_others = losses(torch.cat(bench.outputs(), 1), bench.y)[::-1]
    with pytest.raises(RuntimeError, match=r"loss of heads\[0\] must pass .* got one that passes through: heads\[2\]"):
        bench.optimizer.step([losses_of_others[0], None, None])


@pytest.mark.parametrize("write", [Tensor.index_add, Tensor.index_copy])
def test_outputs_may_be_written_to_one_tensor_one_by_one(write: Callable[..., Tensor]) -> None:
    bench, rows = Heads(8), torch.zeros(3, 8)
    for k, out in enumerate(bench.outputs()):
        rows = write(rows, 0, torch.tensor([k]), out.T)
    bench.optimizer.backward(list(rows.square().mean(1)))
    true = [bench.true_gradient(lambda outs, y, k=task: outs[k].square().mean(), task) for task in range(3)]  # type: ignore[misc]
    weights = bench.optimizer.last_step.weights  # type: ignore[union-attr]
    assert_close(bench.backbone.weight.grad, sum(w * grad for w, grad in zip(weights, true, strict=True)))


def test_joined_outputs_in_which_parts_were_replaced_need_backward_with_the_losses() -> None:
    """After the user's own backward, the graph does not show which parts. As in YOLOX."""
    bench = Heads(8)
    out = put_columns(torch.cat(bench.outputs(), 1).view(8, 3, 1), 2)
    losses = [F.smooth_l1_loss(out[:, k, 0], bench.y[:, k]).sqrt() for k in range(3)]
    with pytest.raises(RuntimeError, match=r"or parts of joined outputs are replaced, .* call backward\(losses\) with"):
        back_propagate(losses)


class Doubled(torch.autograd.Function):
    """A function with several outputs whose dependence is not visible in the graph, as in a compiled model."""

    @staticmethod
    def forward(ctx: Any, *outs: Tensor) -> tuple[Tensor, ...]:
        return tuple(2 * out for out in outs)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, ...]:
        return tuple(2 * grad for grad in grads)


def test_outputs_of_an_opaque_function_may_be_those_of_single_heads() -> None:
    bench = Heads(4)
    losses = [out.square().mean() for out in Doubled.apply(*bench.outputs())]  # type: ignore[no-untyped-call]
    bench.optimizer.step(losses)
    assert bench.optimizer.last_step is not None
    assert bench.optimizer.last_step.present.all()


@pytest.mark.parametrize("dim", [0, 2])
@pytest.mark.parametrize("name", OPERATIONS)
def test_labels_of_a_freed_graph_miss_no_task(name: str, dim: int) -> None:
    """After a backward pass, the graph does not contain indices and masks."""
    fed, parts = outputs(0)
    x = OPERATIONS[name](torch.stack(parts, dim))
    expected = labels_by_gradients(x, fed)
    torch.autograd.grad(x.sum(), fed, allow_unused=True)  # frees the graph
    edge = made_by(x)
    labels = Dependence([edge])._label(edge).expand(x.shape)
    assert ((labels == expected) | (labels < NONE) | (expected == NONE)).all()


@pytest.mark.parametrize("own", [False, True])
@pytest.mark.parametrize("reads", ["nothing", "the backbone and a head", "two heads", "one head"])
def test_an_opaque_function_in_the_backbone_hides_nothing(reads: str, own: bool) -> None:
    """As in a compiled backbone with several outputs; but between two heads, what it computes from what is unknown."""
    bench = Heads(4)
    z, other = Doubled.apply(bench.backbone(bench.x), bench.x)  # type: ignore[no-untyped-call]
    outs = [head(z) for head in bench.heads[:2]]
    if reads != "nothing":
        read = {"the backbone and a head": (z, outs[0]), "two heads": (outs[0], outs[1]), "one head": (outs[1],) * 2}
        z = Doubled.apply(*read[reads])[0].expand(4, 4)  # type: ignore[no-untyped-call]
    losses = [out.square().mean() for out in (*outs, bench.heads[2](z))]
    raises = pytest.raises(RuntimeError, match=r"Heads must read the backbone, got heads\[2\], which reads")
    warns = pytest.warns(UserWarning, match="The wiring must be visible in the autograd graph")
    with nullcontext() if reads == "nothing" else raises if reads == "one head" else warns:
        if own:
            back_propagate([*losses, other.mean()])
        else:
            bench.optimizer.backward(losses, backbone_loss=other.mean())
