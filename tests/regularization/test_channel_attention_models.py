"""Channel attention of models of any kind: it does not change them, or says why it cannot measure them."""

import copy
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.testing import assert_close

from rotoopt import RotoGradOptimizer
from rotoopt.regularization import channel_attention
from tests.asserts import eps
from tests.contract.models import assert_same
from tests.regularization import oracle
from tests.regularization.channel_networks import LAYERS, Network, draw_batches, fail, network


@pytest.mark.parametrize("method", ["ablation", "first_order"])
@pytest.mark.parametrize("loss_fn", [F.cross_entropy, fail])
def test_model_does_not_change(loss_fn: Callable[[Tensor, Tensor], Tensor], method: Any) -> None:
    model = network()
    model.norm.eval()
    model.second.requires_grad_(False)
    before = copy.deepcopy(model.state_dict())
    try:
        channel_attention(model, LAYERS, loss_fn, draw_batches(), method=method)
        assert loss_fn is not fail
    except KeyboardInterrupt:
        assert loss_fn is fail
    assert_same(dict(model.state_dict()), dict(before))
    modes = {name: module.training for name, module in model.named_modules()}
    assert modes == {name: name != "norm" for name in modes}
    assert all(not module._forward_hooks for module in model.modules())
    assert all(param.grad is None for param in model.parameters())
    assert [name for name, param in model.named_parameters() if not param.requires_grad] == [
        "second.weight",
        "second.bias",
    ]


@pytest.mark.parametrize("grad", [True, False])
@pytest.mark.parametrize("method", ["ablation", "first_order"])
def test_frozen_model_and_no_grad_change_nothing(method: Any, grad: bool) -> None:
    model, batches = network(), draw_batches()
    expected = channel_attention(model, LAYERS, F.cross_entropy, batches, method=method)
    with torch.set_grad_enabled(grad):
        found = channel_attention(model.requires_grad_(False), LAYERS, F.cross_entropy, batches, method=method)
    assert_same(found, expected)
    assert not any(weights.requires_grad for weights in [*found.values(), *expected.values()])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("method", ["ablation", "first_order"])
def test_models_of_half_precision(method: Any, dtype: torch.dtype) -> None:
    model = network().to(dtype)
    batches = [(x.to(dtype), y) for x, y in draw_batches()]

    def loss_fn(output: Tensor, target: Tensor) -> Tensor:
        return F.cross_entropy(output.float(), target)

    attention = channel_attention(model, LAYERS, loss_fn, batches, method=method)
    exact = channel_attention(model.float(), LAYERS, loss_fn, [(x.float(), y) for x, y in batches], method=method)
    assert_close(attention, exact, rtol=0.0, atol=eps(dtype))  # a fifth to a third of it


@pytest.mark.parametrize("method", ["ablation", "first_order"])
def test_layers_may_be_followed_by_a_change_in_place(method: Any) -> None:
    found = []
    for inplace in (False, True):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(3, 6), nn.ReLU(inplace=inplace), nn.Linear(6, 2)).double()
        batch = torch.randn(5, 3, dtype=torch.float64), torch.randint(2, (5,))
        found.append(channel_attention(model, ["0"], F.cross_entropy, [batch], method=method))
    assert_same(*found)


def compiled(model: Network) -> Any:
    return torch.compile(model, backend="aot_eager")


def compiled_in_place(model: Network) -> nn.Module:
    model.compile(backend="aot_eager")
    return model


def compiled_in_part(model: Network) -> nn.Module:
    part: Any = torch.compile(model.second, backend="aot_eager")
    model.second = part
    return model


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")
@pytest.mark.parametrize("wrapper", [nn.DataParallel, compiled, compiled_in_place, compiled_in_part])
@pytest.mark.parametrize("method", ["ablation", "first_order"])
def test_wrapped_models(method: Any, wrapper: Callable[[nn.Module], Any]) -> None:
    """Compiled models ran before: their code cannot apply masks."""
    torch.compiler.reset()
    model, batches = network(), draw_batches()
    expected = channel_attention(model, LAYERS, F.cross_entropy, batches, method=method)
    wrapped = wrapper(model).eval()
    with torch.no_grad():
        wrapped(batches[0][0])
    wrapped(batches[0][0])
    assert_same(channel_attention(wrapped, LAYERS, F.cross_entropy, batches, method=method), expected)
    torch.compiler.reset()


@pytest.mark.parametrize("method", ["ablation", "first_order"])
def test_tokens_have_their_channels_last(method: Any) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 6), nn.Tanh(), nn.Flatten(), nn.Linear(24, 2)).double()
    batches = [(torch.randn(5, 4, 3, dtype=torch.float64), torch.randint(2, (5,)))]
    attention = channel_attention(model, ["0"], F.cross_entropy, batches, channel_dim=-1, method=method)["0"]
    assert attention.shape == (6,)
    if method == "ablation":
        assert_close(attention.double(), oracle.attention_by_ablation(model, "0", F.cross_entropy, batches))


def test_model_with_rotations() -> None:
    """Rotations are part of the model."""
    model = nn.Sequential(nn.Linear(3, 6), nn.Tanh(), nn.Linear(6, 2)).double()
    head = nn.Linear(6, 1).double()
    optimizer = RotoGradOptimizer(
        torch.optim.SGD(model.parameters(), lr=0.1),
        heads=[model[2], head.requires_grad_(False)],
        init="haar",
        rotation_size=6,
    )
    batches = [(torch.randn(5, 3, dtype=torch.float64), torch.randint(2, (5,)))]
    attention = channel_attention(model, ["0"], F.cross_entropy, batches)["0"]
    model.eval()
    assert_close(attention.double(), oracle.attention_by_ablation(model, "0", F.cross_entropy, batches))
    assert optimizer.last_step is None


BAD: dict[str, tuple[type[Exception], str, Callable[[], object]]] = {
    "method": (
        ValueError,
        "`method` must be 'ablation' or 'first_order', got 'exact'",
        lambda: channel_attention(network(), LAYERS, F.cross_entropy, [], method="exact"),  # type: ignore[arg-type]
    ),
    "temperature": (
        ValueError,
        "`temperature` must be positive, got 0",
        lambda: channel_attention(network(), LAYERS, F.cross_entropy, draw_batches(), temperature=0),
    ),
    "layer": (
        ValueError,
        "`return_layers` must name layers of the model, got 'third'",
        lambda: channel_attention(network(), ["first", "third"], F.cross_entropy, draw_batches()),
    ),
    "no batch": (
        ValueError,
        "^`batches` must contain at least one batch, got none. Was the iterator exhausted",
        lambda: channel_attention(network(), LAYERS, F.cross_entropy, iter(())),
    ),
    "channel_dim": (
        ValueError,
        r"and channels along another, channel_dim=2, got shape \(4, 3\) from head",
        lambda: channel_attention(network(), ["head"], F.cross_entropy, draw_batches(), channel_dim=2),
    ),
    "channels along the samples": (
        ValueError,
        r"and channels along another, channel_dim=0, got shape \(4, 3\) from head",
        lambda: channel_attention(network(), ["head"], F.cross_entropy, draw_batches(), channel_dim=0),
    ),
    "no tensor": (
        ValueError,
        "got a tuple from 0",
        lambda: channel_attention(nn.Sequential(nn.LSTM(2, 3)), ["0"], F.cross_entropy, [(torch.randn(4, 2), None)]),
    ),
    "infinite loss": (
        ValueError,
        "Every loss must be finite, got .*nan.* for the channels of second",
        lambda: channel_attention(network(), ["second"], lambda out, y: out.mean() * torch.nan, draw_batches()),
    ),
    "loss per sample": (
        ValueError,
        r"`loss_fn` must return a scalar, got shape \(4,\). Reduce it",
        lambda: channel_attention(network(), LAYERS, partial(F.cross_entropy, reduction="none"), draw_batches()),
    ),
    "in place": (
        RuntimeError,
        r"must run under torch.func.vmap from second on, got: output with shape .* write x = x \+ y, not x \+= y.* "
        r"lower chunk_size. Or pass method='first_order'",
        lambda: channel_attention(network(inplace=True), ["second"], F.cross_entropy, draw_batches()),
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_models_that_cannot_be_measured_are_rejected(name: str) -> None:
    error, message, call = BAD[name]
    with pytest.raises(error, match=message):
        call()


def test_first_order_has_no_requirements_on_the_model() -> None:
    attention = channel_attention(network(inplace=True), LAYERS, F.cross_entropy, draw_batches(), method="first_order")
    assert all(weights.isfinite().all() for weights in attention.values())
