"""The (L, d, P) view: it is invertible, copies nothing, and rotating it is a rotation."""

import math

import torch
from hypothesis import assume, example, given
from hypothesis import strategies as st
from torch.testing import assert_close

from rotoopt._capture.representation import RotatedDims, rotated
from tests.asserts import eps
from tests.oracle import layout, rotate
from tests.samplers import DTYPES, LAYOUTS, SEEDS, Layout, Sampler

# Of float64: sums of at most 36 products of numbers of size up to about 5.
ROUNDING = 1e-13
LAYOUT = st.sampled_from(LAYOUTS)


@st.composite
def views(draw: st.DrawFn) -> tuple[torch.Size, tuple[int, ...]]:
    """Draw a shape of 1 to 5 dimensions and some of them, in any order, some counted from the end."""
    shape = draw(st.lists(st.integers(1, 4), min_size=1, max_size=5))
    dims = draw(st.lists(st.sampled_from(range(len(shape))), min_size=1, unique=True))
    return torch.Size(shape), tuple(i - len(shape) * draw(st.integers(0, 1)) for i in dims)


@given(view=views())
def test_restore_inverts_view(view: tuple[torch.Size, tuple[int, ...]]) -> None:
    shape, dim = view
    rep, dims = torch.arange(shape.numel()).view(shape), RotatedDims(dim)
    assert torch.equal(dims.restore(dims.view(rep), rep), rep)


@given(view=views())
def test_features_are_the_rotated_dimensions_in_row_major_order(view: tuple[torch.Size, tuple[int, ...]]) -> None:
    shape, dim = view
    rep, dims = torch.arange(shape.numel()).view(shape), RotatedDims(dim)
    rows = dims.view(rep).mT.reshape(-1, dims.size(rep.shape))  # (samples, d)
    assert torch.equal(rows, layout(shape, dim))


@given(view=views(), K=st.integers(1, 4))
def test_view_of_a_stack_is_the_stack_of_views(view: tuple[torch.Size, tuple[int, ...]], K: int) -> None:
    shape, dim = view
    reps, dims = torch.arange(K * shape.numel()).view(K, *shape), RotatedDims(dim)
    assert torch.equal(dims.view_stacked(reps), torch.stack([dims.view(rep) for rep in reps]))


@given(shape=st.lists(st.integers(1, 4), min_size=1, max_size=5), data=st.data())
def test_view_of_adjacent_dims_copies_nothing(shape: list[int], data: st.DataObject) -> None:
    first = data.draw(st.integers(0, len(shape) - 1))
    stop = data.draw(st.integers(first + 1, len(shape)))
    rep, dims = torch.zeros(shape), RotatedDims(range(first, stop))
    assert dims.view(rep).data_ptr() == rep.data_ptr()


@given(layout_=LAYOUT, seed=SEEDS, dtype=DTYPES)
def test_rotation_keeps_inner_products(layout_: Layout, seed: int, dtype: torch.dtype) -> None:
    shape, dim = layout_
    sampler, dims = Sampler(seed, dtype), RotatedDims(dim)
    x, y = sampler.normal(*shape), sampler.normal(*shape)
    (R,) = sampler.rotations(1, dims.size(x.shape))
    # The rounding of two products of d terms each, relative to |x||y|, not to <x, y>, which may cancel.
    atol = 4 * dims.size(x.shape) * eps(dtype) * float(x.norm() * y.norm())
    assert_close((rotated(x, R, dims) * rotated(y, R, dims)).sum(), (x * y).sum(), rtol=0, atol=atol)
    assert_close(rotated(x, R, dims).norm(), x.norm(), rtol=4 * dims.size(x.shape) * eps(dtype), atol=0)


@given(layout_=LAYOUT, seed=SEEDS, rest=st.integers(0, 3))
@example(layout_=((5, 6, 6), -2), seed=0, rest=0)
def test_rotation_is_the_oracles_and_passes_the_rest_through(layout_: Layout, seed: int, rest: int) -> None:
    shape, dim = layout_
    sampler, dims = Sampler(seed), RotatedDims(dim)
    rep = sampler.normal(*shape)
    m = dims.size(rep.shape) - rest
    (R,) = sampler.rotations(1, m)
    assert_close(rotated(rep, R, dims), rotate(rep, R, layout(rep.shape, dims.dim)), rtol=ROUNDING, atol=ROUNDING)
    assert torch.equal(dims.view(rotated(rep, R, dims))[:, m:], dims.view(rep)[:, m:])


@given(layout_=LAYOUT, seed=SEEDS, rest=st.integers(0, 3))
@example(layout_=((5, 6), 1), seed=0, rest=0)
def test_rotation_is_written_to_the_memory_that_is_given(layout_: Layout, seed: int, rest: int) -> None:
    shape, dim = layout_
    sampler, dims = Sampler(seed), RotatedDims(dim)
    rep, out = sampler.normal(*shape), torch.full(shape, torch.nan).double()
    assume(dims.lie_side_by_side(rep.shape))
    (R,) = sampler.rotations(1, dims.size(rep.shape) - rest)
    assert rotated(rep, R, dims, out).data_ptr() == out.data_ptr()
    assert_close(out, rotated(rep, R, dims), rtol=ROUNDING, atol=ROUNDING)


@given(layout_=LAYOUT, seed=SEEDS, rest=st.integers(0, 3))
def test_strides_do_not_matter_and_are_kept(layout_: Layout, seed: int, rest: int) -> None:
    """They are kept if one dimension is rotated; several need not lie side by side."""
    shape, dim = layout_
    sampler, dims = Sampler(seed), RotatedDims(dim)
    order = torch.randperm(len(shape), generator=sampler.generator).tolist()
    rep = sampler.normal(*shape)
    strided = rep.permute(order).contiguous().permute([order.index(i) for i in range(len(shape))])
    (R,) = sampler.rotations(1, dims.size(rep.shape) - rest)
    out = rotated(strided, R, dims)
    assert_close(out, rotated(rep, R, dims), rtol=ROUNDING, atol=ROUNDING)
    assert out.permute(order).is_contiguous() or len(dims.dim) > 1


@given(layout_=LAYOUT, seed=SEEDS)
def test_transposed_rotation_is_the_inverse(layout_: Layout, seed: int) -> None:
    shape, dim = layout_
    sampler, dims = Sampler(seed), RotatedDims(dim)
    rep = sampler.normal(*shape)
    (R,) = sampler.rotations(1, dims.size(rep.shape))
    assert_close(rotated(rotated(rep, R, dims), R.mT, dims), rep, rtol=ROUNDING, atol=ROUNDING)


def test_size_is_the_product_of_the_rotated_dimensions() -> None:
    assert RotatedDims((1, -1)).size(torch.Size([2, 3, 4, 5])) == math.prod((3, 5))


def test_a_tensor_without_a_rotated_dimension_does_not_fit() -> None:
    for dim, shape in ((1, (6,)), ((-1, -2), (6,)), (-3, (6, 6)), (None, (6, 6, 6, 6))):
        for all_of_them in (True, False):
            assert not RotatedDims(dim).fit(torch.Size(shape), 6, all_of_them=all_of_them)
