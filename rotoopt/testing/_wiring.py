"""Checks of the wiring: which head runs on what, which loss comes from which head, and who trains the parameters."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor

from rotoopt._capture.graph import Node, behind_rotations, in_heads, is_leaf, is_rotation, leaves, reached
from rotoopt.optimizer import RotoGradOptimizer
from rotoopt.testing._trial import LossFn, Trial


def check_heads_share_the_representation(optimizer: RotoGradOptimizer, losses: LossFn) -> None:
    """Check that every head runs in training, and all of them on one tensor z that requires grad."""
    trial = Trial(optimizer, losses)
    with trial.restored():
        present = trial.losses()
        for task in present:
            _check_fed(trial, task)
        rotations = set(filter(is_rotation, reached(loss.grad_fn for loss in present.values())))
    _check_rotated_once(rotations, trial.names)
    # The node that made z, too: a tensor that was changed in place is the same object, but was made by another one.
    seen = {task: {(node.fork, node.next_functions[0]) for node in rotations if node.task == task} for task in present}
    for task, tensors in seen.items():
        if len(tensors) > 1:
            raise AssertionError(
                f"The head of {trial.names[task]} must run on one tensor z, got {len(tensors)} in one forward pass. It "
                "is called on several: join them, as with torch.cat, and make one z of all for all heads."
            )
    found = {task: tensors for task, tensors in seen.items() if tensors}
    for task, tensors in found.items():
        first = next(iter(found))
        if tensors != found[first]:
            raise AssertionError(
                f"All heads must run on the same tensor z, got one for {trial.names[first]} and another for "
                f"{trial.names[task]}. Likely causes: (a) something is done to z on its way into one head, as in "
                "head(z.relu()), head(z.flatten(1)) or head(z @ rotation): do it once, before the first head, or "
                "inside of the head, (b) z is changed in place between two heads, as by z.relu_(), or (c) the heads "
                "read different layers, or z of different batches."
            )


def _check_fed(trial: Trial, task: int) -> None:
    """Raise unless the head of ``task`` was fed with a z that requires grad."""
    name, heads, fed = trial.names[task], trial.core.heads, trial.fed()
    if fed.get(task):
        return
    if task in fed:
        others = [trial.names[other] for other, requires_grad in fed.items() if requires_grad]
        raise AssertionError(
            f"The head of {name} must run on a z that requires grad, got one that does not"
            f"{f', while that of {others[0]} does' if others else ''}. Likely causes: (a) z.detach(), or no_grad() "
            "around the backbone, (b) the backbone is frozen, and there is nothing for the tasks to share, or (c) "
            "`heads` holds the whole model, whose input is rotated then: give the modules that consume z."
        )
    if not heads:
        raise AssertionError(
            f"The head of {name} must be fed by optimizer.rotate(z), got a forward pass without it. Likely causes: (a) "
            "z is multiplied by a copy of the rotations, which does not turn with them, or (b) rotate(z) of another "
            "optimizer is used."
        )
    if not trial.engine.capture.handles:
        raise AssertionError(
            f"There must be a rotation in front of the head of {name}, got none: fold() or remove() was called. To "
            "train on, build a new optimizer."
        )
    if not heads[task].training:
        raise AssertionError(
            f"The head of {name} must run in training mode, got one in eval mode. Call model.train() first; to freeze "
            "statistics, put the normalization layers in eval mode, and not the head."
        )
    raise AssertionError(
        f"The head of {name} must be called on z, got a forward pass in which the module that `heads` holds was not "
        "called. Likely causes: (a) it is called as head.forward(z), or only submodules of it are, (b) the model that "
        "runs has another one: it is a copy, was built twice, or its head was replaced after the optimizer was built, "
        "(c) the losses of two tasks come from one head, or (d) it runs under no_grad() or paused(), or in a model "
        "that was compiled before the optimizer was built."
    )


def _check_rotated_once(rotations: Iterable[Node], names: Sequence[str]) -> None:
    """Raise if z is rotated again on its way to a head."""
    for node in rotations:
        behind = [other for other in filter(is_rotation, reached([node])) if other is not node]
        if behind:
            raise AssertionError(
                f"z must be rotated once on its way to a loss, got it rotated for {names[behind[0].task]} and then for "
                f"{names[node.task]}. A head is part of another one, or reads its output: give every task a head of "
                "its own that reads z."
            )


def check_losses_pass_through_their_heads(optimizer: RotoGradOptimizer, losses: LossFn) -> None:
    """Check that every loss is computed by its own head, and reaches the backbone through heads only."""
    trial = Trial(optimizer, losses)
    with trial.restored():
        present = trial.losses()
    for task, loss in present.items():
        nearest = filter(is_rotation, reached([loss.grad_fn], stop_at_rotations=True))
        through = sorted({node.task for node in nearest})
        if task not in through:
            raise AssertionError(
                f"The loss of {trial.names[task]} must be computed from the output of its own head, got one from "
                f"{', '.join(trial.names[other] for other in through) or 'none'}. Likely causes: "
                f"{_causes(through, functional=not trial.core.heads)}."
            )
        if not {node for node in in_heads(loss) if not is_leaf(node)}.isdisjoint(behind_rotations(loss)):
            raise AssertionError(
                f"The loss of {trial.names[task]} must depend on the backbone through its head only, got a loss that "
                "reaches the backbone around its head, where nothing rotates or weighs its gradient. Likely causes: "
                "(a) a skip connection from z, or from a layer before, to the output: put it into the head, or (b) a "
                "penalty on z: pass it as backbone_loss."
            )


def _causes(through: list[int], *, functional: bool) -> str:
    if through:
        return (
            "(a) `losses` are in another order than the heads, (b) two losses are computed from one output, or (c) a "
            "tensor of optimizer.rotate(z) went to the wrong head"
        )
    fed = "z itself instead of its tensor of optimizer.rotate(z)" if functional else "head.forward(z), too"
    return f"(a) the output is detached, or comes from another forward pass, or (b) the loss is computed from {fed}"


def check_rotations_reach_their_heads(optimizer: RotoGradOptimizer, losses: LossFn) -> None:
    """Check that another rotation R_k changes the loss of task k, and no other."""
    trial = Trial(optimizer, losses)
    with trial.restored():
        before = trial.backward()
        rotations, norms = optimizer.rotations, trial.engine.record
        assert norms is not None
        depends = norms.grad_norms > 0  # a head whose last layer is zero, as some are at first, does not look at z
        for task in before:
            if not rotations.rotate[task] or rotations.size == 1:
                continue
            original = rotations[task].clone()
            rotations[task].copy_(_another(original))
            after = trial.losses()
            rotations[task].copy_(original)
            changed = {other for other, loss in before.items() if not torch.equal(after[other], loss)}
            _check_changed(changed, task, trial.names, depends=bool(depends[task]))


def _check_changed(changed: set[int], task: int, names: Sequence[str], *, depends: bool) -> None:
    for other in sorted(changed - {task}):
        raise AssertionError(
            f"A rotation in front of {names[task]} must change its loss and no other, got that of {names[other]} "
            f"changed: it is computed from the output of {names[task]}, too. A loss that mixes two heads belongs to "
            "neither: add each term to the loss of its own head."
        )
    if depends and task not in changed:
        raise AssertionError(
            f"A rotation in front of {names[task]} must change its loss, got that of {names[task]} unchanged. Likely "
            "causes: (a) the head looks at the norm of z only, which no rotation changes, or (b) its value and its "
            "gradient come from different computations, as with a straight-through estimator."
        )


def _another(rotation: Tensor) -> Tensor:
    """Return a rotation far from this one: its rows in another order, one negated where the determinant asks for it."""
    other = rotation.roll(1, 0)
    if len(other) % 2 == 0:
        other[0] *= -1
    return other


def check_parameters_are_optimized(optimizer: RotoGradOptimizer, losses: LossFn) -> None:
    """Check that the optimizer holds every parameter that a loss depends on."""
    trial = Trial(optimizer, losses)
    known = {id(param) for param in trial.parameters()}
    with trial.restored():
        present = trial.losses()
    places = {
        **{id(leaf): (leaf, "the backbone") for loss in present.values() for leaf in leaves(behind_rotations(loss))},
        **{
            id(leaf): (leaf, f"the head of {trial.names[task]}")
            for task, loss in present.items()
            for leaf in leaves(in_heads(loss))
        },
    }
    missing = {key: place for key, place in places.items() if key not in known}
    if missing:
        raise AssertionError(
            f"The optimizer must hold every parameter that the losses depend on, got {len(missing)} that it lacks: "
            f"{_listed(missing)}. Build it with model.parameters(), of the model that runs and when it is complete, or "
            "freeze them: requires_grad_(False)."
        )


def _listed(missing: Mapping[int, tuple[Tensor, str]]) -> str:
    """Return the shapes of parameters by place."""
    shapes: dict[str, list[str]] = {}
    for leaf, place in missing.values():
        shapes.setdefault(place, []).append(str(tuple(leaf.shape)))
    return "; ".join(f"{', '.join(each)} of {place}" for place, each in shapes.items())
