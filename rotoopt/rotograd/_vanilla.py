"""The baseline: a backbone and heads, trained by the sum of the losses."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from rotoopt._engine.losses import Losses, check_backbone_loss, check_losses


class VanillaMTL(nn.Module):
    """A backbone and heads, trained on the sum of the losses: the baseline.

    Args:
        backbone: Computes the representation. If it returns a tuple, the first entry is the representation.
        heads: One module per task. The sequence is copied, the modules are not.

    Attributes:
        backbone: The backbone.
        heads: The heads, an ``nn.ModuleList``.
        num_tasks: K.
        rep: The latest representation in training mode.
    """

    rep: Tensor | None

    def __init__(self, backbone: nn.Module, heads: Sequence[nn.Module] | nn.ModuleList) -> None:
        super().__init__()
        self.backbone = backbone
        self.heads = nn.ModuleList(heads)
        self.num_tasks = len(self.heads)
        self.rep = None

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "rep": None}  # the graph of `rep` cannot be copied

    def __len__(self) -> int:
        """Return the number of tasks."""
        return self.num_tasks

    def __getitem__(self, task: int) -> nn.Module:
        """Return the end-to-end model of one task, which shares its parameters with this one."""
        return SingleTask(self, task)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Run the backbone, and every head on its representation.

        Returns:
            The list of the K predictions. If the backbone or a head returns a tuple: the list of the first entries,
            and a list of all the others, as in the official package.
        """
        rep, extra = _first_and_rest(self.backbone(*args, **kwargs))
        if self.training:
            self.rep = rep
        predictions = []
        for head in self.heads:
            output = head(rep)
            if isinstance(output, tuple | list):
                predictions.append(output[0])
                extra.append(output[1:])
            else:
                predictions.append(output)
        return (predictions, extra) if extra else predictions

    def backward(self, losses: Losses, backbone_loss: Tensor | None = None, **kwargs: Any) -> None:
        """Compute all gradients.

        Args:
            losses: One scalar per task, ``None`` for an absent one.
            backbone_loss: A loss of the backbone alone.
            **kwargs: Options of ``torch.autograd.backward``.

        Raises:
            ValueError: If the losses are not K scalars with graphs.
            RuntimeError: In eval mode.
        """
        self._check_training()
        check_backbone_loss(backbone_loss)
        roots = list(check_losses(losses, self.task_names).values())
        torch.autograd.backward(roots if backbone_loss is None else [*roots, backbone_loss], **kwargs)

    @property
    def task_names(self) -> tuple[str, ...]:
        """Names of the tasks, for losses given by name, such as ``heads[0]``."""
        return tuple(f"heads[{task}]" for task in range(self.num_tasks))

    def _check_training(self) -> None:
        if not self.training:
            raise RuntimeError("The model must be in training mode for backward(), got eval mode. Call model.train().")

    def parameters(self, recurse: bool = True) -> Iterator[nn.Parameter]:
        """Return the parameters of the method, not of the network: see :meth:`model_parameters`."""
        return self.mtl_parameters(recurse)

    def mtl_parameters(self, recurse: bool = True) -> Iterator[nn.Parameter]:
        """Return the parameters of the method: rotations and GradNorm's weights, for a separate optimizer."""
        return super().parameters(recurse=False)

    def model_parameters(self, recurse: bool = True) -> Iterator[nn.Parameter]:
        """Return the parameters of backbone and heads."""
        yield from self.backbone.parameters(recurse)
        for head in self.heads:
            yield from head.parameters(recurse)

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Clear all gradients, including those of the network."""
        for param in (*self.mtl_parameters(), *self.model_parameters()):
            if set_to_none:
                param.grad = None
            elif param.grad is not None:
                param.grad.detach_().zero_()


class SingleTask(nn.Module):
    """The end-to-end model of one task."""

    def __init__(self, model: VanillaMTL, task: int) -> None:
        super().__init__()
        self.backbone = model.backbone
        self.head = model.heads[task]

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Return the output of the head."""
        rep, _ = _first_and_rest(self.backbone(*args, **kwargs))
        return self.head(rep)


def _first_and_rest(output: Any) -> tuple[Any, list[Any]]:
    return (output[0], list(output[1:])) if isinstance(output, tuple | list) else (output, [])
