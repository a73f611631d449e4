"""Models that are wired wrongly, each in one way, which can be trained but with wrong results."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Adam

from rotoopt import RotoGradOptimizer
from tests.contract.models import REP_SIZE, TwoTasks, adam, train, wrap
from tests.testing.wired import Wired

# From the model and its optimizer to the outputs of the heads; the losses are their squares.
Forward = Callable[[TwoTasks, RotoGradOptimizer], Sequence[Tensor]]


def representation(model: TwoTasks) -> Tensor:
    z: Tensor = model.backbone(model.inputs(0))
    return z


def squares(outputs: Sequence[Tensor]) -> list[Tensor]:
    return [output.square().mean() for output in outputs]


def forward(run: Forward, **options: Any) -> Callable[[], Wired]:
    """Wire a correct optimizer to a forward pass that is wrong, after a correct one."""

    def build() -> Wired:
        model, optimizer = wrap(adam, **{"rotation_size": REP_SIZE, **copy.deepcopy(options)})
        model(model.inputs(1))
        return Wired(model, optimizer, lambda: squares(run(model, optimizer)))

    return build


def outputs_of(left: Callable[[nn.Module, Tensor], Tensor], right: Callable[[nn.Module, Tensor], Tensor]) -> Forward:
    """Return a forward pass that calls each head by its own function."""

    def run(model: TwoTasks, optimizer: RotoGradOptimizer) -> Sequence[Tensor]:
        z, heads = representation(model), model.heads
        return [left(heads["left"], z), right(heads["right"], z)]

    return run


def called(head: nn.Module, z: Tensor) -> Tensor:
    output: Tensor = head(z)
    return output


def on_detached(head: nn.Module, z: Tensor) -> Tensor:
    return called(head, z.detach())


# ------------------------------------------------------------------ heads that are not hooked


def with_copied_head() -> Wired:
    """``heads`` contains a copy of a head; the model uses its own."""
    model = TwoTasks()
    params = [*model.parameters(), *(right := copy.deepcopy(model.heads["right"])).parameters()]
    optimizer = RotoGradOptimizer(Adam(params), heads={"left": model.heads["left"], "right": right})
    return Wired(model, optimizer, lambda: model.losses(0)[0])


def with_old_model() -> Wired:
    """The notebook cell that builds the model ran again, but not that of the optimizer."""
    _, optimizer = wrap(adam)
    model = TwoTasks()
    return Wired(model, optimizer, lambda: model.losses(0)[0])


def with_whole_model() -> Wired:
    """Each of ``heads`` is a whole network, including the backbone."""
    model = TwoTasks()
    heads = {name: nn.Sequential(model.backbone, head) for name, head in model.heads.items()}
    optimizer = RotoGradOptimizer(Adam(model.parameters()), heads=heads)
    return Wired(model, optimizer, lambda: squares([head(model.inputs(0)) for head in heads.values()]))


def in_eval_mode() -> Wired:
    model, optimizer = wrap(adam)
    model.heads["right"].eval()
    return Wired(model, optimizer, lambda: model.losses(0)[0])


def one_head_for_both(model: TwoTasks, optimizer: RotoGradOptimizer) -> Sequence[Tensor]:
    output = model.heads["left"](representation(model))
    return [output, output - 1]


# ------------------------------------------------------------------ stale rotations


def with_copied_rotations() -> Wired:
    """Functional heads whose inputs the user multiplies by rotations that were copied once."""
    model, optimizer = wrap(adam, num_tasks=2, rotation_size=REP_SIZE, init="haar")
    copied = optimizer.rotations.matrices.clone()
    heads = model.heads.values()

    def losses() -> list[Tensor]:
        z = representation(model)
        return squares([head(z @ rotation.T) for head, rotation in zip(heads, copied, strict=True)])

    return Wired(model, optimizer, losses)


def folded() -> Wired:
    """The rotations were folded into the weights for evaluation, and training continues."""
    model, optimizer = wrap(adam)
    train(model, optimizer, 0)
    optimizer.fold()
    return Wired(model, optimizer, lambda: model.losses(0)[0])


def copied_model() -> Wired:
    """A copy of the model is trained; its rotations are copies as well."""
    model, optimizer = wrap(adam)
    train(model, optimizer, 0)
    copied = copy.deepcopy(model)
    return Wired(model, optimizer, lambda: copied.losses(0)[0])


# ------------------------------------------------------------------ other tensors than z


def z_from_before() -> Wired:
    """The backbone runs outside of ``losses``."""
    model, optimizer = wrap(adam)
    z = representation(model)
    return Wired(model, optimizer, lambda: squares([head(z) for head in model.heads.values()]))


# ------------------------------------------------------------------ losses of something else


def swapped(model: TwoTasks, optimizer: RotoGradOptimizer) -> Sequence[Tensor]:
    left, right = model(model.inputs(0))
    return [right, left]


def tensors_swapped(model: TwoTasks, optimizer: RotoGradOptimizer) -> Sequence[Tensor]:
    z_left, z_right = optimizer.rotate(representation(model))
    return [model.heads["left"](z_right), model.heads["right"](z_left)]


def one_fed_with_z(model: TwoTasks, optimizer: RotoGradOptimizer) -> Sequence[Tensor]:
    z = representation(model)
    z_left, _ = optimizer.rotate(z)
    return [model.heads["left"](z_left), model.heads["right"](z)]


def around_the_head(model: TwoTasks, optimizer: RotoGradOptimizer) -> Sequence[Tensor]:
    z = representation(model)
    return [model.heads["left"](z), model.heads["right"](z) + z[:, :2]]


def mixed(model: TwoTasks, optimizer: RotoGradOptimizer) -> Sequence[Tensor]:
    left, right = model(model.inputs(0))
    return [left, right + left]


def without_grad(model: TwoTasks, optimizer: RotoGradOptimizer) -> Sequence[Tensor]:
    z = representation(model)
    with torch.no_grad():
        right = model.heads["right"](z)
    return [model.heads["left"](z), right]


def straight_through(model: TwoTasks, optimizer: RotoGradOptimizer) -> Sequence[Tensor]:
    """Another value, with the gradient of the output."""
    left, right = model(model.inputs(0))
    return [left, right - right.detach() + 1]


class Similarities(nn.Module):
    """A head without weights: inner products of its two inputs, for all samples."""

    def forward(self, first: Tensor, second: Tensor) -> Tensor:
        return first @ second.mT


def of_inner_products() -> Wired:
    """A head whose output does not depend on its rotation."""
    model, right = TwoTasks(), Similarities()
    optimizer = RotoGradOptimizer(Adam(model.parameters()), heads={"left": model.heads["left"], "right": right})

    def losses() -> list[Tensor]:
        z = representation(model)
        z = z + ((4 * z).round() / 4 - z).detach()  # so that sums are exact
        return squares([model.heads["left"](z), right(z, 2 * z)])

    return Wired(model, optimizer, losses)


# ------------------------------------------------------------------ the rest


def without_backbone() -> Wired:
    model = TwoTasks()
    optimizer = RotoGradOptimizer(Adam(model.heads.parameters()), heads=model.heads)
    return Wired(model, optimizer, lambda: model.losses(0)[0])


def without_head() -> Wired:
    model = TwoTasks()
    optimizer = RotoGradOptimizer(
        Adam([*model.backbone.parameters(), *model.heads["left"].parameters()]), heads=model.heads
    )
    return Wired(model, optimizer, lambda: model.losses(0)[0])


def of_old_model() -> Wired:
    """The optimizer has the parameters of a model that was built earlier, with the heads of this one."""
    model, old = TwoTasks(), TwoTasks()
    optimizer = RotoGradOptimizer(Adam(old.parameters()), heads=model.heads)
    return Wired(model, optimizer, lambda: model.losses(0)[0])


def drawn_inside() -> Wired:
    """Every call of ``losses`` uses another batch."""
    model, optimizer = wrap(adam)
    batches = iter(range(100))
    return Wired(model, optimizer, lambda: model.losses(next(batches))[0])


def overflowing(model: TwoTasks, optimizer: RotoGradOptimizer) -> Sequence[Tensor]:
    left, right = model(model.inputs(0))
    return [left, right * torch.inf]


def overwritten(matrices: Tensor) -> Callable[[], Wired]:
    def build() -> Wired:
        model, optimizer = wrap(adam, rotation_size=REP_SIZE)
        optimizer.rotations.matrices.copy_(matrices)
        return Wired(model, optimizer, lambda: model.losses(0)[0])

    return build


def hooked(name: str) -> Callable[[], Wired]:
    """A hook changes the gradient when it is accumulated in ``.grad``, so that training uses another one."""

    def negate(param: Tensor) -> None:
        assert param.grad is not None
        param.grad.neg_()

    def build() -> Wired:
        model, optimizer = wrap(adam)
        model.get_parameter(name).register_post_accumulate_grad_hook(negate)  # type: ignore[no-untyped-call]
        return Wired(model, optimizer, lambda: model.losses(0)[0])

    return build


def forgetful() -> Wired:
    """A hook loses the moments when they are loaded."""
    model, optimizer = wrap(adam, rotation_size=REP_SIZE)
    train(model, optimizer, 0)
    optimizer.register_load_state_dict_post_hook(lambda each: each.state.clear())
    return Wired(model, optimizer, lambda: model.losses(0)[0])
