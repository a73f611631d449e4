"""Multi-task training with RotoGrad, as a wrapper of any torch optimizer.

    representation z -> rotation R_k -> head k -> loss k -> gradient at z -> weighting -> wrapped optimizer
                                                                 |
                                                                 +-> rotation step

:class:`RotoGradOptimizer` wraps any torch optimizer; ``optimizer.step(losses, rep)`` replaces
``sum(losses).backward(); optimizer.step()``. A weighting combines the K task gradients; :mod:`rotoopt.weighting` has
the base class for writing your own. :mod:`rotoopt.rotograd` is the API of the official package.
"""

from rotoopt._engine.record import StepRecord
from rotoopt._rotation.rotations import Rotations
from rotoopt.optimizer import RotoGradOptimizer
from rotoopt.weighting import EqualWeighting, GradNorm, ProgressWeighting, RotoGradWeighting, Weighting

__version__ = "0.1.0"

__all__ = [
    "RotoGradOptimizer",
    "Rotations",
    "StepRecord",
    "Weighting",
    "ProgressWeighting",
    "RotoGradWeighting",
    "GradNorm",
    "EqualWeighting",
]
