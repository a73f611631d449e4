"""The built-in rotation step: from the task gradients to an update of every R_k along its Lie algebra."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, overload

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from rotoopt._rotation.cayley import DenseSkew, SampleSkew, Skew, repair_columns_
from rotoopt._rotation.metric import Metric
from rotoopt._rotation.rotations import Rotations
from rotoopt._rotation.schedule import Schedule
from rotoopt._rotation.step import RotationGradient, sum_of_correlations
from rotoopt._torch.devices import move_
from rotoopt._torch.processes import Processes

DENSE_FROM = 0.55  # samples per feature from which the dense update takes fewer operations
REPAIRED_SHARE = 64  # 1 / 64 of the columns are corrected in each update


class NormalizedStep(Optimizer):
    r"""The built-in rotation optimizer: step sizes with one AdaGrad normalizer per rotation.

    .. math:: \eta_k = \mathrm{lr} \,/\, \sqrt{\textstyle\sum_t q_{k,t}^2}

    with :math:`q_k` the size of the rotation gradient, so that ``lr`` is the size of the first step, unless it is
    shortened. Later ones decrease as :math:`1/\sqrt t`: rotations must learn more slowly than the network (RotoGrad,
    ICLR 2022, section 4), and a step that is normalized by the latest gradients alone would not converge in noise.

    Args:
        params: One tensor, shape ``(K,)``: its gradient is q, and the step writes :math:`\eta` into it.
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
        """Write the step sizes for the current gradients."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for param in group["params"]:
                if param.grad is not None:
                    state = self.state[param]
                    if not state:
                        state["sum"] = torch.zeros_like(param)
                    total = state["sum"].addcmul_(param.grad, param.grad)
                    inverse = total.rsqrt().nan_to_num_(posinf=0.0)  # 0 before the first gradient
                    torch.mul(inverse, group["lr"], out=param)
        return loss


class CayleyStep:
    r"""The built-in rotation step: R_k <- R_k cay(:math:`\sigma \sqrt{r_k} \eta_k D_k`).

    S is the :class:`~rotoopt._rotation.step.RotationGradient`. :math:`D_k = G^{-1} S_k G^{-1}`, with the
    :class:`~rotoopt._rotation.metric.Metric` G, favors planes in which the representation has little variance, so that
    the outputs of the heads on recent data change little. Its size :math:`q_k = (\operatorname{tr}(D_k G D_k^\top) /
    m)^{1/2}` is the root mean square relative change of the input of the head. So the learning rate of
    :class:`NormalizedStep`, which computes :math:`\eta_k`, is independent of width, batch and scale. :math:`\sigma` is
    the share of the :class:`~rotoopt._rotation.schedule.Schedule` of the network, and :math:`\sqrt{r_k}` is
    :attr:`~rotoopt.weighting.Weighting.remaining`: a change of the inputs of a head by a fixed share would prevent
    small errors.

    Steps are shortened such that the objective of the batch increases for certain, and no plane rotates by more than a
    radian: with :math:`\lVert D \rVert_2^2 \le \lVert D \rVert_F^2 / 2` and a nuclear norm of :math:`U_k V^\top` of at
    most one, a step :math:`s` changes the objective by at least :math:`s \langle S, D \rangle / 2 - s^2 \lVert D
    \rVert_F^2 / 4`.

    The official code minimizes a squared distance whose gradient is the paper's times twice the norm of the mean
    gradient, with Adam and matrix exponentials.

    Args:
        rotations: The rotations.
        lr: Learning rate of :class:`NormalizedStep`.
        processes: The processes that share a batch.
        network: The optimizer of the network.
    """

    needs_second_moment = True

    def __init__(self, rotations: Rotations, lr: float, processes: Processes, network: Optimizer) -> None:
        self.rotations = rotations
        self._processes = processes
        self._sizes = nn.Parameter(torch.zeros(rotations.num_tasks, device=rotations.device, dtype=rotations.dtype))
        self.optimizer: Optimizer = NormalizedStep([self._sizes], lr)
        self._metric = Metric(processes)
        self._schedule = Schedule(network)
        self._num_turns = 0

    @torch.no_grad()
    def step(self, gradients: Sequence[RotationGradient], remaining: Tensor | None = None) -> Tensor | None:
        """Update the rotations, and correct rounding errors in some of their columns; return the angles."""
        self._follow(self.rotations.device)
        if not gradients:
            if "step" in vars(self.optimizer):  # a scheduler has replaced it, to check that it is called
                self.optimizer.step()
            return None
        matrices = self.rotations.matrices
        m = matrices.shape[-1]
        metric = self._metric.update(gradients, matrices)
        ascent = self._skew(gradients, m).in_metric(metric)  # which frees S
        norm = ascent.skew.half_squared_norm()
        least = torch.minimum(ascent.change, ascent.clarity)
        rests = (least > 0) <= self.rotations.rests  # for booleans: not (a turn is possible, and not rests)
        self._sizes.grad = (ascent.change / m).sqrt().masked_fill(rests, 0.0)
        self.optimizer.step()
        self._sizes.grad = None
        inverse = norm.rsqrt()
        longest = torch.minimum(ascent.rise / norm, inverse)
        sizes = self._sizes * self._schedule.share()
        sizes = sizes if remaining is None else sizes * remaining.to(sizes.dtype)
        step = torch.minimum(sizes, longest).masked_fill(rests, 0.0)
        ascent.skew.turn_(matrices, step)
        count = -(-m // REPAIRED_SHARE)
        repair_columns_(matrices, self._num_turns * count % m, count, step > 0)
        self._num_turns += 1
        angles: Tensor = step / inverse * (2.0 / m) ** 0.5
        return angles

    def _skew(self, gradients: Sequence[RotationGradient], m: int) -> Skew:
        """Return the sum of the gradients in the dtype of the rotations, in the form with the cheaper update."""
        dtype = self._sizes.dtype
        distributed = self._processes.count > 1  # the number of joined samples is large, and unknown here
        if distributed or sum(each.num_samples for each in gradients) >= DENSE_FROM * m:
            return DenseSkew(sum_of_correlations(gradients, m, self._processes).to(dtype))
        tasks = _joined([_columns(each.directions, m) for each in gradients])
        target = _joined([_columns(each.target, m) for each in gradients])
        return SampleSkew(tasks.to(dtype), target.to(dtype))

    def _follow(self, device: torch.device) -> None:
        if self._sizes.device != device:
            move_(self._sizes, self.optimizer, device)
            self._metric.to(device)

    def state_dict(self) -> dict[str, Any]:
        """Return the state of the optimizer, the metric and the schedule, and the next column to correct."""
        return {
            "optimizer": self.optimizer.state_dict(),
            "metric": self._metric.state_dict(),
            "schedule": self._schedule.state_dict(),
            "num_turns": self._num_turns,
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load what :meth:`state_dict` returned."""
        self.optimizer.load_state_dict(state_dict["optimizer"])
        self._metric.load_state_dict(state_dict["metric"], self._sizes)
        self._schedule.load_state_dict(state_dict["schedule"])
        self._num_turns = state_dict["num_turns"]


def _columns(samples: Tensor, m: int) -> Tensor:
    """Return ``(..., L, d, P)`` as ``(..., m, L P)``: one column per sample."""
    return samples[..., :m, :].movedim(-2, -3).flatten(-2)


def _joined(samples: Sequence[Tensor]) -> Tensor:
    return samples[0] if len(samples) == 1 else torch.cat(list(samples), dim=-1)
