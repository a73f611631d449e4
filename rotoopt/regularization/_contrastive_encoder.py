"""The encoder of Bi-Tuning: one representation, a classifier and a projector."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from torch.nn.functional import normalize, pad

from rotoopt.regularization._inputs import at_least_float32
from rotoopt.regularization._pooling import GlobalAveragePool, features_of


class ClassifierHead(nn.Linear):
    """A linear layer that can also return its input, which is rotated if there is a rotation in front of it."""

    def forward(self, rep: Tensor, with_rep: bool = False) -> Any:
        """Return the logits, and ``rep`` as well if ``with_rep``."""
        logits = super().forward(rep)
        return (logits, rep) if with_rep else logits


class Classifier(nn.Module):
    """The encoder of Bi-Tuning: a backbone, with a linear classifier and a linear projector on its features h.

    With ``RotoGradOptimizer`` they are two tasks that share h: pass :attr:`heads`.

    Args:
        backbone: Returns maps ``(b, c, h, w)`` or vectors ``(b, c)``; has an attribute ``out_features``, c.
        num_classes: Number of classes.
        projection_dim: Number of outputs of the projector.
        finetune: Whether :meth:`get_parameters` gives backbone and projector a tenth of the learning rate.
        pool_layer: Maps the output of ``backbone`` to vectors. Default: the mean over all positions.

    Raises:
        ValueError: If ``backbone`` has no ``out_features``.

    Source: ``tllib.regularization.bi_tuning.Classifier``, with the same names and outputs. Differences: the default
    pooling accepts vectors and rejects token sequences; unit vectors are at least float32.
    """

    def __init__(
        self,
        backbone: nn.Module,
        num_classes: int,
        projection_dim: int = 128,
        finetune: bool = True,
        pool_layer: nn.Module | None = None,
    ) -> None:
        super().__init__()
        self.backbone = backbone
        self.num_classes = num_classes
        self.projection_dim = projection_dim
        self.finetune = finetune
        self.pool_layer = GlobalAveragePool() if pool_layer is None else pool_layer
        self.head = ClassifierHead(self.features_dim, num_classes)
        nn.init.normal_(self.head.weight, std=0.01)
        nn.init.zeros_(self.head.bias)
        self.projector = nn.Linear(self.features_dim, projection_dim)

    @property
    def features_dim(self) -> int:
        """Number of input features of the heads."""
        return features_of(self.backbone)

    @property
    def heads(self) -> dict[str, nn.Module]:
        """The heads for ``RotoGradOptimizer``, by task."""
        return {"classifier": self.head, "projector": self.projector}

    def represent(self, x: Tensor) -> Tensor:
        """Return h. Shape ``(b, features_dim)``."""
        rep: Tensor = self.pool_layer(self.backbone(x))
        return rep

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor] | Tensor:
        """Return logits y, and in training mode also the unit vectors z and hn of projector and head input.

        Returns:
            In training mode y ``(b, num_classes)``, z ``(b, projection_dim)`` and hn = [h, 1] / ||[h, 1]||
            ``(b, features_dim + 1)``; in eval mode y.
        """
        rep = self.represent(x)
        if not self.training:
            return self.head(rep)  # type: ignore[no-any-return]
        logits, seen = self.head(rep, with_rep=True)
        return logits, unit(self.projector(rep)), unit(with_one(seen))

    def get_parameters(self, base_lr: float = 1.0) -> list[dict[str, Any]]:
        """Return parameter groups: if ``finetune``, a tenth of ``base_lr`` for backbone and projector."""
        pretrained_lr = 0.1 * base_lr if self.finetune else base_lr
        return [
            {"params": [*self.backbone.parameters(), *self.pool_layer.parameters()], "lr": pretrained_lr},
            {"params": self.head.parameters(), "lr": base_lr},
            {"params": self.projector.parameters(), "lr": pretrained_lr},
        ]


def unit(vectors: Tensor) -> Tensor:
    """Return ``vectors``, shape ``(b, n)``, normalized to length one, at least float32."""
    return normalize(at_least_float32(vectors), dim=1)


def with_one(vectors: Tensor) -> Tensor:
    """Return ``[h, 1]`` for every h in ``vectors``. Shape ``(b, n)`` to ``(b, n + 1)``."""
    return pad(vectors, (0, 1), value=1.0)
