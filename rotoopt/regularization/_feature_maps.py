"""Penalties on the distance between feature maps of the source and of the target model (DELTA)."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Literal

import torch
from torch import Tensor, nn

from rotoopt.regularization._inputs import at_least_float32
from rotoopt.regularization._named_tensors import NamedTensors, squares

Reduction = Literal["sum", "batchmean"]


class BehavioralRegularization(nn.Module):
    r"""Penalty on the distance between feature maps of the source and of the target model.

    .. math:: \Omega(w) = \frac12 \sum_j \lVert F_j(w, x) - F_j(w_0, x) \rVert_2^2

    over the layers :math:`j`, all samples and all positions: the sum grows with the batch and the resolution. With
    ``reduction="batchmean"`` it does not grow with the batch. Then N processes under DistributedDataParallel, which
    averages gradients, compute the same as one process with the joined batch.

    The source model should be in eval mode. If the target has batch normalization layers, the distance after them is
    initially not zero, since the target normalizes by the batch; to avoid this, put these layers in eval mode.

    Args:
        reduction: ``"sum"``, or ``"batchmean"`` to divide by the number of samples, the first dimension.

    Shape:
        - Inputs: mappings from names of layers to feature maps, as returned by :class:`IntermediateLayerGetter`, with
          the same names, in any order, and the same shapes. Only the second one receives gradients.
        - Output: ``()``, at least float32.

    Raises:
        TypeError: If an input is not a mapping to tensors.
        ValueError: If there is no layer, or names or shapes differ.

    Example:
        >>> source, target = {"conv": torch.zeros(2, 3, 4, 4)}, {"conv": torch.ones(2, 3, 4, 4)}
        >>> BehavioralRegularization()(source, target), BehavioralRegularization(reduction="batchmean")(source, target)
        (tensor(48.), tensor(24.))

    Source: Li et al., DELTA: Deep Learning Transfer using Feature Map with Attention for Convolutional Networks, ICLR
    2019, as in ``tllib.regularization.delta.BehavioralRegularization``. The factor 1/2 is in its code, and the
    authors', but not in its documentation. Differences: layers are matched by name, where tllib matches them by order
    and ignores the rest; shapes are never broadcast; an empty mapping is an error instead of the float 0.0; squares
    are computed at least in float32, where float16 overflows; the second derivative at zero is not NaN.
    """

    def __init__(self, *, reduction: Reduction = "sum") -> None:
        super().__init__()
        self.reduction = _checked_reduction(reduction)

    def forward(self, layer_outputs_source: Mapping[str, Tensor], layer_outputs_target: Mapping[str, Tensor]) -> Tensor:
        """Return the penalty."""
        differences = _differences(layer_outputs_source, layer_outputs_target)
        return _total({name: squares(each).sum() for name, each in differences.items()}, differences, self.reduction)


class AttentionBehavioralRegularization(nn.Module):
    r"""The same penalty, with a weight for every channel.

    .. math:: \Omega(w) = \frac12 \sum_j \frac{C_j}{P_j} \sum_c a_{jc} \lVert F_{jc}(w, x) - F_{jc}(w_0, x) \rVert_2^2

    with :math:`C_j` channels and :math:`P_j` positions in layer :math:`j`. The weights :math:`a_j` of a layer come
    from :func:`channel_attention` and sum to one; if they are equal, this is :class:`BehavioralRegularization` with the
    mean over positions instead of the sum.

    Args:
        channel_attention: The weights, ``(C_j,)`` each, by name of the layer; or a sequence of them, in the order of
            the names in the first input, which is that of ``return_layers`` if it comes from
            :class:`IntermediateLayerGetter`. Copied into buffers.
        channel_dim: Dimension of the channels: 1 for maps ``(b, c, h, w)``, -1 for tokens ``(b, t, c)``. The first
            dimension counts samples, all others positions; there may be none.
        reduction: As in :class:`BehavioralRegularization`.

    Shape:
        - Inputs, output: as in :class:`BehavioralRegularization`.

    Raises:
        TypeError: If ``channel_attention`` contains anything but floating-point tensors.
        ValueError: If it is empty, a tensor is not a vector, or it does not match the feature maps.

    Example:
        >>> source, target = {"conv": torch.zeros(2, 3, 4, 4)}, {"conv": torch.ones(2, 3, 4, 4)}
        >>> AttentionBehavioralRegularization({"conv": torch.tensor([0.5, 0.5, 0.0])})(source, target)
        tensor(3.)

    Source: as for :class:`BehavioralRegularization`. The same differences from tllib, and: attention is in the state
    dict, follows ``.to()`` and is never broadcast; maps may have any number of dimensions instead of four; a mapping
    is matched by name, where tllib matches by order of execution.
    """

    def __init__(
        self,
        channel_attention: Sequence[Tensor] | Mapping[str, Tensor],
        *,
        channel_dim: int = 1,
        reduction: Reduction = "sum",
    ) -> None:
        super().__init__()
        self._by_name = isinstance(channel_attention, Mapping)
        attention = (
            dict(channel_attention)
            if isinstance(channel_attention, Mapping)
            else {str(place): weights for place, weights in enumerate(channel_attention)}
        )
        _check_attention(attention)
        self.channel_attention = NamedTensors(attention)
        self.channel_dim = channel_dim
        self.reduction = _checked_reduction(reduction)

    def forward(self, layer_outputs_source: Mapping[str, Tensor], layer_outputs_target: Mapping[str, Tensor]) -> Tensor:
        """Return the penalty."""
        differences = _differences(layer_outputs_source, layer_outputs_target)
        attention = self._attention_for(differences)
        distances = {name: self._distance(name, each, attention[name]) for name, each in differences.items()}
        return _total(distances, differences, self.reduction)

    def _attention_for(self, layers: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return the attention by name of the layer."""
        attention = dict(self.channel_attention.items())
        if self._by_name and attention.keys() != layers.keys():
            raise ValueError(
                f"Feature maps must be those of the layers with attention, {[*attention]}, got those of {[*layers]}."
            )
        if len(attention) != len(layers):
            raise ValueError(
                f"Feature maps must be as many as there are attentions, {len(attention)}, got those of {[*layers]}."
            )
        return attention if self._by_name else dict(zip(layers, attention.values(), strict=True))

    def _distance(self, name: str, difference: Tensor, attention: Tensor) -> Tensor:
        shape, rank = tuple(difference.shape), difference.ndim
        dim = self.channel_dim % rank if abs(self.channel_dim) < rank else 0
        if dim == 0 or shape[dim] != len(attention):
            raise ValueError(
                f"Feature maps must have samples along their first dimension, and along channel_dim={self.channel_dim} "
                f"as many channels as there are weights, {len(attention)}, got {shape} for {name}."
            )
        per_channel = squares(difference).sum([other for other in range(rank) if other != dim])
        num_positions = math.prod(shape[1:]) // shape[dim]
        # Not a product of vectors, which autocast would compute in half precision.
        return (at_least_float32(attention) * per_channel).sum() * (shape[dim] / num_positions)


def _checked_reduction(reduction: Reduction) -> Reduction:
    if reduction not in ("sum", "batchmean"):
        raise ValueError(f"`reduction` must be 'sum' or 'batchmean', got {reduction!r}.")
    return reduction


def _check_attention(attention: Mapping[str, Tensor]) -> None:
    if not attention:
        raise ValueError("`channel_attention` must have weights for at least one layer, got none.")
    for name, weights in attention.items():
        if not isinstance(weights, Tensor) or not weights.is_floating_point():
            found = weights.dtype if isinstance(weights, Tensor) else f"a {type(weights).__name__}"
            raise TypeError(f"`channel_attention` must contain floating-point tensors, got {found} for {name}.")
        if weights.ndim != 1 or len(weights) == 0:
            raise ValueError(
                f"`channel_attention` must have one weight per channel, got shape {tuple(weights.shape)} for {name}."
            )


def _differences(source: Mapping[str, Tensor], target: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return target minus source in the order of the source, which is detached."""
    for maps in (source, target):
        found = maps.values() if isinstance(maps, Mapping) else [maps]
        if not all(isinstance(each, Tensor) for each in found) or isinstance(maps, Tensor):
            raise TypeError(
                "Feature maps must be a mapping from names of layers to tensors, got "
                f"{' and '.join(f'a {type(each).__name__}' for each in found)}. IntermediateLayerGetter returns two "
                "things: the feature maps, and the output of the model."
            )
    if source.keys() != target.keys() or not source:
        raise ValueError(
            "Feature maps must be those of the same layers, at least one, got those of "
            f"{[*source]} for the source and of {[*target]} for the target."
        )
    for name, each in source.items():
        if each.shape != target[name].shape or each.ndim == 0:
            raise ValueError(
                f"Feature maps must have the same shape, with at least one dimension, got {tuple(each.shape)} for the "
                f"source and {tuple(target[name].shape)} for the target in {name}."
            )
    return {name: at_least_float32(target[name]) - at_least_float32(each.detach()) for name, each in source.items()}


def _total(distances: Mapping[str, Tensor], maps: Mapping[str, Tensor], reduction: Reduction) -> Tensor:
    """Return half of the sum of the distances, or of their means over the samples."""
    if reduction == "batchmean":
        distances = {name: distance / len(maps[name]) for name, distance in distances.items()}
    return 0.5 * torch.stack([*distances.values()]).sum()
