"""Weightings: how the K task gradients at the representation become the one that the backbone receives.

:class:`ProgressWeighting` is the default, :class:`RotoGradWeighting` the paper's, :class:`GradNorm` trains its weights,
and :class:`EqualWeighting` is the plain sum. For one of your own, subclass :class:`Weighting`, which sees
:class:`Measurements` and returns one weight per task, or pass any callable that maps the ``(K, n)`` gradients to
``(n,)``, such as a TorchJD aggregator.
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
