"""The annotations are as documented: ``mypy --strict`` accepts correct user code, and rejects mistakes."""

from pathlib import Path

import mypy.api
import pytest

ROOT = Path(__file__).parents[2]

# In strict mode mypy also complains of a `type: ignore` that ignores nothing.
PROGRAM = """
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import StepLR
from typing_extensions import assert_type

from rotoopt import EqualWeighting, GradNorm, RotoGradOptimizer, Rotations, RotoGradWeighting, StepRecord

backbone, left, right = nn.Linear(3, 8), nn.Linear(8, 1), nn.Linear(8, 2)
model = nn.Sequential(backbone, left, right)
adam = torch.optim.AdamW(model.parameters(), lr=1e-3)

optimizer = RotoGradOptimizer(adam, heads=[left, right], rotate=[True, False], weighting=GradNorm(alpha=1.5))
RotoGradOptimizer(adam, {"left": left, "right": right}, dim=1, rotation_size=4, weighting=RotoGradWeighting())
RotoGradOptimizer(adam, nn.ModuleList([left, right]), dim=(1, 2), rotate=False, weighting=EqualWeighting())
RotoGradOptimizer(adam, nn.ModuleDict({"left": left}), weighting=lambda grads: grads.mean(0), init="haar")
RotoGradOptimizer(adam, num_tasks=2, rotation_optimizer=torch.optim.Adam, burn_in_period=10, rotation_lr=1e-3)
RotoGradOptimizer(adam, num_tasks=2, rotation_optimizer=lambda params: torch.optim.SGD(params, lr=0.1))

rep: Tensor = backbone(torch.randn(5, 3))
losses: list[Tensor] = [left(rep).mean(), right(rep).mean()]
scheduler = StepLR(optimizer, 10)
StepLR(optimizer.rotation_optimizer, 10)


def closure() -> float:
    optimizer.zero_grad()
    optimizer.backward(losses, rep)
    return 0.0


assert_type(optimizer.step(losses, rep), None)
assert_type(optimizer.step(tuple(losses)), None)
assert_type(optimizer.step([losses[0], None], backbone_loss=rep.square().mean()), None)
assert_type(optimizer.step({"left": losses[0], "right": None}, rep), None)
assert_type(optimizer.step(losses=losses, rep=rep), None)
assert_type(optimizer.step(), None)
assert_type(optimizer.step(None), None)
assert_type(optimizer.step(closure=None), None)
assert_type(optimizer.step(closure), float)
assert_type(optimizer.step(closure=closure), float)
assert_type(optimizer.backward(losses, rep, backbone_loss=rep.sum()), None)
assert_type(optimizer.rotate(rep), tuple[Tensor, ...])
assert_type(optimizer.optimizer, torch.optim.Optimizer)
assert_type(optimizer.rotation_optimizer, torch.optim.Optimizer)
assert_type(optimizer.rotations, Rotations)
assert_type(optimizer.rotations.matrices, Tensor)
assert_type(optimizer.rotations[0], Tensor)
assert_type(optimizer.task_weights, Tensor)
assert_type(optimizer.last_step, StepRecord | None)
assert_type(optimizer.state_dict(), dict[str, Any])
assert_type(optimizer.param_groups, list[dict[str, Any]])
with optimizer.paused():
    model(rep)
optimizer.zero_grad(set_to_none=False)
optimizer.add_param_group({"params": left.parameters()})
optimizer.load_state_dict(optimizer.state_dict())
optimizer.remove()

base: torch.optim.Optimizer = optimizer
base.step()
optimizer.step(torch.stack([rep.mean(), rep.sum()]), {"z": [rep]})

optimizer.step(3)  # type: ignore[call-overload]
optimizer.step([0.5, 0.5])  # type: ignore[list-item]
optimizer.backward()  # type: ignore[call-arg]
RotoGradOptimizer(model.parameters(), [left])  # type: ignore[arg-type]
RotoGradOptimizer(adam, ["left"])  # type: ignore[list-item]
RotoGradOptimizer(adam, [left], init="random")  # type: ignore[arg-type]
RotoGradOptimizer(adam, [left], -1)  # type: ignore[call-arg]
"""


def test_user_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program = tmp_path / "program.py"
    program.write_text(PROGRAM)
    monkeypatch.setenv("MYPYPATH", str(ROOT))
    options = ["--strict", f"--config-file={ROOT / 'pyproject.toml'}", f"--cache-dir={ROOT / '.mypy_cache'}"]
    report, errors, _ = mypy.api.run([*options, str(program)])
    assert report == "Success: no issues found in 1 source file\n"
    assert not errors
