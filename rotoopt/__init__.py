"""Multi-task training that does not fight itself: RotoGrad as an optimizer wrapper.

    representation z -> rotation R_k -> head k -> loss k -> gradient at z -> weighting -> wrapped optimizer
                                                                 |
                                                                 +-> rotation step

:class:`RotoGradOptimizer` wraps any torch optimizer; ``optimizer.step(losses, rep)`` replaces
``sum(losses).backward(); optimizer.step()``. The weightings say how K task gradients become one.
"""

from rotoopt.gradnorm import GradNorm
from rotoopt.homogenize import StepRecord
from rotoopt.optimizer import RotoGradOptimizer
from rotoopt.rotations import Rotations
from rotoopt.weighting import EqualWeighting, RotoGradWeighting, Weighting

__all__ = [
    "EqualWeighting",
    "GradNorm",
    "RotoGradOptimizer",
    "RotoGradWeighting",
    "Rotations",
    "StepRecord",
    "Weighting",
]
