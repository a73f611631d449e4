"""The API of the official package, ``rotograd``: where code for it changes its import, and nothing else.

``from rotograd import RotoGrad`` becomes ``from rotoopt.rotograd import RotoGrad``. All mathematics is that of
:class:`~rotoopt.RotoGradOptimizer`, which needs no such model.
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
