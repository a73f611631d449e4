"""Reads the results of the official package, written by generate.py. All tensors are float64."""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tests.official import networks
from tests.official.networks import Kind, Network

FOLDER = Path(__file__).parent


@dataclass(frozen=True, eq=False)
class Step:
    """One batch, and the results of ``model.backward``. Dictionaries have the keys of ``named_parameters()``.

    Attributes:
        inputs: Input of the model.
        targets: One per task.
        predictions: One per task.
        extra_outputs: As the official model returns them beside its predictions: first the backbone's, as tensors, then
            a tuple per head that has some. Empty where neither has any: the model then returns no more than a list.
        losses: ``networks.task_losses`` of the above, never normalized. Shape ``(K,)``.
        backbone_loss: ``networks.backbone_loss`` of the representation, a scalar; ``None`` in cases without.
        norms: Norms of the task gradients G_k at the representation, of the whole batch, before any rescaling but that
            of ``normalize_losses``. Shape ``(K,)``.
        norm_of_mean: The norm of their mean over the tasks, a scalar.
        network_gradients: Gradient of every parameter of backbone and heads, keyed as ``Case.parameters``.
        model_gradients: Gradient of every parameter of the official model itself, keyed as in ``Case.state``: that of
            ``original`` in every rotation, and that of ``weight_``. Empty for ``VanillaMTL``.
    """

    inputs: Tensor
    targets: list[Tensor]
    predictions: list[Tensor]
    extra_outputs: list[Tensor | tuple[Tensor, ...]]
    losses: Tensor
    backbone_loss: Tensor | None
    norms: Tensor
    norm_of_mean: Tensor
    network_gradients: dict[str, Tensor]
    model_gradients: dict[str, Tensor]


@dataclass(frozen=True, eq=False)
class Case:
    """A model, and successive steps of it in which no parameter is updated.

    Attributes:
        model: Name of the class.
        options: Its keyword arguments, ``rotation_shape`` among them, beside backbone and heads.
        kind: Argument of ``networks.build``, along with ``size`` and the number of tasks.
        size: Features or channels of the representation.
        loss_scales: Third argument of ``networks.task_losses``.
        parameters: State dict of the ``Network``.
        state: State dict of the official model; empty for ``VanillaMTL``.
        rotations: The matrices R_k. Shape ``(K, m, m)``; ``None`` for ``VanillaMTL``.
        weights: ``model.weight`` of ``RotoGradNorm``. Shape ``(K,)``; ``None`` for all others.
        steps: Six of them.
    """

    model: str
    options: dict[str, Any]
    kind: Kind
    size: int
    loss_scales: list[float]
    parameters: dict[str, Tensor]
    state: dict[str, Tensor]
    rotations: Tensor | None
    weights: Tensor | None
    steps: list[Step]

    def network(self) -> Network:
        """Return a new copy of the network, in float64."""
        network = networks.build(self.kind, self.size, len(self.loss_scales)).double()
        network.load_state_dict(self.parameters)
        return network


@dataclass(frozen=True, eq=False)
class ToyRun:
    """The toy problem from one start.

    Attributes:
        seed: Of the start.
        parameters: State dict of ``networks.build_toy()`` at the start.
        state: State dict of the official models that rotate at the start.
        losses: Losses of both tasks, under the name of the class: before steps 0, 20, ..., 380, and after the last one.
            Shape ``(21, 2)``.
    """

    seed: int
    parameters: dict[str, Tensor]
    state: dict[str, Tensor]
    losses: dict[str, Tensor]

    def network(self) -> Network:
        """Return a new copy of the network at the start, in float64."""
        network = networks.build_toy().double()
        network.load_state_dict(self.parameters)
        return network


@cache
def cases() -> dict[str, Case]:
    """Return all cases by name."""
    return {name: _case(entry) for name, entry in _read("numbers.json").items()}


@cache
def toy_runs() -> list[ToyRun]:
    """Return the runs of the toy problem."""
    return [
        ToyRun(entry["seed"], *(_tensors(entry[key]) for key in ("parameters", "state", "losses")))
        for entry in _read("toy.json").values()
    ]


def _read(name: str) -> dict[str, Any]:
    entries: dict[str, Any] = json.loads((FOLDER / name).read_text())
    return entries


def _tensor(value: Any) -> Tensor:
    return torch.tensor(value, dtype=torch.float64)


def _tensors(values: dict[str, Any]) -> dict[str, Tensor]:
    return {name: _tensor(value) for name, value in values.items()}


def _extra_output(value: Any) -> Tensor | tuple[Tensor, ...]:
    return tuple(map(_tensor, value["tuple"])) if isinstance(value, dict) else _tensor(value)


def _case(entry: dict[str, Any]) -> Case:
    options = {key: tuple(value) if isinstance(value, list) else value for key, value in entry["options"].items()}
    return Case(
        model=entry["model"],
        options=options,
        kind=entry["kind"],
        size=entry["size"],
        loss_scales=entry["loss_scales"],
        parameters=_tensors(entry["parameters"]),
        state=_tensors(entry["state"]),
        rotations=None if entry["rotations"] is None else _tensor(entry["rotations"]),
        weights=None if entry["weights"] is None else _tensor(entry["weights"]),
        steps=[_step(each) for each in entry["steps"]],
    )


def _step(entry: dict[str, Any]) -> Step:
    return Step(
        inputs=_tensor(entry["inputs"]),
        targets=[_tensor(each) for each in entry["targets"]],
        predictions=[_tensor(each) for each in entry["predictions"]],
        extra_outputs=[_extra_output(each) for each in entry["extra_outputs"]],
        losses=_tensor(entry["losses"]),
        backbone_loss=None if entry["backbone_loss"] is None else _tensor(entry["backbone_loss"]),
        norms=_tensor(entry["norms"]),
        norm_of_mean=_tensor(entry["norm_of_mean"]),
        network_gradients=_tensors(entry["network_gradients"]),
        model_gradients=_tensors(entry["model_gradients"]),
    )
