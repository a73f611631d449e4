"""Strategies for ``hypothesis`` (an extra): representations, gradients, rotations and small models.

They draw sizes, scales and seeds, never the entries of a tensor: shrinking is fast, and failures can be replayed.
"""

from __future__ import annotations

import torch
from hypothesis import strategies as st
from torch import Tensor

from rotoopt.testing._branching import BRANCHING
from rotoopt.testing._branching.model import Branching, Sizes, built, inputs
from rotoopt.testing._models import Batch, Network, batches, network
from rotoopt.testing._sampler import Sampler

# Shapes of a representation, each with the dimensions to rotate: vectors, tokens, maps.
Layout = tuple[tuple[int, ...], int | tuple[int, ...]]
LAYOUTS: list[Layout] = [
    ((6, 8), -1),
    ((3, 4, 6), -1),
    ((3, 6, 2, 3), 1),
    ((3, 4, 2, 3), (1, 2)),
    ((2, 3, 4, 2), (1, 3)),
    ((3, 12), -1),  # fewer samples than features, here and below: updates of low rank
    ((2, 12, 2, 1), 1),
]


def seeds() -> st.SearchStrategy[int]:
    """Draw a seed."""
    return st.integers(0, 2**32 - 1)


def dtypes() -> st.SearchStrategy[torch.dtype]:
    """Draw float32 or float64."""
    return st.sampled_from([torch.float32, torch.float64])


def layouts() -> st.SearchStrategy[Layout]:
    """Draw the shape of a representation, with ``dim``: vectors, tokens, maps, several rotated dimensions."""
    return st.sampled_from(LAYOUTS)


@st.composite
def representations(draw: st.DrawFn) -> tuple[Tensor, int | tuple[int, ...]]:
    """Draw a representation that requires grad, with the dimensions to rotate.

    Example:
        >>> from hypothesis import given
        >>> @given(representations())
        ... def test(drawn):
        ...     z, dim = drawn
        ...     assert z.requires_grad
        >>> test()
    """
    shape, dim = draw(layouts())
    return Sampler(draw(seeds()), draw(dtypes())).normal(*shape).requires_grad_(), dim


@st.composite
def task_gradients(
    draw: st.DrawFn,
    num_tasks: st.SearchStrategy[int] = st.integers(2, 10),  # noqa: B008 - strategies are values
    *,
    conflicting: bool | None = None,
    max_log_scale: float = 3.0,
    low_rank: bool = False,
) -> Tensor:
    r"""Draw gradients of K tasks at a representation of vectors.

    Args:
        draw: Provided by hypothesis.
        num_tasks: Draws K.
        conflicting: Whether cosines are negative. Default: either.
        max_log_scale: Norms are between :math:`10^{-s}` and :math:`10^s`, drawn per task.
        low_rank: Whether the gradients of all samples of a task are multiples of one vector.

    Returns:
        Shape ``(K, B, d)``.
    """
    K = draw(num_tasks)
    low, high = {True: (-1.0, -0.01), False: (0.0, 1.0), None: (-1.0, 1.0)}[conflicting]
    cosine = draw(st.floats(low, high))
    cosine = cosine / (K - 1) if cosine < 0 and K > 1 else cosine
    sampler = Sampler(draw(seeds()), draw(dtypes()))
    units = sampler.task_gradients(K, 4, 6, cosine=cosine, rank=1 if low_rank else None)
    return units * sampler.log_scales(K, -max_log_scale, max_log_scale)[:, None, None]


@st.composite
def rotations(draw: st.DrawFn) -> Tensor:
    """Draw Haar rotations. Shape ``(K, m, m)``."""
    return Sampler(draw(seeds()), draw(dtypes())).rotations(draw(st.integers(1, 10)), draw(st.integers(2, 24)))


@st.composite
def multi_task_models(draw: st.DrawFn) -> tuple[Network, list[Batch], int | tuple[int, ...]]:
    """Draw a small network, some batches for it, and the dimensions of its representation to rotate.

    Example:
        >>> from hypothesis import given, settings
        >>> from rotoopt import RotoGradOptimizer
        >>> from rotoopt.testing import check_invariants
        >>> @settings(deadline=None)
        ... @given(multi_task_models())
        ... def test(drawn):
        ...     model, batches, dim = drawn
        ...     bare = torch.optim.SGD(model.parameters(), lr=0.1)
        ...     optimizer = RotoGradOptimizer(bare, heads=model.heads, dim=dim)
        ...     check_invariants(optimizer, lambda: model.losses(batches[0])[0])
        >>> test()
    """
    shape, dim = draw(layouts())
    K, seed, dtype = draw(st.integers(1, 5)), draw(seeds()), draw(dtypes())
    return network(seed, shape[1:], K, dtype), batches(seed, 3, K, dtype), dim


@st.composite
def branching_models(draw: st.DrawFn) -> tuple[Branching, list[Tensor]]:
    """Draw a small model whose heads need not all read one tensor, and the inputs of some batches.

    Example:
        >>> from hypothesis import given, settings
        >>> from rotoopt import RotoGradOptimizer
        >>> from rotoopt.testing import check_invariants
        >>> @settings(deadline=None)
        ... @given(branching_models())
        ... def test(drawn):
        ...     model, batches = drawn
        ...     bare = torch.optim.SGD(model.modules().parameters(), lr=0.1)
        ...     optimizer = RotoGradOptimizer(bare, model.heads, **model.options)
        ...     check_invariants(optimizer, lambda: model.losses(batches[0]))
        >>> test()
    """
    make, seed, dtype = draw(st.sampled_from(BRANCHING)), draw(seeds()), draw(dtypes())
    sizes, size = draw(model_sizes()), draw(st.integers(2, 5))
    return built(make, sizes, seed, dtype), [inputs(seed + batch, size, dtype) for batch in range(3)]


def model_sizes() -> st.SearchStrategy[Sizes]:
    """Draw the sizes of a model that branches."""
    features = st.sampled_from([4, 6, 8, 10])
    return st.builds(Sizes, features=features, length=st.integers(1, 5), side=st.sampled_from([4, 8]))
