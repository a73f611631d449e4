"""Transfer-learning regularizers: fine-tuning as multi-task training.

They preserve what a pretrained source model has learned while it is fine-tuned. Names and numbers are those of
``tllib``. Penalties on the backbone or on the representation are passed to ``optimizer.step(losses, rep,
backbone_loss=...)``, where they are never rescaled; terms with their own head are tasks. The documentation of each
lists its differences from ``tllib``.
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
