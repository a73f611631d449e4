"""Co-Tuning: target labels are translated into source classes, so that the source head is trained as well."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from rotoopt._torch.modules import in_eval_mode
from rotoopt._torch.processes import Processes
from rotoopt.regularization import lwf
from rotoopt.regularization._inputs import at_least_float32, check_labels, check_same_shape
from rotoopt.regularization.lwf import source_logits


class CoTuningLoss(nn.Module):
    r"""Cross-entropy of the source head with soft labels, :math:`-\sum_i t_i \log \mathrm{softmax}(y)_i`, batch mean.

    With ``RotoGradOptimizer`` this is the loss of the source head, which is a task: see :class:`Classifier`.

    Example:
        >>> CoTuningLoss()(torch.tensor([[0.0, 0.0, 0.0, 0.0]]), torch.tensor([[0.5, 0.5, 0.0, 0.0]]))  # log 4
        tensor(1.3863)

    Source: You et al., Co-Tuning for Transfer Learning, NeurIPS 2020; ``tllib.regularization.co_tuning``, with the same
    value and gradient. Differences from tllib: shapes must be equal, where it broadcasts a target; the target receives
    no gradient; a logit of -inf with a target of 0 contributes 0, not NaN; half precision is computed in float32.
    """

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        """Return the loss, shape ``()``, at least float32.

        Args:
            input: Logits of the source head, not probabilities. Shape ``(b, N_s)``.
            target: Probabilities of the source classes given the target label. Shape ``(b, N_s)``.

        Raises:
            ValueError: If the shapes differ.
        """
        check_same_shape(input=input, target=target)
        target = target.detach()
        log_q = F.log_softmax(at_least_float32(input), dim=1)
        return torch.where(target == 0, 0.0, -target * log_q).sum(dim=1).mean()


class Relationship(nn.Module):
    r"""The category relationship :math:`p(y_s \mid y_t)`: mean prediction of the source model for each target class.

    ``relationship[labels]`` are the soft labels for :class:`CoTuningLoss`, of shape ``(b, N_s)``; an int or a list is
    an index, too. The matrix is a buffer, ``relationship``, of shape ``(N_t, N_s)``, and is saved, moved and copied as
    such. In distributed training, all processes compute it together; each may have its part of the data.

    Args:
        data_loader: Yields ``(x, labels)`` of the target data, in any order.
        classifier: Maps x to source logits ``(b, N_s)``. In a :class:`Classifier`, the source head is used. It runs in
            eval mode; its modes are restored afterwards.
        device: The device of the computation and of the matrix.
        cache: A file. If it exists, the matrix is loaded from it, otherwise saved to it. Delete it if model or data
            change: only the numbers of classes are compared.
        num_classes: N_t. ``None``: the largest label plus one.

    Raises:
        ValueError: If a class has no sample, a label is not a class, ``classifier`` does not return logits, or
            ``cache`` does not match.

    Example:
        >>> x, labels = torch.tensor([[0.0, 0.0], [9.0, -9.0], [2.0, 2.0]]), torch.tensor([0, 1, 0])
        >>> relationship = Relationship([(x, labels)], nn.Identity(), "cpu")
        >>> relationship[torch.tensor([1, 0])]
        tensor([[1.0000, 0.0000],
                [0.5000, 0.5000]])

    Source: the "direct" relationship of You et al., Co-Tuning for Transfer Learning, NeurIPS 2020;
    ``tllib.regularization.co_tuning``. Differences from tllib: rows are tensors, not numpy arrays; a class without
    samples (a row of NaN there) and a label of -1 (ignored there) are errors; sums are accumulated in float64, batch by
    batch; a ``cache`` is the file of that name (numpy appends ".npy", and does not find it again) and must match.
    """

    relationship: Tensor

    def __init__(
        self,
        data_loader: Iterable[tuple[Tensor, Tensor]],
        classifier: nn.Module,
        device: torch.device | str,
        cache: str | os.PathLike[str] | None = None,
        *,
        num_classes: int | None = None,
    ) -> None:
        super().__init__()
        processes = Processes()
        cached = cache is not None and os.path.exists(cache)
        if processes.count > 1:  # what follows is collective: either all processes load it, or none
            cached = bool(processes.gather(torch.tensor([cached], device=device)).all())
        with in_eval_mode(classifier):
            if cache is not None and cached:
                matrix = _load(cache)
                _check_fit(matrix, data_loader, classifier, device, num_classes, cache)
            else:
                matrix = _mean_predictions(data_loader, classifier, device, num_classes, processes)
        self.register_buffer("relationship", matrix.to(device, torch.float32))
        if cache is not None and not cached:
            partial = f"{os.fspath(cache)}.{os.getpid()}"  # other processes may be reading or writing the same file
            torch.save(self.state_dict(), partial)
            os.replace(partial, cache)

    def __getitem__(self, category: int | Sequence[int] | Tensor) -> Tensor:
        """Return the rows of target classes: shape ``(N_s,)`` for one, ``(b, N_s)`` for b of them."""
        labels = torch.as_tensor(category)
        check_labels(labels.reshape(-1), labels.numel(), len(self.relationship))
        return F.embedding(labels.to(self.relationship.device), self.relationship)

    def __len__(self) -> int:
        return len(self.relationship)


def _mean_predictions(
    data_loader: Iterable[tuple[Tensor, Tensor]],
    classifier: nn.Module,
    device: torch.device | str,
    num_classes: int | None,
    processes: Processes,
) -> Tensor:
    """Return the mean source probabilities of each class. Shape ``(N_t, N_s)``, float64."""
    totals = torch.zeros(0, 1, dtype=torch.float64)  # per class: number of samples, then sums of the probabilities
    for x, labels in data_loader:
        labels = labels.cpu()
        check_labels(labels, len(x), num_classes)
        probabilities = source_logits(classifier, x.to(device)).cpu().double().softmax(dim=1)
        labels = labels.long()
        rows = len(labels.bincount()) if num_classes is None else num_classes
        totals = _grown(totals, rows, probabilities.shape[1] + 1)
        totals.index_add_(0, labels, F.pad(probabilities, (1, 0), value=1.0))
    if processes.count > 1:
        rows, columns = processes.gather(torch.tensor(totals.shape, device=device)).amax(dim=0).tolist()
        totals = _grown(totals, rows, columns).to(device)
        processes.sum_(totals)
    missing = (totals[:, 0] == 0).nonzero().flatten().tolist()
    if missing or not len(totals):
        raise ValueError(
            f"Every target class must have a sample, got none of class {missing if missing else 'at all'}. Either (a) "
            "the labels do not start at 0 or skip numbers, (b) `data_loader` leaves them out, or (c) `num_classes` is "
            "too large."
        )
    return totals[:, 1:] / totals[:, :1]


def _grown(totals: Tensor, rows: int, columns: int) -> Tensor:
    """Return ``totals``, padded with zeros to at least ``rows`` and ``columns``."""
    return F.pad(totals, (0, max(columns - totals.shape[1], 0), 0, max(rows - len(totals), 0)))


def _load(cache: str | os.PathLike[str]) -> Tensor:
    try:
        matrix = torch.load(cache, map_location="cpu", weights_only=True)["relationship"]
        matrix = matrix.to(torch.float32)
    except Exception as error:
        raise ValueError(
            f"`cache` must be a file that a Relationship saved, got {os.fspath(cache)!r} ({type(error).__name__}). "
            "Delete it, or give another name."
        ) from error
    return matrix  # type: ignore[no-any-return]


def _check_fit(
    matrix: Tensor,
    data_loader: Iterable[tuple[Tensor, Tensor]],
    classifier: nn.Module,
    device: torch.device | str,
    num_classes: int | None,
    cache: str | os.PathLike[str],
) -> None:
    """Raise unless ``matrix``, loaded from ``cache``, has the classes of the first batch."""
    x, labels = next(iter(data_loader), (None, None))
    if x is None or labels is None:
        raise ValueError("`data_loader` must have a batch to compare `cache` with, got an empty one.")
    check_labels(labels, len(x), num_classes)
    num_source = source_logits(classifier, x.to(device)).shape[1]
    num_target = len(matrix) if num_classes is None else num_classes
    if matrix.shape != (num_target, num_source) or int(labels.max()) >= len(matrix):
        raise ValueError(
            f"`cache` must be of {num_target} target and {num_source} source classes, got {tuple(matrix.shape)} in "
            f"{os.fspath(cache)!r}, and label {int(labels.max())} in the data. It belongs to another model or other "
            "data: delete it."
        )


class Classifier(lwf.Classifier):
    """:class:`rotoopt.regularization.lwf.Classifier` with a source head that is trained.

    With ``RotoGradOptimizer`` both heads are tasks, and both may be rotated, since the source head is trained.

    Example:
        >>> from rotoopt import RotoGradOptimizer
        >>> classifier = Classifier(nn.Linear(3, 8), num_classes=2, head_source=nn.Linear(8, 5))
        >>> x, labels = torch.randn(6, 3), torch.tensor([0, 1, 0, 1, 0, 1])
        >>> relationship = Relationship([(x, labels)], classifier, "cpu")
        >>> optimizer = RotoGradOptimizer(torch.optim.SGD(classifier.get_parameters(0.1)), heads=classifier.heads)
        >>> y_s, y_t = classifier(x)
        >>> co_tuning_loss = CoTuningLoss()(y_s, relationship[labels])
        >>> optimizer.step({"source": co_tuning_loss, "target": F.cross_entropy(y_t, labels)})
    """

    _freezes_source = False

    def get_parameters(self, base_lr: float = 1.0) -> list[dict[str, Any]]:
        """Return parameter groups: if ``finetune``, pretrained layers get a tenth of ``base_lr``."""
        backbone, *others = super().get_parameters(base_lr)
        return [backbone, {"params": self.head_source.parameters(), "lr": backbone["lr"]}, *others]
