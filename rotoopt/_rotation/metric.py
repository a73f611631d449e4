"""The metric of updates: how much an update changes the inputs of the heads."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from rotoopt._rotation.step import RotationGradient
from rotoopt._torch.processes import Processes

DAMPING = 0.1  # relative to the mean variance of a feature
MEMORY = 0.5  # decay of the running mean


class Metric:
    r"""The second moment of the representation, a running mean over updates, scaled to a mean eigenvalue of one.

    .. math:: G = \frac{m\, C}{\operatorname{tr} C} + \frac1{10} I, \qquad C = \mathrm{E}[z z^\top]

    A small update S changes the input of a head by S z, which is on average :math:`\operatorname{tr}(S C S^\top) /
    \operatorname{tr} C` of :math:`\lVert z \rVert^2`, and at most a tenth more than
    :math:`\operatorname{tr}(S G S^\top) / m`.

    Args:
        processes: The processes that share a batch.
    """

    def __init__(self, processes: Processes) -> None:
        self._processes = processes
        self._mean: Tensor | None = None  # shape (m, m), trace m
        self._memory: Tensor | None = None  # the decay, zero before the first measurement

    def update(self, gradients: Sequence[RotationGradient], like: Tensor) -> Tensor:
        """Update the running mean with the moments of ``gradients``, and return G.

        Args:
            gradients: The gradients of an update.
            like: The rotations. Shape ``(K, m, m)``.
        """
        m, distributed = like.shape[-1], self._processes.count > 1
        if self._mean is None or self._memory is None:
            self._mean = torch.eye(m, device=like.device, dtype=like.dtype)
            self._memory = torch.zeros_like(self._mean[0, 0])
        moments = [each.second_moment for each in gradients if each.second_moment is not None]
        total = sum(moments[1:], moments[0]).to(like, copy=distributed) if moments else torch.zeros_like(self._mean)
        if distributed:
            self._processes.sum_(total)
        trace = total.trace()
        measured = trace == trace.clamp(torch.finfo(trace.dtype).tiny, torch.finfo(trace.dtype).max)  # positive, finite
        latest = total / (trace / m)
        self._mean = torch.where(measured, torch.lerp(latest, self._mean, self._memory), self._mean)
        self._memory = self._memory.masked_fill(measured, MEMORY)
        damped = self._mean.clone()
        damped.diagonal().add_(DAMPING)
        return damped

    def to(self, device: torch.device) -> None:
        """Move the state to ``device``."""
        if self._mean is not None and self._memory is not None:
            self._mean, self._memory = self._mean.to(device), self._memory.to(device)

    def state_dict(self) -> dict[str, Tensor | None]:
        """Return what is needed to resume."""
        return {"mean": self._mean, "memory": self._memory}

    def load_state_dict(self, state_dict: dict[str, Tensor | None], like: Tensor) -> None:
        """Load what :meth:`state_dict` returned, onto the device of ``like``."""
        mean, memory = state_dict["mean"], state_dict["memory"]
        self._mean = None if mean is None else mean.to(like)
        self._memory = None if memory is None else memory.to(like)
