"""The paper's weighting: one norm for all task gradients."""

from __future__ import annotations

import torch
from torch import Tensor

from rotoopt.weighting._measurements import Measurements
from rotoopt.weighting._weighting import Weighting


def gradient_shares(norm_ratios: Tensor, present: Tensor) -> Tensor:
    r"""Share of every task in the common norm: tasks that converge slowly count more.

    :math:`\alpha_k = \rho_k / \sum_{i \in P} \rho_i` with :math:`\rho_k = \lVert G_k \rVert / \lVert G_k(t_0) \rVert`
    over the present tasks P. A present task without a ratio gets the mean ratio of the others.

    Args:
        norm_ratios: :math:`\rho`. Shape ``(K,)``, NaN where unknown.
        present: P. Shape ``(K,)``, bool.

    Returns:
        Shares that sum to one; zero for absent tasks. Shape ``(K,)``.

    Example:
        >>> gradient_shares(torch.tensor([3.0, 1.0]), torch.tensor([True, True]))
        tensor([0.7500, 0.2500])

    Source: RotoGrad, ICLR 2022, eq. 2.
    """
    known = present & ~norm_ratios.isnan()
    # Ratios of a task whose gradient exploded since t0 may be huge, even infinite: divide before adding up.
    ratios = torch.where(known, norm_ratios, 0.0).clamp(max=torch.finfo(norm_ratios.dtype).max)
    ratios = ratios / ratios.amax()
    ratios = torch.where(present & ~known, ratios.sum() / known.sum(), ratios)
    total = ratios.sum()  # NaN where all ratios are zero, or none is known
    return torch.where(total > 0, ratios / total, present.to(ratios.dtype) / present.sum())


class RotoGradWeighting(Weighting):
    r"""Give all task gradients the same norm C, a convex combination of their norms (the paper's scaling).

    .. math:: w_k = C / \lVert G_k \rVert, \qquad C = \sum_k \alpha_k \lVert G_k \rVert

    with the shares :math:`\alpha_k` of :func:`~rotoopt.weighting.gradient_shares`. The combination is the sum
    :math:`\sum_k w_k G_k` over the present tasks, without a factor 1/K. A zero gradient stays zero.

    Source: RotoGrad, ICLR 2022, eqs. 1-2.
    """

    def __call__(self, measured: Measurements) -> Tensor:
        """Return w."""
        norms = measured.norms
        common_norm = (gradient_shares(measured.norm_ratios, measured.present) * norms).sum()
        # Saturates where norms lie more than 38 decades apart; the task then gets less than C, and no infinity.
        weights = (common_norm / norms).clamp(max=torch.finfo(norms.dtype).max)
        return torch.where(norms == 0, 0.0, weights)
