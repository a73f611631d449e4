"""Burn-in references: the values L_k(t0) and ||G_k(t0)|| that losses and gradient norms are compared with."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Reference:
    """One reference value per task, taken at step 0 and once more after the burn-in.

    Only a valid value becomes a reference: of a present task, finite and not zero. Where the value at step 0 (or at
    the end of the burn-in) is not, the next valid one is taken. Before the burn-in ends, a reference that is but
    rounding next to the present value is taken anew: a distillation loss starts at zero, plus or minus some eps.

    Attributes:
        values: The references, NaN where there is none yet. Shape ``(K,)``.
        settled: Whether the reference was taken after the burn-in, and so is final. Shape ``(K,)``, bool.

    Source: RotoGrad, ICLR 2022, eq. 2 has t0 = 0; the second time is the official code's. The official code takes
    any value, so that one overflow at step 0 zeroes the gradient of the backbone until the burn-in ends.
    """

    values: Tensor
    settled: Tensor

    @classmethod
    def unknown(cls, num_tasks: int, device: torch.device, dtype: torch.dtype) -> Reference:
        """Return references that are all unknown."""
        values = torch.full((num_tasks,), float("nan"), device=device, dtype=dtype)
        return cls(values, torch.zeros(num_tasks, dtype=torch.bool, device=device))

    def updated(self, current: Tensor, present: Tensor, *, burnt_in: bool) -> Reference:
        """Return the references after a step.

        Args:
            current: The values of this step, in absolute value. Shape ``(K,)``.
            present: Which tasks take part in it. Shape ``(K,)``, bool.
            burnt_in: Whether the burn-in is over.
        """
        valid = present & current.isfinite() & (current > 0)
        outgrown = self.values < current * torch.finfo(self.values.dtype).eps ** 0.5
        due = self.values.isnan() | ~self.settled & (outgrown | burnt_in)
        take = valid & due
        values = torch.where(take, current.to(self.values.dtype), self.values)
        return Reference(values, self.settled | take if burnt_in else self.settled)

    def keep_if(self, condition: Tensor, previous: Reference) -> Reference:
        """Return these references where ``condition`` (shape ``()``, bool) holds, the previous ones elsewhere."""
        return Reference(
            torch.where(condition, self.values, previous.values),
            torch.where(condition, self.settled, previous.settled),
        )

    def known_or_one(self) -> Tensor:
        """Return the references, and one where there is none. Shape ``(K,)``."""
        return torch.where(self.values.isnan(), 1.0, self.values)

    def to(self, device: torch.device) -> Reference:
        """Return these references on ``device``."""
        return Reference(self.values.to(device), self.settled.to(device))

    def state_dict(self) -> dict[str, Tensor]:
        """Return copies of the tensors."""
        return {"values": self.values.clone(), "settled": self.settled.clone()}

    def loaded(self, state_dict: dict[str, Tensor]) -> Reference:
        """Return the references of ``state_dict`` on this one's device."""
        return Reference(
            state_dict["values"].to(self.values, copy=True),
            state_dict["settled"].to(self.settled, copy=True),
        )
