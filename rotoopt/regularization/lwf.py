"""Learning without Forgetting: the source head is kept, with its predictions before fine-tuning as targets."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, IterableDataset, SequentialSampler

from rotoopt._torch.modules import in_eval_mode
from rotoopt.regularization._inputs import at_least_float32, check_same_shape
from rotoopt.regularization._pooling import GlobalAveragePool, features_of


class Classifier(nn.Module):
    """A backbone with two heads, one of the source model and one for the target task.

    The source head reads the pooled features f, the target head ``bottleneck(f)``. With ``RotoGradOptimizer`` they are
    two tasks that share f: pass :attr:`heads`. The source head is frozen, so it must not be rotated:
    ``rotate=[False, True]``.

    Args:
        backbone: Returns maps ``(b, c, h, w)`` or vectors ``(b, c)``; has an attribute ``out_features``, c.
        num_classes: Number of target classes.
        head_source: The head of the source model. It is frozen, in place.
        head_target: Maps ``(b, features_dim)`` to ``(b, num_classes)``; a new ``nn.Linear`` by default.
        bottleneck: Maps ``(b, out_features)`` to ``(b, bottleneck_dim)``; none by default.
        bottleneck_dim: Number of features after ``bottleneck``.
        finetune: Whether :meth:`get_parameters` gives pretrained layers a tenth of the learning rate.
        pool_layer: Maps the output of ``backbone`` to vectors. Default: the mean over all positions.

    Raises:
        TypeError: If ``head_source`` is not a module.
        ValueError: If ``backbone`` has no ``out_features``, ``bottleneck`` comes without ``bottleneck_dim``, or
            ``head_target`` has another number of outputs.

    Example:
        >>> from rotoopt import RotoGradOptimizer
        >>> classifier = Classifier(nn.Linear(3, 8), num_classes=2, head_source=nn.Linear(8, 5))
        >>> bare = torch.optim.SGD(classifier.get_parameters(0.1))
        >>> optimizer = RotoGradOptimizer(bare, heads=classifier.heads, rotate=[False, True])
        >>> x, labels = torch.randn(6, 3), torch.randint(2, (6,))
        >>> recorded = record_logits([x], classifier, "cpu")
        >>> rep = classifier.represent(x)
        >>> y_s, y_t = classifier.predict(rep)
        >>> losses = {"source": distillation_loss(y_s, recorded, T=3.0), "target": F.cross_entropy(y_t, labels)}
        >>> optimizer.step(losses, rep)
        >>> y_s.shape, y_t.shape, classifier.eval()(x).shape
        (torch.Size([6, 5]), torch.Size([6, 2]), torch.Size([6, 2]))

    Source: Li and Hoiem, Learning without Forgetting, ECCV 2016; ``tllib.regularization.lwf.Classifier``, with the same
    names and outputs. Differences: the source head is frozen, since it is in no parameter group and its gradients
    would accumulate; the default pooling accepts vectors, and rejects token sequences instead of averaging over the
    wrong dimension; a ``pool_layer`` with parameters is trained with the backbone; modules that do not match are an
    error at construction; the source head does not run in eval mode.
    """

    _freezes_source = True

    def __init__(
        self,
        backbone: nn.Module,
        num_classes: int,
        head_source: nn.Module,
        head_target: nn.Module | None = None,
        bottleneck: nn.Module | None = None,
        bottleneck_dim: int = -1,
        finetune: bool = True,
        pool_layer: nn.Module | None = None,
    ) -> None:
        super().__init__()
        if not isinstance(head_source, nn.Module):
            raise TypeError(f"`head_source` must be the head of the source model, got {head_source!r}.")
        if bottleneck is not None and bottleneck_dim < 1:
            raise ValueError(
                f"`bottleneck_dim` must be the number of features after `bottleneck`, got {bottleneck_dim}."
            )
        self._features_dim = features_of(backbone) if bottleneck is None else bottleneck_dim
        if getattr(head_target, "out_features", num_classes) != num_classes:
            raise ValueError(f"`head_target` must have num_classes={num_classes} outputs, got {head_target}.")
        self.backbone = backbone
        self.num_classes = num_classes
        self.pool_layer = GlobalAveragePool() if pool_layer is None else pool_layer
        self.bottleneck = nn.Identity() if bottleneck is None else bottleneck
        self.head_source = head_source.requires_grad_(False) if self._freezes_source else head_source
        self.head_target = nn.Linear(self._features_dim, num_classes) if head_target is None else head_target
        self.finetune = finetune

    @property
    def features_dim(self) -> int:
        """Number of input features of the target head."""
        return self._features_dim

    @property
    def heads(self) -> dict[str, nn.Module]:
        """The heads for ``RotoGradOptimizer``, by task: source head, and bottleneck (or target head)."""
        begins_at_head = isinstance(self.bottleneck, nn.Identity)
        return {"source": self.head_source, "target": self.head_target if begins_at_head else self.bottleneck}

    def represent(self, x: Tensor) -> Tensor:
        """Return the representation that the heads share. Shape ``(b, out_features)``."""
        rep: Tensor = self.pool_layer(self.backbone(x))
        return rep

    def predict(self, rep: Tensor) -> tuple[Tensor, Tensor]:
        """Return the logits of both heads. Shapes ``(b, N_s)`` and ``(b, num_classes)``."""
        return self.head_source(rep), self.head_target(self.bottleneck(rep))

    def predict_source(self, x: Tensor) -> Tensor:
        """Return the logits of the source head, in any mode. Shape ``(b, N_s)``."""
        logits: Tensor = self.head_source(self.represent(x))
        return logits

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor] | Tensor:
        """Return :meth:`predict` in training mode, and the target logits alone in eval mode."""
        rep = self.represent(x)
        if self.training:
            return self.predict(rep)
        logits: Tensor = self.head_target(self.bottleneck(rep))
        return logits

    def get_parameters(self, base_lr: float = 1.0) -> list[dict[str, Any]]:
        """Return parameter groups: if ``finetune``, pretrained layers get a tenth of ``base_lr``."""
        pretrained_lr = 0.1 * base_lr if self.finetune else base_lr
        return [
            {"params": [*self.backbone.parameters(), *self.pool_layer.parameters()], "lr": pretrained_lr},
            {"params": self.bottleneck.parameters(), "lr": base_lr},
            {"params": self.head_target.parameters(), "lr": base_lr},
        ]


def distillation_loss(
    student: Tensor, teacher: Tensor, T: float = 1.0, *, form: Literal["kl", "cross_entropy"] = "kl"
) -> Tensor:
    r"""Penalize differences between the predictions of student and teacher.

    The mean over the batch of :math:`\mathrm{KL}(p \Vert q)`, where p and q are the softmax of ``teacher`` and
    ``student`` over T. Its gradient scales with :math:`1/T^2`: multiply by ``T ** 2`` to compensate. A class with p = 0
    contributes nothing, for any q.

    Args:
        student: Logits. Shape ``(b, N)``.
        teacher: Logits, which receive no gradient. Shape ``(b, N)``.
        T: Temperature.
        form: ``"kl"``, as above, or ``"cross_entropy"``: :math:`H(p, q)`, which has the same gradient, but is not zero
            if student and teacher agree, so that ``normalize_losses`` and ``GradNorm`` can divide by it.

    Returns:
        Shape ``()``, at least float32.

    Raises:
        ValueError: If the shapes differ, or an option is out of range.

    Example:
        >>> student, teacher = torch.tensor([[0.0, 0.0]]), torch.tensor([[1.0, -1.0]])
        >>> distillation_loss(student, teacher), distillation_loss(teacher, teacher)
        (tensor(0.3278), tensor(0.))

    Source: ``KnowledgeDistillationLoss`` in ``tllib``. Differences: the teacher receives no gradient; logits of -inf,
    as for masked classes, do not give NaN; half precision is computed in float32.
    """
    check_same_shape(student=student, teacher=teacher)
    if not T > 0 or form not in ("kl", "cross_entropy"):
        raise ValueError(
            f"`T` must be positive and `form` one of 'kl' and 'cross_entropy', got T={T!r} and form={form!r}."
        )
    log_q = F.log_softmax(at_least_float32(student) / T, dim=1)
    log_p = F.log_softmax(at_least_float32(teacher.detach()) / T, dim=1)
    p = log_p.exp()
    nats = log_p - log_q if form == "kl" else -log_q
    return torch.where(p == 0, 0.0, p * nats).sum(dim=1).mean()


def record_logits(data_loader: Iterable[Any], classifier: nn.Module, device: torch.device | str) -> Tensor:
    """Return the predictions of the source model, as targets for fine-tuning. Row i is sample i of the data set.

    Args:
        data_loader: Yields ``x`` or ``(x, ...)``, in the order of the data set. With random augmentations, logits
            belong to the recorded view, and training uses others.
        classifier: Maps x to source logits ``(b, N)``. In a :class:`Classifier`, the source head is used. It runs in
            eval mode; its modes are restored afterwards.
        device: The device of the computation.

    Returns:
        Shape ``(n, N)``, on the CPU.

    Raises:
        ValueError: If a ``DataLoader`` shuffles, samples or drops samples, there is no batch, or ``classifier``
            does not return logits.

    Source: ``collect_pretrain_labels`` in ``tllib``, which leaves the model in eval mode and accepts shuffled loaders.
    """
    _check_order(data_loader)
    with in_eval_mode(classifier):
        batches = (batch[0] if isinstance(batch, tuple | list) else batch for batch in data_loader)
        recorded = [source_logits(classifier, x.to(device)).cpu() for x in batches]
    if not recorded:
        raise ValueError("`data_loader` must yield at least one batch, got none.")
    return torch.cat(recorded)


@torch.no_grad()
def source_logits(classifier: nn.Module, x: Tensor) -> Tensor:
    """Return the source logits of ``x``. Shape ``(b, N)``."""
    if isinstance(classifier, Classifier):
        return classifier.predict_source(x)
    logits = classifier(x)
    hidden = any(isinstance(module, Classifier) for module in classifier.modules())  # would return target logits
    if hidden or not isinstance(logits, Tensor) or logits.ndim != 2 or len(logits) != len(x):
        found = tuple(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
        raise ValueError(
            f"`classifier` must map x to source logits (b, N), got {found} for {len(x)} samples from a "
            f"{type(classifier).__name__}. Pass the Classifier itself, or "
            "nn.Sequential(classifier.backbone, classifier.pool_layer, classifier.head_source)."
        )
    return logits


def _check_order(data_loader: Iterable[Any]) -> None:
    if not isinstance(data_loader, DataLoader) or isinstance(data_loader.dataset, IterableDataset):
        return
    batches = data_loader.batch_sampler
    sampler = data_loader.sampler if batches is None else getattr(batches, "sampler", batches)
    drop_last = getattr(batches, "drop_last", False)
    if drop_last or not isinstance(sampler, SequentialSampler):
        raise ValueError(
            "`data_loader` must yield every sample once, in the order of the data set, so that row i belongs to sample "
            f"i, got one with a {type(sampler).__name__} and drop_last={drop_last}. Record with another loader: "
            "DataLoader(dataset, batch_size, shuffle=False)."
        )
