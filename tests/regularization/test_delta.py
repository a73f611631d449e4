"""The penalties in use: with RotoGradOptimizer, on other devices, in copies, compiled, and on two ranks."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from torch.testing import assert_close
from torch.torch_version import TorchVersion

import rotoopt.regularization
from rotoopt import GradNorm, RotoGradOptimizer
from rotoopt.regularization import (
    AttentionBehavioralRegularization,
    BehavioralRegularization,
    IntermediateLayerGetter,
    L2Regularization,
    SPRegularization,
    delta,
)
from tests.contract.models import assert_same, gradients, parameters
from tests.distributed.ranks import Ranks

LAYERS = ["0", "2"]
ATTENTION = {"0": torch.linspace(0.1, 0.3, 4), "2": torch.linspace(0.3, 0.1, 6)}


def backbone(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 6), nn.Tanh())


def l2_sp(source: nn.Module, target: nn.Module) -> Callable[[Tensor], Tensor]:
    penalty = SPRegularization(source, target)
    return lambda x: penalty()


def distance(penalty: nn.Module, source: nn.Module, target: nn.Module) -> Callable[[Tensor], Tensor]:
    getters = [IntermediateLayerGetter(model, LAYERS) for model in (source, target)]
    return lambda x: penalty(*(getter(x)[0] for getter in getters))


# From a source and a target model to the penalty on a batch.
PENALTIES: dict[str, Callable[[nn.Module, nn.Module], Callable[[Tensor], Tensor]]] = {
    "L2-SP": l2_sp,
    "behavioral": partial(distance, BehavioralRegularization(reduction="batchmean")),
    "attention": partial(distance, AttentionBehavioralRegularization(ATTENTION, reduction="batchmean")),
}


class Training:
    """Fine-tunes a copy of a source model on two tasks, with a penalty as ``backbone_loss``."""

    def __init__(self, penalty: str | None, *, weight: float = 1.0, **options: Any) -> None:
        self.source = backbone().requires_grad_(False)
        self.target = backbone()
        self.heads = nn.ModuleList([nn.Linear(6, 1), nn.Linear(6, 2)])
        params = [*self.target.parameters(), *self.heads.parameters()]
        self.optimizer = RotoGradOptimizer(torch.optim.SGD(params, lr=0.01), heads=self.heads, **options)
        self.penalty = PENALTIES[penalty](self.source, self.target) if penalty else None
        self.weight = weight
        self.model = nn.ModuleList([self.target, self.heads])

    def forward(self, batch: int, run: Callable[[Tensor], Tensor] | None = None) -> tuple[Tensor, Tensor, list[Tensor]]:
        """Return the inputs of one batch, their representation, and losses that stay away from zero."""
        x, noise = torch.randn(2, 8, 3, generator=torch.Generator().manual_seed(batch))
        rep = (run or self.target)(x)
        targets = [x[:, :1] + 1 + noise[:, :1], x[:, 1:] + noise[:, 1:]]
        return x, rep, [(head(rep) - y).square().mean() for head, y in zip(self.heads, targets, strict=True)]

    def backward(self, batch: int) -> float:
        x, rep, losses = self.forward(batch)
        penalty = None if self.penalty is None else self.weight * self.penalty(x)
        self.optimizer.zero_grad()
        self.optimizer.backward(losses, rep, backbone_loss=penalty)
        return 0.0 if penalty is None else penalty.item()

    def step(self, batch: int) -> float:
        value = self.backward(batch)
        self.optimizer.step()
        return value


OPTIONS: dict[str, Callable[[], dict[str, Any]]] = {
    "default": dict,
    "normalize_losses": lambda: {"normalize_losses": True},
    "GradNorm": lambda: {"weighting": GradNorm(), "normalize_losses": True},
}


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("penalty", PENALTIES)
def test_first_step_is_that_without_penalty(penalty: str, options: str) -> None:
    """The penalty is zero there; divided by its first value, it would be NaN."""
    regularized, plain = (Training(each, **OPTIONS[options]()) for each in (penalty, None))
    assert regularized.step(0) == 0.0
    plain.step(0)
    assert_same(parameters(regularized.model), parameters(plain.model))


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("penalty", PENALTIES)
def test_penalty_adds_its_own_gradient_to_the_backbone(penalty: str, options: str) -> None:
    regularized, plain = (Training(each, weight=0.3, **OPTIONS[options]()) for each in (penalty, None))
    for batch in range(3):
        regularized.step(batch)
    plain.model.load_state_dict(regularized.model.state_dict())
    plain.optimizer.load_state_dict(regularized.optimizer.state_dict())
    assert regularized.backward(3) > 0.0
    plain.backward(3)
    x, _, _ = regularized.forward(3)
    value = 0.3 * PENALTIES[penalty](regularized.source, regularized.target)(x)
    own = torch.autograd.grad(value, list(regularized.target.parameters()))
    for total, other, grad in zip(gradients(regularized.target), gradients(plain.target), own, strict=True):
        assert total is not None
        assert other is not None
        assert_close(total, other + grad)
    assert_same(gradients(regularized.heads), gradients(plain.heads))
    assert all(param.grad is None for param in regularized.source.parameters())


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("penalty", PENALTIES)
def test_penalty_keeps_the_target_near_the_source(penalty: str, options: str) -> None:
    distances = []
    for weight in (0.0, 10.0):
        training = Training(penalty, weight=weight, **OPTIONS[options]())
        for batch in range(30):
            training.step(batch)
        moved = zip(training.target.parameters(), training.source.parameters(), strict=True)
        distances.append(sum((now - then).square().sum().item() for now, then in moved))
    free, held = distances
    assert 0.0 < held < 0.5 * free


def test_representation_may_come_from_the_getter() -> None:
    """Also as a feature map: the gradient of a penalty on it is added to those of the tasks."""
    found = []
    for once in (True, False):
        training, maps = Training(None), dict[str, Tensor]()
        source, target = (IntermediateLayerGetter(m, ["3", "0"]) for m in (training.source, training.target))
        nn.init.zeros_(training.target.get_submodule("0").get_parameter("bias"))

        def run(x: Tensor, target: IntermediateLayerGetter = target, maps: dict[str, Tensor] = maps) -> Tensor:
            outputs, rep = target(x)
            maps.update(outputs)
            assert maps["3"] is rep
            return rep

        x, rep, losses = training.forward(0, run if once else training.target)
        penalty = BehavioralRegularization()(source(x)[0], maps if once else target(x)[0])
        assert penalty.item() > 0.0
        training.optimizer.step(losses, rep, backbone_loss=penalty)
        found.append(gradients(training.model))
    assert_close(*found)


def test_penalty_under_autocast_and_grad_scaler() -> None:
    """Squares are not rounded to half precision, and are scaled like the losses."""
    found = []
    for scaler in (None, torch.amp.GradScaler("cpu", init_scale=1024.0)):
        training = Training("L2-SP")
        with torch.no_grad():
            for param in training.target.parameters():
                param.add_(1e-3)
        with torch.autocast("cpu", torch.bfloat16):
            x, rep, losses = training.forward(0)
            assert training.penalty is not None
            value = training.penalty(x)
        assert value.item() == pytest.approx(
            0.5 * 1e-6 * sum(p.numel() for p in training.target.parameters()), rel=1e-3
        )
        training.optimizer.backward(losses, rep, backbone_loss=1e3 * value, scaler=scaler)
        if scaler is not None:
            scaler.unscale_(training.optimizer)
        found.append(gradients(training.target))
    assert_close(*found)


@pytest.mark.parametrize("name", ["deepcopy", "pickle"])
def test_copies_regularize_the_copy_of_the_model(name: str) -> None:
    source, target = backbone(0), backbone(1)
    whole = (target, SPRegularization(source, target), L2Regularization(target))
    copied_target, copied_sp, copied_l2 = (
        copy.deepcopy(whole) if name == "deepcopy" else pickle.loads(pickle.dumps(whole))
    )
    assert_same([copied_sp(), copied_l2()], [whole[1](), whole[2]()])
    copied_target.load_state_dict(source.state_dict())
    assert copied_sp().item() == 0.0
    assert_same(copied_l2(), L2Regularization(source)())
    assert whole[1]().item() > 0.0


def test_penalties_inside_a_module_are_saved_and_moved_with_it() -> None:
    class Trainer(nn.Module):
        def __init__(self, seed: int) -> None:
            super().__init__()
            self.target = backbone(seed)
            self.l2_sp = SPRegularization(backbone(seed), self.target)
            self.attention = AttentionBehavioralRegularization(ATTENTION)

    trainer, other = Trainer(0), Trainer(1)
    assert len(list(trainer.parameters())) == len(list(trainer.target.parameters()))
    assert "l2_sp.starting_point.0/weight" in trainer.state_dict()
    other.load_state_dict(trainer.state_dict())
    assert other.l2_sp().item() == 0.0
    assert trainer.double().l2_sp().dtype == torch.float64
    assert trainer.to("meta").l2_sp().device.type == "meta"


def every_penalty(device: str = "cpu") -> Iterator[tuple[nn.Module, list[Any]]]:
    source, target = backbone(0).to(device), backbone(1).to(device)
    maps = [{name: torch.randn(2, len(ATTENTION[name]), 3, device=device) for name in LAYERS} for _ in range(2)]
    for each in maps[1].values():
        each.requires_grad_()
    yield L2Regularization(target), []
    yield SPRegularization(source, target), []
    yield BehavioralRegularization(), maps
    yield AttentionBehavioralRegularization(ATTENTION).to(device), maps


@pytest.mark.parametrize("number", range(4))
def test_no_penalty_waits_for_the_device(number: int) -> None:
    """On this device tensors have no values, so copies to the host raise an error."""
    penalty, maps = list(every_penalty("meta"))[number]
    value = penalty(*maps)
    assert value.device.type == "meta"
    value.backward()


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")
@pytest.mark.parametrize("number", range(4))
def test_penalties_compile_in_one_piece(number: int) -> None:
    torch.compiler.reset()
    penalty, maps = list(every_penalty())[number]
    compiled: Any = torch.compile(penalty, backend="aot_eager", fullgraph=True)
    assert_close(compiled(*maps), penalty(*maps))
    torch.compiler.reset()


@pytest.mark.parametrize("name", delta.__all__)
def test_delta_has_the_names_of_tllib(name: str) -> None:
    assert getattr(delta, name) is getattr(rotoopt.regularization, name)
    assert name in rotoopt.regularization.__all__
    assert getattr(delta, name).__doc__


def train_on_rank(rank: int | None, penalty: str) -> list[Tensor]:
    """Take three steps on one half of the batch, or on all of it; return the parameters of the target."""
    source, target = backbone(0).requires_grad_(False), backbone(0)
    parallel = target if rank is None else DistributedDataParallel(target)
    value = PENALTIES[penalty](source, parallel)
    optimizer = torch.optim.SGD(target.parameters(), lr=0.1)
    for batch in range(3):
        x = torch.randn(8, 3, generator=torch.Generator().manual_seed(batch))
        x = x if rank is None else x.chunk(2)[rank]
        optimizer.zero_grad()
        torch.autograd.backward([(parallel(x) - 1).square().mean(), 3.0 * value(x)])
        optimizer.step()
    return parameters(target)


@pytest.mark.distributed
@pytest.mark.parametrize("penalty", PENALTIES)
def test_two_ranks_do_what_one_process_does(ranks: Ranks, penalty: str) -> None:
    first, second = ranks.run(train_on_rank, penalty)
    assert_same(first, second)
    assert_close(first, train_on_rank(None, penalty))


def shard_on_rank(rank: int) -> list[Tensor]:
    """Return the gradients of a sharded model; half of the batch is on this rank."""
    start, target, mesh = backbone(0), backbone(1), init_device_mesh("cpu", (2,))
    fully_shard(start, mesh=mesh)
    fully_shard(target, mesh=mesh)
    x = torch.randn(8, 3, generator=torch.Generator().manual_seed(0)).chunk(2)[rank]
    penalty = SPRegularization(start, target)()  # before the forward pass, which gathers the parameters
    torch.autograd.backward([target(x).square().mean(), penalty])
    return [grad.full_tensor() for grad in gradients(target) if isinstance(grad, DTensor)]


@pytest.mark.skipif(TorchVersion(torch.__version__) < "2.10", reason="no backward pass of torch through these shards")
@pytest.mark.distributed
def test_sharded_parameters_have_a_sharded_start_point(ranks: Ranks) -> None:
    first, second = ranks.run(shard_on_rank)
    assert_same(first, second)
    target = backbone(1)
    x = torch.randn(8, 3, generator=torch.Generator().manual_seed(0))
    torch.autograd.backward([target(x).square().mean(), SPRegularization(backbone(0), target)()])
    assert_close(first, gradients(target))
