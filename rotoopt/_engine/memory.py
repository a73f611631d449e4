"""Memory: the state of the method from step to step, except that of the rotation step."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor

from rotoopt._capture.agreement import SampleSums
from rotoopt._rotation.rotations import Rotations
from rotoopt.weighting import Weighting
from rotoopt.weighting._gradients import task_mask
from rotoopt.weighting._measurements import Reference


class Memory:
    """Counter, references, weights and angles of K tasks. Rotations and weighting have their own state.

    Args:
        rotations: The K rotations.
        weighting: The weighting.

    Attributes:
        num_steps: Number of steps so far.
        sample_sums: Those of the latest step, if agreement was measured in it: the next step uses them.
        agreement_tasks: Tasks whose agreement was measured since the latest update of the rotations.
        weights: The weights of the next backward pass, if it is lagged. Shape ``(K,)``.
        known_norms: The latest nonzero ||G_k||; zero if there was none yet. Shape ``(K,)``.
        norm_reference: ||G_k(t0)||.
        loss_reference: |L_k(t0)|.
        total_angles: Sum of the angles of all updates of each rotation, in radians. Shape ``(K,)``.
        rest: The angles of a step without an update: zeros. Shape ``(K,)``.
    """

    def __init__(self, rotations: Rotations, weighting: Weighting) -> None:
        K, device, dtype = len(rotations), rotations.device, rotations.dtype
        weighting.bind(K, device, dtype)
        self.num_steps = 0
        self.sample_sums: SampleSums | None = None
        self.agreement_tasks: set[int] = set()
        self.weights = torch.ones(K, device=device, dtype=dtype)
        self.known_norms = torch.zeros(K, device=device, dtype=dtype)
        self.norm_reference = Reference.unknown(K, device, dtype)
        self.loss_reference = Reference.unknown(K, device, dtype)
        self.total_angles = torch.zeros(K, device=device, dtype=dtype)
        self.rest = torch.zeros(K, device=device, dtype=dtype)
        self._all_tasks = torch.ones(K, device=device, dtype=torch.bool)
        self._num_tasks = K
        self._rotations = rotations
        self._weighting = weighting

    def to(self, device: torch.device) -> None:
        """Move everything but the rotations to ``device``."""
        self.weights, self.known_norms = self.weights.to(device), self.known_norms.to(device)
        self.total_angles, self.rest = self.total_angles.to(device), self.rest.to(device)
        self._all_tasks = self._all_tasks.to(device)
        self.norm_reference, self.loss_reference = self.norm_reference.to(device), self.loss_reference.to(device)
        self.sample_sums = None if self.sample_sums is None else self.sample_sums.to(self.weights)
        self._weighting.to(device)

    def mask(self, tasks: set[int]) -> Tensor:
        """Return ``tasks`` as a mask; for all tasks, always the same tensor. Shape ``(K,)``, bool."""
        return self._all_tasks if len(tasks) == self._num_tasks else task_mask(tasks, self.weights)

    def state_dict(self) -> dict[str, Any]:
        """Return copies of everything, as plain containers of tensors and numbers."""
        rotations = self._rotations
        return {
            "num_tasks": len(rotations),
            "num_steps": self.num_steps,
            "sample_sums": None if self.sample_sums is None else self.sample_sums.state_dict(),
            "agreement_tasks": sorted(self.agreement_tasks),
            "matrices": None if rotations.size is None else rotations.matrices.clone(),
            "seeds": list(rotations.seeds),
            # Copies: the state dicts of torch's optimizers contain their tensors, which the next step changes.
            "weighting": {type(self._weighting).__name__: copy.deepcopy(self._weighting.state_dict())},
            "weights": self.weights.clone(),
            "known_norms": self.known_norms.clone(),
            "norm_reference": self.norm_reference.state_dict(),
            "loss_reference": self.loss_reference.state_dict(),
            "total_angles": self.total_angles.clone(),
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load what :meth:`state_dict` returned; check it first with :meth:`check_state_dict`."""
        state_dict = copy.deepcopy(state_dict)
        if state_dict["matrices"] is not None:
            self._rotations.load_matrices(state_dict["matrices"])
        elif self._rotations.covers_all:
            self._rotations.discard()  # saved before the first forward pass, which will create them
        self._rotations.seeds = list(state_dict["seeds"])
        self.num_steps = state_dict["num_steps"]
        sums = state_dict["sample_sums"]
        self.sample_sums = None if sums is None else SampleSums(**sums).to(self.weights)
        self.agreement_tasks = set(state_dict["agreement_tasks"])
        self.weights = state_dict["weights"].to(self.weights)
        self.known_norms = state_dict["known_norms"].to(self.known_norms)
        self.norm_reference = self.norm_reference.loaded(state_dict["norm_reference"])
        self.loss_reference = self.loss_reference.loaded(state_dict["loss_reference"])
        self.total_angles = state_dict["total_angles"].to(self.total_angles)
        self._weighting.load_state_dict(state_dict["weighting"].get(type(self._weighting).__name__, {}), self.weights)

    def check_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Raise unless ``state_dict`` matches these tasks, this size and this weighting."""
        rotations, matrices = self._rotations, state_dict["matrices"]
        if state_dict["num_tasks"] != len(rotations):
            raise misfit(f"be of {len(rotations)} tasks", str(state_dict["num_tasks"]), "heads")
        if matrices is not None:
            if rotations.size not in (None, matrices.shape[-1]):
                rule, found = f"have rotations of {rotations.size} features", str(matrices.shape[-1])
                raise misfit(rule, found, "representation and `rotation_size`")
            turned = (matrices != torch.eye(matrices.shape[-1], device=matrices.device)).flatten(1).any(dim=1).tolist()
        else:
            turned = [seed is not None for seed in state_dict["seeds"]]
        for task, rotate in enumerate(rotations.rotate):
            if turned[task] and not rotate:
                raise misfit("have R = I where rotate=False", f"another one for task {task}", "`rotate` flags")
        ((saved, state),) = state_dict["weighting"].items()
        if saved != type(self._weighting).__name__ and (state or self._weighting.state_dict()):
            raise misfit(f"be of weighting {self._weighting}", f"that of {saved}", "`weighting`")


def misfit(rule: str, found: str, option: str) -> ValueError:
    """Return the error for a state dict that must ``rule``, which depends on ``option``."""
    return ValueError(
        f"The state dict must {rule}, got {found}. Build the optimizer with the {option} that it was saved with."
    )
