"""An unseen problem of reinforcement learning: actor and critic on a simulated cart-pole."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tests.benchmarks.unseen.base import Losses, Problem


class ActorCritic(Problem):
    """Advantage actor-critic on 32 poles that are to be balanced for 200 steps, updated every eight of them."""

    about = "actor and critic balance a pole"
    metrics = ("missing in training", "missing at end", "value, rel. RMSE")
    lr = 3e-2
    num_steps = 400
    num_poles, num_unrolled, longest, discount = 32, 8, 200, 0.98

    def __init__(self, seed: int) -> None:
        super().__init__(seed)
        self.backbone = nn.Sequential(nn.Linear(4, 64), nn.Tanh(), nn.Linear(64, 32))
        self.heads = nn.ModuleDict(
            {name: nn.Sequential(nn.Tanh(), nn.Linear(32, size)) for name, size in {"actor": 2, "critic": 1}.items()}
        )
        self.model = nn.ModuleList([self.backbone, self.heads])
        self.states, self.ages = self._upright(self.num_poles), torch.zeros(self.num_poles)
        self.lengths: list[float] = []  # of finished episodes

    def _upright(self, count: int) -> Tensor:
        return (self.rand(count, 4) - 0.5) * 0.1

    def _act(self, states: Tensor) -> Tensor:
        probabilities = torch.softmax(self.heads["actor"](self.backbone(states)), dim=1)
        return torch.multinomial(probabilities, 1, generator=self.generator)[:, 0]

    def _values(self, z: Tensor) -> Tensor:
        values: Tensor = self.heads["critic"](z)
        return values[:, 0]

    @staticmethod
    def _moved(states: Tensor, actions: Tensor) -> tuple[Tensor, Tensor]:
        """Return the next states, and which poles have fallen."""
        _, velocity, angle, spin = states.unbind(1)
        force, cosine, sine = 20.0 * actions - 10, angle.cos(), angle.sin()
        push = (force + 0.05 * spin * spin * sine) / 1.1
        turn = (9.8 * sine - cosine * push) / (0.5 * (4 / 3 - 0.1 * cosine * cosine / 1.1))
        acceleration = push - 0.05 * turn * cosine / 1.1
        changes = torch.stack([velocity, acceleration, spin, turn], dim=1)
        states = states + 0.02 * changes
        return states, (states[:, 0].abs() > 2.4) | (states[:, 2].abs() > 0.2095)

    @torch.no_grad()
    def _unroll(self) -> tuple[Tensor, Tensor, Tensor]:
        """Return states, actions and returns of the next eight steps. Shape ``(8 * 32, ...)``."""
        states, actions, ends = [], [], []
        for _ in range(self.num_unrolled):
            action = self._act(self.states)
            moved, fallen = self._moved(self.states, action)
            self.ages += 1
            end = fallen | (self.ages >= self.longest)
            states.append(self.states)
            actions.append(action)
            ends.append(end)
            self.lengths += self.ages[end].tolist()
            self.states = torch.where(end[:, None], self._upright(self.num_poles), moved)
            self.ages = torch.where(end, 0.0, self.ages)
        later, returns = self._values(self.backbone(self.states)), list[Tensor]()
        for end in reversed(ends):
            later = 1 + self.discount * later * (~end)
            returns.insert(0, later)
        return torch.cat(states), torch.cat(actions), torch.cat(returns)

    def losses(self) -> Losses:
        """Return the policy gradient loss with an entropy bonus, and half the squared error of the value."""
        states, actions, returns = self._unroll()
        z = self.backbone(states)
        log_policy, values = torch.log_softmax(self.heads["actor"](z), dim=1), self._values(z)
        advantages = (returns - values).detach()
        policy_gradient = -(log_policy.gather(1, actions[:, None])[:, 0] * advantages).mean()
        return {
            "actor": policy_gradient + 0.01 * (log_policy.exp() * log_policy).sum(1).mean(),
            "critic": 0.5 * F.mse_loss(values, returns),
        }

    def errors(self) -> dict[str, float]:
        """Return by how many steps, plus one, episodes are too short, in training and at the end; value error."""
        self.generator = torch.Generator().manual_seed(5)
        states, alive = self._upright(128), torch.ones(128, dtype=torch.bool)
        all_values, all_alive = [], []
        for _ in range(self.longest):
            all_values.append(self._values(self.backbone(states)))
            all_alive.append(alive)
            states, fallen = self._moved(states, self._act(states))
            alive = alive & ~fallen
        values, lives = torch.stack(all_values), torch.stack(all_alive).float()
        later, returns = torch.zeros(128), list[Tensor]()
        for alive_then in reversed(lives):
            later = alive_then * (1 + self.discount * later)
            returns.insert(0, later)
        wanted = torch.stack(returns)[lives > 0]
        return {
            "missing in training": self.longest + 1 - sum(self.lengths) / max(len(self.lengths), 1),
            "missing at end": self.longest + 1 - lives.sum(0).mean().item(),
            "value, rel. RMSE": ((values[lives > 0] - wanted).pow(2).mean().sqrt() / wanted.mean()).item(),
        }
