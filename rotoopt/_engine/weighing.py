"""Weighting: combines K gradients, and computes the weights of the next backward pass from measurements."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from rotoopt._capture.agreement import SampleSums
from rotoopt._capture.backward_pass import BackwardPass, Met
from rotoopt._capture.fork import Fork
from rotoopt._capture.places import Places
from rotoopt._engine.memory import Memory
from rotoopt._rotation.rotations import Rotations
from rotoopt._torch.autocast import without_autocast
from rotoopt._torch.processes import Processes
from rotoopt.weighting import Measurements, Weighting
from rotoopt.weighting._gradients import JoinedGradients, TaskGradients, all_finite
from rotoopt.weighting._measurements import Reference, joined, joined_across


class Weighing:
    """Weights the gradients of backward passes, over the joined batch of all processes, and remembers their norms.

    Args:
        weighting: Computes the weights.
        memory: The state of the method.
        rotations: The rotations.
        processes: The processes that share a batch.
        burn_in_period: Step in which the references are measured again.
        turn_every: Number of steps between updates of the rotations.
        normalize_losses: Whether losses are divided by their references.
    """

    def __init__(
        self,
        weighting: Weighting,
        memory: Memory,
        rotations: Rotations,
        processes: Processes,
        *,
        burn_in_period: int,
        turn_every: int,
        normalize_losses: bool,
    ) -> None:
        self._weighting = weighting
        self._memory = memory
        self._rotations = rotations
        self._processes = processes
        self._burn_in_period = burn_in_period
        self._turn_every = turn_every
        self._keeps_loss_references = normalize_losses or weighting.needs_references
        self._processes_checked = False

    @property
    def burnt_in(self) -> bool:
        """Whether references measured now are final."""
        return self._memory.num_steps >= self._burn_in_period

    @property
    def turns_are_due(self) -> bool:
        """Whether the rotations are updated in this step."""
        return self._memory.num_steps % self._turn_every == 0

    @property
    def joint_turns_are_due(self) -> bool:
        """Whether several processes update the rotations in this step."""
        return self._processes.count > 1 and self.turns_are_due and any(self._rotations.rotate)

    @property
    def agreement_is_due(self) -> bool:
        """Whether the agreement is measured: when rotations are updated, and afterwards for tasks absent then."""
        memory, since = self._memory, self._memory.num_steps % self._turn_every
        is_open = since < self._rotations.num_tasks and len(memory.agreement_tasks) < self._rotations.num_tasks
        return self._weighting.needs_agreement and (since == 0 or is_open)

    @torch.no_grad()
    def combine(self, this: BackwardPass, grads: Tensor, tasks: tuple[int, ...], fork: Fork) -> Tensor:
        """Return the gradient of a tensor, given the gradients of the tasks that were collected there."""
        this.tasks.update(tasks)
        with without_autocast(grads.device):
            flat = grads.reshape(len(grads), fork.shape.numel())  # also of single numbers
            gradients = TaskGradients.of(flat, tasks, self._memory.mask(set(tasks)))
            if this.lagged:
                this.norms.append(gradients.norms)
                assert this.weights is not None
                vector = gradients.combine(this.weights.to(grads.dtype))
            else:
                gradients = self._joined_batch(this, gradients)
                vector = self._weigh(this, gradients)
                vector = vector if this.magnified is None else vector * this.magnified
            if fork.sketch is not None:
                scaled = gradients.scaled.view(len(grads), *fork.shape)
                this.sample_sums.append(fork.sketch.sums(scaled).scaled(gradients.scale))
            turns = self.turns_are_due and fork.rotated
            if len(tasks) > 1 and (turns or this.lagged):
                this.met.append(Met(gradients, fork.shape, turns, fork.second_moment))
            elif fork.second_moment is not None:  # the target of a single task is its own gradient
                this.lone_moments.append(fork.second_moment)
        return vector.reshape(fork.shape)

    def _joined_batch(self, this: BackwardPass, own: TaskGradients) -> TaskGradients:
        """Return the gradients of the losses of the joined batch, with the samples of ``own`` on this process."""
        if self._processes.count > 1:
            self._check_processes()
            # The loss of the joined batch is the mean over processes, computed later by DistributedDataParallel.
            own = JoinedGradients.join(own, self._processes)
        return own if this.magnified is None else own.divided_by(this.magnified)

    def _weigh(self, this: BackwardPass, gradients: TaskGradients) -> Tensor:
        """Return the gradient combined with weights from this pass, and store its measurements."""
        if this.measured is not None:
            raise RuntimeError(
                "All heads must read the same tensor in a backward pass, got two tensors in one pass: from two forward "
                "passes, or computed before the latest backward pass. Back-propagate the losses of one forward pass "
                "before the next one, or call optimizer.backward(losses)."
            )
        this.measured = self.measure(this, gradients.norms, gradients.present, gradients.cosines)
        finite, known = this.measured.finite, this.measured.norms
        this.known_norms = torch.where(finite & (known > 0), known, this.known_norms)
        this.weights = self._weights_of(this.measured)
        return self._weighting.combine(gradients, this.weights.to(gradients.scaled))  # its own dtype may differ

    def _weights_of(self, measured: Measurements) -> Tensor:
        """Return the weights for a pass whose gradients are collected."""
        weighting = self._weighting
        if not weighting.num_waiting:
            return weighting(measured)
        # The state of the weighting is restored: it is updated once per step, from all passes.
        remembered = dict(weighting.state)
        weighting.state.clear()
        weights = weighting(measured)
        weighting.state.clear()
        weighting.state.update(remembered)
        return weights

    def agree(self, places: Places) -> None:
        """Give the rotations of all processes one size, until all have some: that of the first that has.

        On the others, no head has run yet, only heads that are not rotated, or heads that read another size.
        """
        if self._processes.count > 1 and not self._processes_checked and any(self._rotations.rotate):
            agreed = next(filter(None, self._sizes()), None)
            if agreed is not None and agreed != self._rotations.size:
                places.resize(agreed)
            self._check_processes()

    def _check_processes(self) -> None:
        """Check once, as soon as all processes have rotations of one size, that these are the same."""
        if not self._processes_checked and any(self._rotations.rotate):
            sizes = set(self._sizes())
            if len(sizes) == 1 and sizes != {0}:
                self._processes.check_same(self._rotations.matrices)
                self._processes_checked = True

    def _sizes(self) -> list[int]:
        """Return the sizes of the rotations of all processes, zero where there are none; synchronizes."""
        sizes: list[int] = self._processes.gather(
            torch.tensor(self._rotations.size or 0, device=self._rotations.device)
        ).tolist()
        return sizes

    def loss_reference(self, this: BackwardPass) -> Reference:
        """Return |L_k(t0)| with the losses of ``this``, before it is known whether its gradients are finite."""
        assert this.losses is not None
        sizes = this.losses.abs()
        return this.loss_reference.updated(sizes, sizes < torch.inf, burnt_in=self.burnt_in)

    def measure(self, this: BackwardPass, norms: Tensor, present: Tensor, cosines: Tensor | None) -> Measurements:
        """Return the measurements of ``this``, and update the references that are due.

        Args:
            this: The backward pass.
            norms: ||G_k||, zero for an absent task. Shape ``(K,)``.
            present: Which tasks are present. Shape ``(K,)``, bool.
            cosines: Cosines of the gradients, if they were collected. Shape ``(K, K)``.
        """
        sizes = norms
        if this.losses is not None:
            losses = this.losses if len(this.tasks) == len(norms) else this.losses.masked_fill(~present, 0.0)
            sizes = torch.hypot(sizes, losses)
        finite = all_finite(sizes)
        if this.losses is not None and self._keeps_loss_references:
            this.loss_reference = this.loss_reference.updated(this.losses.abs(), finite, burnt_in=self.burnt_in)
        if not this.lagged:  # otherwise once per step, from all backward passes jointly
            this.norm_reference = this.norm_reference.updated(norms, finite, burnt_in=self.burnt_in)
            norms = torch.where(present, norms, this.known_norms)
        references = this.norm_reference.values, this.loss_reference.values
        return Measurements(norms, present, finite, this.losses, cosines, *references, burnt_in=self.burnt_in)

    def joint_tasks(self, passes: Sequence[BackwardPass]) -> list[set[int]]:
        """Return the tasks of each backward pass of a step, on any process if rotations or agreement need these."""
        own = [this.tasks for this in passes]
        if self._processes.count > 1 and (self.agreement_is_due or self.joint_turns_are_due):
            return self._processes.tasks(own, self._rotations.num_tasks, self._memory.weights.device)
        return own

    def learn(self, passes: Sequence[BackwardPass], tasks: Sequence[set[int]]) -> Measurements:
        """Compute the weights of a lagged weighting; return the joint measurements of all ``passes`` of a step.

        Args:
            passes: The backward passes.
            tasks: Those of :meth:`joint_tasks`.
        """
        memory, latest, count = self._memory, passes[-1], self._processes.count
        assert latest.measured is not None  # it is closed
        assert latest.weights is not None
        waited = not any(this.lagged for this in passes)
        if waited and not self._weighting.num_waiting:
            memory.known_norms = latest.known_norms
            if not self._weighting.needs_one_tensor:
                memory.weights = torch.where(latest.measured.finite, latest.weights, memory.weights)
            return latest.measured
        parts = [this.measured for this in passes if this.measured is not None]
        # A single lagged pass is the joined batch: its norms are zero for absent tasks.
        measured = parts[0] if latest.lagged and len(parts) == count == 1 else joined(parts)
        if count > 1 and not waited:
            measured = joined_across(measured, self._processes)
        agreement = self._agreement(passes, tasks)
        seen = replace(measured, present=measured.present & measured.finite, agreement=agreement)
        if self._weighting.needs_references:
            seen = self._with_old_norms(seen)
        weights = self._weighting(seen).to(memory.weights)
        if memory.num_steps + 1 < self._weighting.num_waiting:
            weights = torch.ones_like(weights)
        memory.weights = torch.where(measured.finite, weights, memory.weights)
        return measured

    def _with_old_norms(self, measured: Measurements) -> Measurements:
        """Return ``measured`` with the references of the norms and the last known norms, and store both."""
        memory, norms, present = self._memory, measured.norms, measured.present
        reference = memory.norm_reference.updated(norms, measured.finite, burnt_in=self.burnt_in)
        known = torch.where(present & (norms > 0), norms, memory.known_norms)
        memory.known_norms, memory.norm_reference = known.to(memory.known_norms), reference
        if self._weighting.lagged:
            norms = torch.where(present, norms, known)
        else:  # a gradient that is zero now may not be zero in the next step, where the weight is used
            norms, present = known, present & (known > 0)
        return replace(measured, norms=norms, present=present, norm_references=reference.values)

    def _agreement(self, passes: Sequence[BackwardPass], tasks: Sequence[set[int]]) -> Tensor | None:
        """Return how much the samples of the step before agreed, if it was measured, and keep the sums of this one.

        One step later, so that no step computes both the updates of the rotations and the signal.
        """
        before, self._memory.sample_sums = self._memory.sample_sums, self._joined_sums(passes, tasks)
        return None if before is None else before.agreement()

    def _joined_sums(self, passes: Sequence[BackwardPass], tasks: Sequence[set[int]]) -> SampleSums | None:
        """Return the sums over the samples of all ``passes``; None if agreement is not measured in this step."""
        if not self.agreement_is_due:
            return None
        measured = set[int]().union(*tasks)
        self._memory.agreement_tasks = measured if self.turns_are_due else self._memory.agreement_tasks | measured
        parts = []
        for this in passes:
            for sums in this.sample_sums:
                known = sums if not this.lagged or this.magnified is None else sums.scaled(1.0 / this.magnified)
                # Values that are not finite would affect other passes; on its own, such a pass has no tasks.
                if len(passes) > 1 and this.measured is not None:
                    known = known.where(this.measured.finite)
                parts.append(known)
        if not parts:  # other processes may have some
            parts = [SampleSums.none(len(self._memory.weights), self._memory.weights)]
        return SampleSums.joined(parts, self._processes)
