"""The schedule of the network, which the rotations follow: as it comes to rest, so do they."""

from __future__ import annotations

from torch.optim import Optimizer


class Schedule:
    """Where the network is on the schedule of its learning rate.

    Args:
        optimizer: The optimizer of the network. Of several parameter groups, the largest learning rate counts.
    """

    def __init__(self, optimizer: Optimizer) -> None:
        self._optimizer = optimizer
        self._highest = 0.0

    def share(self) -> float:
        """Return the learning rate as a share of the highest one so far; 1 for an optimizer that has none.

        A learning rate that is a tensor on a GPU is waited for: once per turn.
        """
        rates = [float(group["lr"]) for group in self._optimizer.param_groups if group.get("lr") is not None]
        if not rates:
            return 1.0
        self._highest = max(self._highest, *rates)
        return max(rates) / self._highest if self._highest > 0 else 0.0

    def state_dict(self) -> dict[str, float]:
        """Return what is needed to resume."""
        return {"highest": self._highest}

    def load_state_dict(self, state_dict: dict[str, float]) -> None:
        """Load what :meth:`state_dict` returned."""
        self._highest = state_dict["highest"]
