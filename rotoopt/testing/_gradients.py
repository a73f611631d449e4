"""Checks that the gradients of heads and backbone are those that the method defines."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import islice

import torch
from torch import Tensor, nn

from rotoopt._capture.graph import behind_taps, in_heads, leaves
from rotoopt.optimizer import RotoGradOptimizer
from rotoopt.testing._trial import LossFn, Trial


def check_head_gradients(optimizer: RotoGradOptimizer, losses: LossFn) -> None:
    """Check that heads are trained by the unscaled gradients of their own losses."""
    trial = Trial(optimizer, losses)
    heads, _, _ = _split(trial)
    _check_gradients(trial, heads, weighted=False)


def check_backbone_gradients(optimizer: RotoGradOptimizer, losses: LossFn) -> None:
    r"""Check that the backbone is trained by :math:`\sum_k w_k \nabla_\theta L_k`, with ``optimizer.task_weights`` w.

    Passes for a callable weighting, which has no weights to compare with.
    """
    trial = Trial(optimizer, losses)
    _, backbone, unclear = _split(trial)
    _check_gradients(trial, [[*backbone, *_shared(trial, unclear)]], weighted=True)


def _shared(trial: Trial, params: list[Tensor]) -> list[Tensor]:
    """Return those of ``params`` that have an entry on which several losses depend."""
    if not params:
        return []
    with trial.restored():
        true = trial.true_gradients(params)
    depend = [sum(grad != 0 for grad in of_param if grad is not None) for of_param in zip(*true.values(), strict=True)]
    return [param for param, count in zip(params, depend, strict=True) if bool((torch.as_tensor(count) > 1).any())]


def _split(trial: Trial) -> tuple[list[list[Tensor]], list[Tensor], list[Tensor]]:
    """Return the trained parameters in front of the taps of each task, those of its head, and all others.

    The third part are those that seem to be both but are not listed as those of a task, as layers that are compiled
    into one graph with a loss. Excluded are parameters that a head shares with the backbone, such as embeddings that
    are also the weights of an output layer: part of their gradient is weighted, part is not.
    """
    with trial.restored():
        present = trial.losses().values()
    heads = [{id(param) for param in leaves(in_heads(loss))} for loss in present]
    behind = {id(param) for loss in present for param in leaves(behind_taps(loss))}
    trained = [param for param in trial.parameters() if param.requires_grad]
    in_any = set().union(*heads)
    listed = {
        id(param)
        for parts in trial.core.heads
        for part in parts
        for param in ([part] if isinstance(part, nn.Parameter) else part.parameters())
    }
    return (
        [[param for param in trained if id(param) in head - behind] for head in heads],
        [param for param in trained if id(param) not in in_any],
        [param for param in trained if id(param) in (in_any & behind) - listed],
    )


def _check_gradients(trial: Trial, groups: Sequence[list[Tensor]], *, weighted: bool) -> None:
    params = [param for group in groups for param in group]
    if not params:
        return
    with trial.restored():
        true = trial.true_gradients(params)
        memory = trial.engine.memory
        # Different ones where they are those of the step before: all ones, in the first step, would hide mistakes.
        memory.weights = torch.linspace(0.5, 2.0, len(memory.weights)).to(memory.weights)
        trial.backward(trial.losses())
        grads = [torch.zeros_like(param) if param.grad is None else param.grad for param in params]
        weights, divisors = trial.optimizer.task_weights.tolist(), trial.divisors()
    if weighted and any(math.isnan(weights[task]) for task in true):  # a callable weighting
        return
    factors = {task: (weights[task] if weighted else 1.0) / divisors[task] for task in true}
    expected = [torch.zeros_like(param) for param in params]
    for task, of_task in true.items():
        for total, grad in zip(expected, of_task, strict=True):
            total += 0.0 if grad is None else factors[task] * grad
    pairs = iter(zip(grads, expected, strict=True))
    for group in groups:
        _compare(list(islice(pairs, len(group))), weighted=weighted)


def _compare(pairs: Sequence[tuple[Tensor, Tensor]], *, weighted: bool) -> None:
    """Raise unless the gradients of one head, or of the backbone, are the expected ones."""
    largest = max((float(total.abs().max()) for _, total in pairs), default=0.0)
    for grad, total in pairs:
        eps = torch.finfo(total.dtype).eps
        # Sums in another order, over a few layers. The second term is for gradients that are only rounding errors,
        # such as that of a bias in front of a batch normalization.
        tolerance = 100 * (eps**0.75 * float(total.abs().max()) + eps * largest)
        error = float((total - grad).abs().max())  # in this order: the gradient may be sparse
        if not error <= tolerance:
            rule = "sum of the task gradients, each times its weight" if weighted else "gradient of the losses"
            raise AssertionError(
                f"The gradient of a parameter of {'the backbone' if weighted else 'a head'} must be the {rule}, got an "
                f"error of {error:.1e}, where the largest entry should be {float(total.abs().max()):.1e}, for shape "
                f"{tuple(grad.shape)}. Likely causes: (a) a hook changes gradients, for example to clip them, (b) the "
                "forward pass runs under autocast, where rounding is coarse: check without it, (c) a loss reaches "
                "the backbone around its head, or (d) the model is compiled, and an autograd.Function in front of a "
                "head returns a view, as gradient reversal often does: torch then ignores its backward. Return "
                "x.clone()."
            )
