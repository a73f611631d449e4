"""The paper in plain float64, one step at a time: the truth that all fast code is compared with.

Equation numbers: Javaloy and Valera, RotoGrad, ICLR 2022; what has none is rotoopt's own. Symbols:
K tasks, P of them present in a batch; z, the representation; G_k, gradient of loss k at z; J, the
G_k of the present tasks as flat rows (P, n); R, a rotation in SO(m). An unknown number is NaN.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import KW_ONLY, dataclass, field
from typing import Literal

import torch
from torch import Tensor, nn
from torch.optim import Adam, Optimizer

LossFn = Callable[[Tensor], Tensor]


def layout(shape: torch.Size, dims: Sequence[int]) -> Tensor:
    """Where each number of z is in z.flatten(): (samples, d), ``dims`` flattened row-major."""
    dims = sorted(i % len(shape) for i in dims)
    index = torch.arange(shape.numel()).view(shape).movedim(dims, list(range(-len(dims), 0)))
    return index.reshape(-1, math.prod(shape[i] for i in dims))


def rotate(z: Tensor, R: Tensor, index: Tensor) -> Tensor:
    """Features of one task: r = [R z_1..m, z_m+1..d] for every sample, a row of ``index``."""
    x, m = z.flatten()[index], len(R)  # (samples, d)
    r = torch.cat([x[:, :m] @ R.T, x[:, m:]], dim=1)
    return r.flatten()[index.flatten().argsort()].view_as(z)  # argsort: the inverse permutation


def shares(norms: Tensor, references: Tensor) -> Tensor:
    """Eq. 2: alpha_k = ratio_k / sum of ratios, ratio_k = norm_k / norm_k(t0)."""
    known = ~references.isnan()
    ratios = norms / references
    mean = ratios[known].mean() if known.any() else torch.ones(()).double()
    ratios = torch.where(known, ratios, mean)
    return ratios / ratios.sum() if ratios.any() else torch.full_like(ratios, 1 / len(ratios))


def scale(norms: Tensor, alphas: Tensor) -> Tensor:
    """Eq. 1: w_k = C / norm_k, C = sum of alpha_k norm_k. A zero gradient stays zero."""
    return torch.where(norms == 0, 0.0, alphas @ norms / norms)


def combine(J: Tensor, weights: Tensor) -> Tensor:
    """Gradient that the backbone receives at z: sum of w_k G_k."""
    return weights @ J


def gradnorm_gradient(J: Tensor, logits: Tensor, loss_ratios: Tensor, present: list[int], alpha: float) -> Tensor:
    """Gradient at the logits of sum_P |w_k norm_k - T_k|, w = K softmax(logits), T_k constant."""
    weights = len(logits) * logits.softmax(0)
    slopes = torch.zeros_like(logits)  # at the weights
    if len(present) > 1:  # a single task is its own target; rounding must not give 0 a sign
        w, norms = weights[present], J.norm(dim=1)
        rates = (loss_ratios / loss_ratios.mean()).pow(alpha)
        targets = combine(J, w / len(present)).norm() * rates
        slopes[present] = (w * norms - targets).sign() * norms
    return weights * (slopes - weights @ slopes / len(logits))


class Progress:
    """Equal mean norms, times progress and signal: w_k = share_k / norm_k * (sum of norms), from earlier steps."""

    def __init__(self, n_tasks: int, alpha: float, decay: float) -> None:
        self.alpha, self.length = alpha, 1 / (1 - decay)
        self.norms, self.losses, self.peaks, self.num_norms, self.num_losses = torch.zeros(5, n_tasks).double()
        self.first_losses = torch.full((n_tasks,), math.nan).double()
        self.agreements: list[list[float]] = [[] for _ in range(n_tasks)]  # all so far
        self.mean_rate = 1.0
        self.remaining = torch.ones(n_tasks).double()
        self.latest_signal = torch.ones(n_tasks).double()
        self.weights = torch.ones(n_tasks).double()
        self.signed = [False] * n_tasks

    def update(self, norms: Tensor, losses: Tensor, agreement: Tensor | None = None, *, burnt_in: bool) -> None:
        """``norms`` and ``losses`` are NaN for absent tasks."""
        common, rates = self.peaks.clone(), torch.full_like(self.weights, math.nan)
        for k, (norm, loss) in enumerate(zip(norms.tolist(), losses.tolist(), strict=True)):
            if norm > 0:
                self.num_norms[k] += 1
                self.num_losses[k] += burnt_in
                self.norms[k] += self._gain(self.num_norms[k]) * (norm - self.norms[k])
                self.losses[k] += self._gain(self.num_losses[k]) * (loss - self.losses[k])
                self.signed[k] = self.signed[k] or loss < 0
                if self.num_losses[k] <= round(self.length):
                    self.first_losses[k] = self.losses[k]
            if agreement is not None and agreement[k] < math.inf:
                self.agreements[k].append(agreement[k].item())
            self.peaks[k] = max(self.peaks[k].item(), self.norms[k].item())
            common[k] = max(self.norms[k].item(), norm / 3 if norm > 0 else 0.0, self.peaks[k].item() / 1000)
            if not self.signed[k]:
                rates[k] = (self.losses[k] / self.first_losses[k]).clamp(1e-4, 1.0)
        if agreement is not None:
            self.latest_signal = self.signal()
            usable = ~rates.isnan()
            self.remaining = rates.nan_to_num(1.0) ** 0.5
            total = self.latest_signal[usable].sum()
            self.mean_rate = (rates ** (self.latest_signal / total))[usable].prod().item()  # an empty product is one
        s = self.latest_signal
        rates = (rates**s * self.mean_rate ** (1 - s)).nan_to_num(self.mean_rate)
        known = common > 0
        shares = torch.where(known, (rates * s) ** self.alpha, 0.0)
        self.weights = torch.where(known, shares / shares.sum() * common.sum() / common, 1.0)

    def _gain(self, count: Tensor) -> float:
        return 1 / min(max(count.item(), 1.0), self.length)

    def signal(self) -> Tensor:
        """One minus the part that is noise; nearer to the geometric mean over the tasks the fewer measurements."""
        found = torch.full_like(self.weights, math.nan)
        for k, all_so_far in enumerate(self.agreements):
            mean = 0.0
            for n, value in enumerate(all_so_far, start=1):
                mean += (value - mean) / min(n, 30)
            if all_so_far:
                found[k] = min(max(1 - 1 / mean, 0.1), 1.0)
        counts = torch.tensor([len(all_so_far) for all_so_far in self.agreements]).double()
        trust = counts / (counts + 1)
        average = found.log().nanmean().nan_to_num(0.0)
        return (trust * found.log().nan_to_num(0.0) + (1 - trust) * average).exp()


def agreement(G: Tensor, z: Tensor, seed: int) -> Tensor:
    """|sum_b A_b|^2 / sum_b |A_b|^2 for A_b = sum_s g_bs z_bs^T, of random projections; 1 if samples share nothing.

    NaN if fewer than two samples have an A.
    """
    left, right = torch.randn(2, z.shape[-1], 8, generator=torch.Generator().manual_seed(seed)).double()
    A = torch.einsum("kbsd,de,bsc,cf->kbfe", G, right, z, left)  # G: (K, B, samples of one, d), z the same without K
    found = A.sum(dim=1).square().sum(dim=(1, 2)) / A.square().sum(dim=(1, 2, 3))
    return torch.where(A.flatten(2).any(dim=2).sum(dim=1) > 1, found, math.nan)


def rotation_gradient(U: Tensor, V: Tensor) -> Tensor:
    """Eq. 3, unit gradients: the skew S along which R cay(S) raises <U, V> fastest."""
    N = U.mT @ V  # U, V: (samples, m)
    return N - N.mT


class Metric:
    """G: the second moment of z, its trace brought to m, as a mean that halves with every turn; plus a tenth."""

    def __init__(self, m: int) -> None:
        self.mean: Tensor | None = None
        self.identity = torch.eye(m).double()

    def update(self, z: Tensor) -> Tensor:
        C = z.mT @ z  # z: (samples, m)
        if C.trace() > 0:
            C = C * len(C) / C.trace()
            self.mean = C if self.mean is None else (self.mean + C) / 2
        elif self.mean is None:
            self.mean = self.identity
        return self.mean + self.identity / 10


def ascent(S: Tensor, G: Tensor) -> tuple[Tensor, float]:
    """The way up, D = G^-1 S G^-1, and how much a head's input changes along it, relative to itself."""
    D = G.inverse() @ S @ G.inverse()
    return D, math.sqrt((D @ G @ D.mT).trace() / len(D))


def longest(S: Tensor, D: Tensor) -> float:
    """No plane turns by a radian, and <U, V> surely rises."""
    half = float(D.square().sum() / 2)
    return min(1 / math.sqrt(half), float((S * D).sum()) / half)


def cayley_step(R: Tensor, S: Tensor) -> Tensor:
    """R cay(S) = R (I - S/2)^-1 (I + S/2), a rotation for every skew S."""
    identity = torch.eye(len(S)).double()
    turn: Tensor = torch.linalg.solve(identity - S / 2, identity + S / 2)
    return R @ turn


class References:
    """Value of each task at its first valid step, measured again at the first one after burn-in."""

    def __init__(self, n_tasks: int, burn_in: int) -> None:
        self.values, self.taken = torch.full((2, n_tasks), math.nan).double()
        self.burn_in = burn_in

    def update(self, values: Tensor, t: int) -> None:
        outdated = (self.taken < self.burn_in) & (t >= self.burn_in)
        new = (self.values.isnan() | outdated) & values.isfinite() & (values != 0)
        self.values[new], self.taken[new] = values[new], float(t)


@dataclass(eq=False)
class Oracle:
    """Trains a float64 backbone and heads, whose parameters are in ``optimizer``.

    The arguments are those of ``RotoGradOptimizer``, those of the weighting (``alpha``,
    ``decay``, ``weight_lr``), and ``matrices``, the first rotations. ``losses``, ``norms`` and ``weights``
    are the last step's, NaN for absent tasks; a callable ``weighting`` has no weights.
    """

    backbone: nn.Module
    heads: Sequence[nn.Module]
    optimizer: Optimizer
    _: KW_ONLY
    dim: int | tuple[int, ...] = -1
    rotation_size: int | None = None
    rotate: bool | Sequence[bool] = True
    weighting: Literal["rotograd", "equal", "gradnorm", "progress"] | Callable[[Tensor], Tensor] = "rotograd"
    alpha: float = 1.5
    decay: float = 0.95
    weight_lr: float = 1e-3
    normalize_losses: bool = False
    burn_in_period: int = 20
    rotation_lr: float = 0.02
    turn_every: int = 32
    rotation_optimizer: Callable[[list[Tensor]], Optimizer] | None = None
    matrices: Tensor = field(default_factory=lambda: torch.empty(0))  # empty: K identities

    def __post_init__(self) -> None:
        self.t, K = 0, len(self.heads)
        self.loss_references = References(K, self.burn_in_period)
        self.norm_references = References(K, self.burn_in_period)
        self.known_norms = torch.full((K,), math.nan).double()
        self.squares, self.logits = torch.zeros(K).double(), torch.zeros(K).double()
        self.highest_lr = 0.0
        self.logit_optimizer = Adam([self.logits], lr=self.weight_lr)
        self.progress = Progress(K, self.alpha, self.decay)
        self.agreement: Tensor | None = None  # that of the step before, if it was measured
        self.told: set[int] = set()  # tasks whose agreement was measured since the rotations turned

    def step(self, x: Tensor, loss_fns: Sequence[LossFn | None], backbone_loss: LossFn | None = None) -> Tensor:
        """Take one step on one batch and return its losses, NaN where a task is absent.

        ``loss_fns[k]`` maps prediction k to a loss and is None if task k is absent;
        ``backbone_loss`` maps z to a loss.
        """
        self.optimizer.zero_grad()
        z = self.backbone(x)
        index = layout(z.shape, (self.dim,) if isinstance(self.dim, int) else self.dim)
        if self.t == 0:
            self._create_rotations(self.rotation_size or index.shape[1])

        leaf = z.detach().requires_grad_()  # the gradient from a head stops here
        K = len(self.heads)
        self.losses, self.norms, self.weights = torch.full((3, K), math.nan).double().unbind()
        J, present = torch.zeros(K, z.numel()).double(), []
        for k, loss_fn in enumerate(loss_fns):
            if loss_fn is None:
                continue
            loss = loss_fn(self.heads[k](rotate(leaf, self.matrices[k], index)))
            self.losses[k] = loss.detach()
            self.loss_references.update(self.losses.abs(), self.t)
            if self.normalize_losses:
                loss = loss / self.loss_references.values[k].nan_to_num(1.0)
            J[k] = torch.autograd.grad(loss, leaf, retain_graph=True)[0].flatten()
            torch.autograd.backward(loss)  # the head's own gradient, unscaled
            present.append(k)
        J = J[present]
        self.norms[present] = J.norm(dim=1)
        self.norm_references.update(self.norms, self.t)

        if present:
            combined = self._combine(J, present).view_as(z)
            torch.autograd.backward(z, combined, retain_graph=True)
        if backbone_loss is not None:
            torch.autograd.backward(backbone_loss(z))
        self.optimizer.step()

        if J.isfinite().all() and self.losses[present].isfinite().all():
            self.known_norms = torch.where(self.norms > 0, self.norms, self.known_norms)
            if self.weighting == "gradnorm":
                self._step_logits(J, present)
            agreement_before, self.agreement = self.agreement, self._agreement(J, present, index, z.detach())
            self.progress.update(self.norms, self.losses, agreement_before, burnt_in=self.t >= self.burn_in_period)
            if len(present) > 1:
                self._step_rotations(J, present, index, z.detach().flatten()[index])
        self.t += 1
        return self.losses

    def _agreement(self, J: Tensor, present: list[int], index: Tensor, z: Tensor) -> Tensor | None:
        first_is_rotated = 0 in {i % z.ndim for i in ((self.dim,) if isinstance(self.dim, int) else self.dim)}
        since, K = self.t % self.turn_every, len(self.heads)
        if since and (since >= K or len(self.told) == K):
            return None
        self.told = set(present) if since == 0 else self.told | set(present)
        if first_is_rotated or len(z) == 1:  # one sample has no others to agree with
            return None
        samples = index.view(len(z), -1, index.shape[1])
        found = torch.full((len(self.heads),), math.nan).double()
        found[present] = agreement(J[:, samples], z.flatten()[samples], (self.t - since) << 20)
        return found

    def _create_rotations(self, m: int) -> None:
        identities = torch.eye(m).expand(len(self.heads), m, m)
        self.matrices = (self.matrices if self.matrices.numel() else identities).double()
        self.algebra = torch.zeros_like(self.matrices)  # A, back at zero after every step
        self.metric = Metric(m)
        if self.rotation_optimizer is not None:
            self.algebra_optimizer = self.rotation_optimizer([self.algebra])

    def _combine(self, J: Tensor, present: list[int]) -> Tensor:
        if callable(self.weighting):
            return self.weighting(J)
        if self.weighting == "rotograd":
            # An absent task contributes its last known norm to C, so a batch per task is scaled like a joint batch.
            norms = torch.where(
                torch.isin(torch.arange(len(self.heads)), torch.tensor(present)), self.norms, self.known_norms
            )
            members = ~norms.isnan()
            alphas = shares(norms[members], self.norm_references.values[members])
            weights = torch.full_like(norms, math.nan)
            weights[members] = scale(norms[members], alphas)
            weights = weights[present]
        elif self.weighting == "gradnorm":
            weights = (len(self.heads) * self.logits.softmax(0))[present]
        elif self.weighting == "progress":
            progress = self.progress if self.t >= 2 else Progress(len(self.heads), self.alpha, self.decay)
            if self.t < 2:  # of this step alone
                progress.update(self.norms, self.losses, burnt_in=self.t >= self.burn_in_period)
            weights = progress.weights[present]
        else:
            weights = torch.ones(len(present)).double()
        self.weights[present] = weights
        return combine(J, weights)

    def _step_logits(self, J: Tensor, present: list[int]) -> None:
        ratios = (self.losses / self.loss_references.values.nan_to_num(1.0))[present]
        gradient = gradnorm_gradient(J, self.logits, ratios, present, self.alpha)
        if gradient.isfinite().all():  # no power alpha of a negative ratio
            self.logits.grad = gradient
            self.logit_optimizer.step()

    def _step_rotations(self, J: Tensor, present: list[int], index: Tensor, z: Tensor) -> None:
        m = self.matrices.shape[-1]
        norms = self.norms[present, None]
        units = torch.where(norms == 0, 0.0, J / norms)[:, index[:, :m]]  # (P, samples, m)
        S = torch.zeros_like(self.matrices)
        S[present] = rotation_gradient(units, units.mean(dim=0))
        S *= torch.tensor(self.rotate).view(-1, 1, 1)
        if self.t % self.turn_every:
            return
        if self.rotation_optimizer is None:
            whole = torch.zeros(len(S)).double()
            whole[present] = (units.mT @ units.mean(dim=0)).norm(dim=(1, 2))
            rounding = (4 * torch.finfo(S.dtype).eps) ** 0.5 * whole  # a task that is aligned has no S
            S *= (S.norm(dim=(1, 2)) / 2**0.5 > rounding).view(-1, 1, 1)
            lr, G = self.optimizer.param_groups[0]["lr"], self.metric.update(z[:, :m].double())
            self.highest_lr = max(self.highest_lr, lr)
            for k in S.any(dim=(1, 2)).nonzero().flatten():
                D, size = ascent(S[k], G)
                self.squares[k] += size**2
                left = self.progress.remaining[k] if self.weighting == "progress" else 1.0
                step = left * self.rotation_lr * (lr / self.highest_lr if lr > 0 else 0.0) / self.squares[k].sqrt()
                S[k] = D * min(float(step), longest(S[k], D))
        else:
            self.algebra.grad = -S.tril(-1)
            self.algebra_optimizer.step()
            S = self.algebra.tril(-1) - self.algebra.tril(-1).mT
            self.algebra.zero_()
        self.matrices = torch.stack(list(map(cayley_step, self.matrices, S)))
