"""The engine: everything that happens before, in and after a backward pass, in order."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from rotoopt._capture.capture import Capture
from rotoopt._capture.fork import BackwardPass, Fed
from rotoopt._capture.representation import RotatedDims
from rotoopt._capture.wiring import check_wiring
from rotoopt._engine.arguments import Losses, check_backbone_loss, check_losses, check_rep, warn_of_frozen
from rotoopt._engine.memory import Memory
from rotoopt._engine.record import StepRecord
from rotoopt._rotation.rotations import Rotations
from rotoopt._rotation.step import RotationGradient
from rotoopt._torch.private import backward_pass_id
from rotoopt._torch.processes import Processes
from rotoopt.weighting import Measurements, Weighting
from rotoopt.weighting._gradients import JoinedGradients, TaskGradients, task_mask
from rotoopt.weighting._measurements import joined, joined_across


class Engine:
    """Rotates representations, weighs the gradients of backward passes, and remembers what they measured.

    It turns no rotation: who does takes :meth:`rotation_gradients`, and then calls :meth:`finish_step`.

    Args:
        names: How to call the K tasks.
        rotations: The rotations; everything else is kept where they are, in their dtype.
        dims: The rotated dimensions of the representation.
        weighting: How K gradients become one.
        burn_in_period: Step at which the references are taken anew.
        normalize_losses: Whether to back-propagate ``L_k / |L_k(t0)|`` instead of L_k.
        turn_every: In the first of so many steps the rotations turn, and the gradients of all tasks meet.
        processes: Those that share a batch.
    """

    def __init__(
        self,
        names: Sequence[str],
        rotations: Rotations,
        *,
        dims: RotatedDims,
        weighting: Weighting,
        burn_in_period: int,
        normalize_losses: bool,
        turn_every: int,
        processes: Processes,
    ) -> None:
        self.names = tuple(names)
        self.rotations = rotations
        self.weighting = weighting
        self.processes = processes
        self.burn_in_period = burn_in_period
        self.normalize_losses = normalize_losses
        self.turn_every = turn_every
        self.capture = Capture(rotations, dims, self._running_pass)
        self.memory = Memory(rotations, weighting)
        self._record: StepRecord | None = None
        self._running: BackwardPass | None = None
        self._passes: list[BackwardPass] = []  # those since the latest step
        self._wiring_checked = self._warned_of_frozen = self._processes_checked = False

    # ------------------------------------------------------------------ before

    def backward(
        self,
        losses: Losses,
        rep: Tensor | None,
        backbone_loss: Tensor | None,
        scaler: torch.amp.GradScaler | None = None,
        **options: Any,
    ) -> None:
        """Fill every ``.grad``; ``options`` are those of ``torch.autograd.backward``."""
        present = check_losses(losses, self.names)
        check_rep(rep, self.capture.last_shape)
        check_backbone_loss(backbone_loss)
        frozen = self.capture.fed.is_frozen(present)
        if frozen:
            if not self._warned_of_frozen:
                self._warned_of_frozen = True
                warn_of_frozen()
        elif not self._wiring_checked or not self.capture.fed.looks_complete(present):
            check_wiring(present, self.names, backbone_loss)
            self._wiring_checked = True
        self.close()
        scale = None if scaler is None else scaler.scale(torch.ones((), device=next(iter(present.values())).device))
        try:
            self._running = this = self._open(self._values(present), scale)
            roots = list(present.values())
            if self.normalize_losses and not frozen:
                divisors = this.loss_reference.known_or_one()
                roots = [loss / divisors[task] for task, loss in present.items()]
            roots = roots if backbone_loss is None else [*roots, backbone_loss]
            torch.autograd.backward(roots if scale is None else [root * scale for root in roots], **options)
            self.close()
        finally:
            self._running = None
            self.capture.fed = Fed()

    def _values(self, present: Mapping[int, Tensor]) -> Tensor:
        """Return the losses of the joined batch, NaN for an absent task. Shape ``(K,)``."""
        self._follow_rotations()
        values = torch.full_like(self.memory.weights, torch.nan)
        for task, loss in present.items():
            values[task] = loss.detach().squeeze()
        if self.processes.count > 1:
            values = self.processes.mean(values, task_mask(set(present), values))
        return values

    def _open(self, losses: Tensor | None, loss_scale: Tensor | None, number: int | None = None) -> BackwardPass:
        """Return a new backward pass: which way its gradients go depends on what the weighting and the step need."""
        if losses is None and (self.normalize_losses or self.weighting.needs_losses):
            who = "normalize_losses=True" if self.normalize_losses else repr(self.weighting)
            raise RuntimeError(
                f"{who} must see the losses, got none. Call optimizer.step(losses) or optimizer.backward(losses) "
                "instead of your own sum(losses).backward()."
            )
        self._follow_rotations()
        memory, weighting = self.memory, self.weighting
        loss_reference = memory.loss_reference
        if losses is not None:
            loss_reference = loss_reference.updated(losses.abs(), ~losses.isnan(), burnt_in=self._burnt_in)
        return BackwardPass(
            number,
            losses,
            loss_scale,
            weights=memory.weights if weighting.lagged else None,
            waits=not weighting.lagged or weighting.needs_cosines or self._turns_are_due,
            combine=self._combine,
            norm_reference=memory.norm_reference,
            loss_reference=loss_reference,
        )

    def _follow_rotations(self) -> None:
        """Move what is remembered to where the rotations are, which follow the representation."""
        if self.memory.weights.device != self.rotations.device:
            self.memory.to(self.rotations.device)

    @property
    def _burnt_in(self) -> bool:
        """Whether the references taken now are final."""
        return self.memory.num_steps >= self.burn_in_period

    @property
    def _turns_are_due(self) -> bool:
        return self.memory.num_steps % self.turn_every == 0

    # ------------------------------------------------------------------ in the backward pass

    def _running_pass(self) -> BackwardPass:
        """Return the backward pass that runs; in one that the user calls, the first gradient opens it."""
        number = backward_pass_id()
        if self._running is None or self._running.number not in (None, number):
            self.close()
            self._running = self._open(None, None, number)
        return self._running

    @torch.no_grad()
    def _combine(self, this: BackwardPass, grads: Tensor, tasks: tuple[int, ...], dims: RotatedDims) -> Tensor:
        """Return the gradient for the representation, of those of all tasks, and note what the rotations turn by."""
        shape = grads.shape[1:]
        with torch.autocast(grads.device.type, enabled=False):
            gradients, magnified = self._joined_batch(this, grads.flatten(1), tasks)
            measured = self._measured(this, gradients.norms, gradients.present, gradients.finite, gradients.cosines)
            weights = self.memory.weights if self.weighting.lagged else self.weighting(measured)
            vector = self.weighting.combine(gradients, weights)
            this.measured, this.weights = measured, weights
            # Alone, a task is its own target. What other processes have, the host does not know.
            alone = len(tasks) == 1 and self.processes.count == 1
            if self._turns_are_due and any(self.rotations.rotate) and not alone:
                this.rotation_gradients.append(_rotation_gradient(gradients, measured.finite, shape, dims))
        return (vector if magnified is None else vector * magnified).reshape(shape)

    def _joined_batch(
        self, this: BackwardPass, grads: Tensor, tasks: tuple[int, ...]
    ) -> tuple[TaskGradients, Tensor | float | None]:
        """Return the gradients of the batch of all processes, and how many times larger ``grads`` are."""
        own = TaskGradients.of(grads, tasks, task_mask(set(tasks), self.memory.weights))
        scale = this.loss_scale
        if self.processes.count == 1:
            return (own, None) if scale is None else (own.divided_by(scale), scale)
        if not self._processes_checked:
            self.processes.check_same(self.rotations.matrices)
            self._processes_checked = True
        # The loss of the joined batch is the mean over the processes, which DistributedDataParallel takes afterwards.
        magnified = self.processes.count if scale is None else scale * self.processes.count
        return JoinedGradients.join(own, self.processes).divided_by(magnified), magnified

    def _measured(
        self, this: BackwardPass, norms: Tensor, present: Tensor, finite: Tensor, cosines: Tensor | None
    ) -> Measurements:
        """Return what ``this`` measured, and take the references that are due."""
        if this.losses is not None:
            finite = finite & (this.losses.isfinite() | ~present).all()
        this.loss_reference = this.loss_reference.keep_if(finite, self.memory.loss_reference)
        if not self.weighting.lagged:  # else once per step, from all backward passes together
            reference = this.norm_reference.updated(norms, present, burnt_in=self._burnt_in)
            this.norm_reference = reference.keep_if(finite, this.norm_reference)
        return Measurements(
            norms, present, finite, this.losses, cosines, this.norm_reference.values, this.loss_reference.values
        )

    # ------------------------------------------------------------------ after

    @torch.no_grad()
    def close(self) -> None:
        """Take over what the latest backward pass measured: if it was the user's, nobody says when it ends."""
        this, self._running = self._running, None
        if this is None or not this.tasks:
            return
        if not this.waits:
            magnified = self.processes.count if this.loss_scale is None else this.loss_scale * self.processes.count
            norms = this.norms_on_the_way(self.memory.weights) / magnified
            this.measured = self._measured(this, norms, task_mask(this.tasks, norms), norms.isfinite().all(), None)
        self.memory.norm_reference, self.memory.loss_reference = this.norm_reference, this.loss_reference
        self._passes.append(this)
        self._record = StepRecord.of(this, self.memory, self.rotations, self._record)

    @property
    def record(self) -> StepRecord | None:
        """What the latest backward pass, or the step after it, measured. None before the first."""
        self.close()
        return self._record

    @record.setter
    def record(self, record: StepRecord | None) -> None:
        self._record = record

    @property
    def pending(self) -> bool:
        """Whether there was a backward pass since the latest step."""
        self.close()
        return bool(self._passes)

    @property
    def rotation_gradients(self) -> list[RotationGradient]:
        """The gradients of the rotations in the backward passes since the latest step."""
        self.close()
        return [gradient for this in self._passes for gradient in this.rotation_gradients]

    @torch.no_grad()
    def finish_step(self, angles: Tensor, rotation_lr: float | Tensor) -> None:
        """Learn from the backward passes since the latest step, and forget them.

        Args:
            angles: By how much the rotations turned, in radians. Shape ``(K,)``.
            rotation_lr: Their learning rate.
        """
        if not self.pending:
            return
        if self.weighting.lagged:
            # A training loop may step inside of its autocast.
            with torch.autocast(self.rotations.device.type, enabled=False):
                self._learn()
        memory = self.memory
        memory.total_angles = memory.total_angles + angles
        assert self._record is not None  # there was a pass
        self._record = replace(self._record, angles=angles, total_angles=memory.total_angles, rotation_lr=rotation_lr)
        memory.num_steps += 1
        self.clear()

    def _learn(self) -> None:
        """Make the weights of the next step from what all backward passes of this one measured."""
        memory, latest = self.memory, self._passes[-1]
        measured = joined([this.measured for this in self._passes if this.measured is not None])
        if self.processes.count > 1 and not latest.waits:
            measured = joined_across(measured, self.processes)
        reference = memory.norm_reference.updated(measured.norms, measured.present, burnt_in=self._burnt_in)
        measured = replace(measured, norm_references=reference.values)
        if self.processes.count > 1 or len(self._passes) > 1:
            latest.measured = measured
            self._record = StepRecord.of(latest, memory, self.rotations, self._record)
        memory.norm_reference, memory.weights = reference, self.weighting(measured)

    def state_dict(self) -> dict[str, Any]:
        """Return everything needed to resume, but for what turns the rotations."""
        self.close()
        return self.memory.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load what :meth:`state_dict` returned; check it first with :meth:`Memory.check_state_dict`."""
        self.clear()
        self.memory.load_state_dict(state_dict)

    def clear(self) -> None:
        """Forget the backward passes since the latest step."""
        self._running = None
        self._passes.clear()

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self.clear()  # torch does not copy the gradients of parameters, so a copy has none to step on


def _rotation_gradient(
    gradients: TaskGradients, usable: Tensor, shape: torch.Size, dims: RotatedDims
) -> RotationGradient:
    directions = gradients.directions()
    target = directions.sum(0) / gradients.num_present
    directions, target = torch.where(usable, directions, 0.0), torch.where(usable, target, 0.0)
    return RotationGradient(dims.view_stacked(directions.view(-1, *shape)), dims.view(target.view(shape)), usable)
