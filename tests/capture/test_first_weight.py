"""R is applied to the first weight of a head where that is cheaper, with the same outputs and gradients."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.utils import parametrizations, prune
from torch.optim import SGD
from torch.testing import assert_close
from torch.utils.checkpoint import checkpoint

from rotoopt import EqualWeighting, RotoGradOptimizer
from rotoopt._capture import first_weight
from rotoopt._capture.first_weight import FirstWeight

Head = Callable[[], nn.Module]

VECTORS: dict[str, Head] = {
    "linear": lambda: nn.Linear(6, 2),
    "no bias": lambda: nn.Linear(6, 2, bias=False),
    "layers": lambda: nn.Sequential(nn.Linear(6, 3), nn.ReLU(), nn.Linear(3, 1)),
    "nested": lambda: nn.Sequential(nn.Sequential(nn.Sequential(nn.Linear(6, 3)), nn.Tanh()), nn.Linear(3, 1)),
}
MAPS: dict[str, Head] = {
    "1 x 1": lambda: nn.Conv2d(6, 2, 1),
    "3 x 3": lambda: nn.Sequential(nn.Conv2d(6, 2, 3, stride=2, padding=1, dilation=2, bias=False), nn.ReLU()),
    "same": lambda: nn.Conv2d(6, 2, 3, padding="same"),
}


@contextmanager
def applied(*, to_weights: bool | None) -> Iterator[list[FirstWeight]]:
    """Apply R to weights of any size, to none, or (None) as usual; return those it was applied to."""
    found: list[FirstWeight] = []
    defer = FirstWeight.defer

    def recorded(self: FirstWeight, rep: Tensor, matrix: Tensor) -> Tensor:
        found.append(self)
        return defer(self, rep, matrix)

    with pytest.MonkeyPatch.context() as patch:
        if to_weights is not None:
            patch.setattr(first_weight, "LEAST", 0 if to_weights else 2**62)
        patch.setattr(FirstWeight, "defer", recorded)
        yield found


class Model(nn.Module):
    """Two heads of one kind; the features are in the last dimension of z, or in ``dim=1``."""

    def __init__(self, head: Head, *, dim: int = -1) -> None:
        super().__init__()
        self.dim, self.backbone, self.heads = dim, nn.Linear(4, 6), nn.ModuleList([head(), head()])

    def wrap(self, **options: object) -> RotoGradOptimizer:
        sgd = SGD(self.parameters(), lr=0.1)
        return RotoGradOptimizer(sgd, self.heads, dim=self.dim, init="haar", weighting=EqualWeighting(), **options)  # type: ignore[arg-type]

    def losses(self, x: Tensor) -> list[Tensor]:
        z = self.backbone(x).tanh().movedim(-1, self.dim)
        return [head(z).square().sum() for head in self.heads]

    def gradients(self) -> list[Tensor]:
        return [param.grad for param in self.parameters() if param.grad is not None]


def trained(model: Model, x: Tensor, steps: int, **options: object) -> tuple[list[Tensor], list[Tensor]]:
    """Return all losses, and the gradients of the last step."""
    torch.manual_seed(0)  # for the rotations
    optimizer, losses = model.wrap(**options), list[Tensor]()
    for _ in range(steps):
        optimizer.zero_grad()
        losses += model.losses(x)
        optimizer.step(losses[-2:])
    return [loss.detach() for loss in losses], model.gradients()


@given(name=st.sampled_from([*VECTORS, *MAPS]), is_sequence=st.booleans(), seed=st.integers(0, 2**31))
def test_losses_and_gradients_are_those_of_a_rotated_input(name: str, is_sequence: bool, seed: int) -> None:
    torch.manual_seed(seed)
    model = Model((VECTORS | MAPS)[name], dim=1 if name in MAPS else -1).double()
    shape = (8, 5, 5, 4) if name in MAPS else (8, 5, 4) if is_sequence else (32, 4)
    x = torch.randn(shape, dtype=torch.float64)
    results = []
    for to_weights in (False, True):
        with applied(to_weights=to_weights) as found:
            results.append(trained(copy.deepcopy(model), x, 3, turn_every=2))
        assert len(found) == (2 if to_weights else 0)  # the rotations are updated in the first and third step
    assert_close(results[1], results[0], rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_precision_is_that_of_the_layer(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    model, x = Model(VECTORS["linear"]), torch.randn(64, 4)
    exact = trained(copy.deepcopy(model), x, 1, turn_every=1)
    with applied(to_weights=True) as found, torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
        losses, gradients = trained(model, x, 2, turn_every=2)
    assert len(found) == 2
    assert all(grad.dtype == torch.float32 for grad in gradients)
    tolerance = 0.05 if dtype == torch.bfloat16 else 1e-5
    assert_close([loss.float() for loss in losses[:2]], exact[0], rtol=tolerance, atol=tolerance)


class Scaled(nn.Linear):
    """A subclass may use its weight in another way."""

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(2 * input)


def observed(register: str) -> Head:
    def head() -> nn.Module:
        layer = nn.Linear(6, 2)
        getattr(layer, register)(lambda *_: None)
        return layer

    return head


def in_sequential() -> nn.Module:
    return nn.Sequential(nn.Linear(6, 2))


OTHERS: dict[str, Head] = {
    "subclass": lambda: Scaled(6, 2),
    "behind another layer": lambda: nn.Sequential(nn.Tanh(), nn.Linear(6, 2)),
    "many rows": lambda: nn.Linear(6, 40),
    "parametrization": lambda: parametrizations.weight_norm(nn.Linear(6, 2)),
    "pruning": lambda: prune.identity(nn.Linear(6, 2), "weight"),  # type: ignore[no-untyped-call]
    "no parameters": lambda: nn.Sequential(),
    **{
        name: observed(name)
        for name in (
            "register_forward_hook",
            "register_forward_pre_hook",
            "register_full_backward_hook",
            "register_full_backward_pre_hook",
        )
    },
}


@pytest.mark.parametrize("name", OTHERS)
def test_other_heads_get_a_rotated_input(name: str) -> None:
    torch.manual_seed(0)
    model, x = Model(OTHERS[name]), torch.randn(64, 4)
    with applied(to_weights=True) as found:
        trained(model, x, 2, turn_every=2)
    assert not found


def reflected() -> nn.Module:
    return nn.Conv1d(6, 2, 3, padding=1, padding_mode="reflect")


@pytest.mark.parametrize("kind", ["first features", "features elsewhere", "padding", "attribute", "other weights"])
def test_other_inputs_are_rotated(kind: str) -> None:
    torch.manual_seed(0)
    model = Model(reflected if kind == "padding" else VECTORS["linear"])
    model.dim = 1 if kind in ("features elsewhere", "padding") else -1
    optimizer = model.wrap(turn_every=1000, rotation_size=4 if kind == "first features" else 6)
    with applied(to_weights=True) as found:
        for _ in range(2):
            z = model.backbone(torch.randn(64, 6, 4)).tanh()
            z = z.mT if kind == "padding" else z
            if kind == "attribute":
                z.meta = "of the user"
            weights = [
                {"weight": 1 * next(head.parameters())} if kind == "other weights" else {} for head in model.heads
            ]
            outs = [functional_call(head, of, (z,)) for head, of in zip(model.heads, weights, strict=True)]
            optimizer.step([out.square().sum() for out in outs])
    assert not found


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")  # which torch hides by itself
def test_inputs_that_somebody_may_see_are_rotated() -> None:
    """Hooks that were added later, by whomever, and layers that were replaced or compiled."""
    torch.manual_seed(0)
    model, x = Model(in_sequential), torch.randn(64, 4)
    optimizer = model.wrap(turn_every=1000)
    optimizer.step(model.losses(x))
    seen: list[Tensor] = []

    def see(_: nn.Module, args: tuple[Tensor, ...], __: object) -> None:
        seen.append(args[0])

    with applied(to_weights=True) as found:
        handles = [model.heads[0].register_forward_hook(see), model.heads[1][0].register_forward_hook(see)]  # type: ignore[index]
        model.losses(x)
        for handle in handles:
            handle.remove()
        with nn.modules.module.register_module_forward_hook(see):
            model.losses(x)
        assert not found
        assert all(each.shape == (64, 6) for each in seen if each.shape[1] == 6)
        model.losses(x)
        assert len(found) == 2
        first, second = model.heads
        assert isinstance(first, nn.Sequential)
        assert isinstance(second, nn.Sequential)
        first[0] = nn.Linear(6, 2)
        second[0].compile(backend="eager")
        model.losses(x)
        assert len(found) == 2


class Doubled(nn.Linear):
    def forward(self, input: Tensor) -> Tensor:
        return 2 * super().forward(input)


def test_layers_that_compute_something_else_get_a_rotated_input() -> None:
    """As libraries do that cast, quantize or adapt a layer after the optimizer was built."""
    torch.manual_seed(0)
    model, x = Model(in_sequential), torch.randn(64, 4)
    optimizer = model.wrap(turn_every=1000)
    optimizer.step(model.losses(x))
    first, second = (head[0] for head in model.heads)  # type: ignore[index]
    own = first.forward
    first.forward = lambda z: 2 * own(z)
    second.__class__ = Doubled
    with applied(to_weights=True) as found:
        model.losses(x)
    assert not found


def test_convolutions_that_pad_in_another_way_get_a_rotated_input() -> None:
    """As in libraries that replace ``_conv_forward``, for images without seams."""
    torch.manual_seed(0)
    model, x = Model(MAPS["same"], dim=1), torch.randn(8, 5, 5, 4)
    optimizer = model.wrap(turn_every=1000)
    optimizer.step(model.losses(x))
    for head in model.heads:
        assert isinstance(head, nn.Conv2d)
        convolve = head._conv_forward
        head._conv_forward = lambda z, *weights, own=convolve: own(z.roll(1, 3), *weights)  # type: ignore[method-assign]
    with optimizer.paused():
        expected = model.losses(x)
    with applied(to_weights=True) as found:
        assert_close(model.losses(x), expected)
    assert not found


def test_layers_whose_class_has_another_forward_get_a_rotated_input(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    model, x, forward = Model(in_sequential), torch.randn(64, 4), nn.Linear.forward
    optimizer = model.wrap(turn_every=1000)
    optimizer.step(model.losses(x))
    monkeypatch.setattr(nn.Linear, "forward", lambda self, z: forward(self, z) + z.sum(1, keepdim=True))
    with optimizer.paused():
        expected = model.losses(x)
    with applied(to_weights=True) as found:
        assert_close(model.losses(x), expected)
    assert not found


def test_layers_that_are_called_by_themselves_do_not_rotate() -> None:
    torch.manual_seed(0)
    model, x = Model(in_sequential), torch.randn(64, 6)
    expected = model.heads[0][0](x)  # type: ignore[index]
    model.wrap()
    with applied(to_weights=True) as found:
        assert_close(model.heads[0][0](x), expected, rtol=0.0, atol=0.0)  # type: ignore[index]
        with pytest.raises(RuntimeError):
            model.heads[0](torch.randn(64, 5, requires_grad=True))  # between the hooks
        assert_close(model.heads[0][0](x), expected, rtol=0.0, atol=0.0)  # type: ignore[index]
    assert not found


def test_copies_and_checkpoints_use_their_own_weights() -> None:
    torch.manual_seed(0)
    model, x = Model(VECTORS["layers"]), torch.randn(64, 4)
    optimizer = model.wrap(turn_every=1000)
    optimizer.step(model.losses(x))
    other, copied = copy.deepcopy((model, optimizer))
    with torch.no_grad():
        for param in other.heads.parameters():
            param.mul_(2)
    with applied(to_weights=False):
        expected = copy.deepcopy(other).losses(x)
    with applied(to_weights=True) as found:
        plain = model.losses(x)
        saved: list[Tensor] = checkpoint(model.losses, x.clone().requires_grad_(), use_reentrant=False)
        of_copy = other.losses(x)
        optimizer.step(saved)
        copied.step(of_copy)
    assert len(found) == 8  # two of them in the backward pass of the checkpoint
    assert_close(saved, plain)
    assert_close(of_copy, expected)


def test_large_heads_of_few_outputs_use_it() -> None:
    torch.manual_seed(0)
    backbone, heads = nn.Linear(4, 512), nn.ModuleList([nn.Linear(512, 10), nn.Linear(512, 10)])
    optimizer = RotoGradOptimizer(SGD([*backbone.parameters(), *heads.parameters()], lr=0.1), heads)
    with applied(to_weights=None) as found:
        for _ in range(2):
            z = backbone(torch.randn(64, 4))
            optimizer.step([head(z).square().mean() for head in heads], z)
    assert len(found) == 2


def test_hooks_of_a_head_that_is_a_layer_run_in_the_order_in_which_they_were_added() -> None:
    """torch.compile before 2.9 counts them in that order."""
    model = Model(VECTORS["linear"])
    model.wrap()
    hooks = model.heads[0]._forward_hooks
    assert len(hooks) == 2
    assert list(dict.keys(hooks)) == list(hooks)
