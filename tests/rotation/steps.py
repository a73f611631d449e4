"""Rotation steps on given gradients."""

import pytest
import torch
from torch import Tensor, nn

from rotoopt._rotation import cayley_step
from rotoopt._rotation.cayley_step import CayleyStep
from rotoopt._rotation.rotations import Rotations
from rotoopt._rotation.step import RotationGradient
from rotoopt._torch.processes import Processes
from tests.samplers import Sampler, haar, rotation_gradient


def cayley(rotations: Rotations, lr: float, processes: Processes | None = None) -> CayleyStep:
    """Return the step for a network with a constant learning rate."""
    network = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=0.1)
    return CayleyStep(rotations, lr, processes or Processes(), network)


def turned(
    R: Tensor,
    *passes: RotationGradient,
    lr: float = 0.1,
    steps: int = 1,
    dense_from: float | None = None,
    processes: Processes | None = None,
) -> Tensor:
    """Return R after steps with the same gradients."""
    rotations = haar(len(R), R.shape[-1], R.dtype)
    rotations.load_matrices(R)
    step = cayley(rotations, lr, processes)
    with pytest.MonkeyPatch.context() as patch:
        if dense_from is not None:
            patch.setattr(cayley_step, "DENSE_FROM", dense_from)
        for _ in range(steps):
            step.step(passes)
    return rotations.matrices.clone()


def with_moment(sampler: Sampler, K: int, n: int, m: int) -> tuple[RotationGradient, Tensor]:
    """Return a gradient with the second moment of features of different variance, and that moment with trace m."""
    z = sampler.normal(n, m) * sampler.log_scales(m, -2, 2)
    gradient = rotation_gradient(*sampler.directions(K, n, m), z)
    assert gradient.second_moment is not None
    return gradient, gradient.second_moment * m / gradient.second_moment.trace()
