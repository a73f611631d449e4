"""For any sequence of operations between steps, rotations stay rotations, and copies train identically."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable, Iterator
from typing import Any

import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from torch import Tensor

from rotoopt import RotoGradOptimizer
from tests.asserts import assert_rotations, assert_same_bits, relative_error
from tests.samplers import Network, Sampler, network

K, BATCH = 3, 4
Pair = tuple[Network, RotoGradOptimizer]


class Training(RuleBasedStateMachine):
    """A training run with random interruptions, and a copy that must stay bit-identical to it."""

    runs: list[Pair]

    @initialize(
        seed=st.integers(0, 99), shape=st.sampled_from([(8,), (3, 6)]), m=st.sampled_from([None, 5]), lr=st.floats(0, 1)
    )
    def build(self, seed: int, shape: tuple[int, ...], m: int | None, lr: float) -> None:
        self.sampler = Sampler(seed, torch.float32)
        self.make: Callable[[], Pair] = lambda: self._wrap(network(seed, shape, K, torch.float32), m, lr)
        self.runs = [self.make()]

    @staticmethod
    def _wrap(model: Network, m: int | None, lr: float) -> Pair:
        bare = torch.optim.Adam(model.parameters(), lr=0.01)
        optimizer = RotoGradOptimizer(
            bare, heads=model.heads, rotation_size=m, rotation_lr=lr, turn_every=8, init="haar", burn_in_period=2
        )
        return model, optimizer

    def _forward(self) -> list[tuple[RotoGradOptimizer, list[Tensor], Tensor]]:
        batch = (self.sampler.normal(BATCH, 5), self.sampler.normal(K, BATCH, 3))
        return [(optimizer, *model.losses(batch)) for model, optimizer in self._with_the_same_random_numbers()]

    def _with_the_same_random_numbers(self) -> Iterator[Pair]:
        rng = torch.get_rng_state()
        for pair in self.runs:
            torch.set_rng_state(rng)  # Haar rotations may be drawn now
            yield pair

    @rule(absent=st.sampled_from([None, 0, 2]), turns=st.integers(1, 9))
    def train(self, absent: int | None, turns: int) -> None:
        for _ in range(turns):
            for optimizer, losses, rep in self._forward():
                optimizer.zero_grad()
                optimizer.step([loss if task != absent else None for task, loss in enumerate(losses)], rep)

    @rule(scale=st.sampled_from([1e-20, 1e20]))
    def train_on_another_scale(self, scale: float) -> None:
        for optimizer, losses, rep in self._forward():
            optimizer.zero_grad()
            optimizer.backward([loss * scale for loss in losses], rep)
            optimizer.step()

    @rule(value=st.sampled_from([float("nan"), float("inf")]))
    def meet_a_bad_batch(self, value: float) -> None:
        for optimizer, losses, rep in self._forward():
            optimizer.zero_grad()
            optimizer.backward([losses[0] * value, *losses[1:]], rep)
            optimizer.zero_grad()

    @rule()
    def accumulate(self) -> None:
        for _, optimizer in self.runs:
            optimizer.zero_grad()
        for _ in range(2):
            for optimizer, losses, rep in self._forward():
                optimizer.backward(losses, rep)
        for _, optimizer in self.runs:
            optimizer.step()

    @rule()
    def forget_a_backward(self) -> None:
        for optimizer, losses, rep in self._forward():
            optimizer.zero_grad()
            optimizer.backward(losses, rep)
            optimizer.zero_grad()

    @rule()
    def evaluate_in_bfloat16(self) -> None:
        for model, _ in self._with_the_same_random_numbers():
            model.eval()
            with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
                model.losses((torch.zeros(BATCH, 5), torch.zeros(K, BATCH, 3)))
            model.train()

    @rule()
    def resume_from_a_file(self) -> None:
        model, optimizer = self.runs[0]
        buffer = io.BytesIO()
        torch.save((model.state_dict(), optimizer.state_dict()), buffer)
        buffer.seek(0)
        states: tuple[dict[str, Any], dict[str, Any]] = torch.load(buffer, weights_only=True)
        resumed_model, resumed = self.make()
        resumed_model.load_state_dict(states[0])
        resumed.load_state_dict(states[1])
        self.runs[1:] = [(resumed_model, resumed)]

    @rule()
    def copy_in_memory(self) -> None:
        self.runs[1:] = [copy.deepcopy(self.runs[0])]

    def _started(self) -> bool:
        return self.runs[0][1].rotations.size is not None

    @precondition(lambda self: self._started())
    @invariant()
    def rotations_are_rotations(self) -> None:
        matrices = self.runs[0][1].rotations.matrices
        assert_rotations(matrices)
        x, y = self.sampler.normal(2, matrices.shape[-1], 1)
        torch.testing.assert_close((matrices @ x).norm(dim=1), x.norm().expand(K, 1), rtol=1e-5, atol=0.0)
        inner = ((matrices @ x) * (matrices @ y)).sum((1, 2))
        torch.testing.assert_close(inner, (x * y).sum().expand(K), rtol=0.0, atol=1e-5 * float(x.norm() * y.norm()))
        assert relative_error(matrices.mT @ (matrices @ x), x.expand(K, -1, -1)) <= 1e-5

    @invariant()
    def copies_are_equal(self) -> None:
        (model, optimizer), *copies = self.runs
        for other_model, other in copies:
            for actual, expected in zip(other_model.parameters(), model.parameters(), strict=True):
                assert_same_bits(actual.detach(), expected.detach())
            if self._started():
                assert_same_bits(other.rotations.matrices, optimizer.rotations.matrices)


TestTraining = Training.TestCase
TestTraining.settings = settings(max_examples=10, stateful_step_count=20, deadline=None)
