"""The engine: the steps before, during and after a backward pass, in order."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from rotoopt._capture.backward_pass import BackwardPass
from rotoopt._capture.capture import Capture
from rotoopt._capture.faults import check_weighting
from rotoopt._capture.fork import SPENT
from rotoopt._capture.representation import RotatedDims
from rotoopt._capture.wiring import Wiring
from rotoopt._engine.construction import Parts
from rotoopt._engine.losses import Losses, check_backbone_loss, check_losses, check_rep
from rotoopt._engine.memory import Memory
from rotoopt._engine.record import StepRecord
from rotoopt._engine.turning import cosines_of, rotation_gradients
from rotoopt._engine.watch import BorrowedHeads, ForeignSteps, FrozenRepresentation, SilentHeads
from rotoopt._engine.weighing import Weighing
from rotoopt._rotation.rotations import Rotations
from rotoopt._rotation.step import RotationGradient
from rotoopt._torch.autocast import without_autocast
from rotoopt._torch.private import backward_pass_id, running_inputs
from rotoopt._torch.processes import Processes
from rotoopt._torch.subclasses import plain
from rotoopt.weighting import Measurements, Weighting


class Engine:
    """Rotates the inputs of the heads, weights the gradients, and updates the statistics of earlier steps.

    It does not update the rotations itself: :meth:`finish_step` calls a function that does.

    Args:
        names: Names of the K tasks.
        heads: The modules and parameters of each task alone, if known.
        rotations: The rotations; they determine device and dtype of everything else.
        dims: The rotated dimensions of the representation.
        weighting: Combines the K gradients.
        burn_in_period: Step in which the references are measured again.
        normalize_losses: Whether to back-propagate ``L_k / |L_k(t0)|`` instead of L_k.
        turn_every: Number of steps between updates of the rotations, for which the gradients of all tasks are
            collected.
        needs_second_moment: Whether the rotation step uses the second moment of the representation.
        processes: The processes that share a batch.
    """

    def __init__(
        self,
        names: Sequence[str],
        heads: Sequence[Parts],
        rotations: Rotations,
        *,
        dims: RotatedDims,
        weighting: Weighting,
        burn_in_period: int,
        normalize_losses: bool,
        turn_every: int,
        needs_second_moment: bool,
        processes: Processes,
    ) -> None:
        self.names = tuple(names)
        self.rotations = rotations
        self.weighting = weighting
        self.processes = processes
        self.normalize_losses = normalize_losses
        self.turn_every = turn_every
        self._needs_second_moment = needs_second_moment
        self.capture = Capture(
            rotations, dims, self._running_pass, self._measures_second_moments, self._agreement_seed, self._are_own
        )
        self.memory = Memory(rotations, weighting)
        self._weighing = Weighing(
            weighting,
            self.memory,
            rotations,
            processes,
            burn_in_period=burn_in_period,
            turn_every=turn_every,
            normalize_losses=normalize_losses,
        )
        self._wiring = Wiring(self.names, heads, self.capture.places)
        self.frozen_representation = FrozenRepresentation()
        self._silent_heads = SilentHeads(self.names)
        self._foreign_steps = ForeignSteps(heads)
        self.borrowed_heads = BorrowedHeads(heads)
        self._record: StepRecord | None = None
        self._running: BackwardPass | None = None
        self._passes: list[BackwardPass] = []  # since the latest step
        self._one_tensor_on_all: bool | None = None  # agreed on by the processes

    # ------------------------------------------------------------------ before

    def backward(
        self,
        losses: Losses,
        rep: Any,
        backbone_loss: Tensor | None,
        scaler: torch.amp.GradScaler | None = None,
        **options: Any,
    ) -> None:
        """Compute all gradients; ``options`` are those of ``torch.autograd.backward``."""
        self.capture.check_attached()
        present = check_losses(losses, self.names)
        check_backbone_loss(backbone_loss)
        frozen = self.capture.fed.is_frozen(present)
        if frozen:
            self.frozen_representation.observe()
        one_tensor = frozen or self._wiring.check(present, self.capture.fed, backbone_loss)
        check_rep(rep, self.capture.fed, self.names)
        self.close()
        scale = None if scaler is None else scaler.scale(torch.ones((), device=next(iter(present.values())).device))
        try:
            self._running = this = self._open(self._values(present), scale, one_tensor=one_tensor)
            this.expected = frozenset(present)
            roots = list(present.values())
            if self.normalize_losses and not frozen:
                divisors = self._weighing.loss_reference(this).known_or_one()
                roots = [loss / divisors[task] for task, loss in present.items()]
            roots = roots if backbone_loss is None else [*roots, backbone_loss]
            _back_propagate(roots if scale is None else [root * scale for root in roots], **options)
            self.close()
        finally:
            self._running = None
            self.capture.fed = self.capture.fed.following()

    @torch.no_grad()
    def _values(self, present: Mapping[int, Tensor]) -> Tensor:
        """Return the losses of the joined batch, NaN for an absent task. Shape ``(K,)``."""
        self._follow_rotations()
        like = self.memory.weights
        known = {task: _number(loss, like) for task, loss in present.items()}
        if len(known) < len(self.names):
            known = {**dict.fromkeys(range(len(self.names)), like.new_full((), torch.nan)), **known}
        values = torch.stack([known[task] for task in range(len(self.names))])
        if self.processes.count > 1:
            values = self.processes.mean(values, self.memory.mask(set(present)))
        return values

    def _open(
        self, losses: Tensor | None, loss_scale: Tensor | None, *, one_tensor: bool, number: int | None = None
    ) -> BackwardPass:
        """Return a new backward pass, with the route of gradients that the weighting and the rotation step need."""
        if losses is None and (self.normalize_losses or self.weighting.needs_losses):
            who = "normalize_losses=True" if self.normalize_losses else repr(self.weighting)
            raise RuntimeError(
                f"{who} must see the losses, got none. Call optimizer.step(losses) or optimizer.backward(losses) "
                "instead of your own sum(losses).backward()."
            )
        self.capture.places.propose(self.capture.fed.forks)
        self._follow_rotations()
        memory, weighting, count = self.memory, self.weighting, self.processes.count
        lagged = self._lags(one_tensor)
        self.borrowed_heads.begin(self._wiring.take_shared())
        return BackwardPass(
            number,
            losses,
            loss_scale if count == 1 else count if loss_scale is None else loss_scale * count,
            weights=memory.weights if lagged else None,
            lagged=lagged,
            meets=weighting.needs_cosines or self._weighing.turns_are_due,
            combine=self._weighing.combine,
            known_norms=self._passes[-1].known_norms if self._passes else memory.known_norms,
            norm_reference=memory.norm_reference,
            loss_reference=memory.loss_reference,
            returns=number is not None and bool(running_inputs()),
        )

    def _lags(self, one_tensor: bool) -> bool:
        """Return whether the weights of a backward pass were computed in the step before."""
        check_weighting(self.weighting, self.capture.fed, self.names, one_tensor=one_tensor)
        lagged = self.weighting.lagged and self.memory.num_steps >= self.weighting.num_waiting
        if lagged or self.processes.count == 1:
            return lagged or not one_tensor
        if self.weighting.lagged:  # in the first steps
            return not self.processes.all(one_tensor)
        if self._one_tensor_on_all is None:  # in the first pass; later ones exchange norms only if all expect it
            self._one_tensor_on_all = self.processes.all(one_tensor)
        if self._one_tensor_on_all and not one_tensor:
            raise RuntimeError(
                "All heads must continue to read one tensor under distributed training, got several after steps with "
                f"one: {self.capture.fed.described(self.names)}. The processes exchange norms in the backward pass, "
                "all at the same time. Use a lagged weighting, such as EqualWeighting()."
            )
        return not self._one_tensor_on_all

    def _follow_rotations(self) -> None:
        """Move the state to the device of the rotations, which follow the representation."""
        if self.memory.weights.device != self.rotations.device:
            self.memory.to(self.rotations.device)

    def _measures_second_moments(self) -> bool:
        """Return whether the rotation update of this step needs the second moment of the representation."""
        return self._needs_second_moment and self._weighing.turns_are_due

    def _are_own(self, params: Iterable[Tensor], task: int) -> bool:
        """Return whether ``params`` belong to ``task`` alone."""
        return self._wiring.are_own(params, task)

    def _agreement_seed(self) -> int | None:
        """Return the seed of the projections if the agreement is measured in this step; constant between updates."""
        if not self._weighing.agreement_is_due:
            return None
        return (self.memory.num_steps // self.turn_every * self.turn_every) << 20

    # ------------------------------------------------------------------ in the backward pass

    def _running_pass(self) -> BackwardPass:
        """Return the current backward pass; if the user called ``backward()``, the first gradient opens it."""
        if self._running is not None and self._running.number is None:
            return self._running
        number = backward_pass_id()
        if self._running is None or self._running.number != number:
            self.close()
            self._foreign_steps.observe(len(self._passes))
            try:
                one_tensor, tasks = self._wiring.check_running(self.capture.fed)
                self._running = self._open(None, None, one_tensor=one_tensor, number=number)
                self._running.expected = tasks
            finally:
                self.capture.fed = self.capture.fed.following()
        return self._running

    # ------------------------------------------------------------------ after

    def close(self) -> None:
        """Finish the latest backward pass: the end of a ``backward()`` of the user is not known when it happens."""
        this, self._running = self._running, None
        if this is not None and this.tasks:
            self._measure(this)

    @torch.no_grad()
    def _measure(self, this: BackwardPass) -> None:
        """Measure the gradients of a backward pass that has ended."""
        if this.measures:
            self._wiring.warn_of_measured()
        if this.lagged:
            norms = this.joint_norms()
            cosines = cosines_of(this, norms) if this.meets else None
            norms = norms if this.magnified is None else norms / this.magnified
            this.measured = self._weighing.measure(this, norms, self.memory.mask(this.tasks), cosines)
        memory = self.memory
        memory.norm_reference, memory.loss_reference = this.norm_reference, this.loss_reference
        self._record = StepRecord.of(this, memory, self.rotations, self._record, begun=bool(self._passes))
        self._passes.append(this)

    @property
    def record(self) -> StepRecord | None:
        """Measurements of the latest backward pass, and of the step after it. None before the first."""
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

    @torch.no_grad()
    def finish_step(
        self, turn: Callable[[Sequence[RotationGradient], Tensor | None], Tensor | None], rotation_lr: float | Tensor
    ) -> None:
        """Update weights and rotations from the backward passes since the latest step, and forget these passes.

        Args:
            turn: Updates the rotations, as :meth:`RotationStep.step`, and returns their angles in radians, shape
                ``(K,)``; None if there was no update.
            rotation_lr: Their learning rate.
        """
        if not self.pending:
            return
        # A training loop may call step() under autocast.
        with without_autocast(self.rotations.device):
            self._weighing.agree(self.capture.places)
            tasks = self._weighing.joint_tasks(self._passes)
            measured, latest = self._weighing.learn(self._passes, tasks), self._passes[-1]
            joined = self.processes.count > 1 or len(self._passes) > 1
            if joined and any(this.lagged for this in self._passes):
                self._record = StepRecord.of(
                    replace(latest, measured=measured), self.memory, self.rotations, self._record
                )
            angles = turn(self._rotation_gradients(measured, tasks), self.weighting.remaining)
        memory = self.memory
        if angles is not None:
            memory.total_angles = memory.total_angles + angles
        assert self._record is not None  # there was a pass
        self._record = replace(
            self._record,
            angles=memory.rest if angles is None else angles,
            total_angles=memory.total_angles,
            rotation_lr=rotation_lr,
        )
        memory.num_steps += 1
        self.capture.places.decide()
        self._silent_heads.observe(self._passes)
        self.borrowed_heads.forget()
        self.clear()

    def _rotation_gradients(self, measured: Measurements, tasks: Sequence[set[int]]) -> list[RotationGradient]:
        """Return the gradients of the rotations; none in a step without an update."""
        size = self.rotations.size
        gradients = rotation_gradients(self._passes, measured, tasks, self.capture.dims, self.rotations)
        # If one process updates its rotations, all do.
        all_turn = self._weighing.joint_turns_are_due and any(len(each) > 1 for each in tasks)
        if not gradients and all_turn and size is not None:
            return [RotationGradient.none(len(self.names), size, like=measured.norms)]
        return gradients

    def state_dict(self) -> dict[str, Any]:
        """Return everything needed to resume, except the state of the rotation step."""
        self.close()
        return {**self.memory.state_dict(), "places": self.capture.places.state_dict()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load what :meth:`state_dict` returned; check it first with :meth:`Memory.check_state_dict`."""
        self.clear()
        self.memory.load_state_dict(state_dict)
        self.capture.places.load_state_dict(state_dict["places"])
        self.capture.whereabouts.mark_as_loaded()
        self.capture.latest_weights.forget()

    def clear(self) -> None:
        """Forget the backward passes since the latest step."""
        self._running = None
        self._passes.clear()

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self.clear()  # torch does not copy the gradients of parameters, so a copy has none


def _number(loss: Tensor, like: Tensor) -> Tensor:
    """Return ``loss`` with shape ``()``, in the dtype and on the device of ``like``."""
    number = plain(loss if loss.ndim == 0 else loss.reshape(()))
    return number if number.dtype == like.dtype and number.device == like.device else number.to(like)


def _back_propagate(roots: list[Tensor], **options: Any) -> None:
    try:
        torch.autograd.backward(roots, **options)
    except RuntimeError as error:
        if "backward through the graph a second time" in str(error):
            raise RuntimeError(SPENT) from error
        raise
