"""Aggregators: functions that combine K gradients into one, such as those of TorchJD."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from rotoopt.weighting._gradients import TaskGradients
from rotoopt.weighting._measurements import Measurements
from rotoopt.weighting._progress import ProgressWeighting
from rotoopt.weighting._weighting import Weighting

Aggregator = Callable[[Tensor], Tensor]


class CallableWeighting(Weighting):
    """Any function of the ``(|P|, n)`` matrix of present task gradients, such as a TorchJD aggregator.

    Args:
        aggregator: Maps ``(|P|, n)``, float32 (float64 for float64 representations), to ``(n,)``.
    """

    needs_one_tensor = True

    def __init__(self, aggregator: Aggregator) -> None:
        self.aggregator = aggregator

    def __call__(self, measured: Measurements) -> Tensor:
        """Return NaN: the result of an aggregator is not necessarily a weighted sum."""
        return torch.full_like(measured.norms, torch.nan)

    def combine(self, gradients: TaskGradients, weights: Tensor) -> Tensor:
        """Return the result of the aggregator, checked."""
        return gradients.aggregate(self._checked)

    def _checked(self, rows: Tensor) -> Tensor:
        vector = self.aggregator(rows)
        if not isinstance(vector, Tensor) or vector.shape != rows.shape[1:]:
            found = tuple(vector.shape) if isinstance(vector, Tensor) else type(vector).__name__
            raise ValueError(
                f"`weighting` must map a (K, n) tensor to an (n,) tensor, got {found} for {tuple(rows.shape)}."
            )
        return vector

    def __repr__(self) -> str:
        return repr(self.aggregator)


def as_weighting(weighting: Weighting | Aggregator | None) -> Weighting:
    """Return ``weighting`` as a :class:`Weighting`; ``None`` is the default."""
    if weighting is None:
        return ProgressWeighting()
    if isinstance(weighting, Weighting):
        return weighting
    if isinstance(weighting, type) or not callable(weighting):
        raise TypeError(
            "`weighting` must be a Weighting or a callable (K, n) -> (n,), such as ProgressWeighting(), "
            f"GradNorm(alpha=1.5), EqualWeighting() or a TorchJD aggregator, got {weighting!r}."
        )
    return CallableWeighting(weighting)
