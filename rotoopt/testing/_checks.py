"""Checks that a model and its optimizer are wired correctly. Each raises ``AssertionError`` with what is wrong."""

from __future__ import annotations

import io
from collections.abc import Iterable

import torch
from torch import Tensor

from rotoopt._capture.fork import Fork
from rotoopt._capture.graph import is_tap, reached
from rotoopt._rotation.cayley import determinant_signs, orthogonality_error
from rotoopt.optimizer import RotoGradOptimizer
from rotoopt.testing._gradients import check_backbone_gradients, check_head_gradients
from rotoopt.testing._trial import LossFn, Trial
from rotoopt.testing._wiring import (
    check_heads_are_fed,
    check_losses_pass_through_their_heads,
    check_parameters_are_optimized,
    check_rotations_reach_their_heads,
)

MAX_ORTHOGONALITY_ERROR = 1e-5


def check_invariants(optimizer: RotoGradOptimizer, losses: LossFn) -> None:
    """Run all checks of ``rotoopt.testing``.

    The checks are ordered from causes to effects, so that the first error is the relevant one. Parameters, gradients,
    optimizer and rotations are restored; forward passes in training mode update the running statistics of the model,
    as they always do.

    Args:
        optimizer: The optimizer, built for the model.
        losses: Computes the losses of one batch in training mode, as given to ``optimizer.step``. It must use the same
            batch in every call. Random numbers, as in dropout, are made the same automatically.

    Raises:
        AssertionError: With what must hold, what was found, and what to do. Errors raised by the model itself, or by
            the hooks while it runs, are not caught.

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
    check_rotations(optimizer)
    check_losses_repeat(optimizer, losses)
    check_heads_are_fed(optimizer, losses)
    check_losses_pass_through_their_heads(optimizer, losses)
    check_parameters_are_optimized(optimizer, losses)
    check_rotations_reach_their_heads(optimizer, losses)
    check_head_gradients(optimizer, losses)
    check_backbone_gradients(optimizer, losses)
    check_resume(optimizer, losses)


def check_losses_repeat(optimizer: RotoGradOptimizer, losses: LossFn) -> None:
    """Check that ``losses`` recomputes the same finite losses in every call. The other checks rely on it."""
    trial = Trial(optimizer, losses)
    with trial.restored():
        trial.losses()  # may create the rotations, which may draw random numbers
        first, second = trial.losses(), trial.losses()
    for task, loss in first.items():
        if not loss.isfinite():
            raise AssertionError(
                f"`losses` must be finite, got {loss.item()} for {trial.names[task]}. Such a batch can neither be "
                "trained on nor checked: use another one."
            )
        if task not in second or not torch.equal(loss, second[task]):
            raise AssertionError(
                f"`losses` must return the same losses in every call, got {loss.item()} and then "
                f"{second[task].item() if task in second else None} for {trial.names[task]}. Draw the batch outside of "
                "it, use torch's generators for random numbers, put layers that change in every forward pass, such "
                "as those with spectral_norm, in eval mode, and reset buffers, such as a queue of keys, inside of it."
            )
    if not _forks(first.values()).isdisjoint(_forks(second.values())):
        raise AssertionError(
            "`losses` must run the whole model in every call, got the z of an earlier call. Compute z inside of it."
        )


def _forks(losses: Iterable[Tensor]) -> set[Fork]:
    """Return the points where tensors go to the heads, without parameters, which are the same in every call."""
    taps = filter(is_tap, reached(loss.grad_fn for loss in losses))
    return {tap.fork for tap in taps if not tap.fork.is_leaf}


def check_rotations(optimizer: RotoGradOptimizer) -> None:
    """Check that the rotations are orthogonal with determinant +1. Passes before the first forward pass."""
    if optimizer.rotations.size is None:
        return
    matrices = optimizer.rotations.matrices
    error = float(orthogonality_error(matrices).max())
    signs = determinant_signs(matrices.double()).tolist()
    if not error <= MAX_ORTHOGONALITY_ERROR or min(signs) <= 0:
        raise AssertionError(
            f"Rotations must be orthogonal with determinant +1, got an error of {error:.1e} and signs {signs}. "
            "Likely cause: they were overwritten, or loaded from something that is not a checkpoint of rotations."
        )


def check_resume(optimizer: RotoGradOptimizer, losses: LossFn) -> None:
    """Check that a step after saving and loading the state equals the step without, bit for bit."""
    trial = Trial(optimizer, losses)
    results = []
    for loaded in (False, True):
        with trial.restored():
            if loaded:
                buffer = io.BytesIO()
                torch.save(optimizer.state_dict(), buffer)
                buffer.seek(0)
                optimizer.load_state_dict(torch.load(buffer, weights_only=True))
            trial.step()
            rotations = optimizer.rotations
            matrices = [] if rotations.size is None else [rotations.matrices]  # none if no input can be rotated
            results.append([tensor.detach().clone() for tensor in [*trial.parameters(), *matrices]])
    if not all(torch.equal(first, second) for first, second in zip(*results, strict=True)):
        raise AssertionError(
            "A step after loading the saved state must equal the step without, got different parameters. Likely "
            "causes: (a) a state dict hook of the optimizer changes the state, or (b) the forward pass depends on more "
            "than parameters, such as the number of calls."
        )
