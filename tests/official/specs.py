"""The cases in which the official package was run."""

from dataclasses import dataclass, field
from typing import Any

from tests.official.networks import Kind


@dataclass(frozen=True)
class Spec:
    """A case: an official model, the arguments of ``networks.build``, and one scale per task's loss."""

    model: str
    kind: Kind
    size: int
    loss_scales: tuple[float, ...]
    options: dict[str, Any] = field(default_factory=dict)
    has_backbone_loss: bool = False


def _rotated(shape: int | tuple[int, ...], post_shape: tuple[int, ...] = (), **options: Any) -> dict[str, Any]:
    # The references are measured again in the fourth of the six steps.
    return {"rotation_shape": shape, "post_shape": post_shape, "burn_in_period": 3, **options}


NORMALIZE: dict[str, Any] = {"normalize_losses": True}
CASES = {
    "vanilla": Spec("VanillaMTL", "vectors", 5, (0.1, 20.0)),
    "vanilla, maps, backbone loss": Spec("VanillaMTL", "maps", 3, (1.0, 0.01, 5.0), has_backbone_loss=True),
    "rotate only": Spec("RotateOnly", "vectors", 4, (0.1, 1.0, 10.0), _rotated(4)),
    "rotate only, channels, normalized": Spec("RotateOnly", "maps", 4, (50.0, 1.0), _rotated(4, (2, 3), **NORMALIZE)),
    "rotograd": Spec("RotoGrad", "vectors", 6, (0.01, 1.0, 30.0), _rotated(6)),
    "rotograd, normalized": Spec("RotoGrad", "vectors", 5, (0.2, 100.0), _rotated(5, **NORMALIZE)),
    "rotograd, no burn-in": Spec("RotoGrad", "vectors", 4, (1.0, 3.0), {"rotation_shape": 4}),
    "rotograd, part": Spec("RotoGrad", "vectors", 6, (5.0, 0.05, 1.0), _rotated(3)),
    "rotograd, tokens": Spec("RotoGrad", "tokens", 4, (0.1, 4.0), _rotated(4)),
    "rotograd, channels": Spec("RotoGrad", "maps", 4, (1.0, 20.0, 0.1), _rotated(4, (2, 3))),
    "rotograd, part of the channels, normalized": Spec(
        "RotoGrad", "maps", 5, (0.02, 2.0), _rotated(3, (2, 3), **NORMALIZE)
    ),
    "rotograd, channels and rows": Spec("RotoGrad", "maps", 2, (10.0, 1.0), _rotated((2, 2), (3,))),
    "rotograd, flattened": Spec("RotoGrad", "maps", 2, (0.3, 3.0), _rotated((2, 2, 3))),
    "rotograd, extra outputs, normalized": Spec("RotoGrad", "tuples", 4, (1.0, 40.0), _rotated(4, **NORMALIZE)),
    "rotograd, backbone loss": Spec("RotoGrad", "vectors", 4, (2.0, 0.1), _rotated(4), True),
    "rotograd, backbone loss, normalized": Spec(
        "RotoGrad", "vectors", 5, (0.1, 1.0, 8.0), _rotated(5, **NORMALIZE), True
    ),
    "gradnorm": Spec("RotoGradNorm", "vectors", 4, (0.1, 10.0), _rotated(4, alpha=1.5)),
    "gradnorm, part, normalized": Spec(
        "RotoGradNorm", "vectors", 5, (0.1, 1.0, 30.0), _rotated(3, alpha=1.5, **NORMALIZE)
    ),
    "gradnorm, channels": Spec("RotoGradNorm", "maps", 3, (1.0, 0.2), _rotated(3, (2, 3), alpha=0.5)),
}
