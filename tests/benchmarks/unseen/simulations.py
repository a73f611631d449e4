"""A judge's problems, simulations: flights of a projectile without noise; demonstrations of a drone in wind."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tests.benchmarks.unseen.base import Losses, Problem
from tests.benchmarks.unseen.parts import error_rate


class Surrogate(Problem):
    """Five results of a flight with drag and wind, in meters, seconds, m/s and radians; exact, at a constant rate."""

    about = "surrogate of a simulation: five numbers in their units, no noise, constant learning rate"
    metrics = ("range", "apex", "time", "speed", "angle")
    lr = 1e-2
    num_steps = 1400
    num_training = 1200

    def __init__(self, seed: int) -> None:
        super().__init__(seed)
        self.inputs, self.outputs = self._fly(self.rand(self.num_training + 1000, 5))
        self.backbone = nn.Sequential(nn.Linear(5, 64), nn.SiLU(), nn.Linear(64, 64), nn.SiLU(), nn.Linear(64, 32))
        self.heads = nn.ModuleDict(
            {name: nn.Sequential(nn.SiLU(), nn.Linear(32, 32), nn.SiLU(), nn.Linear(32, 1)) for name in self.metrics}
        )
        self.model = nn.ModuleList([self.backbone, self.heads])

    def _fly(self, drawn: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """Integrate the flights until they reach the ground, in steps of 10 ms."""
        speed, angle, drag = 10 + 40 * drawn[:, 0], 0.2 + 1.2 * drawn[:, 1], 0.001 + 0.015 * drawn[:, 2]
        wind, height = 16 * drawn[:, 3] - 8, 20 * drawn[:, 4]
        x, y, vx, vy = torch.zeros_like(height), height, speed * angle.cos(), speed * angle.sin()
        time, apex, flies = torch.zeros_like(height), height, torch.ones_like(height)
        while flies.any():
            dt = 0.01 * flies
            through_air = ((vx - wind).square() + vy.square()).sqrt()
            vx, vy = vx - dt * drag * through_air * (vx - wind), vy - dt * (9.81 + drag * through_air * vy)
            x, y, time = x + dt * vx, y + dt * vy, time + dt
            apex, flies = torch.maximum(apex, y), flies * (y > 0)
        inputs = torch.stack([speed / 50, angle, 60 * drag, wind / 8, height / 20], dim=1)
        outputs = {"range": x, "apex": apex, "time": time, "speed": vx.hypot(vy), "angle": torch.atan2(-vy, vx)}
        return inputs, outputs

    def _squared_errors(self, rows: Tensor) -> dict[str, Tensor]:
        z = self.backbone(self.inputs[rows])
        return {name: F.mse_loss(of(z)[:, 0], self.outputs[name][rows]) for name, of in self.heads.items()}

    def losses(self) -> Losses:
        """Return the squared errors of 64 flights."""
        return self._squared_errors(self.randint(self.num_training, 64))

    def errors(self) -> dict[str, float]:
        """Return their roots, for 1000 new flights."""
        test = torch.arange(self.num_training, len(self.inputs))
        return {name: of.sqrt().item() for name, of in self._squared_errors(test).items()}


class Next(nn.Module):
    """Predicts the change of the state from z and the action."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(64 + 5, 32), nn.ReLU(), nn.Linear(32, 4))

    def forward(self, z: Tensor, action: Tensor) -> Tensor:
        """Return the change ``(B, 4)``."""
        change: Tensor = self.layers(torch.cat([z, F.one_hot(action, 5).float()], dim=1))
        return change


class Imitation(Problem):
    """Demonstrations of a drone on a line: its action, 10 % random; its return, in natural units; its next state."""

    about = "demonstrations of a drone: action, return (large, heavy tails), change of state"
    metrics = ("action", "return", "next state")
    lr = 3e-3
    num_steps = 1400
    num_flights, num_training, length, discount = 160, 100, 50, 0.95

    def __init__(self, seed: int) -> None:
        super().__init__(seed)
        self.flights = self._fly()
        self.backbone = nn.Sequential(nn.Linear(4, 64), nn.Tanh(), nn.Linear(64, 64), nn.Tanh())
        self.heads = nn.ModuleDict({"action": nn.Linear(64, 5), "return": nn.Linear(64, 1), "next": Next()})
        self.model = nn.ModuleList([self.backbone, self.heads])

    def _fly(self) -> list[Tensor]:
        """Return states, actions, the best actions, returns and changes of state, each ``(length, flights, ...)``."""
        n = self.num_flights
        position, velocity, goal, wind = 2 * self.randn(n), self.randn(n), self.randn(n), 0.5 * self.randn(n)
        steps, rewards = [], []
        for _ in range(self.length):
            state = torch.stack([position, velocity, goal, wind], dim=1)
            wanted = 1.2 * (goal - position) - 1.4 * velocity - 0.7 * wind
            best = (wanted.clamp(-2, 2).round() + 2).long()
            action = torch.where(self.rand(n) < 0.1, self.randint(5, n), best)
            velocity = velocity + 0.1 * (1.5 * (action - 2) + wind - 0.2 * velocity * velocity.abs())
            position = position + 0.1 * velocity
            wind = 0.95 * wind + 0.15 * self.randn(n)
            rewards.append(-(goal - position).square() - 0.1 * (action - 2).square())
            steps.append((state, action, best, torch.stack([position, velocity, goal, wind], dim=1) - state))
        returns = [-(goal - position).square()]
        for reward in reversed(rewards):
            returns.append(reward + self.discount * returns[-1])
        states, actions, bests, changes = map(torch.stack, zip(*steps, strict=True))
        return [states, actions, bests, torch.stack(returns[:0:-1]), changes]

    def losses(self) -> Losses:
        """Return a cross entropy and two squared errors of 256 samples."""
        training = [of[:, : self.num_training].flatten(0, 1) for of in self.flights]
        rows = self.randint(len(training[0]), 256)
        state, action, _, value, change = (of[rows] for of in training)
        z = self.backbone(state)
        return {
            "action": F.cross_entropy(self.heads["action"](z), action),
            "return": 0.5 * F.mse_loss(self.heads["return"](z)[:, 0], value),
            "next": F.mse_loss(self.heads["next"](z, action), change),
        }

    def errors(self) -> dict[str, float]:
        """Return how often the best action is missed, the error of the return, and the root of that of the change."""
        state, action, best, value, change = (of[:, self.num_training :].flatten(0, 1) for of in self.flights)
        z = self.backbone(state)
        return {
            "action": error_rate(self.heads["action"](z), best),
            "return": (self.heads["return"](z)[:, 0] - value).abs().mean().item(),
            "next state": F.mse_loss(self.heads["next"](z, action), change).sqrt().item(),
        }
