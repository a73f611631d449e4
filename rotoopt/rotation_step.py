"""The rotation step: from the task gradients to a turn of every R_k along its Lie algebra."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, Protocol, overload

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from rotoopt.agreement import Agreement
from rotoopt.devices import move_
from rotoopt.distributed import Processes
from rotoopt.representation import correlate
from rotoopt.rotations import Rotations
from rotoopt.turn import DenseSkew, SampleSkew, Skew, repair_columns_

TURN_EVERY = 16  # steps: a turn costs more than applying the rotations, and rotations are to learn slowly anyway
# Below 1 / ||N_k|| every step improves the objective of its batch, and the nuclear norm of N_k = U_k V^T is at most
# ||U_k|| ||V|| <= 1. So ||S_k||_2 <= 1, too, and no plane turns by more than a radian.
MAX_STEP = 1.0
DENSE_FROM = 0.43  # samples per feature from which the dense turn takes fewer operations
REPAIRED_SHARE = 64  # one column in so many is repaired with every turn


class RotationStep(Protocol):
    """Collects rotation gradients, and turns the rotations by what an optimizer makes of them."""

    rotations: Rotations

    @property
    def lr(self) -> float | Tensor:
        """Learning rate of the rotations; NaN if they have no optimizer here."""

    def is_due(self, num_steps: int) -> bool:
        """Whether the rotations are to turn in the step after ``num_steps`` steps."""

    def collect(self, directions: Tensor, target: Tensor, usable: Tensor) -> None:
        """Note what one backward pass measured; several before a step are averaged.

        Args:
            directions: U, the unit gradients of the tasks at the representation, zero for absent ones.
                Shape ``(K, L, d, P)``.
            target: V, their mean. Shape ``(L, d, P)``.
            usable: Whether everything in this pass was finite; if not, the pass does not count. Shape ``()``, bool.
        """

    def step(self) -> Tensor:
        """Turn the rotations; without anything collected, only the optimizer's step is called.

        Returns:
            The angle by which each rotation turned, in radians: the root mean square over all vectors. Shape ``(K,)``.
        """

    def clear(self) -> None:
        """Forget what was collected since the last step."""

    def to(self, device: torch.device) -> None:
        """Move the state to ``device``; the rotations are moved by others."""

    def state_dict(self) -> dict[str, Any]:
        """Return what is needed to resume."""

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load what :meth:`state_dict` returned."""


class NormalizedStep(Optimizer):
    r"""The built-in rotation optimizer: step sizes with one AdaGrad normalizer per rotation.

    .. math:: \eta_k = \min\Bigl(1, \; \mathrm{lr} \,/\, \sqrt{\textstyle\sum_t g_{k,t}^2}\Bigr)

    with :math:`g_k` the root mean square of the m (m - 1) / 2 coordinates of the rotation gradient, so that ``lr`` is
    the root mean square turn, in radians per coordinate, of the first step. Later ones shrink as :math:`1/\sqrt t`:
    rotations must learn more slowly than the network (RotoGrad, ICLR 2022, section 4), and a step normalized by the
    latest gradients alone would move on noise for ever.

    Args:
        params: One tensor, shape ``(K,)``: its gradient is g, and the step writes :math:`\eta` into it.
        lr: Learning rate; schedulers may change it.
    """

    def __init__(self, params: Iterable[nn.Parameter], lr: float) -> None:
        super().__init__(params, {"lr": lr})

    @overload
    def step(self, closure: None = None) -> None: ...
    @overload
    def step(self, closure: Callable[[], float]) -> float: ...
    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """Write the step sizes for the present gradients."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for param in group["params"]:
                if param.grad is not None:
                    total = self.state[param].setdefault("sum", torch.zeros_like(param))
                    total.add_(param.grad.square())
                    step = (group["lr"] / total.sqrt()).clamp(max=MAX_STEP)
                    param.copy_(torch.where(total > 0, step, 0.0))
        return loss


class CayleyStep:
    r"""The built-in rotation step: every :data:`TURN_EVERY` steps, R_k <- R_k cay(:math:`a_k \eta_k S_k`).

    The objective of a batch, :math:`-\sum_s \langle R_k^\top \tilde g_{s,k}, v_s \rangle` over samples s, is linear in
    R_k. Its gradient along the Lie algebra is the skew matrix :math:`S_k = U_k V^\top - V U_k^\top`, with the unit
    gradients U_k at the representation and their mean V. The step size :math:`\eta_k` is
    :class:`NormalizedStep`'s, and :math:`a_k` is how well successive gradients agree
    (:class:`~rotoopt.agreement.Agreement`): where they are noise, the rotation rests.

    Source: Javaloy and Valera, RotoGrad, ICLR 2022, eq. 3, with unit gradients on both sides (there g is not
    normalized), so that the scale of a loss cancels. The official code minimizes a squared distance whose
    gradient is the paper's times twice the norm of the mean gradient, with Adam and matrix exponentials.

    Args:
        rotations: The rotations to turn.
        lr: Learning rate of :class:`NormalizedStep`.
        processes: Those that share a batch.
    """

    def __init__(self, rotations: Rotations, lr: float, processes: Processes) -> None:
        self.rotations = rotations
        self._processes = processes
        self._sizes = nn.Parameter(torch.zeros(rotations.num_tasks, device=rotations.device, dtype=rotations.dtype))
        self.optimizer: Optimizer = NormalizedStep([self._sizes], lr)
        self._agreement = Agreement()
        self._passes: list[tuple[Tensor, Tensor, Tensor]] = []
        self._num_turns = 0

    @property
    def lr(self) -> float | Tensor:
        """Learning rate, which a scheduler may change."""
        lr: float | Tensor = self.optimizer.param_groups[0]["lr"]
        return lr

    def is_due(self, num_steps: int) -> bool:
        """Every few steps."""
        return num_steps % TURN_EVERY == 0 and any(self.rotations.rotate)

    def collect(self, directions: Tensor, target: Tensor, usable: Tensor) -> None:
        """Keep the gradients for the step; nothing is computed yet."""
        self._passes.append((torch.where(usable, directions, 0.0), torch.where(usable, target, 0.0), usable))

    @torch.no_grad()
    def step(self) -> Tensor:
        """Turn the rotations, and repair what rounding did to some of their columns; return the angles."""
        if not self._passes:
            self.optimizer.step()  # a scheduler expects to see one
            return torch.zeros_like(self._sizes)
        matrices = self.rotations.matrices
        m = matrices.shape[-1]
        skew = self._skew(m)
        norm = skew.half_squared_norm()
        self._sizes.grad = (norm / max(1, m * (m - 1) / 2)).sqrt()
        self.optimizer.step()
        step = torch.where(norm > 0, self._sizes, 0.0) * self._agreement.observe(skew, matrices)
        step = torch.where(self.rotations.rotates, step, 0.0)
        skew.turn_(matrices, step)
        count = -(-m // REPAIRED_SHARE)
        first = self._num_turns * count % m
        repair_columns_(matrices, first, min(count, m - first), (step > 0).to(step.dtype))
        self._num_turns += 1
        self.clear()
        return step * (2.0 * norm / m).sqrt()

    def _skew(self, m: int) -> Skew:
        """Return the mean of the usable gradients, in the form that is cheaper to turn by."""
        directions, targets, usable = zip(*self._passes, strict=True)
        share = 1.0 / torch.stack(usable).sum().clamp(min=1).to(targets[0])
        num_samples = sum(target.shape[0] * target.shape[2] for target in targets)
        distributed = self._processes.count > 1  # their joined samples are many, and their number is not known here
        if distributed or num_samples >= DENSE_FROM * m:
            correlations = [correlate(U, V, m) for U, V in zip(directions, targets, strict=True)]
            correlation = torch.stack(correlations).sum(0) * share
            if distributed:
                self._processes.sum_(correlation)
            return DenseSkew(correlation)
        tasks = torch.cat([_columns(U, m) for U in directions], dim=-1)
        target = torch.cat([_columns(V, m) for V in targets], dim=-1)
        return SampleSkew(tasks if len(usable) == 1 else tasks * share, target)

    def clear(self) -> None:
        """Forget what was collected since the last step."""
        self._passes.clear()
        self._sizes.grad = None

    def to(self, device: torch.device) -> None:
        """Move the state to ``device``."""
        move_(self._sizes, self.optimizer, device)
        self._agreement.to(device)

    def state_dict(self) -> dict[str, Any]:
        """Return the state of the optimizer, the agreement so far, and where the repair is."""
        return {
            "optimizer": self.optimizer.state_dict(),
            "agreement": self._agreement.state_dict(),
            "num_turns": self._num_turns,
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load what :meth:`state_dict` returned."""
        self.optimizer.load_state_dict(state_dict["optimizer"])
        self._agreement.load_state_dict(state_dict["agreement"], self._sizes)
        self._num_turns = state_dict["num_turns"]


def _columns(samples: Tensor, m: int) -> Tensor:
    """Return ``(..., L, d, P)`` as ``(..., m, L P)``: one column per sample."""
    return samples[..., :m, :].movedim(-2, -3).flatten(-2)
