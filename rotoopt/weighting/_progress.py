"""The default weighting: gradient norms that are equal on average, times progress and signal of each task."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import threshold

from rotoopt.weighting._measurements import Measurements
from rotoopt.weighting._weighting import Weighting

BURST = 3.0  # a gradient up to this many times its mean norm is weighted by the mean, a larger one by its own norm
VANISHED = 1e-3  # relative to the largest mean norm of the task: below it, the weight stops growing
RATES = 1e-4, 1.0  # bounds of r
NOISE = 0.1  # lower bound of s: a smaller estimate is not significant, and a task may show its signal late
PRIOR = 1.0  # number of measurements after which an estimate of s counts as much as that all tasks have the same
TURNS = 30  # length of the running mean of the agreement: its standard error is then about 0.1


class ProgressWeighting(Weighting):
    r"""Equal gradient norms on average, with larger shares for slow tasks and for tasks with a clear signal.

    .. math:: w_k = \frac{\pi_k}{\nu_k} \sum_j \nu_j, \qquad
        \pi_k = \frac{(\tilde r_k s_k)^\alpha}{\sum_j (\tilde r_j s_j)^\alpha}, \qquad
        \tilde r_k = r_k^{s_k} \, \bar r^{1 - s_k}

    .. math:: \nu_k = \overline{\lVert G_k \rVert}, \qquad r_k = \frac{\overline{L_k}}{\overline{L_k}(t_0)}, \qquad
        s_k = 1 - \frac{1}{\overline{F_k}}, \qquad \log \bar r = \frac{\sum_j s_j \log r_j}{\sum_j s_j}

    Bars denote running means. The sum of the weighted norms is the same as in the plain sum, so that its learning rate
    still fits. Task k has the share :math:`\pi_k` of it:

    - r is the remaining loss, relative to its first running mean, at :math:`t_0`, 20 steps (1 / (1 - decay)) after the
      burn-in. Before that, it is one. For a loss that is quadratic around zero, :math:`\nu_k` is proportional to
      :math:`\sqrt{r_k}`: with :math:`\alpha \ge 1/2` and s = 1, its weight does not grow as it converges.
    - s is the share of the gradient that is signal. F is the agreement of the samples of a batch
      (:attr:`Measurements.agreement`, measured when rotations are updated, or soon after, and used from the next step
      on): one if they have nothing in common, as for random labels. With one sample per batch it cannot be estimated.
      The first estimates are noisy: after n of them, log s has the weight n / (n + 1), and its mean over the tasks the
      rest.
    - :math:`\tilde r` is r as far as the gradient is signal, and the mean progress of the tasks with a signal,
      :math:`\bar r`, otherwise: a loss that remains high because its labels are noise is not that of a slow task.

    The weights are computed in earlier steps, so that they are known before the backward pass and each gradient is
    weighted as soon as it is available. The first two steps use their own gradients if all heads read one tensor, and
    weights of one otherwise. One such step is not enough: a loss that starts at its minimum, as in distillation,
    has a gradient that is only rounding errors.

    The rotations follow the progress: the change in an update of R_k is multiplied by :math:`\sqrt{r_k}`
    (:attr:`remaining`), so that it stays small relative to the errors that the heads still make.

    Unknown values have no influence: all r are one if the losses are unknown (your own ``sum(losses).backward()``).
    The r of a task whose loss has been negative is unknown as well; :math:`\tilde r` is then :math:`\bar r`. An unknown
    s is the geometric mean of the others. Both means are renewed when the agreement is measured. The weight of a task
    that has had no gradient yet is one. Absent tasks keep their running means, so that a batch per task is weighted
    like a batch with all of them.

    Weights are bounded: a gradient more than three times as large as its mean is weighted by a third of its own
    norm, a vanishing one by a thousandth of its largest mean so far; r is between 1e-4 and 1, and s at least 0.1.
    A gradient that grows by orders of magnitude within one step is still used once with the previous weight.

    Args:
        alpha: :math:`\alpha`, how strongly tasks are favored that are slow, as in GradNorm, or have a clear signal;
            0 gives equal norms. The default, 3/4, was chosen on the ten problems of the quality page; 1/2 to 1 are
            close to it on average.
        decay: Decay of the running means, at least 0 and below 1.

    Raises:
        ValueError: If an argument is out of range.

    Example:
        >>> unknown = torch.full((2,), torch.nan)
        >>> everywhere, finite = torch.tensor([True, True]), torch.tensor(True)
        >>> measured = Measurements(torch.tensor([3.0, 1.0]), everywhere, finite, None, None, unknown, unknown)
        >>> ProgressWeighting()(measured)  # both gradients get the norm 2
        tensor([0.6667, 2.0000])

    Source: r is the target of Chen et al., GradNorm, ICML 2018, eq. 2, at most one, without trained weights. s is new.
    Equal norms are from RotoGrad, ICLR 2022, eq. 1, which uses the current gradients instead of running means.
    """

    lagged = True
    num_waiting = 2
    needs_agreement = True
    needs_references = False

    def __init__(self, alpha: float = 0.75, *, decay: float = 0.95) -> None:
        if not alpha >= 0:
            raise ValueError(f"`alpha` must be a non-negative number, got {alpha!r}.")
        if not 0 <= decay < 1:
            raise ValueError(f"`decay` must be at least 0 and below 1, got {decay!r}.")
        self.alpha = alpha
        self.decay = decay

    def __call__(self, measured: Measurements) -> Tensor:
        """Update the running means, and return w."""
        (latest_norms, _), (mean_norms, mean_losses) = self._remember(measured)
        norms = self._bounded(latest_norms, mean_norms)
        rates = (mean_losses / self.state["first_losses"]).clamp_(*RATES).log_()  # NaN where unknown
        if measured.agreement is not None:
            self._renew(measured.agreement, rates)
        # Relative to the mean, which the softmax cancels; zero where unknown.
        rates = (rates - self._remembered("mean_rate", norms)).nan_to_num_(0.0)
        clear = self._remembered("clear", norms, 1.0)
        logits = torch.addcmul(self._remembered("signal", norms), rates, clear, value=self.alpha)
        shares = logits.masked_fill_(norms.logical_not(), -torch.inf).softmax(0)
        # NaN (0 / 0) for a task that has had no gradient yet; infinite if norms nearly overflow.
        return (shares * (norms.sum() / norms)).nan_to_num_(1.0)

    @property
    def remaining(self) -> Tensor | None:
        r""":math:`\sqrt{r_k}` when the agreement was measured last, one where unknown. Shape ``(K,)``."""
        return self.state.get("remaining")

    def _remember(self, measured: Measurements) -> tuple[Tensor, Tensor]:
        """Return norms and losses, the latest of every task, and their running means, both of shape ``(2, K)``."""
        norms, losses, seen = measured.norms, measured.losses, torch.logical_and(measured.norms, measured.present)
        before = self._remembered("means", norms.expand(2, -1))
        if losses is None:
            latest, learned = torch.stack([norms, before[1]]), torch.stack([seen, torch.zeros_like(seen)])
        else:  # a negative loss makes the mean NaN permanently
            latest, learned = torch.stack([norms, losses.to(norms.dtype)]), seen
            threshold(latest, -torch.finfo(norms.dtype).tiny, torch.nan, inplace=True)
        latest = torch.where(seen, latest, before)
        count = self._remembered("count", latest) + learned
        if not measured.burnt_in:
            count[1].zero_()  # the mean of the losses starts after the burn-in
        length = 1 / (1 - self.decay)
        means = torch.lerp(before, latest, count.clamp(1.0, length).reciprocal_())
        first = torch.where(count[1] <= round(length), means[1], self._remembered("first_losses", norms))
        self.state["means"], self.state["count"], self.state["first_losses"] = means, count, first
        return latest, means

    def _bounded(self, latest: Tensor, means: Tensor) -> Tensor:
        r"""Return :math:`\nu`, bounded; zero where unknown. Shape ``(K,)``."""
        self.state["peaks"] = torch.maximum(self._remembered("peaks", means), means)
        return torch.maximum(torch.maximum(means, latest / BURST), VANISHED * self.state["peaks"])

    def _renew(self, agreement: Tensor, rates: Tensor) -> None:
        r"""Renew s, closer to its mean over tasks the less is known, and the mean of ``rates``, the logarithms of r."""
        known = agreement < torch.inf  # NaN is not
        before = self._remembered("agreement", rates)
        count = self._remembered("num_agreements", before) + known
        gain = count.clamp(1.0, TURNS).reciprocal()
        mean = torch.lerp(before, torch.where(known, agreement.to(before), before), gain)
        logs = (1 - mean.reciprocal()).clamp(min=NOISE).log()
        logs = torch.lerp(_mean(logs, count.clamp(max=1.0)), logs, count / (count + PRIOR))
        signal = logs.exp()
        self.state["agreement"], self.state["num_agreements"] = mean, count
        self.state["signal"], self.state["clear"] = logs * self.alpha, signal
        known_rates = rates.nan_to_num()
        self.state["mean_rate"] = _mean(known_rates, signal.masked_fill(rates.isnan(), 0.0))
        self.state["remaining"] = (known_rates / 2).exp()

    def _remembered(self, name: str, like: Tensor, otherwise: float = 0.0) -> Tensor:
        """Return what is remembered, in the dtype of ``like``, which may differ between steps."""
        known = self.state.get(name)
        if known is None:
            return torch.full_like(like, otherwise)
        return known if known.dtype == like.dtype else known.to(like)

    def __repr__(self) -> str:
        return f"ProgressWeighting(alpha={self.alpha})"


def _mean(values: Tensor, weights: Tensor) -> Tensor:
    """Return the mean with ``weights``, which are zero or at least :data:`NOISE`; zero if all are. Shape ``()``."""
    return (values * weights).sum() / weights.sum().clamp(min=NOISE)
