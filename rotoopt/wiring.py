"""Wiring: does every loss pass through its own rotated head, and do all heads share one representation?"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from rotoopt.capture import Fork, Rotate


def check_wiring(losses: Mapping[int, Tensor], names: Sequence[str]) -> None:
    """Raise unless every loss was computed by its own head from the one shared representation.

    Walks the graph of every loss back to the rotations, not beyond. That costs some microseconds per node, so the
    optimizer does it in its first backward and where something looks odd.

    Args:
        losses: The losses of the present tasks.
        names: How to call the K tasks in an error.
    """
    forks = {task: _forks_behind(loss) for task, loss in losses.items()}
    for task, found in forks.items():
        if task not in found:
            others = ", ".join(names[other] for other in sorted(found)) or "none"
            raise RuntimeError(
                f"The loss of {names[task]} must pass through its rotated head, got one that passes through: {others}. "
                "Either (a) `losses` are in another order than the heads, (b) the head was bypassed, as by "
                "head.forward(z), a submodule of it, or a functional head that was not fed by optimizer.rotate(z), "
                "(c) it ran in eval mode, under paused() or no_grad(), or before the optimizer was built, or (d) the "
                "model was compiled and run before the optimizer was built: build it first, or call "
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
