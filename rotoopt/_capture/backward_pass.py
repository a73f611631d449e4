"""One backward pass: what is known before it, and what it measures."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from rotoopt._capture.representation import RotatedDims
from rotoopt._rotation.step import RotationGradient
from rotoopt.weighting import Measurements
from rotoopt.weighting._references import Reference


@dataclass
class BackwardPass:
    """Made before a backward pass or by its first gradient, filled by it, used by the step, and dropped.

    Attributes:
        number: torch's number of the pass; None where we run it, and know when it ends.
        losses: L_k over the joined batch, NaN for an absent task; None where the user back-propagates them. ``(K,)``.
        loss_scale: What the losses were multiplied by, as by a ``GradScaler``. Shape ``()``. None: one.
        weights: The weights, if they are known before the pass; None until the pass has made them. Shape ``(K,)``.
        waits: Whether the gradients of the tasks wait at the representation until all have arrived.
        combine: What becomes of gradients that waited.
        norm_reference: ||G_k(t0)||, with this pass.
        loss_reference: |L_k(t0)|, with this pass.
        tasks: The tasks whose gradients have arrived.
        norms: Norms of the gradients that did not wait, by task.
        measured: What was measured of gradients that waited.
        rotation_gradients: The gradients of the rotations, where these are to turn.
    """

    number: int | None
    losses: Tensor | None
    loss_scale: Tensor | None
    weights: Tensor | None
    waits: bool
    combine: Callable[[BackwardPass, Tensor, tuple[int, ...], RotatedDims], Tensor]
    norm_reference: Reference
    loss_reference: Reference
    tasks: set[int] = field(default_factory=set)
    norms: dict[int, list[Tensor]] = field(default_factory=dict)
    measured: Measurements | None = None
    rotation_gradients: list[RotationGradient] = field(default_factory=list)

    def pass_on(self, task: int, grad: Tensor) -> Tensor:
        """Measure the gradient of one task, and return it times its weight, which is known."""
        assert self.weights is not None
        self.tasks.add(task)
        self.norms.setdefault(task, []).append(torch.linalg.vector_norm(grad))
        return self.weights[task] * grad

    def norms_on_the_way(self, like: Tensor) -> Tensor:
        """Return the norms of the gradients that did not wait, zero for an absent task. Shape ``(K,)``, as ``like``."""
        zero = like.new_zeros(())
        norms = [torch.stack(self.norms[task]).norm() if task in self.norms else zero for task in range(len(like))]
        return torch.stack(norms).to(like.dtype)

    def join(self, grads: Tensor, tasks: tuple[int, ...], dims: RotatedDims) -> Tensor:
        """Return the gradient for the representation, of those that waited there.

        Args:
            grads: G. Shape ``(K, *shape)``, zero for absent tasks; changed in place.
            tasks: The tasks that are present.
            dims: The rotated dimensions of the representation.
        """
        if self.tasks and self.tasks.isdisjoint(tasks):
            raise RuntimeError(
                "All heads must get the same representation tensor, got two tensors, each for tasks of its own, in "
                "one backward pass. Likely causes: (a) a head is fed a view or a copy, as in head(z.flatten(1)): "
                "reshape once, before the first head, or (b) the tasks use different batches: give them in separate "
                "backward passes."
            )
        self.tasks.update(tasks)
        return self.combine(self, grads, tasks, dims)
