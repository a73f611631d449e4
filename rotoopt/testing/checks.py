"""Checks that a model is wired as the method needs it. Each raises ``AssertionError`` with what is wrong."""

from __future__ import annotations

import io
from typing import Any

import torch
from torch import Tensor

from rotoopt.optimizer import RotoGradOptimizer
from rotoopt.rotations import orthogonality_error
from rotoopt.testing.trial import LossFn, Trial
from rotoopt.wiring import check_wiring

MAX_ORTHOGONALITY_ERROR = 1e-5


def check_invariants(optimizer: RotoGradOptimizer, losses: LossFn) -> None:
    """Check everything below, in this order.

    Parameters, gradients, optimizer and rotations are left as they were; forward passes in training mode update the
    running statistics of the model, as they always do.

    Args:
        optimizer: The optimizer, built for the model.
        losses: Computes the losses of one batch in training mode, as given to ``optimizer.step``; the same batch at
            every call. Random numbers, as of dropout, are the same by themselves.

    Raises:
        AssertionError: With what must hold, what was found, and what to do.

    Example:
        >>> from torch import nn
        >>> from rotoopt import RotoGradOptimizer
        >>> backbone, left, right = nn.Linear(3, 8), nn.Linear(8, 1), nn.Linear(8, 2)
        >>> params = [*backbone.parameters(), *left.parameters(), *right.parameters()]
        >>> optimizer = RotoGradOptimizer(torch.optim.Adam(params), heads=[left, right])
        >>> x = torch.randn(5, 3)
        >>> def losses():
        ...     z = backbone(x)
        ...     return [left(z).square().mean(), right(z).abs().mean()]
        >>> check_invariants(optimizer, losses)
    """
    check_losses_repeat(optimizer, losses)
    check_losses_pass_through_their_heads(optimizer, losses)
    check_rotations_reach_their_heads(optimizer, losses)
    check_parameters_are_optimized(optimizer, losses)
    check_head_gradients(optimizer, losses)
    check_backbone_gradients(optimizer, losses)
    check_rotations(optimizer)
    check_resume(optimizer, losses)


def check_losses_repeat(optimizer: RotoGradOptimizer, losses: LossFn) -> None:
    """Check that ``losses`` computes the same losses twice; the other checks compare them."""
    trial = Trial(optimizer, losses)
    with trial.restored():
        first, second = trial.losses(), trial.losses()
    for task, loss in first.items():
        if task not in second or not torch.equal(loss, second[task]):
            raise AssertionError(
                f"`losses` must return the same losses at every call, got {loss.item()} and then "
                f"{second[task].item() if task in second else None} for {trial.names[task]}. Draw the batch outside of "
                "it, and let random numbers come from torch's generators."
            )


def check_losses_pass_through_their_heads(optimizer: RotoGradOptimizer, losses: LossFn) -> None:
    """Check that every loss is computed by its own head, from the one representation that all heads share."""
    trial = Trial(optimizer, losses)
    with trial.restored():
        try:
            check_wiring(trial.losses(), trial.names)
        except RuntimeError as error:
            raise AssertionError(str(error)) from None


def check_rotations_reach_their_heads(optimizer: RotoGradOptimizer, losses: LossFn) -> None:
    """Check that another rotation R_k changes the loss of task k, and no other."""
    trial = Trial(optimizer, losses)
    with trial.restored():
        before = trial.losses()
        rotations = optimizer.rotations
        for task in before:
            if not rotations.rotate[task] or rotations.size == 1:
                continue
            original = rotations[task].clone()
            rotations[task].copy_(_another(original))
            after = trial.losses()
            rotations[task].copy_(original)
            for other, loss in before.items():
                changed = not torch.equal(after[other], loss)
                if changed != (other == task):
                    raise AssertionError(
                        f"A rotation in front of {trial.names[task]} must change its loss and no other, got that of "
                        f"{trial.names[other]} {'changed' if changed else 'unchanged'}. Likely causes: (a) a loss is "
                        "computed from the output of another head, or from none, or (b) a head looks at the norm of "
                        "the representation only."
                    )


def check_parameters_are_optimized(optimizer: RotoGradOptimizer, losses: LossFn) -> None:
    """Check that the optimizer holds every parameter that a loss depends on."""
    trial = Trial(optimizer, losses)
    known = {id(param) for param in trial.parameters()}
    with trial.restored():
        missing = {
            id(leaf): leaf for loss in trial.true_losses().values() for leaf in _leaves(loss) if id(leaf) not in known
        }
    if missing:
        shapes = ", ".join(str(tuple(leaf.shape)) for leaf in missing.values())
        raise AssertionError(
            f"The optimizer must hold every parameter that the losses depend on, got {len(missing)} that it lacks, of "
            f"shapes {shapes}. Build it with model.parameters(), or freeze them: requires_grad_(False)."
        )


def check_head_gradients(optimizer: RotoGradOptimizer, losses: LossFn) -> None:
    """Check that heads are trained by the gradients of their own losses, which nothing rescales."""
    trial = Trial(optimizer, losses)
    _check_gradients(trial, trial.head_parameters(), weighted=False)


def check_backbone_gradients(optimizer: RotoGradOptimizer, losses: LossFn) -> None:
    r"""Check that the backbone is trained by :math:`\sum_k w_k \nabla_\theta L_k`, with ``optimizer.task_weights`` w.

    A callable weighting has no weights: then there is nothing to compare with.
    """
    trial = Trial(optimizer, losses)
    in_heads = {id(param) for params in trial.head_parameters() for param in params}
    backbone = [param for param in trial.parameters() if id(param) not in in_heads]
    if trial.core.heads:  # parameters of functional heads cannot be told from those of the backbone
        _check_gradients(trial, [backbone], weighted=True)


def _check_gradients(trial: Trial, groups: list[list[Tensor]], *, weighted: bool) -> None:
    with trial.restored():
        true = trial.true_losses()
        present = trial.losses()
        trial.optimizer.backward({trial.names[task]: loss for task, loss in present.items()})
        weights = trial.optimizer.task_weights.tolist()
        if weighted and any(weights[task] != weights[task] for task in present):
            return
        divisors = trial.divisors()
        for params in groups:
            trained = [param for param in params if param.requires_grad and param.grad is not None]
            if not trained:
                continue
            expected = [torch.zeros_like(param) for param in trained]
            for task, loss in true.items():
                grads = torch.autograd.grad(loss / divisors[task], trained, retain_graph=True, allow_unused=True)
                for total, grad in zip(expected, grads, strict=True):
                    total += 0.0 if grad is None else (weights[task] if weighted else 1.0) * grad
            for param, total in zip(trained, expected, strict=True):
                _compare(param, total, weighted=weighted)


def _compare(param: Tensor, expected: Tensor, *, weighted: bool) -> None:
    assert param.grad is not None
    tolerance = 100 * torch.finfo(param.dtype).eps ** 0.75  # sums in another order, over a few layers
    error = float((param.grad - expected).abs().max() / expected.abs().max().clamp(min=1e-30))
    if error > tolerance:
        rule = "sum of the task gradients, each times its weight" if weighted else "gradient of the losses"
        raise AssertionError(
            f"The gradient of a parameter of {'the backbone' if weighted else 'a head'} must be the {rule}, got a "
            f"relative error of {error:.1e} for shape {tuple(param.shape)}. Likely causes: (a) a loss reaches the "
            "backbone around its head, as by a skip connection or a penalty on the representation: pass penalties as "
            "backbone_loss, (b) a parameter belongs to a head and to the backbone, or (c) a gradient hook changes it."
        )


def check_rotations(optimizer: RotoGradOptimizer) -> None:
    """Check that the rotations are rotations: orthogonal, with determinant +1. Before the first forward: nothing."""
    if optimizer.rotations.size is None:
        return
    matrices = optimizer.rotations.matrices
    error = float(orthogonality_error(matrices).max())
    signs = torch.linalg.slogdet(matrices.double()).sign.tolist()
    if error > MAX_ORTHOGONALITY_ERROR or min(signs) <= 0:
        raise AssertionError(
            f"Rotations must be orthogonal with determinant +1, got an error of {error:.1e} and signs {signs}. "
            "Likely cause: they were written to, or loaded from something that is not a checkpoint of rotations."
        )


def check_resume(optimizer: RotoGradOptimizer, losses: LossFn) -> None:
    """Check that a step from a saved and loaded state is the step that would have been, bit for bit."""
    trial = Trial(optimizer, losses)
    results = []
    for loaded in (False, True):
        with trial.restored():
            if loaded:
                buffer = io.BytesIO()
                torch.save(optimizer.state_dict(), buffer)
                buffer.seek(0)
                optimizer.load_state_dict(torch.load(buffer, weights_only=True))
            present = trial.losses()
            optimizer.step({trial.names[task]: loss for task, loss in present.items()})
            results.append(
                [*(param.detach().clone() for param in trial.parameters()), optimizer.rotations.matrices.clone()]
            )
    if not all(torch.equal(first, second) for first, second in zip(*results, strict=True)):
        raise AssertionError(
            "A step after loading the saved state must be the step without, got another one. Likely causes: (a) a "
            "state dict hook of the optimizer changes the state, or (b) the forward pass depends on more than "
            "parameters, such as on the number of calls."
        )


def _another(rotation: Tensor) -> Tensor:
    """Return a rotation far from this one: its rows in another order, one negated where the determinant asks for it."""
    other = rotation.roll(1, 0)
    if len(other) % 2 == 0:
        other[0] *= -1
    return other


def _leaves(loss: Tensor) -> list[Tensor]:
    """Return the leaves of a graph that require grad."""
    found: list[Tensor] = []
    seen: set[Any] = set()
    stack: list[Any] = [loss.grad_fn]
    while stack:
        node = stack.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if hasattr(node, "variable"):
            found.append(node.variable)
        stack.extend(parent for parent, _ in node.next_functions)
    return found
