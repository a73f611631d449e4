"""Models whose tasks have separate samples, or share them."""

from __future__ import annotations

from torch import Tensor

from rotoopt.testing._branching.model import Branching, Sizes, square


def batch_per_domain(s: Sizes) -> Branching:
    """Every task has its own samples, and all tasks are in one backward pass."""
    backbone, heads = s.vectors(), {"art": s.head(), "photo": s.head(), "sketch": s.head()}

    def losses(x: Tensor) -> dict[str, Tensor]:
        return {name: square(h(backbone(x.roll(i, 1)[i % 2 :: 2]))) for i, (name, h) in enumerate(heads.items())}

    return Branching([backbone], heads, losses)


def rows_per_task(s: Sizes) -> Branching:
    """One batch; each task uses some of its rows."""
    backbone, heads = s.vectors(), {"even": s.head(), "odd": s.head()}

    def losses(x: Tensor) -> dict[str, Tensor]:
        z = backbone(x)
        return {"even": square(heads["even"](z[::2])), "odd": square(heads["odd"](z[1::2]))}

    return Branching([backbone], heads, losses)


def one_tensor(s: Sizes) -> Branching:
    """One tensor for all heads: weighted exactly, and rotated."""
    backbone, heads = s.vectors(), {"left": s.head(), "right": s.head(), "third": s.head(outputs=1)}

    def losses(x: Tensor) -> dict[str, Tensor]:
        z = backbone(x)
        return {name: square(h(z)) for name, h in heads.items()}

    return Branching([backbone], heads, losses)
