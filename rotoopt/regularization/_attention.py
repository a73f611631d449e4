"""Channel attention for DELTA: how much the loss of a model increases without one channel of a layer."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from contextlib import ExitStack
from typing import Any, Literal

import torch
from torch import Tensor, nn

from rotoopt._torch.modules import in_eval_mode, unwrapped
from rotoopt.regularization._inputs import at_least_float32
from rotoopt.regularization._layer_getter import IntermediateLayerGetter

# In units of the last place of the loss: smaller differences are rounding errors.
ROUNDING = 16


def channel_attention(
    model: nn.Module,
    layers: Iterable[str],
    loss_fn: Callable[[Any, Any], Tensor],
    batches: Iterable[tuple[Any, Any]],
    *,
    method: Literal["ablation", "first_order"] = "ablation",
    temperature: float = 5.0,
    channel_dim: int = 1,
    chunk_size: int = 32,
) -> dict[str, Tensor]:
    r"""Return the weights of channels for :class:`AttentionBehavioralRegularization`.

    .. math:: a_j = \operatorname{softmax}\left(\frac{\Delta_j - \operatorname{mean} \Delta_j}
        {\tau \operatorname{std} \Delta_j}\right)

    where :math:`\Delta_{jc}` is the increase of the loss, averaged over the batches, if channel c of the output of
    layer j is set to zero. The weights are uniform if no channel makes a difference beyond rounding errors.

    The model is the source model with a head for the target task that was trained while the rest was frozen. It runs in
    eval mode, and is restored afterwards. Under DistributedDataParallel, call this on one process and broadcast the
    result, or on all of them with the same batches.

    Args:
        model: The model.
        layers: Names of the layers, as in ``model.named_modules()``.
        loss_fn: Maps the output of the model and the second part of a batch to a scalar.
        batches: Pairs of an input and the second argument of ``loss_fn``, on the device of the model. All of them are
            used; to use fewer, pass ``itertools.islice(loader, 10)``.
        method: ``"ablation"`` removes one channel after the other, ``chunk_size`` of them at once under
            :func:`torch.func.vmap`; the layers before are run only once for all of these. ``"first_order"`` estimates
            :math:`\Delta_{jc} \approx -\sum F_{jc} \, \partial L / \partial F_{jc}` with one forward and backward pass
            per batch, and does not use ``vmap``.
        temperature: :math:`\tau`.
        channel_dim: Dimension of the channels in the outputs of the layers.
        chunk_size: Number of channels that are removed at once; memory grows with it.

    Returns:
        The weights of every layer, ``(C_j,)``, in float32 on the device of the feature maps.

    Raises:
        ValueError: If an argument is out of range, a layer does not exist, there is no batch, or a loss is not a
            finite scalar.
        RuntimeError: If the model does not run under :func:`torch.func.vmap`.

    Example:
        >>> model = nn.Sequential(nn.Conv2d(1, 3, 3), nn.ReLU(), nn.Flatten(), nn.Linear(12, 2))
        >>> batch = torch.randn(8, 1, 4, 4), torch.randint(2, (8,))
        >>> attention = channel_attention(model, ["0"], nn.functional.cross_entropy, [batch])
        >>> attention["0"].shape, round(float(attention["0"].sum()), 5)
        (torch.Size([3]), 1.0)

    Source: Li et al., DELTA, ICLR 2019, as in ``calculate_channel_attention`` of tllib's example ``delta.py``, without
    the training before it. Differences: a channel is set to zero in the output of the layer, so that the bias of a
    convolution is removed as well; no weight is changed; attention is uniform instead of NaN if all channels matter
    equally; and a ResNet-50 needs 1,200 forward passes, which are separate per channel only after the layer, instead
    of 38,400.
    """
    if method not in ("ablation", "first_order"):
        raise ValueError(f"`method` must be 'ablation' or 'first_order', got {method!r}.")
    if not temperature > 0:
        raise ValueError(f"`temperature` must be positive, got {temperature!r}.")
    model = unwrapped(model)
    getter = IntermediateLayerGetter(model, layers, clone=True)
    losses: dict[str, list[Tensor]] = {name: [] for name in getter.return_layers}
    ones: dict[str, Tensor] = {}
    # Compiled code may ignore hooks that are added later.
    with in_eval_mode(model), torch.compiler.set_stance("force_eager"):
        for inputs, targets in batches:
            ones = ones or _ones(getter, inputs, channel_dim)
            masked = _MaskedLoss(model, loss_fn, inputs, targets, channel_dim)
            measured = (
                {name: _ablated(masked, name, each, chunk_size) for name, each in ones.items()}
                if method == "ablation"
                else _first_order(masked, ones)
            )
            for name, each in measured.items():
                losses[name].append(each)
    return {name: _softmax_of_standardized(name, each, temperature) for name, each in losses.items()}


class _MaskedLoss:
    """The loss of a model on one batch, with the channels of some layers multiplied by masks."""

    def __init__(
        self, model: nn.Module, loss_fn: Callable[[Any, Any], Tensor], inputs: Any, targets: Any, channel_dim: int
    ) -> None:
        self.model, self.loss_fn = model, loss_fn
        self.inputs, self.targets = inputs, targets
        self.channel_dim = channel_dim

    def __call__(self, masks: Mapping[str, Tensor]) -> Tensor:
        """Return the loss with masks ``(C,)`` by name of the layer."""
        with ExitStack() as hooks:
            for name, mask in masks.items():
                handle = self.model.get_submodule(name).register_forward_hook(self._hook(mask))
                hooks.callback(handle.remove)
            loss = self.loss_fn(self.model(self.inputs), self.targets)
        if loss.ndim > 0:
            raise ValueError(f"`loss_fn` must return a scalar, got shape {tuple(loss.shape)}. Reduce it: loss.mean().")
        return loss

    def _hook(self, mask: Tensor) -> Callable[[nn.Module, Any, Tensor], Tensor]:
        def multiply(layer: nn.Module, args: Any, output: Tensor) -> Tensor:
            shape = [1] * output.ndim
            shape[self.channel_dim] = -1
            return output * mask.to(output.dtype).view(shape)

        return multiply


@torch.no_grad()
def _ones(getter: IntermediateLayerGetter, inputs: Any, channel_dim: int) -> dict[str, Tensor]:
    """Return masks that have no effect. Shapes ``(C,)``."""
    maps, _ = getter(inputs)
    for name, output in maps.items():
        # The first dimension contains the samples.
        if not isinstance(output, Tensor) or not (abs(channel_dim) < output.ndim and channel_dim):
            found = f"shape {tuple(output.shape)}" if isinstance(output, Tensor) else f"a {type(output).__name__}"
            raise ValueError(
                "Layers must return tensors with samples along the first dimension and channels along another, "
                f"channel_dim={channel_dim}, got {found} from {name}."
            )
    return {name: at_least_float32(output.new_ones(output.shape[channel_dim])) for name, output in maps.items()}


@torch.no_grad()
def _ablated(loss: _MaskedLoss, name: str, ones: Tensor, chunk_size: int) -> Tensor:
    """Return the losses without one channel each. Shape ``(C,)``."""
    channels = torch.arange(len(ones), device=ones.device)

    def without(channel: Tensor) -> Tensor:
        return loss({name: channels != channel})

    try:
        losses: Tensor = torch.func.vmap(without, chunk_size=chunk_size)(channels)
    except RuntimeError as error:
        raise RuntimeError(
            f"The model must run under torch.func.vmap from {name} on, got: {error}. Likely causes: (a) a tensor from "
            "before that layer is changed in place after it: write x = x + y, not x += y, (b) control flow depends on "
            "values, as in `if x.max() > 0`, or (c) memory: lower chunk_size. Or pass method='first_order'."
        ) from error
    return losses


@torch.enable_grad()
def _first_order(loss: _MaskedLoss, ones: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the increase of a linearized loss without one channel each. Shapes ``(C,)``."""
    masks = {name: each.clone().requires_grad_() for name, each in ones.items()}
    grads = torch.autograd.grad(loss(masks), list(masks.values()))
    return {name: -grad for name, grad in zip(masks, grads, strict=True)}


def _softmax_of_standardized(name: str, measured: list[Tensor], temperature: float) -> Tensor:
    """Return the attention of one layer from the losses, ``(C,)`` each, of all batches."""
    if not measured:
        raise ValueError("`batches` must contain at least one batch, got none. Was the iterator exhausted before?")
    losses = torch.stack(measured).to("cpu", torch.float64)
    if not losses.isfinite().all():
        raise ValueError(f"Every loss must be finite, got {losses.tolist()} for the channels of {name}.")
    mean = losses.mean(dim=0)
    # The loss with all channels, which tllib subtracts, cancels here.
    deviations = mean - mean.mean()
    spread = deviations.square().mean().sqrt()
    if spread <= ROUNDING * torch.finfo(measured[0].dtype).eps * mean.abs().max():
        deviations, spread = torch.zeros_like(mean), torch.ones_like(spread)
    return (deviations / (spread * temperature)).softmax(0).to(measured[0].device, torch.float32)
