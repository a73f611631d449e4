"""Models with a rotation in front of each head, by themselves and with task gradients of one magnitude."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from rotoopt._capture.capture import Capture
from rotoopt._capture.representation import RotatedDims
from rotoopt._engine.engine import Engine
from rotoopt._engine.losses import Losses
from rotoopt._engine.record import StepRecord
from rotoopt._rotation.coordinates import Coordinates
from rotoopt._rotation.rotations import Rotations
from rotoopt._torch.processes import Processes
from rotoopt.rotograd._rotation_parameter import RotationParameter
from rotoopt.rotograd._state_dict import has_official_rotations, rotations_from_rotograd, without_official_rotations
from rotoopt.rotograd._vanilla import VanillaMTL
from rotoopt.weighting import EqualWeighting, RotoGradWeighting, Weighting


class RotateOnly(VanillaMTL):
    r"""A backbone and heads with a rotation in front of each head: aligns gradients, without scaling them.

    Args:
        backbone: Computes the representation, of shape ``(..., *rotation_shape, *post_shape)``. If it returns a tuple,
            the first entry is the representation.
        heads: One module per task. The sequence is copied, the modules are not.
        rotation_shape: Size or shape of the rotated dimensions, which are flattened. An int smaller than the dimension
            rotates that many of its features.
        post_shape: Shape of the positions after them, each of which is rotated separately: ``(H, W)`` for a map.
        normalize_losses: Back-propagate ``L_k / |L_k(t0)|`` instead of L_k.
        burn_in_period: Backward pass in which the references are measured again.

    Attributes:
        rotation_size: m, the number of features that are rotated.
        rotation_coordinates: The parameter that trains the rotations: their Lie-algebra coordinates. Shape
            ``(K, m, m)``. Zero, except after a step of its optimizer and before the rotations are used again.

    Example:
        >>> model = RotoGrad(nn.Linear(3, 8), [nn.Linear(8, 1), nn.Linear(8, 2)], 8)
        >>> optimizer = torch.optim.Adam([{"params": model.model_parameters()}, {"params": model.parameters()}])
        >>> first, second = model(torch.randn(5, 3))
        >>> model.backward([first.square().mean(), second.abs().mean()])
        >>> optimizer.step()

    Source: Javaloy and Valera, RotoGrad, ICLR 2022, and the classes of the official package, rotograd 0.1.6, which
    these classes replace. Differences: :doc:`/how_to/migrate`.
    """

    rotation_coordinates: nn.Parameter

    def __init__(
        self,
        backbone: nn.Module,
        heads: Sequence[nn.Module] | nn.ModuleList,
        rotation_shape: int | Sequence[int],
        *,
        post_shape: Sequence[int] = (),
        normalize_losses: bool = False,
        burn_in_period: int = 20,
    ) -> None:
        super().__init__(backbone, [])
        self.num_tasks = len(heads)
        self.rotation_shape = (rotation_shape,) if isinstance(rotation_shape, int) else tuple(rotation_shape)
        self.post_shape = tuple(post_shape)
        self.rotation_size = math.prod(self.rotation_shape)
        self.burn_in_period = burn_in_period
        self.normalize_losses = normalize_losses
        end = -len(self.post_shape)
        self._build(heads, RotatedDims(range(end - len(self.rotation_shape), end)))

    def _build(self, heads: Sequence[nn.Module] | nn.ModuleList, dims: RotatedDims) -> None:
        params = (param for head in heads for param in head.parameters() if param.is_floating_point())
        processes = Processes()
        self.rotations = Rotations.like(
            next(params, torch.zeros(())),
            self.num_tasks,
            self.rotation_size,
            rotate=(True,) * self.num_tasks,
            init="haar",
            processes=processes,
        )
        self._engine = Engine(
            self.task_names,
            [(head,) for head in heads],
            self.rotations,
            dims=dims,
            weighting=self._make_weighting(),
            burn_in_period=self.burn_in_period,
            normalize_losses=self.normalize_losses,
            turn_every=1,
            needs_second_moment=False,
            processes=processes,
        )
        self._turning = RotationParameter(Coordinates(self.rotations, processes))
        self.rotation_coordinates = self._turning.parameter
        capture = self._engine.capture
        self.heads = nn.ModuleList(RotatedHead(head, task, capture, self._turning) for task, head in enumerate(heads))

    def _make_weighting(self) -> Weighting:
        return EqualWeighting()

    @property
    def rotation(self) -> Sequence[Tensor]:
        """The rotation of every task. Shape ``(m, m)`` each, detached. To train it: :attr:`rotation_coordinates`."""
        self._turning.turn()
        return list(self.rotations.matrices)

    def backward(self, losses: Losses, backbone_loss: Tensor | None = None, **kwargs: Any) -> None:
        """Compute all gradients: of the backbone, the heads, the rotations and GradNorm's weights.

        Args:
            losses: One scalar per task, ``None`` for an absent one.
            backbone_loss: A loss of the backbone alone; never normalized.
            **kwargs: Options of ``torch.autograd.backward``.

        Raises:
            ValueError: If the losses are not K scalars with graphs.
            RuntimeError: In eval mode; if a loss did not pass through its head.
        """
        self._check_training()
        self._engine.backward(losses, None, backbone_loss, **kwargs)
        # The official package counts backward passes. When the user's optimizer steps, and how far, is unknown here.
        self._engine.finish_step(self._turning.add, math.nan)

    @property
    def last_step(self) -> StepRecord | None:
        """Measurements of the latest backward pass: losses, gradient norms, cosines. None before the first."""
        return self._engine.record

    def get_extra_state(self) -> dict[str, Any]:
        """Return references and counters, saved by ``state_dict`` along with parameters and rotations."""
        return {**self._engine.state_dict(), "matrices": None}

    def set_extra_state(self, state: dict[str, Any]) -> None:
        """Load what :meth:`get_extra_state` returned."""
        self._engine.memory.check_state_dict(state)
        self._engine.load_state_dict(state)

    def _save_to_state_dict(self, *args: Any) -> None:
        self._turning.turn()
        super()._save_to_state_dict(*args)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        if has_official_rotations(state_dict, prefix):
            self.rotations.load_matrices(rotations_from_rotograd(state_dict, prefix))
            state_dict = without_official_rotations(state_dict, prefix)
        super()._load_from_state_dict(state_dict, prefix, *args)


class RotoGrad(RotateOnly):
    """Rotations, and equal norms of the task gradients: :class:`RotateOnly` with eqs. 1-2 of the paper.

    The arguments are those of :class:`RotateOnly`.
    """

    def _make_weighting(self) -> Weighting:
        return RotoGradWeighting()


class RotatedHead(nn.Module):
    """A head with its rotation in front."""

    def __init__(self, head: nn.Module, task: int, capture: Capture, turning: RotationParameter) -> None:
        super().__init__()
        self.head = head
        self._task = task
        self._capture = capture
        self._turning = turning

    def forward(self, rep: Tensor) -> Any:
        """Return h_k(R_k z)."""
        self._turning.turn()
        return self.head(self._capture.feed(rep, self._task, training=self.training))


@contextmanager
def cached() -> Iterator[None]:
    """Do nothing. The official package uses it to compute each rotation only once; here they are always stored."""
    yield
