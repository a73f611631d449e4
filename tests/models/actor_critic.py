"""A policy of stable-baselines3 on images: actor and critic share the feature extractor."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from tests.models.case import Case


def make_ppo() -> Any:
    """Return PPO with the policy of the library, for images of the smallest supported size."""
    stable_baselines3 = pytest.importorskip("stable_baselines3")
    envs = pytest.importorskip("stable_baselines3.common.envs")
    return stable_baselines3.PPO(
        "CnnPolicy",
        envs.FakeImageEnv(screen_height=36, screen_width=36, discrete=False),
        policy_kwargs={"net_arch": [32], "features_extractor_kwargs": {"features_dim": 32}},
        n_steps=32,
        batch_size=16,
        n_epochs=2,
        ent_coef=0.01,
        seed=0,
        device="cpu",
    )


def heads_of(policy: Any) -> dict[str, Any]:
    return {"actor": policy.mlp_extractor.policy_net, "critic": policy.mlp_extractor.value_net}


def on_images() -> Case:
    policy = make_ppo().policy
    policy.set_training_mode(True)
    images = torch.randint(256, (16, 1, 36, 36), dtype=torch.uint8)
    with torch.no_grad():
        actions, _, old_log_probs = policy(images)
    advantages, returns = torch.randn(16), torch.randn(16)

    def losses(policy: Any) -> dict[str, Tensor]:
        values, log_probs, entropy = policy.evaluate_actions(images, actions)
        ratios = (log_probs - old_log_probs).exp()
        gain = torch.minimum(advantages * ratios, advantages * ratios.clamp(0.8, 1.2)).mean()
        return {"actor": -gain - 0.01 * entropy.mean(), "critic": 0.5 * F.mse_loss(values.flatten(), returns)}

    return Case(
        policy,
        heads_of(policy),
        {
            "actor": ("mlp_extractor.policy_net.", "action_net.", "log_std"),
            "critic": ("mlp_extractor.value_net.", "value_net."),
        },
        losses,
    )
