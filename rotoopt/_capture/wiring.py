"""Wiring: does every loss pass through its own rotated head, and do all heads share one representation?"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import Tensor, nn

from rotoopt._capture.fork import SPENT, Fork
from rotoopt._capture.graph import is_rotation, reached
from rotoopt._capture.hooks import hook_of


def check_unhooked(heads: Sequence[nn.Module], names: Sequence[str]) -> None:
    """Raise if there is a rotation in front of one of ``heads`` already."""
    for name, head in zip(names, heads, strict=False):  # functional heads have names only
        if hook_of(head) is not None:
            raise ValueError(
                f"`heads` must not have rotations yet, got {name} with that of another optimizer. Call remove() on "
                "the other one first (in a notebook: the one made when the cell ran before). To copy a model that is "
                "wrapped, copy both: copy.deepcopy((model, optimizer))."
            )


def check_wiring(losses: Mapping[int, Tensor], names: Sequence[str], backbone_loss: Tensor | None = None) -> None:
    """Raise unless every loss was computed by its own head from the one shared representation, for the first time.

    Walks the graph of every loss back to the rotations, not beyond. That costs some microseconds per node, so the
    optimizer does it in its first backward and where something looks odd.

    Args:
        losses: The losses of the present tasks.
        names: How to call the K tasks in an error.
        backbone_loss: A loss that must not pass through any head.
    """
    forks = {task: _forks_behind(loss) for task, loss in losses.items()}
    for task, found in forks.items():
        if task not in found:
            others = ", ".join(names[other] for other in sorted(found)) or "none"
            raise RuntimeError(
                f"The loss of {names[task]} must pass through its rotated head, got one that passes through: {others}. "
                "Either (a) `losses` are in another order than the heads, (b) the head was bypassed, as by "
                "head.forward(z), a submodule of it, or a functional head that was not fed by optimizer.rotate(z), "
                "(c) it ran in eval mode, on z.detach(), under paused(), no_grad(), torch.func.vmap() or re-entrant "
                "checkpointing (pass use_reentrant=False), before the optimizer was built, or after remove() or "
                "fold(), or (d) the model was compiled and run before the optimizer was built: build it first, or call "
                "torch._dynamo.reset()."
            )
    first = next(iter(forks))
    for task, found in forks.items():
        if found[task] != forks[first][first]:
            raise RuntimeError(
                f"All heads must get the same representation tensor, got one for {names[first]} and another for "
                f"{names[task]}. Likely causes: (a) a head is fed a view or a copy, as in head(z.flatten(1)): reshape "
                "once, before the first head, (b) the tasks use different batches: give them in separate steps, with "
                "None for the absent tasks, or (c) a wrapper was put around a head after the optimizer was built."
            )
    if any(fork.joined for found in forks.values() for each in found.values() for fork in each):
        raise RuntimeError(SPENT)
    through = _forks_behind(backbone_loss) if backbone_loss is not None else {}
    if through:
        raise RuntimeError(
            f"`backbone_loss` must not pass through a head, got one that passes through {names[min(through)]}. Add it "
            "to the loss of that task, or compute it from the representation or the parameters of the backbone."
        )


def _forks_behind(loss: Tensor) -> dict[int, set[Fork]]:
    """Return the forks that ``loss`` reaches, by the task through whose rotation it reaches them."""
    found: dict[int, set[Fork]] = {}
    for node in filter(is_rotation, reached([loss.grad_fn], stop_at_rotations=True)):
        found.setdefault(node.task, set()).add(node.fork)
    return found
