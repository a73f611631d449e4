"""The learning-rate schedule of the network, which the rotations follow."""

from __future__ import annotations

from torch.optim import Optimizer


class Schedule:
    """The current learning rate of the network, relative to its maximum so far.

    Args:
        optimizer: The optimizer of the network. With several parameter groups, the largest learning rate is used.
    """

    def __init__(self, optimizer: Optimizer) -> None:
        self._optimizer = optimizer
        self._highest = 0.0

    def share(self) -> float:
        """Return the learning rate divided by the largest one so far; 1 for an optimizer without one.

        Synchronizes if the learning rate is a tensor on a GPU, once per update of the rotations.
        """
        rates = [float(group["lr"]) for group in self._optimizer.param_groups if group.get("lr") is not None]
        if not rates:
            return 1.0
        self._highest = max(self._highest, *rates)
        return max(rates) / self._highest if self._highest > 0 else 0.0

    def state_dict(self) -> dict[str, float]:
        """Return the state for a checkpoint."""
        return {"highest": self._highest}

    def load_state_dict(self, state_dict: dict[str, float]) -> None:
        """Load what :meth:`state_dict` returned."""
        self._highest = state_dict["highest"]
