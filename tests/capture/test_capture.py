"""Capture: rotations in front of the heads, and the gradient of each task."""

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.optim import SGD
from torch.testing import assert_close

from rotoopt import RotoGradOptimizer
from rotoopt._capture import wiring
from rotoopt._torch.modules import is_trained
from tests.asserts import eps
from tests.contract.models import back_propagate, wrap
from tests.operations import Count
from tests.oracle import layout, rotate
from tests.samplers import DTYPES, LAYOUTS, SEEDS, Layout, Network, Sampler, batches, network

LAYOUT = st.sampled_from(LAYOUTS)
RESTS = st.integers(0, 3)  # features that are not rotated
FEW_TASKS = st.integers(1, 5)


class Recorder:
    """A weighting that sums the gradients and stores them."""

    def __call__(self, J: Tensor) -> Tensor:
        self.J = J
        return J.sum(dim=0)


def dims_of(layout_: Layout) -> tuple[int, ...]:
    return (layout_[1],) if isinstance(layout_[1], int) else layout_[1]


def functional(layout_: Layout, K: int, rest: int, dtype: torch.dtype, **options: Any) -> RotoGradOptimizer:
    shape, dim = layout_
    size = layout(torch.Size(shape), dims_of(layout_)).shape[1] - rest
    bare = SGD([nn.Parameter(torch.zeros(1, dtype=dtype))], lr=0.1)
    return RotoGradOptimizer(bare, num_tasks=K, dim=dim, rotation_size=size, init="haar", **options)


@given(layout_=LAYOUT, K=FEW_TASKS, rest=RESTS, seed=SEEDS, dtype=DTYPES)
def test_heads_get_the_rotated_representation(
    layout_: Layout, K: int, rest: int, seed: int, dtype: torch.dtype
) -> None:
    torch.manual_seed(seed)
    optimizer, z = functional(layout_, K, rest, dtype), Sampler(seed, dtype).normal(*layout_[0])
    index = layout(z.shape, dims_of(layout_))
    for R, r in zip(optimizer.rotations.matrices, optimizer.rotate(z), strict=True):
        expected = rotate(z.double(), R.double(), index).to(dtype)
        assert_close(r, expected, rtol=0, atol=100 * eps(dtype))  # at most 12 terms of size up to about 5


@given(layout_=LAYOUT, K=FEW_TASKS, dtype=DTYPES)
def test_a_task_without_rotation_gets_the_representation_itself(layout_: Layout, K: int, dtype: torch.dtype) -> None:
    bare = SGD([nn.Parameter(torch.zeros(1, dtype=dtype))], lr=0.1)
    flags = [task > 0 for task in range(K)]
    optimizer = RotoGradOptimizer(bare, num_tasks=K, dim=layout_[1], rotate=flags if K > 1 else True)
    z = torch.ones(layout_[0], dtype=dtype, requires_grad=True)
    # No multiplication by I, which would turn an infinite feature into NaN. A single task needs no rotation.
    assert [r.data_ptr() == z.data_ptr() for r in optimizer.rotate(z)] == [not flag for flag in flags]


@given(layout_=LAYOUT, K=FEW_TASKS, rest=RESTS, seed=SEEDS, dtype=DTYPES)
def test_captured_gradient_is_rotated_back(layout_: Layout, K: int, rest: int, seed: int, dtype: torch.dtype) -> None:
    torch.manual_seed(seed)
    recorder, sampler = Recorder(), Sampler(seed, dtype)
    optimizer = functional(layout_, K, rest, dtype, weighting=recorder)
    z = sampler.normal(*layout_[0]).requires_grad_()
    at_heads = optimizer.rotate(z)
    for r in at_heads:
        r.retain_grad()
    weights = sampler.normal(K, *layout_[0])
    optimizer.backward([(r.tanh() * weight).sum() for r, weight in zip(at_heads, weights, strict=True)], z)
    index = layout(z.shape, dims_of(layout_))
    for R, r, G in zip(optimizer.rotations.matrices, at_heads, recorder.J, strict=True):
        assert r.grad is not None
        expected = rotate(r.grad.double(), R.mT.double(), index).to(dtype)
        assert_close(G.view(z.shape), expected, rtol=0, atol=100 * eps(dtype))


@given(layout_=LAYOUT, K=FEW_TASKS, seed=SEEDS, dtype=st.sampled_from([torch.float16, torch.bfloat16]))
def test_half_precision_is_captured_in_single(layout_: Layout, K: int, seed: int, dtype: torch.dtype) -> None:
    torch.manual_seed(seed)
    recorder, sampler = Recorder(), Sampler(seed, dtype)
    optimizer = functional(layout_, K, 0, dtype, weighting=recorder)
    z, weights = sampler.normal(*layout_[0]).requires_grad_(), sampler.normal(K, *layout_[0])
    optimizer.backward([(r * weight).sum() for r, weight in zip(optimizer.rotate(z), weights, strict=True)], z)
    index, matrices = layout(z.shape, dims_of(layout_)), optimizer.rotations.matrices
    assert recorder.J.dtype == matrices.dtype == torch.float32
    assert z.grad is not None
    assert z.grad.dtype == dtype
    for R, weight, G in zip(matrices, weights, recorder.J, strict=True):
        expected = rotate(weight.float(), R.mT, index)
        assert_close(G.view(z.shape), expected, rtol=0, atol=100 * eps(dtype))


@given(layout_=LAYOUT, K=FEW_TASKS, seed=SEEDS)
def test_other_uses_of_the_representation_keep_their_true_gradient(layout_: Layout, K: int, seed: int) -> None:
    torch.manual_seed(seed)
    sampler, recorder = Sampler(seed), Recorder()
    optimizer = functional(layout_, K, 0, torch.float64, weighting=recorder)
    z = sampler.normal(*layout_[0]).requires_grad_()
    weights, penalty = sampler.normal(K, *layout_[0]), sampler.normal(*layout_[0])
    losses = [(r * weight).sum() for r, weight in zip(optimizer.rotate(z), weights, strict=True)]
    optimizer.backward(losses, z, backbone_loss=(z * penalty).sum() + z.square().sum())
    assert z.grad is not None
    expected = recorder.J.sum(dim=0).view(z.shape) + penalty + 2 * z.detach()
    assert_close(z.grad, expected, rtol=1e-12, atol=1e-13)


@given(layout_=LAYOUT, seed=SEEDS)
def test_gradients_of_a_head_that_runs_twice_add_up(layout_: Layout, seed: int) -> None:
    torch.manual_seed(seed)
    sampler, recorder = Sampler(seed), Recorder()
    optimizer = functional(layout_, 2, 0, torch.float64, weighting=recorder)
    z = sampler.normal(*layout_[0]).requires_grad_()
    weights = sampler.normal(3, *layout_[0])
    (a, b), (again, _) = optimizer.rotate(z), optimizer.rotate(z)
    optimizer.backward([(a * weights[0]).sum() + (again * weights[2]).sum(), (b * weights[1]).sum()], z)
    index, R = layout(z.shape, dims_of(layout_)), optimizer.rotations.matrices
    expected = rotate(weights[0] + weights[2], R[0].mT, index)
    assert_close(recorder.J[0].view(z.shape), expected, rtol=1e-12, atol=1e-13)


def head_gradients(model: Network, task: int) -> list[Tensor]:
    gradients = [parameter.grad for parameter in model.heads[task].parameters()]
    return [gradient for gradient in gradients if gradient is not None]


@given(layout_=LAYOUT, K=st.integers(2, 5), seed=SEEDS, scale=st.floats(-3, 3), absent=st.booleans(), dtype=DTYPES)
def test_gradient_of_a_head_does_not_depend_on_the_other_tasks(
    layout_: Layout, K: int, seed: int, scale: float, absent: bool, dtype: torch.dtype
) -> None:
    (shape, dim), (batch,) = layout_, batches(seed, 1, K, dtype)
    other, gradients = Sampler(seed).integer(K), []
    for changed in (False, True):
        model = network(seed, shape[1:], K, dtype)
        torch.manual_seed(seed)
        bare = SGD(model.parameters(), lr=0.1)
        optimizer = RotoGradOptimizer(bare, list(model.heads), dim=dim, rotation_lr=1.0, init="haar")
        terms, z = model.losses(batch)
        losses: list[Tensor | None] = [*terms]
        if changed:
            losses[other] = None if absent else 10**scale * terms[other].exp()
        optimizer.step(losses, z)
        gradients.append([head_gradients(model, task) for task in range(K) if task != other])
    for before, after in zip(*gradients, strict=True):
        assert len(before) == 4
        assert all(map(torch.equal, before, after))


@given(layout_=LAYOUT, K=st.integers(2, 5), seed=SEEDS)
def test_gradient_of_a_head_is_its_true_gradient(layout_: Layout, K: int, seed: int) -> None:
    (shape, dim), (batch,) = layout_, batches(seed, 1, K, torch.float64)
    model = network(seed, shape[1:], K, torch.float64)
    torch.manual_seed(seed)
    optimizer = RotoGradOptimizer(SGD(model.parameters(), lr=0.1), list(model.heads), dim=dim, init="haar")
    with optimizer.paused():  # autograd without the hooks
        terms, _ = model.losses(batch)
    expected = torch.autograd.grad(torch.stack(terms).sum(), list(model.heads.parameters()))
    optimizer.backward(*model.losses(batch))
    for task in range(K):
        assert_close(head_gradients(model, task), list(expected[4 * task : 4 * task + 4]), rtol=1e-12, atol=1e-15)


class Echo(nn.Module):
    """A head that returns its arguments."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return args, kwargs


@pytest.mark.parametrize("training", [True, False])
def test_other_inputs_of_a_head_are_not_changed(training: bool) -> None:
    head, others = Echo(), [object(), torch.randn(4, 6), torch.arange(3)]
    z = torch.randn(4, 6, requires_grad=True)
    bare = SGD([nn.Parameter(torch.zeros(1))], lr=0.1)
    optimizer = RotoGradOptimizer(bare, [head, Echo()], init="haar", rotation_size=6)
    expected = z @ optimizer.rotations[0].mT
    head(z, *others, mask=others[0])
    head(z=z, mask=others[0])
    with torch.set_grad_enabled(training):
        (first, *positional), keyword = head(z, *others, mask=others[0])
        assert_close(first, expected)
        assert all(one is other for one, other in zip(positional, others, strict=True))
        assert keyword == {"mask": others[0]}
        nothing, keyword = head(z=z, mask=others[0])
        assert_close(keyword.pop("z"), expected)
        assert (nothing, keyword) == ((), {"mask": others[0]})


@pytest.mark.parametrize("training", [True, False])
def test_a_tensor_that_enters_several_times_is_rotated_once(training: bool) -> None:
    """For example query, key and value of self-attention, which is faster for one tensor than for three."""
    head = Echo()
    bare = SGD([nn.Parameter(torch.zeros(1))], lr=0.1)
    optimizer = RotoGradOptimizer(bare, [head, Echo()], init="haar", rotation_size=6)
    z, other = (torch.randn(4, 6, requires_grad=True) for _ in range(2))
    with torch.set_grad_enabled(training):
        (query, key, different), named = head(z, z, other, value=z)
    assert query is key is named["value"]
    assert different is not query
    assert_close(query, z @ optimizer.rotations[0].mT if training else z)  # recorded in training


def test_inputs_are_described_by_task() -> None:
    heads = [Echo(), Echo()]
    optimizer = RotoGradOptimizer(SGD([nn.Parameter(torch.zeros(1))], lr=0.1), heads)
    fed = optimizer._core.engine.capture.fed
    assert fed.described(["left", "right"]) == "nothing"
    z = torch.randn(4, 6, requires_grad=True)
    reps = [2 * z, z.exp()]
    kept = [heads[1](z, torch.ones(4, 6)), heads[0](*reps)]
    expected = "left: (4, 6) made by Exp, (4, 6) made by Mul; right: (4, 6) made by a leaf"
    assert fed.described(["left", "right"]) == expected
    assert fed.trained() == {0, 1}
    del kept


def test_gradients_of_a_backward_pass_that_failed_are_forgotten() -> None:
    weights, gradients = torch.randn(2, 4, 6), []
    for fails in (False, True):
        optimizer = RotoGradOptimizer(SGD([nn.Parameter(torch.zeros(1))], lr=0.1), num_tasks=2, rotation_size=6)
        z = torch.ones(4, 6, requires_grad=True)
        rep = 2 * z
        first, second = optimizer.rotate(rep)  # the gradient of the second one arrives first
        if fails:
            handle = first.register_hook(lambda _: [][0])  # type: ignore[no-untyped-call]
            with pytest.raises(IndexError):
                ((first * weights[0]).sum() + (9 * second).sum()).backward(retain_graph=True)  # type: ignore[no-untyped-call]
            handle.remove()
        back_propagate([(first * weights[0]).sum(), (second * weights[1]).sum()])
        gradients.append(z.grad)
    assert_close(*gradients)


def test_rotated_gradients_are_collected_without_a_copy() -> None:
    bare = SGD([nn.Parameter(torch.zeros(1))], lr=0.1)
    optimizer = RotoGradOptimizer(bare, num_tasks=2, rotation_size=6, init="haar")
    z = torch.ones(4, 6, requires_grad=True)
    losses = [rotated.square().sum() for rotated in optimizer.rotate(2 * z)]
    with Count() as count:
        back_propagate(losses)
    assert count.found["copy_"] == 0


@pytest.mark.parametrize("own", [False, True])
def test_the_graph_of_the_losses_is_traversed_in_the_first_step(own: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    followed: list[Any] = []
    check = "check_sum" if own else "check_losses"
    original = getattr(wiring, check)

    def follow(*args: Any) -> Any:
        followed.append(args)
        return original(*args)

    monkeypatch.setattr(wiring, check, follow)
    model, optimizer = wrap()
    for batch in range(3):
        losses, _ = model.losses(batch)
        back_propagate(losses) if own else optimizer.backward(losses)
        optimizer.step()
    assert len(followed) == 1


def test_an_optimizer_that_could_not_be_built_does_not_block_another_one() -> None:
    """The traceback of its error keeps it alive."""
    half_built = RotoGradOptimizer.__new__(RotoGradOptimizer)
    trained = torch.zeros(3).requires_grad_()
    optimizer = torch.optim.SGD([trained], lr=0.1)
    assert is_trained(trained)
    assert not is_trained(torch.zeros(3).requires_grad_())
    del half_built, optimizer
