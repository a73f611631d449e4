"""A torch optimizer around another one, as transparent as torch allows."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from typing import Any, Protocol

from torch import Tensor
from torch.optim import Optimizer


class Core(Protocol):
    """Everything mutable of a wrapper. One object: proxies such as Lightning's keep what is set on the wrapper."""

    optimizer: Optimizer


class OptimizerWrapper(Optimizer):
    """Is an optimizer to schedulers, GradScaler, checkpoints and hooks, and passes all they do to the wrapped one."""

    _step_supports_amp_scaling = False  # GradScaler must unscale and skip for us, whatever the wrapped one can do
    _core: Core

    def _wrap(self, core: Core) -> None:
        """Stand in for ``Optimizer.__init__``, which would make a second list of groups and a second state."""
        self._core = core
        super().__setstate__({})  # torch's own path for objects built without `__init__`: makes the hook tables

    @property
    def optimizer(self) -> Optimizer:
        """The wrapped optimizer."""
        return self._core.optimizer

    # Views onto the wrapped optimizer, never copies: `load_state_dict` replaces both objects there.

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

    def _run_with_step_hooks(
        self, step: Callable[..., float | None], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> float | None:
        """Call ``step(self, *args, **kwargs)`` between the step hooks of this optimizer.

        torch wraps `step` of every optimizer class to run hooks and label the profile, unless it has the attribute
        `hooked`. The wrapped optimizer is an optimizer itself: with both wrapped, global hooks would count twice.
        """
        args = (self, *args)
        for pre_hook in self._optimizer_step_pre_hooks.values():
            replaced = pre_hook(self, args, kwargs)
            if replaced is None:
                continue
            if not isinstance(replaced, tuple) or len(replaced) != 2:
                raise TypeError(
                    f"A step pre-hook must return None or a tuple (args, kwargs), got {replaced!r} from {pre_hook}."
                )
            args, kwargs = replaced
        result = step(*args, **kwargs)
        for post_hook in self._optimizer_step_post_hooks.values():
            post_hook(self, args, kwargs)
        return result

    def state_dict(self) -> dict[str, Any]:
        """Return everything that is needed to resume."""
        for pre_hook in self._optimizer_state_dict_pre_hooks.values():
            pre_hook(self)
        state_dict = self._save()
        for post_hook in self._optimizer_state_dict_post_hooks.values():
            state_dict = post_hook(self, state_dict) or state_dict
        return state_dict

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load what :meth:`state_dict` returned."""
        state_dict = dict(state_dict)
        for pre_hook in self._optimizer_load_state_dict_pre_hooks.values():
            state_dict = pre_hook(self, state_dict) or state_dict
        self._load(state_dict)
        for post_hook in self._optimizer_load_state_dict_post_hooks.values():
            post_hook(self)

    def _save(self) -> dict[str, Any]:
        return self._core.optimizer.state_dict()

    def _load(self, state_dict: dict[str, Any]) -> None:
        self._core.optimizer.load_state_dict(state_dict)

    def __getstate__(self) -> dict[str, Any]:
        # Not `__dict__`: a scheduler puts its own `step` there, bound to the original, and a copy would step that.
        return {"_core": self._core}
