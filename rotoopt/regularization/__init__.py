"""Transfer-learning regularizers: fine-tuning as multi-task training.

Keep what the source model knows while it learns the target. The names and numbers are those of ``tllib``. Terms that
depend on the backbone or on the representation go into ``optimizer.step(losses, rep, backbone_loss=...)``, where they
are never rescaled; terms with a head of their own are tasks. Each is documented with where it departs from ``tllib``.
"""

from rotoopt.regularization.bi_tuning import BiTuning
from rotoopt.regularization.bss import BatchSpectralShrinkage
from rotoopt.regularization.co_tuning import CoTuningLoss, Relationship
from rotoopt.regularization.delta import (
    AttentionBehavioralRegularization,
    BehavioralRegularization,
    IntermediateLayerGetter,
    L2Regularization,
    SPRegularization,
    channel_attention,
)

__all__ = [
    "L2Regularization",
    "SPRegularization",
    "BehavioralRegularization",
    "AttentionBehavioralRegularization",
    "IntermediateLayerGetter",
    "channel_attention",
    "BatchSpectralShrinkage",
    "CoTuningLoss",
    "Relationship",
    "BiTuning",
]
