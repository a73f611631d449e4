"""Penalties on parameters: their distance from zero (L2), or from the start of fine-tuning (L2-SP)."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from fnmatch import fnmatchcase

import torch
from torch import Tensor, nn

from rotoopt._torch.modules import unwrapped
from rotoopt.regularization._inputs import at_least_float32
from rotoopt.regularization._named_tensors import NamedTensors, named_parameters, squares


class L2Regularization(nn.Module):
    r"""Penalty on all parameters of a model, biases and normalization layers included.

    .. math:: \Omega(w) = \frac12 \lVert w \rVert_2^2

    For new layers, which have no meaningful start point. The gradient is :math:`w`. Weight decay in the parameter group
    of ``SGD`` is equivalent, and should be used for the heads of :class:`~rotoopt.RotoGradOptimizer`.

    Args:
        model: The model, which is not registered as a submodule.

    Shape:
        - Output: ``()``, at least float32.

    Example:
        >>> layer = nn.Linear(2, 1, bias=False)
        >>> _ = nn.init.constant_(layer.weight, 3.0)
        >>> L2Regularization(layer)()
        tensor(9., grad_fn=<MulBackward0>)

    Source: ``tllib.regularization.delta.L2Regularization``. Differences: the state dict and ``parameters()`` are empty
    instead of the model's, which an optimizer given both would contain twice; a model without parameters gives a
    tensor instead of a float; squares are summed at least in float32; the second derivative at zero is not NaN.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self._model = (_checked(model, "model"),)  # in a tuple, so that it is not a submodule

    def forward(self) -> Tensor:
        """Return the penalty."""
        params = [at_least_float32(param) for param in self._model[0].parameters()]
        return half_squared_norm(params) if params else torch.zeros(())


class SPRegularization(nn.Module):
    r"""Penalty on the distance from the start point of fine-tuning (L2-SP).

    .. math:: \Omega(w) = \frac12 \lVert w - w_0 \rVert_2^2

    over all parameters :math:`w` of the target model; :math:`w_0` are those of the source model when this object is
    built. Initially the penalty and its gradient :math:`w - w_0` are zero. It can be the ``backbone_loss`` of
    :class:`~rotoopt.RotoGradOptimizer`, which is never divided by its first value.

    Args:
        source_model: The start point: a model, or tensors by name such as its state dict. It is copied, so it may be
            trained, or be the target model itself.
        target_model: The model that is fine-tuned, which is not registered as a submodule. It may be wrapped in
            DistributedDataParallel or torch.compile: names are compared without their prefixes. With
            ``find_unused_parameters=True``, exclude parameters that are not used in the forward pass: otherwise
            DistributedDataParallel marks them as unused, and then receives a gradient. Under ``fully_shard``, the start
            point must be sharded in the same way, and the penalty computed before the forward pass, which gathers the
            parameters.
        exclude: Patterns, as for file names, of parameters to leave out: ``["fc.*"]`` for a new head, ``["*.bias"]``
            for all biases.

    Shape:
        - Output: ``()``, at least float32.

    Raises:
        TypeError: If a model is not a module, or ``exclude`` is a single string.
        ValueError: If a parameter of the target model is missing in the source or has another shape there, a pattern
            matches nothing, or no parameter is left.

    Example:
        >>> model = nn.Linear(2, 1)
        >>> penalty = SPRegularization(model, model)
        >>> with torch.no_grad():
        ...     _ = model.bias.add_(2.0)
        >>> penalty()
        tensor(2., grad_fn=<MulBackward0>)

    Source: Li, Grandvalet and Davoine, Explicit Inductive Bias for Transfer Learning with Convolutional Networks, ICML
    2018, as in ``tllib.regularization.delta.SPRegularization``, which includes biases and normalization layers with the
    same weight; the authors exclude these by default, which ``exclude`` can do. Differences from tllib: :math:`w_0` is
    a copy, not an alias that changes with the source; it is in the state dict and follows ``.to()``, and the target
    model does not; names and shapes are checked at construction, where tllib broadcasts, or fails in the first forward
    pass; squares are summed at least in float32; the second derivative at the start point is not NaN.
    """

    def __init__(
        self,
        source_model: nn.Module | Mapping[str, Tensor],
        target_model: nn.Module,
        *,
        exclude: Iterable[str] = (),
    ) -> None:
        super().__init__()
        self._target = (_checked(target_model, "target_model"),)
        params = _without(named_parameters(target_model), exclude)
        source = source_model if isinstance(source_model, Mapping) else _source(source_model)
        _check_same(source, params)
        start = {name: source[name].detach().to(param.device) for name, param in params.items()}
        self.starting_point = NamedTensors(start)

    def forward(self) -> Tensor:
        """Return the penalty."""
        params, start = named_parameters(self._target[0]), dict(self.starting_point.items())
        changed = [name for name in start if name not in params or params[name].shape != start[name].shape]
        if changed:
            raise RuntimeError(
                f"The target model must keep its parameters, got one in which {', '.join(changed)} is missing or has "
                "another shape. Parametrize, prune or replace layers before building SPRegularization."
            )
        return half_squared_norm([at_least_float32(params[name]) - at_least_float32(start[name]) for name in start])


def half_squared_norm(tensors: Sequence[Tensor]) -> Tensor:
    r"""Return :math:`\frac12 \lVert x \rVert_2^2` of all entries of all tensors."""
    return 0.5 * torch.stack([squares(tensor).sum() for tensor in tensors]).sum()


def _checked(model: nn.Module, name: str) -> nn.Module:
    if not isinstance(model, nn.Module):
        raise TypeError(f"`{name}` must be a module, got a {type(model).__name__}.")
    return unwrapped(model)


def _source(model: nn.Module) -> Mapping[str, Tensor]:
    """Return all parameters, those with several names under each of them: the target decides which one is used."""
    return named_parameters(_checked(model, "source_model"), remove_duplicate=False)


def _without(params: dict[str, nn.Parameter], exclude: Iterable[str]) -> dict[str, nn.Parameter]:
    """Return the parameters whose names match none of the patterns."""
    if isinstance(exclude, str):
        raise TypeError(f"`exclude` must be a list of patterns, got the string {exclude!r}. Put it in a list.")
    patterns = list(exclude)
    useless = [pattern for pattern in patterns if not any(fnmatchcase(name, pattern) for name in params)]
    if useless:
        raise ValueError(f"`exclude` must match names of parameters, got {useless}, which match none of {[*params]}.")
    kept = {name: p for name, p in params.items() if not any(fnmatchcase(name, pattern) for pattern in patterns)}
    if not kept:
        raise ValueError("`target_model` must have parameters that are not excluded, got none.")
    return kept


def _check_same(source: Mapping[str, Tensor], target: Mapping[str, Tensor]) -> None:
    """Raise unless every parameter of the target is in the source, in the same shape."""
    missing = [name for name in target if name not in source]
    reshaped = [
        f"{name} of {tuple(source[name].shape)} for {tuple(param.shape)}"
        for name, param in target.items()
        if name not in missing and source[name].shape != param.shape
    ]
    if missing or reshaped:
        found = [f"none for {', '.join(missing)}"] * bool(missing) + reshaped
        raise ValueError(
            f"`source_model` must have the parameters of `target_model`, in the same shapes, got {', '.join(found)}. "
            "Either (a) pass the parts that were transferred: SPRegularization(source.backbone, target.backbone), or "
            "(b) leave new layers out, as in exclude=['fc.*']."
        )
