"""The backward pass of K losses: checks before, one ordinary backward of torch, and the method inside of it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from rotoopt.arguments import Losses, check_backbone_loss, check_losses, check_rep, warn_user
from rotoopt.capture import Capture
from rotoopt.homogenize import Homogenizer
from rotoopt.wiring import check_wiring


class BackwardPass:
    """Back-propagates the losses of what ``capture`` fed, through ``homogenizer``.

    Args:
        names: How to call the K tasks in an error.
        capture: Feeds the heads.
        homogenizer: Receives the gradients.
        normalize_losses: Whether to back-propagate ``L_k / |L_k(t0)|`` instead of L_k.
    """

    def __init__(
        self, names: Sequence[str], capture: Capture, homogenizer: Homogenizer, *, normalize_losses: bool
    ) -> None:
        self.names = list(names)
        self.capture = capture
        self.homogenizer = homogenizer
        self.normalize_losses = normalize_losses
        self._wiring_checked = False
        self._warned_of_frozen = False

    def __call__(
        self,
        losses: Losses,
        rep: Tensor | None,
        backbone_loss: Tensor | None,
        scaler: torch.amp.GradScaler | None = None,
        **options: Any,
    ) -> None:
        """Fill every ``.grad``; ``options`` are those of ``torch.autograd.backward``."""
        capture, homogenizer = self.capture, self.homogenizer
        present = check_losses(losses, self.names)
        check_rep(rep, capture.last_shape)
        check_backbone_loss(backbone_loss)
        frozen = capture.is_frozen(present)
        if frozen:
            self._warn_of_frozen()
        elif not self._wiring_checked or not capture.looks_complete(present):
            check_wiring(present, self.names, backbone_loss)
            self._wiring_checked = True
        try:
            scale = None if scaler is None else _scale_of(scaler, next(iter(present.values())).device)
            divisors = homogenizer.expect(present, scale)
            normalize = self.normalize_losses and not frozen
            roots = [loss / divisors[task] if normalize else loss for task, loss in present.items()]
            roots = roots if backbone_loss is None else [*roots, backbone_loss]
            torch.autograd.backward(roots if scale is None else [root * scale for root in roots], **options)
        finally:
            homogenizer.expect_nothing()
            capture.start_over()

    def _warn_of_frozen(self) -> None:
        if not self._warned_of_frozen:
            self._warned_of_frozen = True
            warn_user(
                "The representation should require grad, got one that does not. Either (a) the backbone is frozen: the "
                "heads are trained by a plain backward; rotations and weights rest, or (b) `heads` holds the whole "
                "model, whose input is rotated then: give the modules that consume the representation."
            )


def _scale_of(scaler: torch.amp.GradScaler, device: torch.device) -> Tensor:
    """Return what ``scaler`` multiplies by, where no host has to wait for it."""
    scale: Tensor = scaler.scale(torch.ones((), device=device))
    return scale
