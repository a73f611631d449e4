"""A torch optimizer around another one, as transparent as torch allows."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from torch.optim import Optimizer

from rotoopt._torch.private import make_hook_tables, run_load_state_dict_hooks, run_state_dict_hooks

MODES = ("train", "eval")  # between which schedule-free optimizers switch the weights of the network


@dataclass
class Core:
    """The mutable state of a wrapper, in one object: proxies such as Lightning's keep attributes set on the wrapper.

    Attributes:
        optimizer: The wrapped optimizer.
    """

    optimizer: Optimizer

    def state_dict(self) -> dict[str, Any]:
        """Return everything that is needed to resume."""
        return self.optimizer.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load what :meth:`state_dict` returned."""
        self.optimizer.load_state_dict(state_dict)


class OptimizerWrapper(Optimizer):
    """Behaves as an optimizer for schedulers, GradScaler, checkpoints and hooks, and delegates to the wrapped one."""

    _core: Core

    def _wrap(self, core: Core) -> None:
        """Initialize the wrapper, instead of ``Optimizer.__init__``."""
        self._core = core
        make_hook_tables(self)

    @property
    def optimizer(self) -> Optimizer:
        """The wrapped optimizer."""
        return self._core.optimizer

    def __getattr__(self, name: str) -> Any:
        """Return ``train`` or ``eval`` of a schedule-free optimizer; raise for everything else that is not here."""
        absent = f"{type(self).__name__!r} object has no attribute {name!r}"
        core = self.__dict__.get("_core")  # there is none if the constructor has failed
        if core is None or name.startswith("_") or not hasattr(core.optimizer, name):
            raise AttributeError(absent)
        if name not in MODES:
            raise AttributeError(
                f"{absent}, but the wrapped {type(core.optimizer).__name__} has: optimizer.optimizer.{name}. If it is "
                "a part of a step, as first_step() and second_step() of SAM are, call optimizer.step(closure) instead: "
                "otherwise weights and rotations are not updated."
            )
        return getattr(core.optimizer, name)

    # Views of the wrapped optimizer, never copies: its `load_state_dict` replaces both objects.

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """The parameter groups of the wrapped optimizer."""
        return self._core.optimizer.param_groups

    @param_groups.setter
    def param_groups(self, value: list[dict[str, Any]]) -> None:
        self._core.optimizer.param_groups = value

    @property
    def state(self) -> defaultdict[Tensor, Any]:
        """The state of the wrapped optimizer."""
        return self._core.optimizer.state

    @state.setter
    def state(self, value: defaultdict[Tensor, Any]) -> None:
        self._core.optimizer.state = value

    @property
    def defaults(self) -> dict[str, Any]:
        """The defaults of the wrapped optimizer."""
        return self._core.optimizer.defaults

    @defaults.setter
    def defaults(self, value: dict[str, Any]) -> None:
        self._core.optimizer.defaults = value

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a parameter group to the wrapped optimizer."""
        self._core.optimizer.add_param_group(param_group)

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Clear the gradients of the parameters."""
        self._core.optimizer.zero_grad(set_to_none=set_to_none)

    def state_dict(self) -> dict[str, Any]:
        """Return everything that is needed to resume."""
        return run_state_dict_hooks(self, self._core.state_dict)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load what :meth:`state_dict` returned."""
        run_load_state_dict_hooks(self, self._core.load_state_dict, state_dict)

    def __getstate__(self) -> dict[str, Any]:
        # Not `__dict__`: schedulers put a `step` there that is bound to the original, which a copy would then step.
        return {"_core": self._core}
