"""The state of one backward pass: what is known before, and what arrives in it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from rotoopt._capture.agreement import SampleSums, Sketch
from rotoopt.weighting import Measurements
from rotoopt.weighting._gradients import TaskGradients
from rotoopt.weighting._measurements import Reference, root_sum_square

if TYPE_CHECKING:
    from rotoopt._capture.fork import Fork


@dataclass(frozen=True)
class Met:
    """The gradients of several tasks that met at one tensor, for the rotations to turn.

    Attributes:
        gradients: The gradients.
        shape: The shape of the tensor.
        turns: Whether the rotations turn by them.
        second_moment: That of the tensor, if it was measured. Shape ``(m, m)``.
    """

    gradients: TaskGradients
    shape: torch.Size
    turns: bool
    second_moment: Tensor | None


@dataclass
class BackwardPass:
    """Made before a backward pass or by its first gradient, filled by it, used by the step, and dropped.

    Attributes:
        number: torch's number of the pass; None where we run it, and know when it ends.
        losses: L_k over the joined batch, NaN for an absent task; None where the user back-propagates them. ``(K,)``.
        magnified: How many times larger the gradients are than those of the losses over the joined batch, by a
            ``GradScaler``, and by a mean over processes that is taken afterwards. None: one.
        weights: The weights, if they are known before the pass; None until the pass has made them. Shape ``(K,)``.
        lagged: Whether the weights were known before the pass.
        meets: Whether gradients of several tasks at one tensor wait for each other, although weights are known.
        combine: What becomes of gradients that waited.
        known_norms: The latest ||G_k|| that is not zero, with this pass; zero where there was none. Shape ``(K,)``.
        norm_reference: ||G_k(t0)||, with this pass.
        loss_reference: |L_k(t0)|, with this pass.
        expected: The tasks whose losses are back-propagated, if it is known.
        tasks: The tasks whose gradients have arrived.
        norms: Norms of the gradients that have arrived, by task: one for each tensor that entered its heads. Only if
            the weights were known.
        measured: What was measured, when the pass is over.
        met: Gradients that have met.
        sample_sums: Sums over samples, one for each tensor whose agreement is measured.
    """

    number: int | None
    losses: Tensor | None
    magnified: Tensor | float | None
    weights: Tensor | None
    lagged: bool
    meets: bool
    combine: Callable[[BackwardPass, Tensor, tuple[int, ...], Fork], Tensor]
    known_norms: Tensor
    norm_reference: Reference
    loss_reference: Reference
    expected: frozenset[int] = frozenset()
    tasks: set[int] = field(default_factory=set)
    norms: dict[int, list[Tensor]] = field(default_factory=dict)
    measured: Measurements | None = None
    met: list[Met] = field(default_factory=list)
    sample_sums: list[SampleSums] = field(default_factory=list)

    def pass_on(self, task: int, grad: Tensor, sketch: Sketch | None) -> Tensor:
        """Measure the gradient of one task, and return it times its weight, which is known."""
        assert self.weights is not None
        norm = torch.linalg.vector_norm(grad)
        self.note(task, norm)
        if sketch is not None:  # of the unit gradient, whose squares neither overflow nor vanish
            sums = sketch.sums(torch.where(norm > 0, grad / norm, 0.0)[None])
            self.sample_sums.append(sums.scaled(norm).of_task(task, len(self.weights)))
        return self.weights[task].to(grad.dtype) * grad

    def note(self, task: int, norm: Tensor) -> None:
        """Note the norm of the gradient of one task at one tensor."""
        self.tasks.add(task)
        self.norms.setdefault(task, []).append(norm)

    @property
    def read_one_tensor(self) -> bool:
        """Whether the head of every task has read one tensor."""
        return all(len(norms) == 1 for norms in self.norms.values())

    def joint_norms(self) -> Tensor:
        """Return the norms over all tensors, zero for an absent task. Shape ``(K,)``."""
        double = any(norm.dtype == torch.float64 for norms in self.norms.values() for norm in norms)
        like = self.known_norms.double() if double else self.known_norms
        return torch.stack([self._joint_norm(task, like) for task in range(len(like))])

    def _joint_norm(self, task: int, like: Tensor) -> Tensor:
        norms = [norm.to(like) for norm in self.norms.get(task, ())]
        if len(norms) > 1:
            return root_sum_square(torch.stack(norms))
        return norms[0] if norms else like.new_zeros(())
