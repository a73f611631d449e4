"""The built-in rotation step: from the task gradients to a turn of every R_k along its Lie algebra."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, overload

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from rotoopt._rotation.cayley import DenseSkew, SampleSkew, Skew, repair_columns_
from rotoopt._rotation.rotations import Rotations
from rotoopt._rotation.step import RotationGradient, sum_of_correlations
from rotoopt._torch.devices import move_
from rotoopt._torch.processes import Processes

# Below 1 / ||N_k|| every step improves the objective of its batch, and the nuclear norm of N_k = U_k V^T is at most
# ||U_k|| ||V|| <= 1. So ||S_k||_2 <= 1, too, and no plane turns by more than a radian.
MAX_STEP = 1.0
DENSE_FROM = 0.43  # samples per feature from which the dense turn takes fewer operations
REPAIRED_SHARE = 64  # one column in so many is repaired with every turn
MEMORY = 0.9  # of the agreement, per turn
NUM_PROBES = 8


class NormalizedStep(Optimizer):
    r"""The built-in rotation optimizer: step sizes with one AdaGrad normalizer per rotation.

    .. math:: \eta_k = \min\Bigl(1, \; \mathrm{lr} \,/\, \sqrt{\textstyle\sum_t g_{k,t}^2}\Bigr)

    with :math:`g_k` the root mean square of the m (m - 1) / 2 coordinates of the rotation gradient, so that ``lr`` is
    the root mean square turn, in radians per coordinate, of a first step that nothing else shortens. Later ones shrink
    as :math:`1/\sqrt t`: rotations must learn more slowly than the network (RotoGrad, ICLR 2022, section 4), and a step
    normalized by the latest gradients alone would move on noise for ever.

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


class Agreement:
    r"""Running cosine between successive rotation gradients of each task.

    .. math:: a_k = \max\Bigl(0, \frac{\sum_t \beta^{-t} \langle Y_{k,t}, Y_{k,t-1} \rangle}
        {\sum_t \beta^{-t} \lVert Y_{k,t} \rVert \lVert Y_{k,t-1} \rVert}\Bigr), \qquad Y_{k,t} = S_{k,t} P

    One for gradients that stay the same, about zero for noise, and zero for those that flip. The skew gradients S are
    compared through a few fixed random vectors P, which keeps inner products up to a few percent, so that what must be
    remembered is ``(K, m, 8)``. The first gradient has nothing to agree with: zero. A gradient of zero, that of an
    absent task, changes nothing.
    """

    def __init__(self) -> None:
        self._latest: Tensor | None = None  # Y
        self._inner = self._norms = torch.zeros(())

    def observe(self, skew: Skew, matrices: Tensor) -> Tensor:
        """Return a after another gradient, in the dtype of ``matrices``. Shape ``(K,)``."""
        seen = skew.times(_probes(matrices))
        if self._latest is None:
            self._latest, self._inner = torch.zeros_like(seen), seen.new_zeros(len(seen))
            self._norms = self._inner
        norms, latest = _norms(seen), self._latest
        known = skew.half_squared_norm() > 0
        self._inner = torch.where(known, MEMORY * self._inner + (seen * latest).sum((-2, -1)), self._inner)
        self._norms = torch.where(known, MEMORY * self._norms + norms * _norms(latest), self._norms)
        self._latest = torch.where(known[:, None, None], seen, latest)
        return torch.where(self._norms > 0, self._inner / self._norms, 0.0).clamp(0.0, 1.0)

    def to(self, device: torch.device) -> None:
        """Move what is remembered to ``device``."""
        self._latest = None if self._latest is None else self._latest.to(device)
        self._inner, self._norms = self._inner.to(device), self._norms.to(device)

    def state_dict(self) -> dict[str, Any]:
        """Return what is needed to resume."""
        return {"latest": self._latest, "inner": self._inner, "norms": self._norms}

    def load_state_dict(self, state_dict: dict[str, Any], like: Tensor) -> None:
        """Load what :meth:`state_dict` returned, onto the device of ``like``."""
        latest = state_dict["latest"]
        self._latest = None if latest is None else latest.to(like)
        self._inner, self._norms = state_dict["inner"].to(like), state_dict["norms"].to(like)


class CayleyStep:
    r"""The built-in rotation step: R_k <- R_k cay(:math:`a_k \eta_k S_k`).

    S is the :class:`~rotoopt._rotation.step.RotationGradient`, the step size :math:`\eta_k` is that of
    :class:`NormalizedStep`, and :math:`a_k` is how well successive gradients agree
    (:class:`Agreement`): where they are noise, the rotation rests. The first gradient has
    nothing to agree with, and does not turn anything.

    The official code minimizes a squared distance whose gradient is the paper's times twice the norm of the mean
    gradient, with Adam and matrix exponentials.

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
        self._num_turns = 0

    @torch.no_grad()
    def step(self, gradients: Sequence[RotationGradient]) -> Tensor:
        """Turn the rotations, and repair what rounding did to some of their columns; return the angles."""
        self._follow(self.rotations.device)
        if not gradients:
            self.optimizer.step()  # a scheduler expects to see one
            return torch.zeros_like(self._sizes)
        matrices = self.rotations.matrices
        m = matrices.shape[-1]
        skew = self._skew(gradients, m)
        norm = skew.half_squared_norm()
        self._sizes.grad = (norm / max(1, m * (m - 1) / 2)).sqrt()
        self.optimizer.step()
        self._sizes.grad = None
        step = torch.where(norm > 0, self._sizes, 0.0) * self._agreement.observe(skew, matrices)
        step = torch.where(self.rotations.rotates, step, 0.0)
        skew.turn_(matrices, step)
        count = -(-m // REPAIRED_SHARE)
        repair_columns_(matrices, self._num_turns * count % m, count, step > 0)
        self._num_turns += 1
        return step * (2.0 * norm / m).sqrt()

    def _skew(self, gradients: Sequence[RotationGradient], m: int) -> Skew:
        """Return the sum of the gradients, in the dtype of the rotations and the form that is cheaper to turn by."""
        dtype = self._sizes.dtype
        distributed = self._processes.count > 1  # their joined samples are many, and their number is not known here
        if distributed or sum(each.num_samples for each in gradients) >= DENSE_FROM * m:
            return DenseSkew(sum_of_correlations(gradients, m, self._processes).to(dtype))
        tasks = torch.cat([_columns(each.directions, m) for each in gradients], dim=-1)
        target = torch.cat([_columns(each.target, m) for each in gradients], dim=-1)
        return SampleSkew(tasks.to(dtype), target.to(dtype))

    def _follow(self, device: torch.device) -> None:
        if self._sizes.device != device:
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


def _norms(seen: Tensor) -> Tensor:
    norms: Tensor = torch.linalg.vector_norm(seen, dim=(-2, -1))
    return norms


def _probes(matrices: Tensor) -> Tensor:
    """Return random signs, the same in every step and on every machine. Shape ``(m, 8)``."""
    generator = torch.Generator().manual_seed(0)
    signs = torch.randint(2, (matrices.shape[-1], NUM_PROBES), generator=generator) * 2 - 1
    return signs.to(matrices)
