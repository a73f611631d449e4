"""Weights if gradients cannot be collected: the formula of the paper, with the norms of the previous step."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.optim import SGD
from torch.testing import assert_close

from rotoopt import RotoGradOptimizer, RotoGradWeighting
from tests.contract.models import back_propagate, wrap
from tests.oracle import References, scale, shares
from tests.samplers import NUM_TASKS, SEEDS, Sampler

BURN_IN = 2


class Apart:
    """K tasks, each with its own tensor, whose gradient is prescribed."""

    def __init__(self, K: int) -> None:
        self.optimizer = RotoGradOptimizer(
            SGD([nn.Parameter(torch.zeros(1).double())], lr=0.1),
            num_tasks=K,
            weighting=RotoGradWeighting(),
            burn_in_period=BURN_IN,
            rotate=False,
        )

    def step(self, grads: Tensor, present: list[int]) -> list[Tensor | None]:
        """Train one step, and return the gradient of each tensor, None for an absent task."""
        reps = [torch.zeros(grads.shape[1:], dtype=grads.dtype, requires_grad=True) for _ in grads]
        fed = [self.optimizer.rotate(rep)[task] for task, rep in enumerate(reps)]
        losses = [(fed[task] * grads[task]).sum() + 1 if task in present else None for task in range(len(grads))]
        self.optimizer.step(losses)
        return [rep.grad for rep in reps]


@given(K=NUM_TASKS, seed=SEEDS, data=st.data())
def test_weights_are_computed_from_the_norms_of_the_previous_step(K: int, seed: int, data: st.DataObject) -> None:
    """For norms of any size, including zero; absent tasks count with their latest norm."""
    sampler, apart = Sampler(seed), Apart(K)
    references, known, expected = References(K, BURN_IN), torch.full((K,), torch.nan).double(), torch.ones(K).double()
    sizes = sampler.log_scales(K, -3, 3)
    for step in range(5):
        present = sorted(data.draw(st.sets(st.integers(0, K - 1), min_size=2)))  # a single task has one tensor
        zero = data.draw(st.sampled_from([-1, *range(K)]))
        grads = sampler.normal(K, 4) * (sizes * (0.5 + sampler.uniform(K)))[:, None]
        grads[zero] *= zero < 0
        received = apart.step(grads, present)
        for task in present:
            assert received[task] is not None
            assert_close(received[task], expected[task] * grads[task], rtol=1e-10, atol=0)
        norms = torch.full((K,), torch.nan).double()
        norms[present] = grads[present].norm(dim=1)
        references.update(norms, step)
        known = torch.where(norms > 0, norms, known)
        seen = ~known.isnan()
        expected = torch.ones(K).double()
        if seen.any():
            expected[seen] = scale(known[seen], shares(known[seen], references.values[seen]))


@pytest.mark.parametrize("weighting", [None, RotoGradWeighting()])
def test_losses_from_before_and_after_another_backward_pass(weighting: RotoGradWeighting | None) -> None:
    """Such as the losses of clean and of adversarial examples, with the backward pass that made these in between."""
    model, optimizer = wrap(weighting=weighting)
    for step in range(3):
        before = model.losses(step)[0]
        for inner in range(2):
            back_propagate(model.losses(10 + inner)[0])
        optimizer.zero_grad()
        losses = [first + second for first, second in zip(before, model.losses(20)[0], strict=True)]
        (param,) = model.backbone.parameters()
        with optimizer.paused():
            pairs = zip(model.losses(step)[0], model.losses(20)[0], strict=True)
            true = [torch.autograd.grad(first + second, param, retain_graph=True)[0] for first, second in pairs]
        if step == 1:
            optimizer.backward(losses)
        else:
            back_propagate(losses)
        assert optimizer.last_step is not None
        assert_close(param.grad, torch.tensordot(optimizer.last_step.weights, torch.stack(true), 1))
        optimizer.step()
        del before, losses  # and their graphs


def test_losses_of_two_forward_passes_are_rejected_if_those_of_one_were_back_propagated_before() -> None:
    model, _ = wrap(weighting=RotoGradWeighting())
    old = model.losses(1)[0]
    torch.stack(old).sum().backward(retain_graph=True)  # type: ignore[no-untyped-call]
    message = (
        r"^All heads must read the same tensor .* got two tensors in one pass: .* call optimizer\.backward\(losses\)\.$"
    )
    with pytest.raises(RuntimeError, match=message):
        back_propagate([*old, *model.losses(3)[0]])
