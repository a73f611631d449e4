"""History: the measurements of many steps, at little cost."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from rotoopt._torch.warn import warn_user
from rotoopt.diagnostics._harm import WINDOW, harm
from rotoopt.diagnostics._measurements import Measured, columns, latest, stack
from rotoopt.diagnostics._optional import require
from rotoopt.rotograd import RotateOnly

MOVE_EVERY = 100  # records between two copies to the CPU


class History:
    r"""Collects the measurements of every step.

    Recording keeps references to the small tensors of ``optimizer.last_step``. Every 100 records they are moved to the
    CPU in one copy, which is the only synchronization. Training is not changed, and neither graphs nor rotations are
    kept alive. A record takes 250 bytes for 5 tasks, and 7500 for 40.

    Every 100 records it also checks whether the rotations are harmful, from the last 1000 records, and warns once if
    they seem to be: if one of them turned by a radian or more while the cosines fell, the losses rose, or the cosines
    did not rise although the learning rate of the rotations is above that of the network.

    Attributes:
        task_names: The names of the tasks, those of the heads; empty before the first record.

    Example:
        >>> from torch import nn
        >>> from rotoopt import RotoGradOptimizer
        >>> backbone, heads = nn.Linear(3, 8), nn.ModuleDict({"left": nn.Linear(8, 1), "right": nn.Linear(8, 2)})
        >>> model = nn.Sequential(backbone, *heads.values())
        >>> optimizer = RotoGradOptimizer(torch.optim.SGD(model.parameters(), lr=0.1), heads=heads)
        >>> history = History()
        >>> for _ in range(4):
        ...     z = backbone(torch.randn(5, 3))
        ...     optimizer.zero_grad()
        ...     optimizer.step([head(z).square().mean() for head in heads.values()], z)
        ...     history.record(optimizer)
        >>> len(history), history.task_names, history.to_dict()["cosines"].shape
        (4, ('left', 'right'), torch.Size([4, 2, 2]))
    """

    def __init__(self) -> None:
        self.task_names: tuple[str, ...] = ()
        self._recent: list[dict[str, Tensor]] = []  # one per step, on the device
        self._moved: list[dict[str, Tensor]] = []  # one per MOVE_EVERY steps, on the CPU
        self._warned = False

    def __len__(self) -> int:
        return MOVE_EVERY * len(self._moved) + len(self._recent)

    def record(self, optimizer: Measured) -> None:
        """Record ``optimizer.last_step``. Call this after every step, or after the steps of interest.

        Args:
            optimizer: The optimizer, the same in every call; or a module such as :class:`~rotoopt.rotograd.RotoGrad`.

        Raises:
            TypeError: If ``optimizer`` is neither.
            RuntimeError: If it has not run a backward pass yet.
            ValueError: If its tasks are not those that were recorded before.
        """
        row, names = latest(optimizer), optimizer.task_names
        if self.task_names not in ((), names):
            raise ValueError(
                f"`optimizer` must have the tasks {list(self.task_names)}, those recorded before, got {list(names)}. "
                "Make one History per optimizer."
            )
        self.task_names = names
        self._recent.append(row)
        if len(self._recent) == MOVE_EVERY:
            self._moved.append(stack(self._recent))
            self._recent.clear()
            self._look_for_harm(optimizer)

    def _look_for_harm(self, optimizer: Measured) -> None:
        chunks = self._moved[-WINDOW // MOVE_EVERY :]
        if self._warned or len(chunks) * MOVE_EVERY < WINDOW:
            return
        found = harm(_join(chunks), network_lr=_network_lr(optimizer))
        if found is not None:
            self._warned = True
            warn_user(found)

    def to_dict(self) -> dict[str, Tensor]:
        """Return the T records as tensors on the CPU; see :class:`~rotoopt.StepRecord` for their meaning.

        Values that were not measured are NaN: everything about gradients of an absent task, losses if the user called
        ``backward()`` on them, alignment and conflict rate if a value was not finite, and the angles of modules such
        as :class:`~rotoopt.rotograd.RotoGrad`, whose rotations are updated by the user.

        Returns:
            ``losses``, ``grad_norms``, ``weights``, ``alignment``, ``angles``, ``total_angles`` and ``present``, of
            shape ``(T, K)``; ``cosines``, ``(T, K, K)``; ``conflict_rate``, ``rotation_lr``, ``finite`` and ``step``,
            ``(T,)``.

        Raises:
            RuntimeError: If nothing was recorded.
        """
        if len(self) == 0:
            raise RuntimeError(
                "A history must have records, got none. Call history.record(optimizer) after every step."
            )
        return _join([*self._moved, *([stack(self._recent)] if self._recent else [])])

    def to_pandas(self) -> Any:
        """Return a ``pandas.DataFrame`` with one row per record, indexed by step.

        Columns are named like ``loss/left`` and ``cosine/left/right``, as in :func:`~rotoopt.diagnostics.scalars`; the
        numbers are those of :meth:`to_dict`.

        Raises:
            ImportError: If pandas is not installed.
            RuntimeError: If nothing was recorded.
        """
        pandas = require("pandas", install="pip install pandas")
        values = self.to_dict()
        table = {name: column.numpy() for name, column in columns(values, self.task_names).items()}
        return pandas.DataFrame(table, index=pandas.Index(values["step"].numpy(), name="step"))


def _join(chunks: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    return {name: torch.cat([chunk[name] for chunk in chunks]) for name in chunks[0]}


def _network_lr(optimizer: Measured) -> float:
    """Return the largest learning rate of the network, NaN if it is not comparable with that of the rotations.

    The optimizer of a module's network is not known here, and the built-in rotation step has another unit.
    """
    if isinstance(optimizer, RotateOnly) or optimizer._core.built_in_step:
        return float("nan")
    groups = optimizer.param_groups
    return max((float(group["lr"]) for group in groups if "lr" in group), default=float("nan"))
