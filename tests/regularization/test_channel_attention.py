"""Channel attention equals one forward pass per channel, with far fewer, and does not change the model."""

import copy
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F
from torch.testing import assert_close

from rotoopt import RotoGradOptimizer
from rotoopt.regularization import AttentionBehavioralRegularization, channel_attention
from tests.asserts import eps
from tests.contract.models import assert_same
from tests.regularization import oracle
from tests.samplers import SEEDS

LAYERS = ["first", "second"]
Batch = tuple[Tensor, Tensor]


class Network(nn.Module):
    """Two convolutions with normalization, dropout and a skip connection around the second one, and a head."""

    def __init__(self, *, inplace: bool = False) -> None:
        super().__init__()
        self.first = nn.Conv2d(2, 5, 3, padding=1)
        self.norm = nn.BatchNorm2d(5)
        self.second = nn.Conv2d(5, 5, 3, padding=1)
        self.dropout: nn.Module = nn.Dropout()
        self.head = nn.Linear(5, 3)
        self.inplace = inplace

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(self.first(x)).relu()
        around = h.clone()
        if self.inplace:
            around += self.second(h)
        else:
            around = around + self.dropout(self.second(h))
        result: Tensor = self.head(around.relu().mean(dim=(2, 3)))
        return result


def network(seed: int = 0, *, inplace: bool = False) -> Network:
    torch.manual_seed(seed)
    model = Network(inplace=inplace).double()
    model(torch.randn(16, 2, 6, 6, dtype=torch.float64))  # statistics for the normalization
    return model


def draw_batches(num: int = 2) -> list[Batch]:
    return [(torch.randn(4, 2, 6, 6, dtype=torch.float64), torch.randint(3, (4,))) for _ in range(num)]


@given(seed=SEEDS, num_batches=st.integers(1, 3), chunk_size=st.integers(1, 7))
def test_ablation_equals_one_pass_per_channel(seed: int, num_batches: int, chunk_size: int) -> None:
    model, batches = network(seed), draw_batches(num_batches)
    attention = channel_attention(model, LAYERS, F.cross_entropy, batches, chunk_size=chunk_size)
    model.eval()
    for name in LAYERS:
        expected = oracle.attention_by_ablation(model, name, F.cross_entropy, batches)
        assert attention[name].dtype == torch.float32
        assert_close(attention[name].double(), expected, rtol=1e-6, atol=0.0)
        assert attention[name].sum().item() == pytest.approx(1.0, abs=1e-6)
    assert list(attention) == LAYERS


@given(seed=SEEDS, temperature=st.floats(0.1, 100))
def test_temperature_divides_the_logarithms(seed: int, temperature: float) -> None:
    model, batches = network(seed), draw_batches()
    one, other = (
        channel_attention(model, ["second"], F.cross_entropy, batches, temperature=t)["second"].double()
        for t in (1.0, temperature)
    )
    assert_close((one.log() / temperature).softmax(0), other, rtol=1e-5, atol=1e-9)


@pytest.mark.parametrize("method", ["ablation", "first_order"])
def test_permuted_channels_have_permuted_attention(method: Any) -> None:
    model, batches, order = network(), draw_batches(), torch.tensor([3, 1, 0, 4, 2])
    expected = channel_attention(model, ["second"], F.cross_entropy, batches, method=method)["second"][order]
    permuted = nn.Sequential(PermutedTail(model, order))
    attention = channel_attention(permuted, ["0.model.second"], F.cross_entropy, batches, method=method)
    assert_close(attention["0.model.second"], expected)


class Reordered(nn.Module):
    """Puts channels into another order."""

    def __init__(self, order: Tensor) -> None:
        super().__init__()
        self.order = order

    def forward(self, h: Tensor) -> Tensor:
        return h[:, self.order]


class PermutedTail(nn.Module):
    """The same function, whose second convolution has its outputs in another order."""

    def __init__(self, model: Network, order: Tensor) -> None:
        super().__init__()
        self.model = copy.deepcopy(model)
        with torch.no_grad():
            for param in self.model.second.parameters():
                param.copy_(param[order])
        back = order.argsort()
        self.model.dropout = Reordered(back)

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.model(x)
        return result


@pytest.mark.parametrize("layer", ["1", "0"])
def test_first_order_is_exact_if_the_loss_is_linear(layer: str) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 6), nn.Linear(6, 4), nn.Linear(4, 2)).double()
    batches = [(torch.randn(5, 3, dtype=torch.float64), torch.randn(5, 2, dtype=torch.float64)) for _ in range(3)]

    def linear(output: Tensor, weights: Tensor) -> Tensor:
        return (output * weights).sum()

    first_order, ablation = (
        channel_attention(model, [layer], linear, batches, method=method)[layer]
        for method in ("first_order", "ablation")
    )
    assert_close(first_order, ablation)
    assert first_order.std() > 1e-2


def test_first_order_is_minus_the_inner_product_with_the_gradient() -> None:
    model, batches = network(), draw_batches(1)
    attention = channel_attention(model, ["second"], F.cross_entropy, batches, method="first_order")["second"]
    (x, y), outputs = batches[0], []
    model.eval()
    with model.second.register_forward_hook(lambda module, args, output: outputs.append(output)):
        loss = F.cross_entropy(model(x), y)
    (grad,) = torch.autograd.grad(loss, outputs)
    rise = -(grad * outputs[0].detach()).sum(dim=(0, 2, 3))
    assert_close(attention, ((rise - rise.mean()) / rise.std(unbiased=False) / 5).softmax(0).float())


def count_passes(**options: Any) -> int:
    """Return how often the model runs for three batches and two layers of five channels."""
    model, calls = network(), []
    model.register_forward_pre_hook(lambda module, args: calls.append(module))
    channel_attention(model, LAYERS, F.cross_entropy, draw_batches(3), **options)
    return len(calls)


@pytest.mark.parametrize("chunk_size", [1, 2, 5, 100])
def test_number_of_passes(chunk_size: int) -> None:
    """One to determine the number of channels, and for every layer and batch one per chunk of channels."""
    assert count_passes(chunk_size=chunk_size) == 1 + 3 * 2 * -(-5 // chunk_size)


def test_number_of_passes_of_first_order() -> None:
    assert count_passes(method="first_order") == 1 + 3


def test_modules_before_the_layer_run_on_one_batch() -> None:
    """Under vmap, only what depends on the channel is computed for every channel."""
    model, sizes = network(), []
    model.first.register_forward_hook(lambda module, args, out: sizes.append(torch._C._functorch.is_batchedtensor(out)))
    model.head.register_forward_hook(lambda module, args, out: sizes.append(torch._C._functorch.is_batchedtensor(out)))
    channel_attention(model, ["second"], F.cross_entropy, draw_batches(1))
    assert sizes == [False, False, False, True]


def fail(output: Tensor, target: Tensor) -> Tensor:
    raise KeyboardInterrupt


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


@pytest.mark.parametrize("method", ["ablation", "first_order"])
@pytest.mark.parametrize("loss_fn", ["without the model", "without the layer"])
def test_channels_without_effect_have_equal_weights(loss_fn: str, method: Any) -> None:
    model = network().float()
    nn.init.zeros_(model.head.weight)
    batches = [(x.float(), y) for x, y in draw_batches(3)]

    def nothing(output: Tensor, target: Tensor) -> Tensor:
        return F.cross_entropy(output * 0 if loss_fn == "without the model" else output, target)

    attention = channel_attention(model, LAYERS, nothing, batches, method=method, chunk_size=3)
    assert_same(attention, {name: torch.full((5,), 0.2) for name in LAYERS})


@pytest.mark.parametrize("method", ["ablation", "first_order"])
@given(seed=SEEDS, power=st.integers(-80, 80))
def test_scale_of_the_loss_does_not_matter(method: Any, seed: int, power: int) -> None:
    """Exactly, if it is a power of two, and also if the squares of the losses overflow in float32."""
    model = network(seed).float()
    batches = [(x.float(), y) for x, y in draw_batches()]

    def scaled(output: Tensor, target: Tensor) -> Tensor:
        return 2.0**power * F.cross_entropy(output, target)

    expected, found = (channel_attention(model, LAYERS, f, batches, method=method) for f in (F.cross_entropy, scaled))
    assert_same(found, expected)
    assert all(weights.std() > 1e-2 for weights in found.values())


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


def test_small_differences_are_not_lost() -> None:
    """Here they are a thousandth of the loss, and rounding errors in float32 are ten thousand times smaller."""
    model, batches = network(), draw_batches(3)
    with torch.no_grad():
        model.head.weight.mul_(1e-2)
    exact = channel_attention(model, LAYERS, F.cross_entropy, batches)
    rounded = [(x.float(), y) for x, y in batches]
    attention = channel_attention(model.float(), LAYERS, F.cross_entropy, rounded)
    assert_close(attention, exact, rtol=1e-2, atol=0.0)
    assert all(weights.std() > 1e-2 for weights in attention.values())


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


def test_attention_fits_the_penalty() -> None:
    model, (x, y) = network(), draw_batches(1)[0]
    attention = channel_attention(model, LAYERS, F.cross_entropy, [(x, y)])
    maps = {"first": torch.randn(4, 5, 6, 6), "second": torch.randn(4, 5, 6, 6)}
    assert AttentionBehavioralRegularization(attention)(maps, maps).item() == 0.0


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
