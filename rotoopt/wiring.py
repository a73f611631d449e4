"""Wiring: does every loss pass through its own rotated head, and do all heads share one representation?"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from rotoopt.capture import SPENT, Fork, HeadHook, Rotate


def check_unhooked(heads: Sequence[nn.Module], names: Sequence[str]) -> None:
    """Raise if there is a rotation in front of one of ``heads`` already."""
    for name, head in zip(names, heads, strict=False):  # functional heads have names only
        if any(isinstance(hook, HeadHook) for hook in head._forward_pre_hooks.values()):
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
    shared = {id(fork) for fork in next(iter(forks.values()))[next(iter(forks))]}
    for task, found in forks.items():
        if {id(fork) for fork in found[task]} != shared:
            first = next(iter(forks))
            raise RuntimeError(
                f"All heads must get the same representation tensor, got one for {names[first]} and another for "
                f"{names[task]}. Likely causes: (a) a head is fed a view or a copy, as in head(z.flatten(1)): reshape "
                "once, before the first head, (b) the tasks use different batches: give them in separate steps, with "
                "None for the absent tasks, or (c) a wrapper was put around a head after the optimizer was built."
            )
    if any(fork.joined for found in forks.values() for reached in found.values() for fork in reached):
        raise RuntimeError(SPENT)
    through = _forks_behind(backbone_loss) if backbone_loss is not None else {}
    if through:
        raise RuntimeError(
            f"`backbone_loss` must not pass through a head, got one that passes through {names[min(through)]}. Add it "
            "to the loss of that task, or compute it from the representation or the parameters of the backbone."
        )


def _forks_behind(loss: Tensor) -> dict[int, list[Fork]]:
    """Return the forks that ``loss`` reaches, by the task through whose rotation it reaches them."""
    found: dict[int, list[Fork]] = {}
    seen: set[Any] = set()
    stack: list[Any] = [loss.grad_fn]
    rotation_node: type[Any] = Rotate._backward_cls
    while stack:
        node = stack.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if isinstance(node, rotation_node):
            forks = found.setdefault(node.task, [])
            if node.fork not in forks:
                forks.append(node.fork)
        else:
            stack.extend(parent for parent, _ in node.next_functions)
    return found
