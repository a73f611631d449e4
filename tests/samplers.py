"""Strategies of the property tests: sizes, seeds, scales and dtypes, never the entries of a tensor."""

import copy
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.optim import SGD

from rotoopt import Rotations, RotoGradOptimizer, RotoGradWeighting, StepRecord
from rotoopt._capture.representation import RotatedDims
from rotoopt._rotation.cayley import DenseSkew, SampleSkew, Skew
from rotoopt._rotation.step import RotationGradient
from rotoopt.testing._models import Network as Network
from rotoopt.testing._models import batches as batches
from rotoopt.testing._models import network as network
from rotoopt.testing._sampler import Sampler as Sampler
from rotoopt.testing.strategies import LAYOUTS as LAYOUTS
from rotoopt.testing.strategies import Layout as Layout
from rotoopt.testing.strategies import dtypes, seeds

SEEDS, DTYPES = seeds(), dtypes()
NUM_TASKS = st.integers(2, 10)
SIZES = st.integers(2, 24)
NUM_SAMPLES = st.integers(1, 14)  # below and above half of the features
LOG_SCALES = st.floats(-3, 3)
SKEW_SCALES = st.floats(-8, 2)  # log10; the built-in step is capped near 0, other optimizers are not
KINDS = ["random", "zero samples", "duplicates", "aligned", "antiparallel", "tiny target", "tiny"]


def haar(K: int, m: int, dtype: torch.dtype) -> Rotations:
    return Rotations(K, m, rotate=[True] * K, init="haar", device=torch.device("cpu"), dtype=dtype)


def rotation_gradient(units: Tensor, target: Tensor, z: Tensor | None = None, dim: int = -1) -> RotationGradient:
    """Return the measurements of unit gradients ``(K, n, d)``, their mean ``(n, d)`` and z, ``(n, m)``."""
    dims = RotatedDims(dim)
    moment = None if z is None else z.mT @ z
    return RotationGradient(dims.view_stacked(units), dims.view(target), torch.tensor(True), moment)


def unusable(gradient: RotationGradient) -> RotationGradient:
    """Return the measurements of a backward pass with a non-finite value."""
    zeros = torch.zeros_like(gradient.directions), torch.zeros_like(gradient.target)
    moment = None if gradient.second_moment is None else torch.zeros_like(gradient.second_moment)
    return RotationGradient(*zeros, torch.tensor(False), moment)


class Lagged(RotoGradWeighting):
    """The weights of the paper, computed from the previous step."""

    lagged = True


class Turn:
    """The arguments of a turn: K rotations R, skew matrices S = W V' - V W' of n samples, and step sizes.

    The norms of W and V are at most one, as those of unit gradients and of their mean are, and a step
    is at most one. The seed draws the kind of the samples, too.
    """

    def __init__(self, K: int, m: int, n: int, seed: int, dtype: torch.dtype = torch.float64) -> None:
        sampler = Sampler(seed, dtype)
        kind = KINDS[sampler.integer(len(KINDS))]
        W, V = sampler.normal(K, m, n), sampler.normal(m, n)
        if kind == "zero samples":
            V[:, sampler.uniform(n) < 0.5] = 0
            W[:, :, sampler.uniform(n) < 0.5] = 0
        elif kind == "duplicates":
            W, V = W[:, :, :1].repeat(1, 1, n), V[:, :1].repeat(1, n)
        elif kind in ("aligned", "antiparallel"):
            W = (V if kind == "aligned" else -V).expand(K, m, n) * sampler.log_scales(K, -1, 0)[:, None, None]
        W = W / W.norm(dim=(1, 2), keepdim=True).clamp(min=1e-3)
        V = V / V.norm().clamp(min=1e-3)
        tiny_W, tiny_V = 1e-8 if kind == "tiny" else 1.0, 1e-8 if kind.startswith("tiny") else 1.0
        self.R, self.W, self.V = sampler.rotations(K, m), W * tiny_W, V * tiny_V
        self.step = 1 - sampler.uniform(K)

    def but(self, **changes: Tensor) -> "Turn":
        """Return a copy with other tensors."""
        other = copy.copy(self)
        vars(other).update(changes)
        return other

    @property
    def S(self) -> Tensor:
        N: Tensor = self.W @ self.V.mT
        return N - N.mT

    def low_rank(self) -> Tensor:
        return self._turned(SampleSkew(self.W, self.V))

    def dense(self) -> Tensor:
        return self._turned(DenseSkew(self.W @ self.V.mT))

    def _turned(self, skew: Skew) -> Tensor:
        R = self.R.clone()
        skew.turn_(R, self.step)
        return R


class Bench:
    """An optimizer with prescribed task gradients and losses: loss k is linear in r_k.

    There is no model: the representation is a fresh leaf, so ``backward`` returns what a backbone
    would receive. The wrapped optimizer holds one parameter, which never has a gradient. Rotations turn in every step,
    and the weighting is the paper's, unless ``options`` say something else.
    """

    def __init__(self, shape: Sequence[int], K: int, dtype: torch.dtype, **options: Any) -> None:
        self.shape, self.K, self.dtype = tuple(shape), K, dtype
        bare = SGD([nn.Parameter(torch.zeros(1, dtype=dtype))], lr=0.1)
        self.optimizer = RotoGradOptimizer(
            bare, num_tasks=K, **{"turn_every": 1, "weighting": RotoGradWeighting(), **options}
        )

    def backward(
        self,
        grads: Sequence[Tensor | None],
        values: Sequence[float] | None = None,
        scaler: torch.amp.GradScaler | None = None,
    ) -> Tensor:
        """Back-propagate losses ``values`` (ones) whose gradients at r_k are ``grads``."""
        rep = torch.zeros(self.shape, dtype=self.dtype, requires_grad=True)
        losses: list[Tensor | None] = []
        for task, (r, grad) in enumerate(zip(self.optimizer.rotate(rep), grads, strict=True)):
            value = 1.0 if values is None else values[task]
            losses.append(None if grad is None else (r * grad).sum() + value)
        self.optimizer.backward(losses, rep, scaler=scaler)
        assert rep.grad is not None
        return rep.grad

    def step(self, grads: Sequence[Tensor | None], values: Sequence[float] | None = None) -> Tensor:
        received = self.backward(grads, values)
        self.optimizer.step()
        return received

    @property
    def record(self) -> StepRecord:
        record = self.optimizer.last_step
        assert record is not None
        return record

    @property
    def matrices(self) -> Tensor:
        return self.optimizer.rotations.matrices.clone()

    def state(self) -> dict[str, Tensor]:
        """Return rotations, references and trained weights, which a bad batch must not change."""
        saved = self.optimizer.state_dict()["rotograd"]
        return dict(_tensors({key: saved[key] for key in saved if key != "rotation_step"}))


def _tensors(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Tensor]]:
    for key, value in tree.items():
        if isinstance(value, Tensor):
            yield f"{prefix}{key}", value.clone()
        elif key in ("weighting", "norm_reference", "loss_reference"):
            yield from _tensors(value, f"{key}.")
