"""The default weighting: norms that are equal on average, times how far every task has to go and how clear it is."""

from __future__ import annotations

import torch
from torch import Tensor

from rotoopt.weighting._measurements import Measurements
from rotoopt.weighting._weighting import Weighting

BURST = 3.0  # how many times larger than on average a gradient may be before its own norm counts
VANISHED = 1e-3  # of the largest average norm: below, a weight grows no more
RATES = 1e-4, 1e4  # between which r is told apart
NOISE = 0.05  # the least share of signal: an estimate of less is chance
TURNS = 10  # over which the agreement of samples is averaged


class ProgressWeighting(Weighting):
    r"""Give all task gradients the same norm on average, and more of it to slow tasks and to those with a clear signal.

    .. math:: w_k = \frac{\pi_k}{\nu_k} \sum_j \nu_j, \qquad
        \pi_k = \frac{(r_k s_k)^\alpha}{\sum_j (r_j s_j)^\alpha}

    .. math:: \nu_k = \overline{\lVert G_k \rVert}, \qquad r_k = \frac{\overline{L_k}}{|L_k(t_0)|}, \qquad
        s_k = 1 - \frac{1}{\overline{F_k}}

    Bars are running means. The weighted norms add up to what the norms add up to in the plain sum, so its learning
    rates fit, and task k has the share :math:`\pi_k` of it:

    - r tells how far it still has to go. Of a loss that is quadratic around zero, :math:`\nu_k` is in proportion to
      :math:`\sqrt{r_k}`: with :math:`\alpha = 1/2` its weight does not grow while it converges.
    - s tells what part of its gradient is signal. F is the agreement of the samples of a batch
      (:attr:`Measurements.agreement`, measured in the steps in which rotations turn): one where they have nothing in
      common, as for labels that are random. Batches of one sample tell nothing, and all s are equal.

    The weights are made by the steps before, and so known before a backward pass: each gradient goes on at once. In the
    first two steps, gradients wait for each other if all heads read one tensor; otherwise these weights are ones. One
    step is not enough: a loss that starts at its minimum, as in distillation, has a gradient that is only rounding.

    What is not known is left out: all r are one where no losses were seen (your own ``sum(losses).backward()``),
    and that of a task whose loss has been negative, of which a ratio tells nothing; s is the geometric mean of the
    others'. A task without a gradient so far has weight one. Absent tasks count with what is remembered of them, so
    that a batch per task is weighted as one of all.

    Weights are bounded: a gradient that is more than three times as large as on average counts with a third of its own
    norm, one that vanishes with a thousandth of the largest :math:`\nu_k` so far, r between 1e-4 and 1e4, and s from
    0.05. But a gradient that grows by orders of magnitude from one step to the next is used once with the weight from
    before.

    Args:
        alpha: :math:`\alpha`, how strongly tasks are favored that are slow, as in GradNorm, and whose signal is clear;
            0 gives equal norms.
        decay: How much of a running mean a step keeps, from 0 to 1.

    Raises:
        ValueError: If an argument is out of range.

    Example:
        >>> unknown = torch.full((2,), torch.nan)
        >>> everywhere, finite = torch.tensor([True, True]), torch.tensor(True)
        >>> measured = Measurements(torch.tensor([3.0, 1.0]), everywhere, finite, None, None, unknown, unknown)
        >>> ProgressWeighting()(measured)  # both gradients get the norm 2
        tensor([0.6667, 2.0000])

    Source: r is the target of Chen et al., GradNorm, ICML 2018, eq. 2, reached without trained weights; s is ours; one
    norm for all tasks is that of RotoGrad, ICLR 2022, eq. 1, which takes the latest gradients instead of running means.
    """

    lagged = True
    num_waiting = 2
    needs_agreement = True
    needs_old_norms = False

    def __init__(self, alpha: float = 0.5, *, decay: float = 0.95) -> None:
        if not alpha >= 0:
            raise ValueError(f"`alpha` must be a non-negative number, got {alpha!r}.")
        if not 0 <= decay < 1:
            raise ValueError(f"`decay` must be at least 0 and below 1, got {decay!r}.")
        self.alpha = alpha
        self.decay = decay

    def __call__(self, measured: Measurements) -> Tensor:
        """Remember what was measured, and return w."""
        latest, means = self._remember(measured)
        norms = self._bounded(latest[0], means[0])
        rates = (means[1] / measured.loss_references).clamp(*RATES).nan_to_num(1.0)
        logits = torch.add(self._log_signal(measured), rates.log(), alpha=self.alpha)
        shares = logits.masked_fill(norms == 0, -torch.inf).softmax(0)
        # 0 / 0: of a task without a gradient so far. Infinite: where norms are, or nearly.
        return (shares * (norms.sum() / norms)).nan_to_num(1.0)

    def _remember(self, measured: Measurements) -> tuple[Tensor, Tensor]:
        """Return norms and losses, the latest of every task, and their means, which are plain ones at first. (2, K)."""
        norms, losses, seen = measured.norms, measured.losses, measured.present & (measured.norms > 0)
        before = self._remembered("means", norms.expand(2, -1)).to(norms)  # the network may have become wider
        if losses is None:
            latest, learned = torch.stack([norms, before[1]]), torch.stack([seen, torch.zeros_like(seen)])
        else:  # a negative one makes the mean NaN for good
            latest, learned = torch.stack([norms, losses.masked_fill(losses < 0, torch.nan).to(norms)]), seen
        latest = torch.where(seen, latest, before)
        count = self._remembered("count", latest).to(latest) + learned
        means = torch.lerp(before, latest, count.clamp(1.0, 1 / (1 - self.decay)).reciprocal())
        self.state["means"], self.state["count"] = means, count
        return latest, means

    def _bounded(self, latest: Tensor, means: Tensor) -> Tensor:
        r"""Return :math:`\nu`, bounded; zero where it is not known. Shape ``(K,)``."""
        self.state["peaks"] = torch.maximum(self._remembered("peaks", means).to(means), means)
        return torch.maximum(torch.maximum(means, latest / BURST), VANISHED * self.state["peaks"])

    def _log_signal(self, measured: Measurements) -> Tensor:
        r"""Return :math:`\alpha \log s`, the mean over the others for a task of which it is not known. ``(K,)``."""
        latest = measured.agreement
        if latest is not None:
            known = measured.present & (latest < torch.inf)
            before = self._remembered("agreement", measured.norms).to(measured.norms)
            count = self._remembered("num_agreements", before).to(before) + known
            mean = torch.lerp(
                before, torch.where(known, latest.to(before), before), count.clamp(1.0, TURNS).reciprocal()
            )
            unknown = count == 0
            logs = (1 - mean.reciprocal()).clamp(NOISE, 1.0).log().masked_fill(unknown, 0.0)
            logs = torch.where(unknown, logs.sum() / (~unknown).sum().clamp(min=1), logs)
            self.state["agreement"], self.state["num_agreements"] = mean, count
            self.state["log_signal"] = self.alpha * logs
        return self._remembered("log_signal", measured.norms).to(measured.norms)

    def _remembered(self, name: str, like: Tensor) -> Tensor:
        return self.state[name] if name in self.state else torch.zeros_like(like)

    def __repr__(self) -> str:
        return f"ProgressWeighting(alpha={self.alpha})"
