"""Homogenization: from K gradients at the representation to one for the backbone, and to the rotation step."""

from __future__ import annotations

import copy
from collections.abc import Collection, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from rotoopt.distributed import JoinedGradients, Processes
from rotoopt.gradients import TaskGradients
from rotoopt.normalization import Reference
from rotoopt.record import StepRecord
from rotoopt.representation import RotatedDims
from rotoopt.rotation_step import CayleyStep, RotationStep
from rotoopt.weighting import Progress, Weighting


class Homogenizer:
    """The state of the method: references, weighting and rotation step, fed by one backward pass after another.

    Args:
        num_tasks: K.
        weighting: How K gradients become one.
        rotation_step: What turns the rotations.
        burn_in_period: Step at which the references are taken anew.
        processes: Those that share a batch.
        needs_losses: Whether gradients without losses are an error, whatever the weighting needs.
    """

    def __init__(
        self,
        num_tasks: int,
        weighting: Weighting,
        rotation_step: RotationStep,
        burn_in_period: int,
        processes: Processes,
        *,
        needs_losses: bool = False,
    ) -> None:
        rotations = rotation_step.rotations
        self.weighting = weighting
        self.rotation_step = rotation_step
        self.burn_in_period = burn_in_period
        self.processes = processes
        self.needs_losses = needs_losses or weighting.needs_losses
        self.num_steps = 0
        self.norm_reference = Reference.unknown(num_tasks, rotations.device, rotations.dtype)
        self.loss_reference = Reference.unknown(num_tasks, rotations.device, rotations.dtype)
        self.total_angles = torch.zeros(num_tasks, device=rotations.device, dtype=rotations.dtype)
        self.record: StepRecord | None = None
        self.pending = False
        self._processes_checked = False
        self._losses: Tensor | None = None
        self._loss_scale: Tensor | None = None

    def expect(self, losses: Mapping[int, Tensor], loss_scale: Tensor | None = None) -> Tensor:
        """Note the losses of the backward pass to come.

        Args:
            losses: L_k of the present tasks.
            loss_scale: What they will be multiplied by, as by a ``GradScaler``. Shape ``()``.

        Returns:
            |L_k(t0)|, by which normalized losses are divided; one where there is none yet. Shape ``(K,)``.
        """
        self._follow_rotations()
        self._loss_scale = loss_scale
        values = torch.full_like(self.loss_reference.values, float("nan"))
        for task, loss in losses.items():
            values[task] = loss.detach().squeeze()
        if self.processes.count > 1:
            values = self.processes.mean(values, self._mask(losses))
        self._losses = values
        references = self._next_loss_reference().values
        return torch.where(references.isnan(), 1.0, references)

    def expect_nothing(self) -> None:
        """Note that the losses of the backward passes to come are not known."""
        self._losses = self._loss_scale = None

    def _follow_rotations(self) -> None:
        """Move to the device of the rotations, which follow the representation."""
        device = self.rotation_step.rotations.device
        if self.norm_reference.values.device != device:
            self.norm_reference, self.loss_reference = self.norm_reference.to(device), self.loss_reference.to(device)
            self.total_angles = self.total_angles.to(device)
            self.weighting.to(device)
            self.rotation_step.to(device)

    def _mask(self, tasks: Collection[int]) -> Tensor:
        """Return ``tasks`` as a mask, made without a copy from the host. Shape ``(K,)``, bool."""
        mask = torch.ones_like(self.loss_reference.settled)
        for task in set(range(len(mask))) - set(tasks):
            mask[task] = False
        return mask

    def _next_loss_reference(self) -> Reference:
        if self._losses is None:
            return self.loss_reference
        present = ~self._losses.isnan()
        return self.loss_reference.updated(self._losses.abs(), present, burnt_in=self.burnt_in)

    @property
    def _built_in_step(self) -> bool:
        return isinstance(self.rotation_step, CayleyStep)

    @property
    def burnt_in(self) -> bool:
        """Whether the references taken now are final."""
        return self.num_steps >= self.burn_in_period

    @torch.no_grad()
    def receive(self, grads: Tensor, tasks: tuple[int, ...], dims: RotatedDims) -> Tensor:
        """Combine the gradients of one backward pass and collect the rotation gradient.

        Args:
            grads: G. Shape ``(K, *shape)``, zero for absent tasks; changed in place.
            tasks: The tasks that are present.
            dims: The rotated dimensions of the representation.

        Returns:
            The gradient for the representation. Shape ``shape``.

        Raises:
            RuntimeError: If the losses are needed, but were not given to :meth:`expect`.
        """
        if self.needs_losses and self._losses is None:
            raise RuntimeError(
                "GradNorm and normalize_losses=True must see the losses, got none. Call optimizer.step(losses) or "
                "optimizer.backward(losses) instead of your own sum(losses).backward()."
            )
        self._follow_rotations()
        shape = grads.shape[1:]
        with torch.autocast(grads.device.type, enabled=False):
            gradients, magnified = self._measure(grads.flatten(1), tasks)
            finite = gradients.finite
            if self._losses is not None:
                finite = finite & (self._losses.isfinite() | ~gradients.present).all()
            references = self._references(gradients, finite)
            combined = self.weighting.combine(gradients, self._progress(gradients, finite, *references))
            self.norm_reference, self.loss_reference = references
            # Alone, a task is its own target. What other processes have, the host does not know.
            alone = len(tasks) == 1 and self.processes.count == 1
            if not alone and self.rotation_step.is_due(self.num_steps):
                self._collect(gradients, shape, dims, finite)
        self.record = StepRecord(
            self.num_steps,
            self._losses,
            gradients.norms,
            combined.weights,
            gradients.cosines,
            gradients.present,
            finite,
            torch.zeros_like(self.total_angles),
            self.total_angles,
            self.rotation_step.lr,
            self.rotation_step.rotations,
        )
        self.pending = True
        vector = combined.vector if magnified is None else combined.vector * magnified
        return vector.reshape(shape)

    def _measure(self, grads: Tensor, tasks: tuple[int, ...]) -> tuple[TaskGradients, Tensor | float | None]:
        """Return the gradients of the batch of all processes, and how many times larger ``grads`` are."""
        own = TaskGradients.of(grads, tasks, self._mask(tasks))
        scale = self._loss_scale
        if self.processes.count == 1:
            return (own, None) if scale is None else (own.divided_by(scale), scale)
        if not self._processes_checked:
            self.processes.check_same(self.rotation_step.rotations.matrices)
            self._processes_checked = True
        # The loss of the joined batch is the mean over the processes, which DistributedDataParallel takes afterwards.
        magnified = self.processes.count if scale is None else scale * self.processes.count
        return JoinedGradients.join(own, self.processes).divided_by(magnified), magnified

    def _references(self, gradients: TaskGradients, finite: Tensor) -> tuple[Reference, Reference]:
        """Return the references of norms and losses, those that are due taken anew."""
        norms = self.norm_reference.updated(gradients.norms, gradients.present, burnt_in=self.burnt_in)
        losses = self._next_loss_reference()
        return norms.keep_if(finite, self.norm_reference), losses.keep_if(finite, self.loss_reference)

    def _progress(self, gradients: TaskGradients, finite: Tensor, norms: Reference, losses: Reference) -> Progress:
        norm_ratios = norms.ratios(gradients.norms)
        if self._losses is None:
            return Progress(norm_ratios, None, finite)
        loss_ratios = self._losses / torch.where(losses.values.isnan(), 1.0, losses.values)
        return Progress(norm_ratios, loss_ratios, finite)

    def _collect(self, gradients: TaskGradients, shape: torch.Size, dims: RotatedDims, finite: Tensor) -> None:
        directions = gradients.directions()
        target = directions.sum(0) / gradients.num_present
        stacked = dims.view_stacked(directions.view(-1, *shape))
        self.rotation_step.collect(stacked, dims.view(target.view(shape)), finite)

    def finish_step(self) -> None:
        """Turn the rotations and train the weights from what was collected; a no-op without a backward pass."""
        if not self.pending:
            return
        # A training loop may step inside of its autocast.
        with torch.autocast(self.rotation_step.rotations.device.type, enabled=False):
            angles = self.rotation_step.step()
            self.weighting.step()
        self.total_angles = self.total_angles + angles
        if self.record is not None:
            self.record = replace(self.record, angles=angles, total_angles=self.total_angles)
        self.num_steps += 1
        self.clear()

    def clear(self) -> None:
        """Forget what was collected since the last step."""
        self.rotation_step.clear()
        self.weighting.zero_grad()
        self.pending = False

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self.clear()  # torch does not copy the gradients of parameters, so a copy has none to step on

    def state_dict(self) -> dict[str, Any]:
        """Return everything needed to resume, as plain containers of tensors and numbers."""
        rotations = self.rotation_step.rotations
        return {
            "num_tasks": len(rotations),
            "num_steps": self.num_steps,
            "built_in_step": self._built_in_step,
            "matrices": None if rotations.size is None else rotations.matrices.clone(),
            # Copies: torch hands out the tensors themselves, which the next step changes.
            "rotation_optimizer": copy.deepcopy(self.rotation_step.state_dict()),
            "weighting": copy.deepcopy(self.weighting.state_dict()),
            "norm_reference": self.norm_reference.state_dict(),
            "loss_reference": self.loss_reference.state_dict(),
            "total_angles": self.total_angles,
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load what :meth:`state_dict` returned; check it first with :meth:`check_state_dict`."""
        state_dict = copy.deepcopy(state_dict)
        self.num_steps = state_dict["num_steps"]
        rotations = self.rotation_step.rotations
        if state_dict["matrices"] is not None:
            rotations.load_matrices(state_dict["matrices"])
        elif rotations.covers_all:
            rotations.manifold = None  # saved before the first forward pass, which will make them
        self.rotation_step.load_state_dict(state_dict["rotation_optimizer"])
        self.weighting.load_state_dict(state_dict["weighting"])
        self.norm_reference = self.norm_reference.loaded(state_dict["norm_reference"])
        self.loss_reference = self.loss_reference.loaded(state_dict["loss_reference"])
        self.total_angles = state_dict["total_angles"].to(self.total_angles)
        self.clear()

    def check_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Raise unless ``state_dict`` fits these tasks, this size and these options."""
        rotations, matrices = self.rotation_step.rotations, state_dict["matrices"]
        if state_dict["num_tasks"] != len(rotations):
            raise _misfit(f"be of {len(rotations)} tasks", str(state_dict["num_tasks"]), "heads")
        if matrices is not None:
            if rotations.size not in (None, matrices.shape[-1]):
                rule, found = f"hold rotations of {rotations.size} features", str(matrices.shape[-1])
                raise _misfit(rule, found, "representation and `rotation_size`")
            turned = (matrices != torch.eye(matrices.shape[-1]).to(matrices)).flatten(1).any(dim=1).tolist()
            for task, rotate in enumerate(rotations.rotate):
                if turned[task] and not rotate:
                    raise _misfit("hold R = I where rotate=False", f"a turned one for task {task}", "`rotate` flags")
        if self.weighting.state_dict().keys() != state_dict["weighting"].keys():
            raise _misfit(f"be of weighting {self.weighting}", "that of another one", "`weighting`")
        if self._built_in_step != state_dict["built_in_step"]:
            steps = {True: "the built-in rotation step", False: "a `rotation_optimizer`"}
            built_in = self._built_in_step
            raise _misfit(f"be of {steps[built_in]}", f"that of {steps[not built_in]}", "`rotation_optimizer`")


def _misfit(rule: str, found: str, option: str) -> ValueError:
    return ValueError(
        f"The state dict must {rule}, got {found}. Build the optimizer with the {option} that it was saved with."
    )
