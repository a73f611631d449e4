"""DELTA and related methods, with the module name of tllib: distances of parameters and of feature maps."""

from rotoopt.regularization._attention import channel_attention
from rotoopt.regularization._feature_maps import AttentionBehavioralRegularization, BehavioralRegularization
from rotoopt.regularization._layer_getter import IntermediateLayerGetter
from rotoopt.regularization._starting_point import L2Regularization, SPRegularization

__all__ = [
    "L2Regularization",
    "SPRegularization",
    "BehavioralRegularization",
    "AttentionBehavioralRegularization",
    "IntermediateLayerGetter",
    "channel_attention",
]
