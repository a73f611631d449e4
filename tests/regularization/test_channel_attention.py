"""Channel attention equals one forward pass per channel, with far fewer, and does not change the model."""

import copy
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F
from torch.testing import assert_close

from rotoopt.regularization import AttentionBehavioralRegularization, channel_attention
from tests.contract.models import assert_same
from tests.regularization import oracle
from tests.regularization.channel_networks import LAYERS, Network, draw_batches, network
from tests.samplers import SEEDS


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


def test_attention_fits_the_penalty() -> None:
    model, (x, y) = network(), draw_batches(1)[0]
    attention = channel_attention(model, LAYERS, F.cross_entropy, [(x, y)])
    maps = {"first": torch.randn(4, 5, 6, 6), "second": torch.randn(4, 5, 6, 6)}
    assert AttentionBehavioralRegularization(attention)(maps, maps).item() == 0.0
