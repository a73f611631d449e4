"""The distillation loss equals its formula, in both forms."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F
from torch.testing import assert_close

from rotoopt.regularization.lwf import distillation_loss
from tests.asserts import eps
from tests.contract.models import assert_same
from tests.samplers import SEEDS

FORMS = ["kl", "cross_entropy"]


def logits(seed: int, scale: float = 1.0, shape: tuple[int, int] = (4, 5)) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    student, teacher = scale * torch.randn(2, *shape, generator=generator, dtype=torch.float64)
    return student, teacher


def oracle(student: Tensor, teacher: Tensor, T: float, form: str) -> float:
    """The mean of sum_i p_i log(p_i / q_i), or of -sum_i p_i log q_i, one number at a time."""
    total = 0.0
    for s, t in zip(student.tolist(), teacher.tolist(), strict=True):
        q, p = ([math.exp(each / T) for each in row] for row in (s, t))
        q, p = ([each / math.fsum(row) for each in row] for row in (q, p))
        base = p if form == "kl" else [1.0] * len(p)
        total += math.fsum(a * math.log(c / b) for a, b, c in zip(p, q, base, strict=True))
    return total / len(student)


@pytest.mark.parametrize("form", FORMS)
@given(seed=SEEDS, T=st.floats(0.5, 10), scale=st.floats(0, 5))
def test_distillation_is_its_formula(form: Any, seed: int, T: float, scale: float) -> None:
    student, teacher = logits(seed, scale)
    loss = distillation_loss(student, teacher, T, form=form)
    assert_close(float(loss), oracle(student, teacher, T, form), rtol=1e-12, atol=1e-14)


@given(seed=SEEDS, T=st.floats(0.5, 10))
def test_distillation_is_torchs_kl_divergence(seed: int, T: float) -> None:
    student, teacher = logits(seed)
    expected = F.kl_div((student / T).log_softmax(dim=1), (teacher / T).softmax(dim=1), reduction="batchmean")
    assert_close(distillation_loss(student, teacher, T), expected, rtol=1e-12, atol=1e-15)
    assert_same(distillation_loss(student, teacher), distillation_loss(student, teacher, 1.0, form="kl"))


@given(seed=SEEDS, T=st.floats(0.5, 10))
def test_both_forms_have_the_gradient_of_the_closed_form(seed: int, T: float) -> None:
    student, teacher = logits(seed)
    student.requires_grad_()
    expected = ((student / T).softmax(dim=1) - (teacher / T).softmax(dim=1)).detach() / (T * len(student))
    for form in ("kl", "cross_entropy"):
        (grad,) = torch.autograd.grad(distillation_loss(student, teacher, T, form=form), student)
        assert_close(grad, expected, rtol=1e-12, atol=1e-16)


@given(seed=SEEDS, shift=st.floats(-50, 50), scale=st.floats(0, 5))
def test_distillation_does_not_depend_on_order_or_shifts(seed: int, shift: float, scale: float) -> None:
    student, teacher = logits(seed, scale)
    loss = distillation_loss(student, teacher)
    generator = torch.Generator().manual_seed(seed)
    rows, columns = torch.randperm(4, generator=generator), torch.randperm(5, generator=generator)
    permuted = distillation_loss(student[rows][:, columns], teacher[rows][:, columns])
    assert_close(permuted, loss, rtol=1e-12, atol=1e-14)
    assert_close(distillation_loss(student + shift, teacher - shift), loss, rtol=1e-10, atol=1e-12)
    assert loss >= -1e-15


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_agreement_is_zero_with_zero_gradient(dtype: torch.dtype) -> None:
    teacher = (10 * torch.randn(4, 5)).to(dtype)
    student = teacher.clone().requires_grad_()
    loss = distillation_loss(student, teacher, 3.0)
    loss.backward()  # type: ignore[no-untyped-call]
    assert loss == 0.0
    assert student.grad is not None
    assert student.grad.abs().max() <= eps(torch.promote_types(dtype, torch.float32))
    assert distillation_loss(student, teacher, 3.0, form="cross_entropy") > 0.0


@pytest.mark.parametrize("form", FORMS)
def test_distillation_gradcheck(form: Any) -> None:
    student, teacher = logits(0)
    student.requires_grad_()
    assert torch.autograd.gradcheck(lambda s: distillation_loss(s, teacher, 2.0, form=form), student)
    assert torch.autograd.gradgradcheck(lambda s: distillation_loss(s, teacher, 2.0, form=form), student)


@pytest.mark.parametrize("form", FORMS)
def test_teacher_gets_no_gradient(form: Any) -> None:
    student, teacher = (each.requires_grad_() for each in logits(0))
    distillation_loss(student, teacher, form=form).backward()  # type: ignore[no-untyped-call]
    assert teacher.grad is None
    assert student.grad is not None


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("masked", ["teacher", "both"])
def test_masked_classes_count_as_impossible(form: Any, masked: str) -> None:
    student, teacher = logits(0)
    teacher[:, 0] = -torch.inf
    if masked == "both":
        student[:, 0] = -torch.inf
        expected = distillation_loss(student[:, 1:], teacher[:, 1:], form=form)
    else:
        expected = distillation_loss(student, teacher.clamp(min=-1e5), form=form)
    student.requires_grad_()
    loss = distillation_loss(student, teacher, form=form)
    loss.backward()  # type: ignore[no-untyped-call]
    assert_close(loss, expected, rtol=1e-12, atol=0.0)
    assert student.grad is not None
    assert student.grad.isfinite().all()


@pytest.mark.parametrize("which", ["student", "teacher"])
@pytest.mark.parametrize("form", FORMS)
def test_nan_is_not_hidden(form: Any, which: str) -> None:
    student, teacher = logits(0)
    (student if which == "student" else teacher)[0, 0] = torch.nan
    assert distillation_loss(student, teacher, form=form).isnan()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("autocast", [False, True])
def test_half_precision_is_computed_in_float32(form: Any, dtype: torch.dtype, autocast: bool) -> None:
    student, teacher = (each.to(dtype) for each in logits(0, scale=30.0))
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        loss = distillation_loss(student, teacher, 3.0, form=form)
    assert loss.dtype == torch.float32
    assert_same(loss, distillation_loss(student.float(), teacher.float(), 3.0, form=form))


@pytest.mark.parametrize("shapes", [((4, 5), (4, 1)), ((4, 5), (5,)), ((4, 5), (1, 5)), ((5,), (5,)), ((2, 3, 5),) * 2])
def test_other_shapes_are_an_error(shapes: tuple[tuple[int, ...], tuple[int, ...]]) -> None:
    with pytest.raises(ValueError, match=r"`student` and `teacher` must have the same shape \(b, N\), got"):
        distillation_loss(torch.zeros(shapes[0]), torch.zeros(shapes[1]))


@pytest.mark.parametrize("options", [{"T": 0.0}, {"T": -1.0}, {"T": math.nan}, {"form": "mse"}])
def test_options_out_of_range_are_an_error(options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="`T` must be positive and `form` one of"):
        distillation_loss(torch.zeros(2, 3), torch.zeros(2, 3), **options)
