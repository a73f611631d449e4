"""Multi-task training that does not fight itself: RotoGrad as an optimizer wrapper.

    representation z -> rotation R_k -> head k -> loss k -> gradient at z -> weighting -> wrapped optimizer
                                                                 |
                                                                 +-> rotation step

:class:`RotoGradOptimizer` wraps any torch optimizer; ``optimizer.step(losses, rep)`` replaces
``sum(losses).backward(); optimizer.step()``. The weightings say how K task gradients become one. ``RotoGrad`` and the
other modules are the API of the official package.
"""

from rotoopt.gradnorm import GradNorm
from rotoopt.modules import RotateOnly, RotoGrad, RotoGradNorm, VanillaMTL, cached
from rotoopt.official import rotations_from_rotograd
from rotoopt.optimizer import RotoGradOptimizer
from rotoopt.record import StepRecord
from rotoopt.rotations import Rotations
from rotoopt.weighting import EqualWeighting, RotoGradWeighting, Weighting

__all__ = [
    "RotoGradOptimizer",
    "Rotations",
    "StepRecord",
    "EqualWeighting",
    "GradNorm",
    "RotoGradWeighting",
    "Weighting",
    "RotateOnly",
    "RotoGrad",
    "RotoGradNorm",
    "VanillaMTL",
    "cached",
    "rotations_from_rotograd",
]
