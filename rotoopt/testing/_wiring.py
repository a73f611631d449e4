"""Checks of the wiring: what each head reads, which head each loss comes from, which parameters are trained."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial

import torch
from torch import Tensor, nn

from rotoopt._capture.graph import behind_taps, in_heads, leaves, taps_of
from rotoopt._engine.construction import modules_of
from rotoopt._torch.modules import living_optimizers
from rotoopt.optimizer import RotoGradOptimizer
from rotoopt.testing._trial import LossFn, Trial


def check_heads_are_fed(optimizer: RotoGradOptimizer, losses: LossFn) -> None:
    """Check that every head runs in training mode, on an input that requires grad."""
    trial = Trial(optimizer, losses)
    with trial.restored():
        for task in trial.losses():
            _check_fed(trial, task)


def _check_fed(trial: Trial, task: int) -> None:
    """Raise unless the head of ``task`` ran on an input that requires grad."""
    name, heads, fed = trial.names[task], trial.core.heads, trial.fed()
    if fed.get(task) or (task in fed and any(fed.values())):  # a probe may read z.detach()
        return
    if task in fed:
        raise AssertionError(
            f"The head of {name} must run on a z that requires grad, got one that does not, for any task. Likely "
            "causes: (a) z.detach(), or no_grad() around the backbone, (b) the backbone is frozen, so that the tasks "
            "share nothing that is trained, or (c) `heads` holds the whole model, whose input is then rotated: pass "
            "the modules that read z."
        )
    if not heads:
        raise AssertionError(
            f"The head of {name} must be fed by optimizer.rotate(z), got a forward pass without it. Likely causes: (a) "
            "z is multiplied by a copy of the rotations, which is not updated with them, or (b) rotate(z) of another "
            "optimizer is used."
        )
    if not trial.engine.capture.handles:
        raise AssertionError(
            f"There must be a rotation in front of the head of {name}, got none: fold() or remove() was called. To "
            "continue training, build a new optimizer."
        )
    if not any(module.training for module in modules_of(heads[task])):
        raise AssertionError(
            f"The head of {name} must run in training mode, got one in eval mode. Call model.train() first; to freeze "
            "statistics, put only the normalization layers in eval mode, not the head."
        )
    raise AssertionError(
        f"The head of {name} must be called on z, got a forward pass in which the module that `heads` holds was not "
        "called. Likely causes: (a) it is called as head.forward(z), or only submodules of it are, (b) the model that "
        "runs has another one: it is a copy, was built twice, or its head was replaced after the optimizer was built, "
        "(c) the losses of two tasks come from one head, or (d) it runs under no_grad() or paused(), or in a model "
        "that was compiled before the optimizer was built."
    )


def check_losses_pass_through_their_heads(optimizer: RotoGradOptimizer, losses: LossFn) -> None:
    """Check, as a step does, that every loss passes through its own head, and reaches shared modules only there."""
    trial = Trial(optimizer, losses)
    with trial.restored():
        trial.check_wiring(trial.losses())


def check_rotations_reach_their_heads(optimizer: RotoGradOptimizer, losses: LossFn) -> None:
    """Check that changing the rotation R_k changes the loss of task k."""
    trial = Trial(optimizer, losses)
    with trial.restored():
        before = trial.losses()
        depending = _depending_on_rotations(trial, before)
        rotations = optimizer.rotations
        for task in before:
            if task not in depending or rotations.size == 1:
                continue
            original = rotations[task].clone()
            rotations[task].copy_(_another(original))
            after = trial.losses()[task]
            rotations[task].copy_(original)
            if torch.equal(after, before[task]):
                raise AssertionError(
                    f"A rotation in front of {trial.names[task]} must change its loss, got the same loss. Likely "
                    "causes: (a) the head only uses norms, or inner products of inputs that are rotated alike, as a "
                    "decoder u @ v.T: no rotation changes these, so pass `rotate` with one flag per task, False for "
                    "it, or (b) its value and its gradient come from different computations, as with a "
                    "straight-through estimator."
                )


def _depending_on_rotations(trial: Trial, losses: dict[int, Tensor]) -> set[int]:
    """Return the tasks with a gradient at rotated inputs.

    There is none if the last layer of a head is initialized to zero, or if no sample of this batch counts there, as for
    a level of a pyramid to which a detector assigns no box.
    """
    depending: set[int] = set()

    def note(task: int, grads: Sequence[Tensor | None]) -> None:
        if any(grad is not None and bool(grad.any()) for grad in grads):
            depending.add(task)

    for task, loss in losses.items():
        for tap in taps_of([loss.grad_fn]):
            if tap.task == task and trial.engine.capture.places.noted[task].get(tap.place):
                tap.register_prehook(partial(note, task))
    trial.backward(losses)
    return depending


def _another(rotation: Tensor) -> Tensor:
    """Return a rotation far from this one: its rows permuted, and one negated if the determinant requires it."""
    other = rotation.roll(1, 0)
    if len(other) % 2 == 0:
        other[0] *= -1
    return other


def check_parameters_are_optimized(optimizer: RotoGradOptimizer, losses: LossFn) -> None:
    """Check that some optimizer has every parameter that a loss depends on: this one or another one.

    Inputs that require grad, as activation checkpointing needs them, are not parameters.
    """
    trial = Trial(optimizer, losses)
    with trial.restored():
        present = trial.losses()
    places = {
        **{id(leaf): (leaf, "the backbone") for loss in present.values() for leaf in leaves(behind_taps(loss))},
        **{
            id(leaf): (leaf, f"the head of {trial.names[task]}")
            for task, loss in present.items()
            for leaf in leaves(in_heads(loss))
        },
    }
    known = {id(param) for each in living_optimizers() for group in each.param_groups for param in group["params"]}
    missing = {key: at for key, at in places.items() if key not in known and isinstance(at[0], nn.Parameter)}
    if missing:
        raise AssertionError(
            f"There must be an optimizer for every parameter that the losses depend on, got {len(missing)} without: "
            f"{_listed(missing)}. Build it with model.parameters() after the model is complete, from the model that "
            "runs, or freeze them: requires_grad_(False)."
        )


def _listed(missing: Mapping[int, tuple[Tensor, str]]) -> str:
    """Return the shapes of parameters by place."""
    shapes: dict[str, list[str]] = {}
    for leaf, place in missing.values():
        shapes.setdefault(place, []).append(str(tuple(leaf.shape)))
    return "; ".join(f"{', '.join(each)} of {place}" for place, each in shapes.items())
