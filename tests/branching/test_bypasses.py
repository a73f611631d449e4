"""Bypasses of the heads: an error if they lead to shared parameters, and accepted otherwise."""

from __future__ import annotations

import gc
import warnings
from collections.abc import Callable
from contextlib import nullcontext

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import SGD
from torch.testing import assert_close
from torch.utils.checkpoint import checkpoint

from rotoopt import RotoGradOptimizer
from tests.contract.models import TwoTasks, back_propagate, sgd, wrap

PAST = "A parameter that tasks share must be reached through their heads, got"
Losses = Callable[[TwoTasks, nn.Module], list[Tensor]]


def outputs_of(model: TwoTasks) -> list[Tensor]:
    z = model.backbone(model.inputs(0))
    return [model.heads["left"](z).expand(-1, 6), model.heads["right"](z).repeat(1, 3)]


def of_both(model: TwoTasks, shared: Callable[[Tensor], Tensor]) -> list[Tensor]:
    return [shared(output).square().mean() for output in outputs_of(model)]


def weight_of(model: TwoTasks) -> Tensor:
    return next(model.backbone.parameters())


BEHIND: dict[str, tuple[Callable[[], nn.Module], Losses]] = {
    "normalization": (lambda: nn.LayerNorm(6), lambda model, layer: of_both(model, layer)),
    "linear": (lambda: nn.Linear(6, 3), lambda model, layer: of_both(model, layer)),
    "convolution": (lambda: nn.Conv1d(1, 3, 1), lambda model, layer: of_both(model, lambda out: layer(out[:, None]))),
    "PReLU": (nn.PReLU, lambda model, layer: of_both(model, layer)),
    "linear with two numbers": (
        lambda: nn.Linear(2, 1, bias=False),
        lambda model, layer: of_both(model, lambda out: layer(out[:, :2])),
    ),
    "number for each column": (
        lambda: nn.PReLU(2),
        lambda model, layer: of_both(model, lambda out: layer(out[:, :2])),
    ),
    "linear for stacked outputs": (
        lambda: nn.Linear(6, 3),
        lambda model, layer: list(layer(torch.stack(outputs_of(model))).square().mean((1, 2))),
    ),
    "matrix for stacked outputs": (
        lambda: nn.Linear(6, 3, bias=False),
        lambda model, layer: list(
            torch.einsum(
                "kbd,kod->kbo", torch.stack(outputs_of(model)), next(layer.parameters()).expand(2, -1, -1)
            ).mean((1, 2))
        ),
    ),
    "weights of the backbone": (
        nn.Identity,
        lambda model, _: of_both(model, lambda out: F.linear(out, weight_of(model)[:, :1].expand(-1, 6))),
    ),
    "norm of the backbone": (
        nn.Identity,
        lambda model, _: [loss + weight_of(model).norm() for loss in model.losses(0)[0]],
    ),
}


@pytest.mark.parametrize("own", [False, True])
@pytest.mark.parametrize("name", BEHIND)
def test_shared_parameters_behind_the_heads_are_named(name: str, own: bool) -> None:
    make, losses_of = BEHIND[name]
    model, layer = TwoTasks(), make()
    params = [*model.parameters(), *layer.parameters()]
    optimizer = RotoGradOptimizer(SGD(params, lr=0.1), model.heads)
    losses = losses_of(model, layer)
    if own and name == "norm of the backbone":
        back_propagate([torch.stack(losses).sum()])  # there, a penalty is treated like any other term
        return
    causes = {
        "weights of the backbone": r"Either \(a\) a skip connection",
        "norm of the backbone": r"It is read by a term that is added to the loss. Either \(a\) it is a penalty",
    }.get(name, r"Either \(a\) a layer is applied to the outputs of several heads")
    message = rf"{PAST} .*, which the losses of left and right reach without passing .*not weighted there\. {causes}"
    with pytest.raises(RuntimeError, match=message):
        back_propagate([torch.stack(losses).sum()]) if own else optimizer.step(losses)


@pytest.mark.parametrize("own", [False, True])
@pytest.mark.parametrize("around_all", [False, True], ids=["around some layers", "around all heads"])
def test_decoders_with_skip_connections_begin_after_the_last_one(around_all: bool, own: bool) -> None:
    """As in HoVer-Net: the last layers read what the first ones have computed, plus a tensor of the backbone."""
    torch.manual_seed(0)
    stem, encoder = nn.Linear(3, 6), nn.Linear(6, 6)
    decoders = [(nn.Linear(6, 6), nn.Linear(6, 1)) for _ in range(2)]
    model = nn.ModuleList([stem, encoder, *decoders[0], *decoders[1]]).double()

    def losses() -> list[Tensor]:
        low = stem(torch.linspace(-1, 1, 12).double().view(4, 3))
        high = encoder(low.detach() if around_all else low)
        return [10**k * last(torch.tanh(first(high)) + low).square().mean() for k, (first, last) in enumerate(decoders)]

    def run(optimizer: RotoGradOptimizer) -> None:
        optimizer.zero_grad()
        back_propagate([torch.stack(losses()).sum()]) if own else optimizer.backward(losses())

    optimizer = RotoGradOptimizer(SGD(model.parameters(), lr=0.1), decoders)
    with pytest.raises(RuntimeError, match=rf"{PAST} .* skip connections to their own outputs, list only those after"):
        run(optimizer)
    optimizer.remove()
    optimizer = RotoGradOptimizer(SGD(model.parameters(), lr=0.1), [last for _, last in decoders], rotate=False)
    for _ in range(4):
        run(optimizer)
        assert optimizer.last_step is not None
        weights = optimizer.last_step.weights
        with optimizer.paused():
            true = [torch.autograd.grad(losses()[task], stem.weight)[0] for task in range(2)]
        assert_close(stem.weight.grad, sum(w * grad for w, grad in zip(weights, true, strict=True)))
        optimizer.step()
    assert weights[0] > weights[1]


@pytest.mark.parametrize("num_layers", [1, 2, 5])
def test_the_first_parameters_are_named_in_the_order_of_the_optimizer(num_layers: int) -> None:
    model = TwoTasks()
    model.backbone = nn.Sequential(*(nn.Linear(3, 3, bias=False) for _ in range(num_layers - 1)), model.backbone)
    for params in (list(model.parameters()), list(model.parameters())[::-1]):
        optimizer = RotoGradOptimizer(SGD(params, lr=0.1), model.heads)
        z = model.backbone(model.inputs(0))
        losses = [model.heads["left"](z).square().mean() + z.square().mean(), model.heads["right"](z).square().mean()]
        with pytest.raises(RuntimeError, match=PAST) as error:
            optimizer.step(losses)
        expected = [f"{each}.weight" for each in range(num_layers - 1)] + [f"{num_layers - 1}.0.weight"]
        shapes = ["(3, 3)"] * (num_layers - 1) + ["(6, 3)"]
        named = [f"backbone.{name} of shape {shape}" for name, shape in zip(expected, shapes, strict=True)]
        first = (named if params[0] is next(model.parameters()) else named[::-1])[:3]
        more = f" and {num_layers - 3} more" if num_layers > 3 else ""
        assert f"got {', '.join(first)}{more}, which the loss of left reaches" in str(error.value)
        optimizer.remove()
        del optimizer, error
        gc.collect()


@pytest.mark.parametrize(
    ("kind", "way"),
    [
        ("exponential", "step"),
        ("exponential", "own"),
        ("softmax", "step"),
        ("softmax", "own"),
        ("dot", "own"),
        ("log", "own"),
    ],
)
def test_trained_weights_of_losses_are_accepted(kind: str, way: str) -> None:
    """As in uncertainty weighting, among others: each loss passes through its own head."""
    model = TwoTasks()
    s = nn.Parameter(torch.tensor([0.5, -0.5]))
    optimizer = RotoGradOptimizer(SGD([*model.parameters(), s], lr=0.1), model.heads)
    for batch in range(3):
        optimizer.zero_grad()
        losses = torch.stack(model.losses(batch)[0])
        weighted = {
            "exponential": torch.exp(-s) * losses + s,
            "softmax": s.softmax(0) * losses,
            "dot": torch.dot(losses, torch.tensor([0.3, 0.7])),
            "log": losses.log(),
        }[kind]
        if way == "step":
            optimizer.step(weighted)
        else:
            back_propagate([weighted.sum()])
            optimizer.step()
        assert optimizer.last_step is not None
        assert optimizer.last_step.present.all()


@pytest.mark.parametrize("kind", ["its own column", "another column", "with another output"])
def test_column_of_a_probe_must_be_its_own(kind: str) -> None:
    """The output of a head that reads nothing with a gradient, beside that of another one."""
    model = TwoTasks()
    optimizer = RotoGradOptimizer(SGD(model.parameters(), lr=0.1), model.heads)
    z = model.backbone(model.inputs(0))
    left, right = model.heads["left"](z).mean(1), model.heads["right"](z.detach()).mean(1)
    outputs = torch.stack([left, right + left if kind == "with another output" else right], 1).tanh()
    losses = [outputs[:, 0].square().mean(), outputs[:, 0 if kind == "another column" else 1].square().mean()]
    accepted = kind == "its own column"
    with nullcontext() if accepted else pytest.raises(RuntimeError, match=r"^The loss of right must pass through its"):
        optimizer.step(losses)
    assert not accepted or optimizer.task_weights.tolist() == [1.0, 0.0]


KINDS = ["of samples", "unbound", "of columns", "of columns, as losses", "of rows, by a view", "unsqueezed"]
KINDS += ["expanded", "expanded and flattened"]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("own", [False, True])
def test_tasks_may_read_separate_elements_of_one_parameter(kind: str, own: bool) -> None:
    """A log-variance or a scale for each task in one vector: each element gets the gradient of its own task."""
    model, s = TwoTasks(), nn.Parameter(torch.tensor([0.5, -0.5]))
    optimizer = RotoGradOptimizer(SGD([*model.parameters(), s], lr=0.1), model.heads, rotate=False)

    def losses() -> list[Tensor]:
        z = model.backbone(model.inputs(0))
        outputs = [head(z).mean(1, keepdim=True) for head in model.heads.values()]
        if kind == "of samples":
            return [(torch.exp(-s)[k] * out.square() + s[k]).mean() for k, out in enumerate(outputs)]
        if kind == "unbound":
            scales = s.exp().unbind()
            return [(scale * out.square()).mean() for scale, out in zip(scales, outputs, strict=True)]
        if kind in ("of rows, by a view", "unsqueezed"):
            each = s.exp().view(1, 2, 1) if kind == "of rows, by a view" else s[:, None].exp()
            errors = (torch.stack(outputs, 1) * each).square()
            return [errors[:, k].mean() for k in range(2)]
        columns = torch.cat(outputs, 1)
        if kind == "expanded and flattened":
            errors = (columns.flatten() * s.view(1, 2).exp().expand_as(columns).reshape(-1)).square().view_as(columns)
        else:
            errors = (columns * (s.exp().expand_as(columns) if kind == "expanded" else s.exp().view(2))).square()
        return list(errors.mean(0)) if kind == "of columns, as losses" else [errors[:, k].mean() for k in range(2)]

    with optimizer.paused():
        (expected,) = torch.autograd.grad(torch.stack(losses()).sum(), s)
    back_propagate(losses()) if own else optimizer.backward(losses())
    assert_close(s.grad, expected)


@pytest.mark.parametrize("shape", [(1,), (1, 1), (1, 1, 1)])
def test_one_number_for_the_outputs_of_all_tasks_is_named(shape: tuple[int, ...]) -> None:
    model, s = TwoTasks(), nn.Parameter(torch.ones(1))
    optimizer = RotoGradOptimizer(SGD([*model.parameters(), s], lr=0.1), model.heads)
    outputs = [each.mean(1, keepdim=True) for each in model(model.inputs(0))]
    with pytest.raises(RuntimeError, match=PAST):
        back_propagate([(torch.cat(outputs, 1) * s.view(shape) - 1).square().mean()])
    assert optimizer.last_step is None


PRODUCTS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "bmm": torch.bmm,
    "baddbmm": lambda outputs, weight: torch.baddbmm(torch.ones(2, 1, 3), outputs, weight),
    "einsum": lambda outputs, weight: torch.einsum("kbd,kdo->kbo", outputs, weight),
    "samples first": lambda outputs, weight: torch.einsum("bkd,kdo->kbo", outputs.transpose(0, 1), weight),
    "vmap": lambda outputs, weight: torch.vmap(torch.matmul)(outputs, weight),
    "two layers": lambda outputs, weight: (outputs @ weight).relu() @ weight.mT,
}


@pytest.mark.parametrize("own", [False, True])
@pytest.mark.parametrize("name", PRODUCTS)
def test_one_product_may_apply_a_matrix_for_each_task(name: str, own: bool) -> None:
    """The heads of all tasks as one parameter: each matrix gets the gradient of its own task."""
    model, weight = TwoTasks(), nn.Parameter(torch.randn(2, 6, 3))
    optimizer = RotoGradOptimizer(SGD([*model.parameters(), weight], lr=0.1), model.heads, rotate=False)

    def losses() -> Tensor:
        return PRODUCTS[name](torch.stack(outputs_of(model)), weight).square().mean((1, 2))

    shared = weight_of(model)
    with optimizer.paused():
        (expected,) = torch.autograd.grad(losses().sum(), weight)
        grads = [torch.autograd.grad(losses()[k], shared)[0] for k in range(2)]
    back_propagate(list(losses())) if own else optimizer.backward(losses())
    assert_close(weight.grad, expected)
    weights = optimizer.last_step.weights  # type: ignore[union-attr]
    assert_close(shared.grad, weights[0] * grads[0] + weights[1] * grads[1])


SPREAD: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "expanded": lambda s, columns: s.expand(2),
    "temperature": lambda s, columns: s.unsqueeze(1).expand(*columns.shape),  # as in temperature scaling
    "times a constant vector": lambda s, columns: s * torch.tensor([0.5, 2.0]),
    "expanded, then a view": lambda s, columns: s.exp().expand(2, 1).reshape(1, 2),
}


@pytest.mark.parametrize("own", [False, True])
@pytest.mark.parametrize("name", SPREAD)
def test_one_number_for_all_tasks_is_named_also_if_it_was_expanded(name: str, own: bool) -> None:
    model, s = TwoTasks(), nn.Parameter(torch.ones(1))
    optimizer = RotoGradOptimizer(SGD([*model.parameters(), s], lr=0.1), model.heads)
    columns = torch.cat([each.mean(1, keepdim=True) for each in model(model.inputs(0))], 1)
    errors = (columns * SPREAD[name](s, columns)).square()
    with pytest.raises(RuntimeError, match=PAST):
        back_propagate([errors.mean()]) if own else optimizer.step(errors.mean(0))
    assert optimizer.last_step is None


@pytest.mark.parametrize("unbound", [False, True])
def test_elements_of_one_number_that_was_expanded_are_not_separate(unbound: bool) -> None:
    model, s = TwoTasks(), nn.Parameter(torch.ones(1))
    optimizer = RotoGradOptimizer(SGD([*model.parameters(), s], lr=0.1), model.heads)
    scales = s.exp().expand(2).unbind() if unbound else s.expand(2)
    with pytest.raises(RuntimeError, match=PAST):
        optimizer.step([(out * scales[k]).square().mean() for k, out in enumerate(model(model.inputs(0)))])


@pytest.mark.parametrize("shape", [(5, 1), (1, 5, 1)])
def test_one_number_per_sample_for_the_outputs_of_all_tasks_is_named(shape: tuple[int, ...]) -> None:
    model, s = TwoTasks(), nn.Parameter(torch.ones(5))
    optimizer = RotoGradOptimizer(SGD([*model.parameters(), s], lr=0.1), model.heads)
    outputs = [each.mean(1, keepdim=True) for each in model(model.inputs(0))]
    with pytest.raises(RuntimeError, match=PAST):
        back_propagate([(torch.stack(outputs) * s.view(shape) - 1).square().mean()])
    assert optimizer.last_step is None


def test_time_steps_of_one_task_may_share_a_parameter_that_is_not_listed() -> None:
    """In the sum of their losses, each looks like the loss of a task."""
    model = TwoTasks()
    log_std = nn.Parameter(torch.zeros(6))
    optimizer = RotoGradOptimizer(SGD([*model.parameters(), log_std], lr=0.1), model.heads)
    z = model.backbone(model.inputs(0))
    expected = (1 - 2 * model.heads["left"](z).detach().square().mean()) / 2
    steps = [((model.heads["left"](z).expand(-1, 6) / log_std.exp()).square() + log_std).mean() for _ in range(3)]
    back_propagate([sum(steps) + model.heads["right"](z).square().mean()])
    optimizer.step()
    assert_close(log_std.grad, expected.expand(6))


@pytest.mark.parametrize("own", [False, True])
@pytest.mark.parametrize("around", ["one", "both", "none"])
def test_bypass_from_a_reentrant_checkpoint_is_rejected(around: str, own: bool) -> None:
    """The graph of the losses contains the checkpoint, but not its parameters."""
    encoder, middle = nn.Linear(5, 6), nn.Linear(6, 6)
    heads = nn.ModuleList(nn.Linear(6, 6) for _ in range(2))
    params = [*encoder.parameters(), *middle.parameters(), *heads.parameters()]
    optimizer = RotoGradOptimizer(SGD(params, lr=0.1), heads)
    e = checkpoint(encoder, torch.randn(4, 5, requires_grad=True), use_reentrant=True)
    z = middle(e)
    num_around = {"one": 1, "both": 2, "none": 0}[around]
    losses = [(head(z) + (e if k < num_around else 0)).square().mean() for k, head in enumerate(heads)]
    refused = pytest.raises(RuntimeError, match="got the output of a re-entrant checkpoint, which the loss of heads")
    with nullcontext() if around == "none" else refused:
        back_propagate(losses) if own else optimizer.backward(losses)


@pytest.mark.parametrize("own", [False, True])
def test_a_module_of_a_task_in_eval_mode_is_rejected(own: bool) -> None:
    model, frozen = TwoTasks(), nn.Linear(6, 1).eval()
    heads = {"left": [model.heads["left"], frozen], "right": [model.heads["right"]]}
    optimizer = RotoGradOptimizer(SGD(model.parameters(), lr=0.1), heads)
    z = model.backbone(model.inputs(0))
    losses = [(model.heads["left"](z) + frozen(z)).mean(), model.heads["right"](z).mean()]
    with pytest.raises(RuntimeError, match=f"{PAST}.* loss of left reaches.* one of several modules.* in eval mode"):
        back_propagate(losses) if own else optimizer.backward(losses)


def test_norms_of_a_list_of_parameters_are_a_penalty_like_any_other() -> None:
    model, optimizer = wrap(sgd)
    norms = torch._foreach_norm(list(model.parameters()))
    back_propagate([torch.stack([*model.losses(0)[0], *norms]).sum()])
    optimizer.step()


class Extra(nn.Module):
    """Layers beside two tasks, and one that another optimizer trains."""

    def __init__(self, model: TwoTasks) -> None:
        super().__init__()
        self.shared = [next(model.backbone.parameters())]  # in a list: not a parameter of this module
        self.head, self.discriminator = nn.Linear(6, 1), nn.Linear(6, 1)
        self.trained = [*model.parameters(), *self.head.parameters()]


TERMS: dict[str, Callable[[Extra, Tensor], Tensor]] = {
    "head": lambda extra, z: extra.head(z.tanh()).square().mean(),
    "head of a copy": lambda extra, z: extra.head((z * 1).relu()).mean(),
    "head with a shared weight": lambda extra, z: (z.tanh() @ extra.shared[0]).square().mean(),
    "penalty on products of weights": lambda extra, z: (extra.shared[0] @ extra.shared[0].T).mean(),
    "another pass": lambda extra, z: F.linear(F.linear(torch.ones(2, 3), extra.shared[0]), extra.shared[0].T).mean(),
    "discriminator": lambda extra, z: extra.discriminator(z).mean(),
    "penalty on z": lambda extra, z: z.square().mean(),
    "penalty on parameters": lambda extra, z: torch.stack([each.square().sum() for each in extra.trained]).sum(),
    "probe": lambda extra, z: extra.head(z.detach()).mean(),
}


@pytest.mark.parametrize("name", TERMS)
def test_a_head_that_is_not_listed_is_reported_once_in_the_users_own_backward(name: str) -> None:
    model = TwoTasks()
    extra = Extra(model)
    discriminating = SGD(extra.discriminator.parameters(), lr=0.1)
    optimizer = RotoGradOptimizer(sgd(extra.trained), model.heads)
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        for batch in range(20):
            losses, z = model.losses(batch)
            optimizer.zero_grad()
            discriminating.zero_grad()
            back_propagate([*losses, TERMS[name](extra, z)])
            optimizer.step()
    messages = [str(warning.message) for warning in found]
    assert len(messages) == name.startswith("head")
    of = "backbone.0.weight" if "shared" in name else "head."
    message = f"applies a layer outside of the backbone to something shared, {of}"
    assert all(message in each for each in messages)
