"""``RotoGradOptimizer``: documentation of the public class, and delegation to the stages of RotoGrad."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any, overload

import torch
from torch import Tensor, nn
from torch.distributed import ProcessGroup
from torch.optim import Optimizer

from rotoopt._capture.adoption import adopt, previous_hooks, turned
from rotoopt._capture.averages import warn_of_averages
from rotoopt._capture.hooks import attach
from rotoopt._capture.representation import RotatedDims
from rotoopt._deploy.fold import fold
from rotoopt._deploy.refresh import refresh
from rotoopt._engine.construction import (
    Heads,
    check_heads,
    check_optimizer,
    check_options,
    check_rotate,
    modules_of,
)
from rotoopt._engine.core import RotoGradCore
from rotoopt._engine.engine import Engine
from rotoopt._engine.losses import Losses, check_rotatable
from rotoopt._engine.record import StepRecord
from rotoopt._engine.watch import UntrainedHeads
from rotoopt._rotation.cayley_step import CayleyStep
from rotoopt._rotation.coordinates import OptimizerStep, RotationOptimizer
from rotoopt._rotation.rotations import Init, Rotations
from rotoopt._rotation.step import RotationStep
from rotoopt._torch.checkpoint import RotoGradState
from rotoopt._torch.private import mark_as_hooked, run_step_hooks
from rotoopt._torch.processes import Processes
from rotoopt._torch.wrapper import OptimizerWrapper
from rotoopt.weighting import Weighting
from rotoopt.weighting._aggregator import Aggregator, as_weighting

DEFAULT_ROTATION_LR = 0.04
TURN_EVERY = 32


class RotoGradOptimizer(OptimizerWrapper):
    r"""Wraps any torch optimizer to train several tasks on one shared representation.

    A rotation :math:`R_k \in SO(d)` is applied to the shared representation in front of head k. The gradients of the K
    tasks at the representation are weighted: by default, by running means of their norms, by how far each task has
    converged, and by the share of each gradient that is signal (:class:`~rotoopt.ProgressWeighting`). The rotations
    are trained so that the gradients align. All of this is state of the optimizer: the model, ``param_groups``,
    schedulers, clipping and the keys of checkpoints do not change.

    Args:
        optimizer: Any ``torch.optim.Optimizer``, already built.
        heads: The first modules that belong to one task alone, as a sequence or as a mapping from task names. The
            floating-point tensors with a gradient that enter them are the representation of that task. For several
            modules of one task, or parameters beside them, use a tuple: ``{"latent": (mean, log_variance)}``. A
            forward pre-hook applies the rotation in front of each.
        num_tasks: K, instead of ``heads``, for functional heads. See :meth:`rotate`.
        dim: Dimension or dimensions of the representation that are rotated (several are flattened together):
            -1 for vectors ``(B, d)`` and token sequences ``(B, T, d)``, 1 for the channels of ``(B, C, H, W)`` maps.
            All other dimensions count as samples. ``None``: -1 for two or three dimensions; an error for any other
            number, or if the first layers of the heads operate on another dimension.
        rotation_size: Rotate only the first m features along ``dim``. The rotations then exist from construction;
            otherwise they are created in the first forward pass in training mode.
        rotate: ``False``, or one flag per task. R_k stays I where it is False (frozen, pretrained heads).
        weighting: How the K gradients are combined: ``ProgressWeighting()`` (default), ``RotoGradWeighting()`` (the
            paper's), ``GradNorm(alpha=...)``, ``EqualWeighting()``, or any callable ``(K, n) -> (n,)``, such as a
            TorchJD aggregator.
        normalize_losses: Back-propagate ``L_k / |L_k(t0)|`` instead of L_k. Applies to ``step(losses)`` and
            ``backward(losses)``, not to your own ``sum(losses).backward()``.
        burn_in_period: Step in which the references L_k(t0) and ||G_k(t0)|| are measured again.
        rotation_lr: Learning rate of the built-in rotation step: the relative change (root mean square) of the input
            of a head in the first update. The change in the t-th update is about :math:`\mathrm{lr} / \sqrt t`,
            multiplied by the learning rate of the network relative to its maximum so far and, with the default
            weighting, by the root of the remaining loss of the task, relative to its initial one.
        turn_every: Number of steps from one update of the rotations to the next. ``None``: 32 for the built-in step,
            which is cheap and keeps the rotations slower than the network, as the method requires; 1 for a
            ``rotation_optimizer``, which has its own schedule.
        rotation_optimizer: A callable ``params -> torch.optim.Optimizer`` on the Lie-algebra coordinates, instead
            of the built-in step. The official recipe is ``lambda params: torch.optim.Adam(params, lr=...)``.
        init: ``"identity"``: initially, the model computes the same as before wrapping. ``"haar"``: uniformly random
            rotations, as in the official code; only for heads that are trained from scratch.
        process_group: The processes that share a batch under DistributedDataParallel or FSDP2. Gradients are measured
            over all of them, so that N processes compute the same as one process with the joined batch. ``None``: the
            default group, if there is one. To measure each process on its own, pass a group of one process.

    Raises:
        TypeError: If ``optimizer`` is not a torch optimizer instance, or a head is not a module that accepts hooks.
        ValueError: If an option is out of range, a head is listed twice, or a head has a rotation from a previous
            optimizer that does not fit this one. A new optimizer takes over the rotations of the previous one,
            which then raises an error when it is used.

    Example:
        >>> from torch import nn
        >>> backbone, head_a, head_b = nn.Linear(3, 8), nn.Linear(8, 1), nn.Linear(8, 2)
        >>> params = [*backbone.parameters(), *head_a.parameters(), *head_b.parameters()]
        >>> optimizer = RotoGradOptimizer(torch.optim.SGD(params, lr=0.1), heads=[head_a, head_b])
        >>> rep = backbone(torch.randn(5, 3))
        >>> losses = [head_a(rep).square().mean(), head_b(rep).abs().mean()]
        >>> optimizer.zero_grad()
        >>> optimizer.step(losses, rep)
        >>> optimizer.task_weights.shape, optimizer.rotations.matrices.shape
        (torch.Size([2]), torch.Size([2, 8, 8]))

    Source: Javaloy and Valera, RotoGrad: Gradient Homogenization in Multitask Learning, ICLR 2022, algorithm 1.
    Differs from the official code (rotograd 0.1.6): wraps the optimizer instead of the model; the default weighting
    uses running means, progress and signal instead of equal norms in every step; the initial rotations are R_k = I; the
    objective of the rotations uses unit gradients; rotations are updated every 32 steps, mainly in directions in which
    the representation has little variance, with a step size that decays and follows the schedule of the network and
    the remaining losses; references are never taken from absent, zero or non-finite gradients; an absent task
    contributes nothing instead of its previous gradient.
    """

    _core: RotoGradCore

    def __init__(
        self,
        optimizer: Optimizer,
        heads: Heads | None = None,
        *,
        num_tasks: int | None = None,
        dim: int | Sequence[int] | None = None,
        rotation_size: int | None = None,
        rotate: bool | Sequence[bool] = True,
        weighting: Weighting | Aggregator | None = None,
        normalize_losses: bool = False,
        burn_in_period: int = 20,
        rotation_lr: float = DEFAULT_ROTATION_LR,
        turn_every: int | None = None,
        rotation_optimizer: RotationOptimizer | None = None,
        init: Init = "identity",
        process_group: ProcessGroup | None = None,
    ) -> None:
        check_optimizer(optimizer)
        parts, names = check_heads(heads, num_tasks)
        flags = check_rotate(rotate, len(names))
        check_options(
            rotation_size=rotation_size,
            burn_in_period=burn_in_period,
            rotation_lr=rotation_lr,
            turn_every=turn_every,
            rotation_optimizer=rotation_optimizer,
            init=init,
        )
        dims, used_weighting = RotatedDims(dim), as_weighting(weighting)
        hooks = previous_hooks([modules_of(each) for each in parts], names)
        if len(names) == 1 and init == "identity" and not turned(hooks):
            flags = (False,)  # a single task has no conflict: R stays I, so the product is skipped as well
        if turn_every is None:
            turn_every = TURN_EVERY if rotation_optimizer is None else 1
        processes = Processes(process_group)
        param = next(param for group in optimizer.param_groups for param in group["params"])
        rotations = Rotations.like(param, len(names), rotation_size, rotate=flags, init=init, processes=processes)
        rotation_step: RotationStep = (
            CayleyStep(rotations, rotation_lr, processes, optimizer)
            if rotation_optimizer is None
            else OptimizerStep(rotations, rotation_optimizer, processes)
        )
        engine = Engine(
            names,
            parts,
            rotations,
            dims=dims,
            weighting=used_weighting,
            burn_in_period=burn_in_period,
            normalize_losses=normalize_losses,
            turn_every=turn_every,
            needs_second_moment=rotation_step.needs_second_moment,
            processes=processes,
        )
        modules = [modules_of(each) for each in parts]
        warn_of_averages(modules)
        try:
            for task, head in enumerate(modules):
                for number, module in enumerate(head):
                    attach(engine.capture, module, task, number, names[task])
            adopt(hooks, engine.capture, names)
        except Exception:
            engine.capture.detach()
            used_weighting.release()
            raise
        untrained_heads = UntrainedHeads(optimizer, parts, names)
        self._wrap(RotoGradCore(optimizer, parts, engine, rotation_step, rotation_optimizer is None, untrained_heads))

    # ------------------------------------------------------------------ training

    def backward(
        self,
        losses: Losses,
        rep: Any = None,
        *,
        backbone_loss: Tensor | None = None,
        scaler: torch.amp.GradScaler | None = None,
    ) -> None:
        """Compute all gradients and collect what the rotation step needs. :meth:`step` without the updates.

        Args:
            losses: One scalar loss per task, in the order of the heads or by task name; ``None`` (or a missing
                name) for a task that is absent from this batch. Or a tensor of stacked losses, shape ``(K,)``.
            rep: The shared representation that entered the heads: a tensor, or several in lists, tuples and dicts.
                Optional; only used to check that the heads received it.
            backbone_loss: A loss of the backbone alone (a regularizer). Its gradient is added without normalizing,
                scaling or rotating it.
            scaler: Scales the losses. Continue with ``scaler.step(optimizer); scaler.update()``.

        Raises:
            ValueError: If the losses are not K scalars with graphs, or ``rep`` did not enter the heads.
            RuntimeError: If a loss does not pass through its own head, or passes through another one as well; if a
                loss reaches shared parameters around the heads; if the weighting requires that all heads read one
                tensor, and they read several; if ``backbone_loss`` passes through a head; or if the losses were
                back-propagated before.
        """
        self._core.engine.backward(losses, rep, backbone_loss, scaler)

    @overload
    def step(
        self,
        closure: None = None,
        rep: Any = None,
        *,
        losses: Losses | None = None,
        backbone_loss: Tensor | None = None,
    ) -> None: ...
    @overload
    def step(self, closure: Callable[[], float]) -> float: ...
    @overload
    def step(self, closure: Losses, rep: Any = None, *, backbone_loss: Tensor | None = None) -> None: ...
    @mark_as_hooked
    def step(
        self,
        closure: Callable[[], float] | Losses | None = None,
        rep: Any = None,
        *,
        losses: Losses | None = None,
        backbone_loss: Tensor | None = None,
    ) -> float | None:
        """Back-propagate the losses, step the wrapped optimizer, and update the rotations.

        ``step(losses, rep)`` replaces ``sum(losses).backward(); step()``. Without losses, it uses the gradients
        computed by :meth:`backward`, your own ``sum(losses).backward()`` or a closure, as any optimizer does. Without
        a backward pass, rotations and counters do not change.

        Args:
            closure: The losses, as in :meth:`backward`, or, as for every torch optimizer, a closure or ``None``.
            rep: As in :meth:`backward`.
            losses: The losses, by keyword.
            backbone_loss: As in :meth:`backward`.

        Returns:
            What the closure returned, or None.
        """
        options = {"losses": losses, "backbone_loss": backbone_loss}
        return run_step_hooks(self, RotoGradOptimizer._step, (closure, rep), options)

    def _step(
        self,
        closure: Callable[[], float] | Losses | None = None,
        rep: Any = None,
        *,
        losses: Losses | None = None,
        backbone_loss: Tensor | None = None,
    ) -> float | None:
        core = self._core
        if closure is not None and not callable(closure):
            if losses is not None:
                raise TypeError("`losses` must be given once, got them by position and by keyword.")
            closure, losses = None, closure
        if losses is not None:
            self.backward(losses, rep, backbone_loss=backbone_loss)
        elif rep is not None or backbone_loss is not None:
            raise TypeError("`rep` and `backbone_loss` must come with `losses`, got none.")
        core.begin_step()
        result = core.optimizer.step() if closure is None else core.optimizer.step(closure)
        core.finish_step()
        return result

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Clear the gradients of the parameters, and what was collected for the rotations."""
        super().zero_grad(set_to_none=set_to_none)
        self._core.engine.borrowed_heads.observe(self._core.optimizer)
        self._core.engine.clear()

    def rotate(self, rep: Tensor) -> tuple[Tensor, ...]:
        """Return R_k z for every task, for functional heads (``num_tasks=K``).

        Args:
            rep: The shared representation z.

        Returns:
            K tensors of the shape of ``rep``, one for each head.

        Raises:
            RuntimeError: If the optimizer was given modules: their hooks rotate already.
            TypeError: If ``rep`` is no floating-point tensor.
        """
        core = self._core
        if core.heads:
            raise RuntimeError(
                "`rotate` must be used with num_tasks=K, got an optimizer with `heads`. Their hooks rotate already: "
                "call the heads on z itself."
            )
        check_rotatable(rep)
        return tuple(core.engine.capture.feed(rep, task) for task in range(len(core.engine.names)))

    def paused(self) -> AbstractContextManager[None]:
        """Return a context in which forward passes rotate, but gradients are not weighted.

        For saliency maps, adversarial examples and gradient penalties. It applies to the forward passes inside it:
        their gradients are the true gradients of the rotated model.
        """
        return self._core.engine.capture.pause()

    def remove(self) -> None:
        """Remove the hooks from the heads: the model computes again without rotations.

        If these have been updated, predictions change; :meth:`fold` keeps them.
        """
        self._core.engine.capture.detach()

    # ------------------------------------------------------------------ deployment

    def fold(self) -> None:
        r"""Merge every rotation into its head and remove the hooks, to use the model without this optimizer.

        The first layers of head k, linear layers or convolutions, get the weights :math:`W R_k`. Predictions in eval
        mode do not change beyond rounding errors, and ``model.state_dict()`` then loads into a model that was never
        wrapped.

        A head that does not begin with such layers, needs more inputs than z, or shares its first weight with another
        module keeps its rotation, as a buffer ``rotation`` that a forward pre-hook applies; a warning names it. The
        same holds for sharded (FSDP) and quantized heads. If a head is wrapped by torch.compile or
        DistributedDataParallel, the head inside is changed.

        For deployment only: the state of the optimizer (e.g. the moments of Adam) belongs to the weights before
        folding. Save a checkpoint to resume from before you fold.

        Raises:
            RuntimeError: If heads are functional (``num_tasks=K``), a head did not run in training mode since this
                optimizer was built, or ``fold`` or :meth:`remove` was called before. Nothing has changed then.

        Example:
            >>> backbone, head_a, head_b = nn.Linear(3, 8), nn.Linear(8, 1), nn.Linear(8, 2)
            >>> params = [*backbone.parameters(), *head_a.parameters(), *head_b.parameters()]
            >>> optimizer = RotoGradOptimizer(torch.optim.SGD(params, lr=0.1), heads=[head_a, head_b], init="haar")
            >>> z = backbone(torch.randn(5, 3))
            >>> rotated, _ = head_a(z), head_b(z)
            >>> optimizer.fold()
            >>> torch.allclose(head_a(z), rotated, atol=1e-6), len(head_a._forward_pre_hooks)
            (True, 0)
        """
        heads = [modules_of(head) for head in self._core.heads]
        fold(self._core.engine.capture, heads, self._core.engine.names)

    def refresh(self, model_copy: nn.Module) -> None:
        """Copy the current rotations into a copy of the model.

        A copy of the model alone, by ``copy.deepcopy`` or ``torch.optim.swa_utils.AveragedModel``, keeps the rotations
        that the model had when it was copied. Call this after the weights of the copy were updated.

        Args:
            model_copy: The copy, or a module that contains it. Its weights and modes stay as they are.

        Raises:
            ValueError: If there are no rotations in ``model_copy``, or they are of another number or size.
            RuntimeError: If the rotations of this optimizer do not exist yet.

        Example:
            >>> import copy
            >>> backbone, head_a, head_b = nn.Linear(3, 8), nn.Linear(8, 1), nn.Linear(8, 2)
            >>> model = nn.ModuleList([backbone, head_a, head_b])
            >>> optimizer = RotoGradOptimizer(torch.optim.SGD(model.parameters(), lr=0.1), heads=[head_a, head_b])
            >>> target = copy.deepcopy(model)
            >>> z = backbone(torch.randn(5, 3))
            >>> optimizer.step([head_a(z).square().mean(), head_b(z).abs().mean()], z)
            >>> target.load_state_dict(model.state_dict())
            <All keys matched successfully>
            >>> optimizer.refresh(target)
            >>> torch.equal(target[1](z), head_a(z))
            True
        """
        refresh(self._core.engine.capture, model_copy)

    # ------------------------------------------------------------------ state and measurements

    @property
    def rotations(self) -> Rotations:
        """The rotations, an ``nn.Module``: ``rotations.matrices`` is ``(K, m, m)``, ``rotations[k]`` is R_k."""
        return self._core.engine.rotations

    @property
    def rotation_optimizer(self) -> Optimizer:
        """The optimizer of the rotations; learning-rate schedulers attach to it."""
        return self._core.rotation_step.optimizer

    @property
    def task_names(self) -> tuple[str, ...]:
        """Names of the tasks, for losses given by name: the keys of ``heads``, or e.g. ``heads[0]``."""
        return self._core.engine.names

    @property
    def task_weights(self) -> Tensor:
        """Weights w_k of the task gradients in the latest backward pass; ones before the first. Shape ``(K,)``."""
        record = self._core.engine.record
        return torch.ones(len(self.task_names)) if record is None else record.weights

    @property
    def last_step(self) -> StepRecord | None:
        """Measurements of the latest backward pass: losses, gradient norms, weights, cosines. None before the first."""
        return self._core.engine.record

    def __repr__(self) -> str:
        core = self._core
        inner = "\n    ".join(repr(core.optimizer).splitlines())
        return (
            f"{type(self).__name__} (\n    tasks: {', '.join(core.engine.names)}\n    weighting: "
            f"{core.engine.weighting!r}\n    rotations: {core.engine.rotations.extra_repr()}\n"
            f"    optimizer: {inner}\n)"
        )

    # ------------------------------------------------------------------ checkpoints

    def state_dict(self) -> dict[str, Any]:
        """Return the state dict of the wrapped optimizer with one more entry, ``"rotograd"``.

        It loads into the bare optimizer too, which ignores that entry.
        """
        return super().state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load what :meth:`state_dict` returned, or the state dict of the bare optimizer (with a warning).

        Raises:
            ValueError: If it was saved with another number of tasks, another size of the rotations, or other options.
        """
        super().load_state_dict(state_dict)

    @property
    def rotograd_state(self) -> RotoGradState:
        """Rotations, references, trained weights and counters, for ``torch.distributed.checkpoint``.

        Its ``get_optimizer_state_dict`` keeps moments and groups only, so this is an entry of its own:
        ``dcp.save({"model": ..., "optimizer": ..., "rotograd": optimizer.rotograd_state})``. Load it the same way,
        before ``set_optimizer_state_dict``.
        """
        return RotoGradState(self._core.save, self._core.load)
