"""State dicts of the official package, rotograd 0.1.5 and 0.1.6."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import count, takewhile

import torch
from torch import Tensor


def rotations_from_rotograd(state_dict: Mapping[str, Tensor], prefix: str = "") -> Tensor:
    r"""Return the rotations in a state dict of ``RotoGrad``, ``RotateOnly`` or ``RotoGradNorm`` of ``rotograd``.

    There, :math:`R_k = B_k \exp(A_k - A_k^\top)`, where B is the base and A the lower triangle of the parameter.

    Args:
        state_dict: The state dict of such a model.
        prefix: Prefix of the keys, if the model was part of another one.

    Returns:
        The rotations, in the dtype in which they were saved. Shape ``(K, m, m)``. To load them into an optimizer:
        ``optimizer.rotations.load_matrices(...)``.

    Raises:
        ValueError: If there are no rotations.

    Example:
        >>> saved = {"parametrizations.rotation_0.original": torch.zeros(2, 2),
        ...          "parametrizations.rotation_0.0.base": torch.eye(2)}
        >>> rotations_from_rotograd(saved).shape
        torch.Size([1, 2, 2])
    """
    names = (f"{prefix}parametrizations.rotation_{task}." for task in count())
    found = list(takewhile(lambda name: f"{name}original" in state_dict, names))
    if not found:
        raise ValueError(
            f"The state dict must be one of rotograd, with '{prefix}parametrizations.rotation_0.original', got keys "
            f"{list(state_dict)[:3]}. Give the prefix, if the model was part of another one."
        )
    lower = torch.stack([state_dict[f"{name}original"] for name in found]).double().tril(-1)
    base = torch.stack([state_dict[f"{name}0.base"] for name in found])
    turned: Tensor = base.double() @ torch.matrix_exp(lower - lower.mT)
    return turned.to(base.dtype)


def has_official_rotations(state_dict: Mapping[str, Tensor], prefix: str) -> bool:
    """Return whether a state dict comes from the official package."""
    return f"{prefix}parametrizations.rotation_0.original" in state_dict


def without_official_rotations(state_dict: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """Return ``state_dict`` without the rotations of the official package, which would be unexpected keys."""
    names = f"{prefix}parametrizations.rotation_"
    return {key: value for key, value in state_dict.items() if not key.startswith(names)}
