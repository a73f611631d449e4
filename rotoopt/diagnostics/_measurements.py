"""Measurements: the records of one or many steps, as named tensors on the CPU."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from rotoopt._engine.record import alignment, conflict_rate
from rotoopt.optimizer import RotoGradOptimizer
from rotoopt.rotograd import RotateOnly

Measured = RotoGradOptimizer | RotateOnly

MEASURED = ("losses", "grad_norms", "weights", "cosines", "present", "finite", "angles", "total_angles")

# Measurements with one number per task or per step, and the names of their columns.
PER_TASK = {
    "losses": "loss",
    "grad_norms": "grad_norm",
    "weights": "weight",
    "alignment": "alignment",
    "angles": "angle",
    "total_angles": "total_angle",
    "present": "present",
}
PER_STEP = ("conflict_rate", "rotation_lr", "finite")


def latest(optimizer: Measured) -> dict[str, Tensor]:
    """Return the tensors of the latest record, without copying them to the CPU or keeping anything else alive."""
    if not hasattr(optimizer, "last_step"):
        raise TypeError(
            "`optimizer` must be a RotoGradOptimizer or a module such as RotoGrad, got a "
            f"{type(optimizer).__name__}. Pass the wrapper, not the optimizer inside it; if a framework has wrapped it "
            "again, as Accelerate does, pass `optimizer.optimizer`."
        )
    record = optimizer.last_step
    if record is None:
        raise RuntimeError(
            "`optimizer` must have seen a backward pass, got none. Call this after optimizer.step(losses, z)."
        )
    row = {name: getattr(record, name) for name in MEASURED if name != "losses"}
    unknown = torch.full_like(record.grad_norms, torch.nan)  # the user called backward() on the losses
    row["losses"] = unknown if record.losses is None else record.losses
    row["step"] = torch.tensor(record.step)
    # A copy, because schedulers change the tensor in place.
    row["rotation_lr"] = torch.as_tensor(record.rotation_lr, dtype=torch.float64).clone()
    return row


def stack(rows: Sequence[dict[str, Tensor]]) -> dict[str, Tensor]:
    """Stack T rows into tensors ``(T, ...)`` on the CPU, with NaN for values that were not measured."""
    last = rows[-1]  # determines the device, in case the network was moved
    values = {name: torch.stack([row[name].to(last[name]) for row in rows]).cpu() for name in last}
    present, finite, cosines = values["present"], values["finite"], values["cosines"]
    values["conflict_rate"] = conflict_rate(cosines, present, finite)
    values["alignment"] = torch.where(present, alignment(cosines, finite), torch.nan)
    values["cosines"] = torch.where(present[:, :, None] & present[:, None, :], cosines, torch.nan)
    for name in ("grad_norms", "weights"):
        values[name] = torch.where(present, values[name], torch.nan)
    for name in ("angles", "total_angles"):  # unknown if the user's optimizer updates the rotations
        values[name] = torch.where(values["rotation_lr"].isnan()[:, None], torch.nan, values[name])
    return values


def pairs(num_tasks: int) -> list[tuple[int, int]]:
    """Return the pairs of different tasks."""
    return [(i, j) for i in range(num_tasks) for j in range(i + 1, num_tasks)]


def columns(values: dict[str, Tensor], names: Sequence[str]) -> dict[str, Tensor]:
    """Split stacked measurements into columns ``(T,)``, named like ``loss/left`` and ``cosine/left/right``."""
    by_name = {name: values[name] for name in PER_STEP}
    for field, prefix in PER_TASK.items():
        by_name |= {f"{prefix}/{name}": values[field][:, task] for task, name in enumerate(names)}
    by_name |= {f"cosine/{names[i]}/{names[j]}": values["cosines"][:, i, j] for i, j in pairs(len(names))}
    return by_name
