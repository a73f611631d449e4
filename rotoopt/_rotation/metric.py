"""The metric of turns: by how much does a turn change what the heads get?"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from rotoopt._rotation.step import RotationGradient
from rotoopt._torch.processes import Processes

DAMPING = 0.1  # of the mean variance of a feature
MEMORY = 0.5  # of what was known before a turn


class Metric:
    r"""The second moment of the representation, a running mean over turns, scaled to a mean eigenvalue of one.

    .. math:: G = \frac{m\, C}{\operatorname{tr} C} + \frac1{10} I, \qquad C = \mathrm{E}[z z^\top]

    A small turn S changes what a head gets by S z, which is on average :math:`\operatorname{tr}(S C S^\top) /
    \operatorname{tr} C` of :math:`\lVert z \rVert^2`, and at most a tenth more than
    :math:`\operatorname{tr}(S G S^\top) / m`.

    Args:
        processes: Those that share a batch.
    """

    def __init__(self, processes: Processes) -> None:
        self._processes = processes
        self._mean: Tensor | None = None  # shape (m, m), trace m; zero where nothing was measured

    def factor(self, gradients: Sequence[RotationGradient], like: Tensor) -> Tensor:
        """Learn from the moments of ``gradients``, and return the Cholesky factor of G.

        Args:
            gradients: Those of a turn.
            like: The rotations. Shape ``(K, m, m)``.
        """
        m, identity = like.shape[-1], torch.eye(like.shape[-1], device=like.device, dtype=like.dtype)
        before = torch.zeros_like(identity) if self._mean is None else self._mean
        moments = [each.second_moment for each in gradients if each.second_moment is not None]
        total = torch.stack(moments).sum(0).to(like) if moments else torch.zeros_like(identity)
        if self._processes.count > 1:
            self._processes.sum_(total)
        trace, known = total.trace(), before.trace() > 0
        measured = (trace > 0) & trace.isfinite()
        latest = total * (m / trace)
        mean = torch.where(known, torch.lerp(latest, before, MEMORY), latest)
        self._mean = torch.where(measured, mean, before)
        damped = torch.where(measured | known, self._mean, identity) + DAMPING * identity
        factor, info = torch.linalg.cholesky_ex(damped)  # `_ex`: no device synchronization
        return torch.where(info == 0, factor, identity)  # of a moment that rounding has made indefinite: all the same

    def to(self, device: torch.device) -> None:
        """Move what is remembered to ``device``."""
        self._mean = None if self._mean is None else self._mean.to(device)

    def state_dict(self) -> dict[str, Tensor | None]:
        """Return what is needed to resume."""
        return {"mean": self._mean}

    def load_state_dict(self, state_dict: dict[str, Tensor | None], like: Tensor) -> None:
        """Load what :meth:`state_dict` returned, onto the device of ``like``."""
        mean = state_dict["mean"]
        self._mean = None if mean is None else mean.to(like)
