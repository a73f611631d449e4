"""The core: the mutable state of a ``RotoGradOptimizer``, and its state dict."""

from __future__ import annotations

import copy
from dataclasses import dataclass, field
from typing import Any

from rotoopt._capture.owner import Owner
from rotoopt._engine.construction import Parts
from rotoopt._engine.engine import Engine
from rotoopt._engine.memory import misfit
from rotoopt._engine.watch import IdleSteps, UntrainedHeads
from rotoopt._rotation.step import RotationStep
from rotoopt._torch.warn import warn_user
from rotoopt._torch.wrapper import Core


@dataclass
class RotoGradCore(Core):
    """The wrapped optimizer, the engine, and the rotation step.

    Attributes:
        heads: The modules and parameters of each task alone; empty for functional heads.
        engine: Weights the gradients of backward passes.
        rotation_step: Updates the rotations.
        built_in_step: Whether that is the built-in one.
        untrained_heads: Warns of parameters of heads that are not updated.
        idle_steps: Warns of steps without a backward pass.
        loaded: Whether the state of the method was loaded since the latest step.
        owner: Reference from the heads to this object.
    """

    heads: list[Parts]
    engine: Engine
    rotation_step: RotationStep
    built_in_step: bool
    untrained_heads: UntrainedHeads
    idle_steps: IdleSteps = field(default_factory=IdleSteps)
    loaded: bool = False
    owner: Owner = field(init=False)

    def __post_init__(self) -> None:
        self.owner = self.engine.capture.owner = Owner(self)

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self.owner.become(self)

    def begin_step(self) -> None:
        """Prepare a step of the wrapped optimizer."""
        self.engine.capture.check_current()
        self.engine.capture.latest_weights.begin_step(self.engine.memory.total_angles)

    def finish_step(self) -> None:
        """Update memory and rotations after a step of the wrapped optimizer, if there were task gradients."""
        engine = self.engine
        if engine.pending:
            self.loaded = False
            engine.finish_step(self.rotation_step.step, self.rotation_step.optimizer.param_groups[0]["lr"])
            self.untrained_heads.observe()
            self.idle_steps.end()
        elif engine.capture.fed.tasks:
            if not engine.capture.fed.trained():  # else their losses were not back-propagated
                engine.frozen_representation.observe()
        elif engine.frozen_representation.in_step:
            self.idle_steps.end()
        # torch.distributed.checkpoint creates the optimizer's state in a step with a learning rate of zero.
        elif any(group.get("lr", 1.0) for group in self.optimizer.param_groups):
            self.idle_steps.observe(trained_before=bool(engine.capture.shapes))
        if engine.frozen_representation.in_step:
            engine.capture.places.keep()
        engine.frozen_representation.in_step = False
        engine.capture.latest_weights.end_step(self.optimizer, self.heads, engine.names, engine.memory.total_angles)

    def state_dict(self) -> dict[str, Any]:
        """Return the state dict of the wrapped optimizer, and the state of the method as ``"rotograd"``."""
        return {**super().state_dict(), "rotograd": self.save()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load what :meth:`state_dict` returned, or the state dict of the bare optimizer (with a warning)."""
        saved = state_dict.pop("rotograd", None)
        if saved is not None:
            self._check(saved)  # before anything changes
        super().load_state_dict(state_dict)
        if saved is not None:
            self.load(saved)
        elif not self.loaded:
            warn_user(
                "The state dict should have an entry 'rotograd', got one without. Rotations, references and trained "
                "weights do not change. Either (a) it is that of a bare optimizer, or (b) it comes from "
                "torch.distributed.checkpoint: save and load optimizer.rotograd_state as well, and load it first."
            )

    def save(self) -> dict[str, Any]:
        """Return the state of the method: rotations, references, trained weights and counters."""
        self.engine.capture.check_current()
        return {
            **self.engine.state_dict(),
            "built_in_step": self.built_in_step,
            "rotation_step": copy.deepcopy(self.rotation_step.state_dict()),  # the next step changes its tensors
        }

    def load(self, saved: dict[str, Any]) -> None:
        """Load what :meth:`save` returned."""
        self._check(saved)
        self.engine.load_state_dict(saved)
        self.rotation_step.load_state_dict(copy.deepcopy(saved["rotation_step"]))
        self.loaded = True

    def _check(self, saved: dict[str, Any]) -> None:
        self.engine.capture.check_current()
        self.engine.memory.check_state_dict(saved)
        if self.built_in_step != saved["built_in_step"]:
            steps = {True: "the built-in rotation step", False: "a `rotation_optimizer`"}
            own = self.built_in_step
            raise misfit(f"be of {steps[own]}", f"that of {steps[not own]}", "`rotation_optimizer`")
