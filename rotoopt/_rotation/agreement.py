"""Agreement: how much of the rotation gradients is signal, by how well successive ones agree."""

from __future__ import annotations

import torch
from torch import Tensor

from rotoopt._rotation.cayley import Skew

MEMORY = 0.9  # of the running means, per turn
NUM_PROBES = 8


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

    def state_dict(self) -> dict[str, Tensor | None]:
        """Return what is needed to resume."""
        return {"latest": self._latest, "inner": self._inner, "norms": self._norms}

    def load_state_dict(self, state_dict: dict[str, Tensor | None], like: Tensor) -> None:
        """Load what :meth:`state_dict` returned, onto the device of ``like``."""
        latest, inner, norms = state_dict["latest"], state_dict["inner"], state_dict["norms"]
        self._latest = None if latest is None else latest.to(like)
        self._inner, self._norms = (torch.zeros(()) if value is None else value.to(like) for value in (inner, norms))


def _norms(seen: Tensor) -> Tensor:
    norms: Tensor = torch.linalg.vector_norm(seen, dim=(-2, -1))
    return norms


def _probes(matrices: Tensor) -> Tensor:
    """Return random signs, the same in every step and on every machine. Shape ``(m, 8)``."""
    generator = torch.Generator().manual_seed(0)
    signs = torch.randint(2, (matrices.shape[-1], NUM_PROBES), generator=generator) * 2 - 1
    return signs.to(matrices)
