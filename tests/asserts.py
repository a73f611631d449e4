"""One assertion per mathematical property, with its tolerance and the reason for it."""

import re

import torch
from torch import Tensor


def eps(dtype: torch.dtype) -> float:
    return torch.finfo(dtype).eps


def relative_error(actual: Tensor, expected: Tensor) -> float:
    """Return the largest difference over the largest entry of ``expected``."""
    difference = (actual.double() - expected.double()).abs().max()
    return float(difference / expected.double().abs().max().clamp(min=1e-300))


def assert_rotations(matrices: Tensor) -> None:
    """Assert R'R = I and det R = +1.

    Largest error measured in R'R: 7.4 eps (m + ||A||), A the generator. One turn is capped at
    ||A|| <= 2, and the Newton-Schulz step after it keeps many turns where one is, so the bound needs
    no term for their number: 20 eps (m + 2).
    """
    m = matrices.shape[-1]
    bound = 20 * eps(matrices.dtype) * (m + 2)
    assert (matrices.mT @ matrices - torch.eye(m, dtype=matrices.dtype)).abs().max() <= bound
    # Not `det`: the product of m pivots underflows from about m = 350 on.
    sign, logarithm = torch.linalg.slogdet(matrices.double())
    assert (sign == 1).all()
    assert logarithm.abs().max() <= bound * m / 2  # log det R = trace(R'R - I) / 2


def assert_reads_well(message: str) -> None:
    """Assert that a message states the rule and what was found, in complete sentences, which may begin with code."""
    assert re.match(r"[A-Z`]|\w+[(=]", message), message
    assert message.endswith((".", "?")), message
    assert re.search(r"\b(must|should)\b.*, got ", message, flags=re.DOTALL), message
    assert not re.search(r"[a-z)`\]]\. (?!\w+\.\w+\()[a-z]", message), message
    assert not re.search(r"XX|[A-Z]{3,} [A-Z]{2,}", message), message


def assert_same_bits(actual: Tensor, expected: Tensor) -> None:
    """Assert equality of the bits: NaN equals itself, and -0 does not equal 0."""
    assert actual.dtype == expected.dtype
    integers = torch.int32 if actual.dtype == torch.float32 else torch.int64
    assert torch.equal(actual.contiguous().view(integers), expected.contiguous().view(integers))
