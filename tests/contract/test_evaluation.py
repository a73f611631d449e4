"""Outside training, the model is the rotated model with its true gradients, and nothing is recorded."""

import contextlib
import copy
import gc
import weakref
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import SGD

from rotoopt import RotoGradOptimizer
from tests.contract.models import TwoTasks, assert_same, back_propagate, parameters, snapshot, train, wrap


def rotated_outputs(model: TwoTasks, optimizer: RotoGradOptimizer, x: Tensor) -> list[Tensor]:
    """Compute the expected outputs without hooks: h_k([R_k z, rest])."""
    rep, m = model.backbone(x), optimizer.rotations.size
    rotated = [torch.cat([rep[:, :m] @ matrix.mT, rep[:, m:]], dim=1) for matrix in optimizer.rotations.matrices]
    return [each @ weight.mT for each, weight in zip(rotated, model.heads.parameters(), strict=True)]


def trained() -> tuple[TwoTasks, RotoGradOptimizer]:
    model, optimizer = wrap(init="haar", rotation_size=4)
    train(model, optimizer, 0, 1)
    return model, optimizer


Context = Callable[[TwoTasks, RotoGradOptimizer], AbstractContextManager[object]]
CONTEXTS: dict[str, Context] = {
    "train()": lambda model, optimizer: nullcontext(),
    "eval()": lambda model, optimizer: nullcontext(model.eval()),
    "no_grad()": lambda model, optimizer: torch.no_grad(),
    "inference_mode()": lambda model, optimizer: torch.inference_mode(),
    "paused()": lambda model, optimizer: optimizer.paused(),
}


@pytest.mark.parametrize("name", CONTEXTS)
def test_outputs_are_those_of_the_rotated_model(name: str) -> None:
    model, optimizer = trained()
    before = snapshot(model, optimizer)
    x = model.inputs(5)
    with CONTEXTS[name](model, optimizer):
        outputs = model(x)
    assert outputs[0].requires_grad == (name in ("train()", "eval()", "paused()"))
    torch.testing.assert_close(outputs, rotated_outputs(model, optimizer, x))
    assert_same(snapshot(model, optimizer), before)


@pytest.mark.parametrize("name", ["eval()", "paused()"])
def test_gradients_are_those_of_the_rotated_model(name: str) -> None:
    model, optimizer = trained()
    optimizer.zero_grad()
    before, record = snapshot(model, optimizer), optimizer.last_step
    saliencies = []
    for by_hand in (False, True):
        x = model.inputs(5).requires_grad_()
        with CONTEXTS[name](model, optimizer):
            outputs = rotated_outputs(model, optimizer, x) if by_hand else model(x)
        objective = torch.stack([output.square().mean() for output in outputs]).sum()
        saliencies.append(torch.autograd.grad(objective, [x, *model.parameters()]))
    torch.testing.assert_close(*saliencies)
    optimizer.step()
    before["optimizer"]["state"] = optimizer.state_dict()["state"]
    assert_same(snapshot(model, optimizer)["optimizer"], before["optimizer"])
    assert optimizer.last_step is record


def test_gradient_penalty_goes_through_paused() -> None:
    model, optimizer = trained()
    x = model.inputs(5).requires_grad_()
    with optimizer.paused():
        output = model(x)[0].square().sum()
    (gradient,) = torch.autograd.grad(output, x, create_graph=True)
    torch.autograd.backward(gradient.square().sum())
    output = model(x)[0].square().sum()
    with pytest.raises(RuntimeError, match=r"must not be differentiated again, got create_graph=True.*paused\(\)"):
        torch.autograd.grad(output, x, create_graph=True)


@pytest.mark.parametrize("own", [False, True])
def test_losses_of_derivatives_are_weighted_if_their_modules_are_the_heads(own: bool) -> None:
    """As in a physics-informed network: the residual of a differential equation, and boundary conditions."""
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(2, 8), nn.Tanh(), nn.Linear(8, 1)).double()
    heads = {"equation": nn.MSELoss(), "boundary": nn.MSELoss()}
    optimizer = RotoGradOptimizer(SGD(network.parameters(), lr=0.01), heads, rotate=False)

    def losses(step: int) -> list[Tensor]:
        generator = torch.Generator().manual_seed(step)
        x, boundary = (torch.rand(5, 2, generator=generator, dtype=torch.float64) for _ in range(2))
        u = network(x.requires_grad_())
        (slope,) = torch.autograd.grad(u.sum(), x, create_graph=True)
        (curvature,) = torch.autograd.grad(slope[:, 0].sum(), x, create_graph=True)
        residual = slope[:, 1] - curvature[:, 0]
        values = network(boundary)
        return [heads["equation"](residual, u[:, 0].detach()), heads["boundary"](values, boundary[:, :1])]

    for step in range(4):
        with optimizer.paused():
            of_tasks = [torch.autograd.grad(loss, list(network[0].parameters())) for loss in losses(step)]
        optimizer.zero_grad()
        if own:
            back_propagate(losses(step))
        else:
            optimizer.backward(losses(step))
        weights = optimizer.task_weights.tolist()
        for param, *grads in zip(network[0].parameters(), *of_tasks, strict=True):
            expected = sum(weight * grad for weight, grad in zip(weights, grads, strict=True))
            torch.testing.assert_close(param.grad, expected, rtol=1e-10, atol=1e-12)
        optimizer.step()
    assert weights[0] != weights[1]


@pytest.mark.parametrize("way", ["backbone_loss", "separate"])
def test_a_gradient_penalty_beside_the_losses(way: str) -> None:
    model, optimizer = trained()
    params = list(model.parameters())

    def penalty() -> Tensor:
        x = model.inputs(3).requires_grad_()
        with optimizer.paused():
            outputs = model(x)
        (slope,) = torch.autograd.grad(sum(out.square().sum() for out in outputs), x, create_graph=True)
        return slope.square().mean()

    of_penalty = torch.autograd.grad(penalty(), params)
    without, plain = copy.deepcopy(optimizer.state_dict()), copy.deepcopy(model.state_dict())
    optimizer.zero_grad()
    optimizer.backward(model.losses(3)[0])
    expected = [param.grad.add(grad) for param, grad in zip(params, of_penalty, strict=True)]  # type: ignore[union-attr]
    model.load_state_dict(plain)
    optimizer.load_state_dict(without)
    optimizer.zero_grad()
    losses = model.losses(3)[0]
    if way == "backbone_loss":
        optimizer.backward(losses, backbone_loss=penalty())
    else:
        penalty().backward()  # type: ignore[no-untyped-call]
        back_propagate(losses)
    for param, grad in zip(params, expected, strict=True):
        torch.testing.assert_close(param.grad, grad)


@pytest.mark.parametrize("second_order", [False, True])
def test_losses_after_an_inner_step_are_weighted_or_the_error_says_how_to_train(second_order: bool) -> None:
    """As in MAML: the parameters of the second forward pass depend on gradients of a first one."""
    model, optimizer = trained()
    params = dict(model.named_parameters())

    def losses() -> list[Tensor]:
        with optimizer.paused():
            inner = torch.stack([output.square().mean() for output in model(model.inputs(5))]).sum()
            grads = torch.autograd.grad(inner, list(params.values()), create_graph=second_order)
        fast = {name: param - 0.1 * grad for (name, param), grad in zip(params.items(), grads, strict=True)}
        outputs = torch.func.functional_call(model, fast, (model.inputs(6),))
        return [output.square().mean() for output in outputs]

    optimizer.zero_grad()
    if not second_order:
        optimizer.step(losses())
        return
    with optimizer.paused():
        torch.autograd.backward(torch.stack(losses()).sum())
    before = [param.detach().clone() for param in params.values()]
    optimizer.step()
    assert not any(map(torch.equal, before, params.values()))
    with pytest.raises(RuntimeError, match=r"computed from gradients, as in MAML.*under optimizer.paused\(\)"):
        optimizer.step(losses())


def test_paused_ends_after_an_error() -> None:
    model, optimizer = wrap()

    def fail() -> None:
        with optimizer.paused():
            with optimizer.paused():
                pass
            back_propagate(model.losses(0)[0])  # still paused
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert optimizer.last_step is None
    train(model, optimizer, 0)
    assert optimizer.last_step is not None


def test_a_first_forward_pass_under_paused_rotates_what_training_does() -> None:
    """Not the state of a cell, which the head computes itself."""
    outputs = []
    for paused in (True, False):
        torch.manual_seed(0)
        backbone, cell, other = nn.Linear(4, 6), nn.GRUCell(6, 6), nn.Linear(6, 2)
        params = nn.ModuleList([backbone, cell, other]).parameters()
        optimizer = RotoGradOptimizer(SGD(params, lr=0.1), [cell, other], init="haar", rotation_size=6)
        z = backbone(torch.randn(5, 4))
        with optimizer.paused() if paused else nullcontext():
            first = cell(z, cell(z))
        with torch.no_grad():
            outputs += [first.detach(), cell(z, cell(z))]
    torch.testing.assert_close(outputs, [outputs[-2]] * 4)


def test_a_cell_may_begin_with_zeros_in_a_first_forward_pass_under_paused() -> None:
    backbone, cell, other = nn.Linear(4, 6), nn.GRUCell(6, 6), nn.Linear(6, 2)
    params = nn.ModuleList([backbone, cell, other]).parameters()
    optimizer = RotoGradOptimizer(SGD(params, lr=0.1), [cell, other], rotation_size=6)
    for paused in (True, False):
        z = backbone(torch.randn(5, 4))
        with optimizer.paused() if paused else nullcontext():
            losses = [cell(z, cell(z, torch.zeros(5, 6))).square().mean(), other(z).square().mean()]
    optimizer.step(losses)


@pytest.mark.parametrize("name", ["eval()", "no_grad()", "inference_mode()", "paused()"])
def test_evaluation_before_training_changes_nothing(name: str) -> None:
    """Trainers run a few validation batches before the first step."""
    (model, optimizer), (expected_model, expected) = wrap(), wrap()
    with CONTEXTS[name](model, optimizer):
        model(model.inputs(0))
    model.train()
    train(model, optimizer, 0, 1)
    train(expected_model, expected, 0, 1)
    assert_same(snapshot(model, optimizer), snapshot(expected_model, expected))


def test_remove_gives_the_plain_model_back() -> None:
    model, optimizer = trained()
    plain = TwoTasks()
    plain.load_state_dict(model.state_dict())
    x = model.inputs(5)
    optimizer.remove()
    assert_same([each.detach() for each in model(x)], [each.detach() for each in plain(x)])
    assert not any(module._forward_pre_hooks for module in model.modules())
    optimizer.remove()
    RotoGradOptimizer(optimizer.optimizer, heads=model.heads)


def test_wrapping_does_not_change_the_model() -> None:
    plain = TwoTasks()
    model, optimizer = trained()
    assert list(model.state_dict()) == list(plain.state_dict())
    assert [name for name, _ in model.named_modules()] == [name for name, _ in plain.named_modules()]
    assert [name for name, _ in model.named_buffers()] == []
    assert len(list(model.parameters())) == len(parameters(plain))
    assert not optimizer.rotations.matrices.requires_grad
    assert not list(optimizer.rotations.parameters())


@pytest.mark.parametrize("how", ["forward", "backward", "error"])
def test_nothing_keeps_the_graph_alive(how: str) -> None:
    model, optimizer = wrap()
    losses, rep = model.losses(0)
    if how == "backward":
        optimizer.backward(losses, rep)
    if how == "error":
        with contextlib.suppress(ValueError):
            optimizer.backward(losses[:1], rep)
    capture = optimizer._core.engine.capture
    dead: list[weakref.ref[Any]] = [weakref.ref(rep), weakref.ref(capture._fork(rep)), weakref.ref(losses[0])]
    gc.disable()  # there is no cycle: everything is freed with the last reference
    try:
        del losses, rep
        assert [reference() for reference in dead] == [None, None, None]
        assert len(capture._forks) == 0
    finally:
        gc.enable()


def test_other_hooks_of_a_head_run_later() -> None:
    """Wrappers such as FSDP pass a separate tensor to every head, by hooks that were registered before."""
    results = []
    for wrapped in (False, True):
        model, optimizer = wrap()
        optimizer.remove()
        for head in model.heads.values():
            if wrapped:
                head.register_forward_pre_hook(lambda head, args: (args[0].clone(),), prepend=True)
        optimizer = RotoGradOptimizer(optimizer.optimizer, heads=model.heads)
        train(model, optimizer, 0, 1)
        results.append(snapshot(model, optimizer))
    assert_same(*results)


@pytest.mark.parametrize("of", ["data", "parameter", "representation"])
def test_a_gradient_of_data_in_training_mode_causes_a_warning(of: str) -> None:
    """It would count as that of a loss. Parameters may be trained by it, and representations passed on."""
    model, _ = trained()
    x = model.inputs(5).requires_grad_(of == "data")
    rep = model.backbone(x)
    if of == "representation":
        rep = rep.detach().requires_grad_()
    objective = torch.stack([head(rep).square().mean() for head in model.heads.values()]).sum()
    inputs = {"data": x, "parameter": next(model.parameters()), "representation": rep}
    message = r"should train parameters, got torch\.autograd\.grad\(\) with respect to data.*optimizer\.paused\(\)"
    with pytest.warns(UserWarning, match=message) if of == "data" else nullcontext():
        torch.autograd.grad(objective, inputs[of])


@pytest.mark.parametrize("order", ["grad, all", "all, grad", "left, grad, right", "grad, grad", "grad", "left, right"])
def test_gradients_beside_those_that_train_cause_a_warning(order: str) -> None:
    """Such as gradient norms of single tasks for a log: they are weighted, and change the weights of later steps."""
    model, optimizer = trained()
    for step in range(5, 8):
        (left, right), _ = model.losses(step)
        passes: dict[str, Callable[[], Any]] = {
            "grad": partial(torch.autograd.grad, left, list(model.backbone.parameters()), retain_graph=True),
            "all": partial(torch.Tensor.backward, left + right, retain_graph=True),
            "left": partial(torch.Tensor.backward, left, retain_graph=True),
            "right": partial(torch.Tensor.backward, right, retain_graph=True),
        }
        told = pytest.warns(UserWarning, match=r"got torch\.autograd\.grad\(\) and another.*optimizer\.paused\(\)")
        with told if step == 5 and order not in ("grad", "left, right") else nullcontext():  # once
            for name in order.split(", "):
                passes[name]()
            optimizer.step()
