"""The API of the official package ``rotograd``: existing code only changes its import.

``from rotograd import RotoGrad`` becomes ``from rotoopt.rotograd import RotoGrad``. The implementation is shared with
:class:`~rotoopt.RotoGradOptimizer`, which works with any model.
"""

from rotoopt.rotograd._gradnorm import RotoGradNorm
from rotoopt.rotograd._rotated import RotateOnly, RotoGrad, cached
from rotoopt.rotograd._state_dict import rotations_from_rotograd
from rotoopt.rotograd._vanilla import VanillaMTL

__all__ = [
    "RotoGrad",
    "RotateOnly",
    "RotoGradNorm",
    "VanillaMTL",
    "cached",
    "rotations_from_rotograd",
]
