"""Weightings: how the K task gradients at the representation are combined into the gradient of the backbone.

:class:`ProgressWeighting` is the default, :class:`RotoGradWeighting` is the paper's, :class:`GradNorm` trains its
weights, and :class:`EqualWeighting` is the plain sum. To write your own, subclass :class:`Weighting`, which computes
one weight per task from :class:`Measurements`, or pass any callable that maps the ``(K, n)`` gradients to ``(n,)``,
such as a TorchJD aggregator.
"""

from rotoopt.weighting._gradnorm import GradNorm
from rotoopt.weighting._measurements import Measurements
from rotoopt.weighting._progress import ProgressWeighting
from rotoopt.weighting._weighting import EqualWeighting, RotoGradWeighting, Weighting, gradient_shares

__all__ = [
    "Weighting",
    "Measurements",
    "ProgressWeighting",
    "RotoGradWeighting",
    "EqualWeighting",
    "GradNorm",
    "gradient_shares",
]
