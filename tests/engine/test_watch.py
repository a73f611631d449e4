"""Warnings about heads that stop running and parameters that are not updated: in time, and once."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.optim import SGD

from rotoopt import RotoGradOptimizer
from rotoopt._capture.wiring import LOOK_EVERY
from rotoopt._engine.construction import Parts
from rotoopt._engine.watch import (
    FOREIGN_PASSES,
    SILENT_STEPS,
    UNTRAINED_STEPS,
    ForeignSteps,
    SilentHeads,
    UntrainedHeads,
)
from tests.contract.models import TwoTasks, back_propagate, wrap

NAMES = ("a", "b", "c")
BLOCK = st.tuples(st.integers(1, SILENT_STEPS + 2), st.booleans(), st.sets(st.integers(0, 2)))


def warned(call: Callable[[], object]) -> list[str]:
    with warnings.catch_warnings(record=True) as record:
        warnings.simplefilter("always")
        call()
    return [str(warning.message) for warning in record]


@given(blocks=st.lists(BLOCK, min_size=1, max_size=6))
def test_a_head_without_gradients_in_the_users_own_backward_is_reported_once(
    blocks: list[tuple[int, bool, set[int]]],
) -> None:
    watch, silence = SilentHeads(NAMES), dict.fromkeys(range(3), 0)
    for own, tasks in [(own, tasks) for length, own, tasks in blocks for _ in range(length)]:
        # A step of the optimizer along with the user's own backward does not specify absent tasks either.
        passes: Any = [
            SimpleNamespace(tasks=tasks, number=None, expected=frozenset()),
            SimpleNamespace(tasks=set(), number=3 if own else None, expected=frozenset()),
        ]
        expected = []
        for task in range(3):
            silence[task] = 0 if task in tasks else silence[task] + own
            if own and task not in tasks and silence[task] == SILENT_STEPS:
                expected.append(f"Every head should deliver a gradient, got none from {NAMES[task]} in {SILENT_STEPS} ")
        found = warned(lambda passes=passes: watch.observe(passes))  # type: ignore[misc]
        assert len(found) == len(expected)
        assert all(message.startswith(start) for message, start in zip(found, expected, strict=True))


FATES = st.lists(
    st.sampled_from(["ours", "another's", "data", "frozen", "frozen later", "no optimizer's"]), min_size=6, max_size=6
)


@given(fates=FATES)
def test_parameters_of_heads_that_no_optimizer_updates_are_named_after_some_steps(fates: list[str]) -> None:
    heads: list[Parts] = [
        (nn.Linear(2, 2),),
        (nn.Linear(2, 2, bias=False), nn.Parameter(torch.ones(2))),
        (nn.Linear(2, 1),),
    ]
    named: dict[str, nn.Parameter] = {}
    for name, parts in zip(NAMES, heads, strict=True):
        for number, part in enumerate(parts):
            of = f" of {name}" if len(parts) == 1 else f" of {name}[{number}]"
            inside = [("a parameter", part)] if isinstance(part, nn.Parameter) else part.named_parameters()
            named |= {key + of: param for key, param in inside}
    by_fate = {
        fate: [param for param, its in zip(named.values(), fates, strict=True) if its == fate] for fate in set(fates)
    }
    for param in by_fate.get("frozen", []):
        param.requires_grad_(False)
    backbone = nn.Parameter(torch.ones(1))
    watch = UntrainedHeads(SGD([backbone, *by_fate.get("ours", [])], lr=0.1), heads, NAMES)
    for step in range(2 * UNTRAINED_STEPS):
        if step == 1:
            for param in by_fate.get("frozen later", []):
                param.requires_grad_(False)
        if step == 2:  # once is enough
            with torch.no_grad():
                for param in by_fate.get("another's", []):
                    param.mul_(2)
            for param in by_fate.get("data", []):
                param.data.mul_(2)
        expected = [key for key, its in zip(named, fates, strict=True) if its == "no optimizer's"]
        found = warned(watch.observe)
        if step == UNTRAINED_STEPS - 1 and expected:
            assert len(found) == 1
            assert f"got no change of {', '.join(expected)} in {UNTRAINED_STEPS} steps" in found[0]
        else:
            assert found == []


@example(num_passes=FOREIGN_PASSES + 1, changed_after=0)
@given(num_passes=st.integers(1, 2 * FOREIGN_PASSES), changed_after=st.integers(0, 2 * FOREIGN_PASSES))
def test_steps_of_another_optimizer_are_reported_once(num_passes: int, changed_after: int) -> None:
    head = nn.Linear(2, 2)
    watch, found = ForeignSteps([(head,)]), []
    for number in range(num_passes):
        found += warned(lambda number=number: watch.observe(number))  # type: ignore[misc]
        if number == changed_after:
            with torch.no_grad():
                head.weight.add_(1.0)
    assert len(found) == (changed_after < FOREIGN_PASSES < num_passes)
    message = (
        "The optimizer whose heads a loss passes through must make the steps, got weights that something else has "
        f"changed, and {FOREIGN_PASSES} backward passes without step() or zero_grad(). It weights the gradients that "
        "something else uses. Either (a) another optimizer has replaced it: call remove() or fold() on the "
        "RotoGradOptimizer, or (b) step() was called on the wrapped optimizer: call it on the RotoGradOptimizer."
    )
    assert found == [message] * len(found)


def test_backward_passes_without_a_step() -> None:
    """Accumulated gradients are not steps of another optimizer, nor are passes between ``zero_grad``."""
    for steps, clears in ((False, False), (True, True), (True, False)):
        model, optimizer = wrap()
        bare = SGD(model.parameters(), lr=0.01)

        def run(steps: bool = steps, clears: bool = clears, bare: SGD = bare) -> None:
            for batch in range(FOREIGN_PASSES + 2):
                back_propagate(model.losses(batch)[0])  # noqa: B023
                if steps:
                    bare.step()
                if clears:
                    optimizer.zero_grad()  # noqa: B023

        assert len(warned(run)) == (steps and not clears)


def test_a_head_that_reads_a_detached_tensor_is_named_once() -> None:
    """It has a loss, and may be a probe, so there is no error. Absent tasks are not reported."""
    model, optimizer = wrap()
    found = []
    for step in range(2 * SILENT_STEPS):
        z = model.backbone(model.inputs(step))
        losses = [model.heads["left"](z).square().mean(), model.heads["right"](z.detach()).square().mean()]

        def run(losses: list[torch.Tensor] = losses, *, absent: bool = step % 2 == 0) -> None:
            optimizer.zero_grad()
            optimizer.step([losses[0], None if absent else losses[1]])

        found += warned(run)
    assert len(found) == 1
    assert f"got none from right in {SILENT_STEPS} steps with its loss" in found[0]


def test_a_lazy_layer_that_never_runs_is_reported() -> None:
    head = nn.ModuleList([nn.Linear(2, 1), nn.LazyLinear(1, bias=False)])
    watch = UntrainedHeads(SGD(head[0].parameters(), lr=0.1), [(head,)], ["a"])
    (message,) = [each for _ in range(UNTRAINED_STEPS) for each in warned(watch.observe)]
    assert "got no change of 1.weight of a in" in message


@pytest.mark.parametrize("clears", ["optimizer", "model"])
@pytest.mark.parametrize("paused", [False, True])
@pytest.mark.parametrize("trains", ["generator", "backbone"])
def test_a_generator_that_is_trained_through_the_heads_is_reported_once(trains: str, paused: bool, clears: str) -> None:
    """But no backbone with an optimizer of its own, also if the steps of the heads are skipped."""
    model, _ = wrap()
    generator = nn.Linear(3, 3, bias=False)
    of_others = generator if trains == "generator" else model.backbone
    own = [param for param in model.parameters() if all(param is not other for other in of_others.parameters())]
    bare, optimizer = SGD(of_others.parameters(), lr=0.01), RotoGradOptimizer(SGD(own, lr=0.01), model.heads)

    def run() -> None:
        for step in range(3 * LOOK_EVERY):
            with optimizer.paused() if paused else nullcontext():
                first, second = model(generator(model.inputs(step)))
            (first.sum() + second.sum()).backward()
            bare.step()
            (optimizer if clears == "optimizer" else model).zero_grad()
            losses, rep = model.losses(step)
            if trains == "generator":
                optimizer.step(losses, rep)

    found = warned(run)
    assert len(found) == (trains == "generator" and not paused)
    assert all("run that forward pass under optimizer.paused()" in each for each in found)


def test_accumulation_while_another_optimizer_updates_a_part_of_the_backbone_is_not_reported() -> None:
    """Gradients of the other part are kept, so that no backward pass is discarded."""
    model = TwoTasks()
    model.backbone = nn.Sequential(nn.Linear(3, 6), nn.Tanh(), nn.Linear(6, 6))
    bare = SGD(model.backbone[0].parameters(), lr=0.01)
    own = [*model.backbone[2].parameters(), *model.heads.parameters()]
    optimizer = RotoGradOptimizer(SGD(own, lr=0.01), model.heads)

    def run() -> None:
        for step in range(4 * LOOK_EVERY):
            back_propagate(model.losses(step)[0])
            bare.step()
            bare.zero_grad()
            if step % 2:
                optimizer.step()
                model.zero_grad()

    assert not warned(run)


class Critic(nn.Module):
    """A critic: a head that reads an observation and an action."""

    def __init__(self) -> None:
        super().__init__()
        self.value = nn.Linear(6 + 2, 1)

    def forward(self, rep: Tensor, action: Tensor) -> Tensor:
        value: Tensor = self.value(torch.cat([rep, action], dim=1))
        return value


class ActorAndCritics:
    """Two critics on a shared encoder, and an actor that is trained through them, behind the encoder.

    Args:
        trains_encoder: Whether the optimizer of the actor trains the encoder as well.
    """

    def __init__(self, *, trains_encoder: bool = False) -> None:
        self.encoder, self.actor = nn.Linear(3, 6), nn.Linear(6, 2)
        self.critics = nn.ModuleList([Critic(), Critic()])
        own, others = [*self.critics.parameters()], [*self.actor.parameters()]
        (others if trains_encoder else own).extend(self.encoder.parameters())
        self.optimizer, self.bare = RotoGradOptimizer(SGD(own, lr=0.01), list(self.critics)), SGD(others, lr=0.01)
        self.clears_critics_only = False

    def train_critics(self, step: int) -> None:
        generator = torch.Generator().manual_seed(step)
        x, action = torch.randn(5, 3, generator=generator), torch.randn(5, 2, generator=generator)
        z = self.encoder(x)
        losses = [critic(z, action).square().mean() for critic in self.critics]
        if self.clears_critics_only:
            self.critics.zero_grad()
            self.optimizer.step(losses)
            return
        self.optimizer.zero_grad()
        back_propagate(losses)
        self.optimizer.step()

    def train_actor(self, step: int, combine: Callable[[Tensor, Tensor], Tensor], *, entropy: bool = False) -> None:
        z = self.encoder(torch.randn(5, 3, generator=torch.Generator().manual_seed(step))).detach()
        action = self.actor(z)
        loss = -combine(*[critic(z, action) for critic in self.critics])
        loss = loss + action.square().sum(1, keepdim=True) if entropy else loss
        self.bare.zero_grad()
        back_propagate([loss.mean()])
        self.bare.step()


@pytest.mark.parametrize("clears", ["optimizer", "critics"])
@pytest.mark.parametrize("paused", [False, True])
@pytest.mark.parametrize("every", [1, 2, 3])
def test_an_actor_that_is_trained_through_its_critics_is_reported_once(every: int, paused: bool, clears: str) -> None:
    """The critics do not train what is behind them then, nor does any gradient reach the encoder."""
    model = ActorAndCritics()
    model.clears_critics_only = clears == "critics"

    def run() -> None:
        for step in range(4 * every * LOOK_EVERY):
            model.train_critics(step)
            if step % every == 0:
                with model.optimizer.paused() if paused else nullcontext():
                    model.train_actor(step, lambda first, second: first)

    found = warned(run)
    assert len(found) == (not paused)
    assert all("an actor through its critics" in each for each in found)


def test_a_backbone_that_is_trained_more_often_than_its_heads_is_not_reported() -> None:
    model = ActorAndCritics(trains_encoder=True)

    def run() -> None:
        for step in range(8 * LOOK_EVERY):
            z = model.encoder(torch.randn(5, 3, generator=torch.Generator().manual_seed(step)))
            back_propagate([critic(z, model.actor(z)).square().mean() for critic in model.critics])
            model.bare.step()
            if step % 2:
                model.optimizer.step()
            model.optimizer.zero_grad()
            model.bare.zero_grad()

    assert not warned(run)


@pytest.mark.parametrize(("combine", "entropy"), [(torch.minimum, False), (lambda first, second: first, True)])
def test_the_loss_of_an_actor_is_rejected_in_its_first_step(
    combine: Callable[[Tensor, Tensor], Tensor], entropy: bool
) -> None:
    """Its critics were trained before, on one tensor as well, but it was another input."""
    model = ActorAndCritics()
    for step in range(3):
        model.train_critics(step)
    with pytest.raises(RuntimeError, match=r"as an actor through its critics[,:] run its forward pass under"):
        model.train_actor(3, combine, entropy=entropy)


def test_encoders_with_optimizers_of_their_own_are_not_reported() -> None:
    """The heads make a step for the gradients from both, or from one of them twice."""
    model, second = ActorAndCritics(trains_encoder=True), nn.Linear(3, 6)
    other = SGD(second.parameters(), lr=0.01)

    def run() -> None:
        for step in range(6 * LOOK_EVERY):
            for encoder, bare in ((model.encoder, model.bare), (second, other)):
                z = encoder(torch.randn(5, 3, generator=torch.Generator().manual_seed(step)))
                back_propagate([critic(z, model.actor(z)).square().mean() for critic in model.critics])
                bare.step()
                bare.zero_grad()
                if step % 3 == 0:
                    model.optimizer.step()
                    model.optimizer.zero_grad()
            model.optimizer.step()
            model.optimizer.zero_grad()

    assert not warned(run)
